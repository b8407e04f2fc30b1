//! The per-VM API's requests, parsed: the whole public interface of a VM process as one enum.

use std::time::Duration;

use forkd_api::http::Request;
use forkd_api::types::{
    Action, DesiredState, ForkRequest, HotPages, MAX_CHILDREN, PersistRequest, SnapshotRequest,
    VmStateChange, ZygoteRequest,
};
use serde::de::DeserializeOwned;

/// Longest time that `GET /vm?wait=ready` waits.
const WAIT_MAX: Duration = Duration::from_secs(3600);

/// Everything a VM process can be asked.
#[derive(Debug, PartialEq)]
pub enum VmmAction {
    /// Firecracker's instance info.
    InstanceInfo,
    /// All about this VM.
    VmInfo,
    /// The same, once it is ready or has failed; at the latest after the time given.
    WaitReady(Duration),
    /// Counters.
    Metrics,
    /// The pages that it has written since it was forked.
    Written,
    /// A zygote: pages that its children write.
    Hot(HotPages),
    /// Fork children.
    Fork(ForkRequest),
    /// Fork a zygote.
    Zygote(ZygoteRequest),
    /// A zygote: become durable.
    Persist(PersistRequest),
    /// A running VM: write a durable snapshot.
    Snapshot(SnapshotRequest),
    /// Pause or resume.
    SetState(DesiredState),
    /// Ctrl+Alt+Del, or the end.
    Act(Action),
}

/// A request that can't be carried out: status and one line.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP status.
    pub status: u16,
    /// What is wrong and what would be right.
    pub message: String,
}

impl Refusal {
    /// A refusal.
    pub fn new(status: u16, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }
}

impl VmmAction {
    /// Reads a request.
    ///
    /// # Errors
    /// 404 for an unknown path, 405 for a known one with another method, 400 for a bad body.
    pub fn parse(request: &Request) -> Result<Self, Refusal> {
        match (request.method.as_str(), request.path.as_str()) {
            ("GET", "/") => Ok(Self::InstanceInfo),
            ("GET", "/vm") => parse_wait(request.query.as_deref()),
            ("GET", "/metrics") => Ok(Self::Metrics),
            ("GET", "/written") => Ok(Self::Written),
            ("PUT", "/hot") => body(request).map(Self::Hot),
            ("PATCH", "/vm") => body::<VmStateChange>(request).map(|c| Self::SetState(c.state)),
            ("PUT", "/actions") => body(request).map(Self::Act),
            ("POST", "/fork") => body(request).and_then(check_fork).map(Self::Fork),
            ("POST", "/zygote") => body(request).map(Self::Zygote),
            ("POST", "/persist") => body(request).map(Self::Persist),
            ("POST", "/snapshot") => body(request).map(Self::Snapshot),
            (
                method,
                path @ ("/" | "/vm" | "/metrics" | "/written" | "/hot" | "/actions" | "/fork"
                | "/zygote" | "/persist" | "/snapshot"),
            ) => Err(Refusal::new(405, format!("{method} is not a method of {path}"))),
            (_, path) => Err(Refusal::new(404, format!("there is no {path} in a VM's API"))),
        }
    }
}

fn body<T: DeserializeOwned>(request: &Request) -> Result<T, Refusal> {
    serde_json::from_slice(&request.body)
        .map_err(|e| Refusal::new(400, format!("the request's body is not understood: {e}")))
}

fn check_fork(request: ForkRequest) -> Result<ForkRequest, Refusal> {
    let count = request.children.len();
    if (1..=MAX_CHILDREN).contains(&count) {
        Ok(request)
    } else {
        Err(Refusal::new(400, format!("{count} children: one request takes 1 to {MAX_CHILDREN}")))
    }
}

fn parse_wait(query: Option<&str>) -> Result<VmmAction, Refusal> {
    let mut wait = false;
    let mut timeout = WAIT_MAX;
    for pair in query.unwrap_or_default().split('&').filter(|p| !p.is_empty()) {
        match pair.split_once('=') {
            Some(("wait", "ready")) => wait = true,
            Some(("timeout_s", text)) => {
                let seconds = text.parse().map_err(|_| {
                    Refusal::new(400, format!("timeout_s={text} is not a number of seconds"))
                })?;
                timeout = Duration::from_secs(seconds).min(WAIT_MAX);
            }
            _ => return Err(Refusal::new(400, format!("unknown parameter {pair:?}"))),
        }
    }
    Ok(if wait { VmmAction::WaitReady(timeout) } else { VmmAction::VmInfo })
}
