//! What every role of a VM process has: the reactor, the API server, signals, children.

use std::io;
use std::path::Path;

use forkd_api::http::{Request, Response};
use forkd_api::server::{RequestId, Server};
use forkd_api::types::{ChildResult, Fault, InstanceInfo, SnapshotReceipt, ZygoteResponse};
use forkd_sys::clock::monotonic_ns;
use forkd_sys::reactor::{Interest, Reactor, Readiness};
use forkd_sys::signal::{SignalFd, SignalSet};
use serde::Serialize;

use crate::VmmError;
use crate::fork::Birth;
use crate::fork::offspring::{AnswerAs, Answered, Offspring};
use crate::requests::{Refusal, VmmAction};

/// Reactor tokens. Ranges do not overlap; each subscriber owns one.
pub mod tokens {
    use forkd_sys::reactor::Token;

    /// vCPUs and devices have something for the loop.
    pub const WAKER: Token = Token(1);
    /// A signal.
    pub const SIGNALS: Token = Token(2);
    /// The agent link: two tokens.
    pub const LINK: Token = Token(3);
    /// The end of a live snapshot's writer.
    pub const CAPTURE: Token = Token(5);
    /// RAM that is being loaded: all of it is there, or cannot be.
    pub const RAM: Token = Token(6);
    /// RAM is protected ahead of a live snapshot's pause.
    pub const AHEAD: Token = Token(7);
    /// RAM is in huge pages, as far as it gets, for a fork.
    pub const COLLAPSE: Token = Token(8);
    /// The API server: listener and connections.
    pub const API: u64 = 0x1_0000;
    /// The vsock device: listener and connections.
    pub const VSOCK: Token = Token(1 << 32);
    /// Children: report pipes and pidfds.
    pub const OFFSPRING: u64 = 1 << 33;
}

/// The common part of all roles.
pub struct Control {
    /// The event loop's core.
    pub reactor: Reactor,
    /// The API server.
    pub api: Server,
    /// SIGTERM and SIGINT.
    pub signals: SignalFd,
    /// Forked children.
    pub offspring: Offspring,
}

impl Control {
    /// Sets all up anew, with the API at `socket`.
    ///
    /// # Errors
    /// No fds, or the socket can't be bound.
    pub fn new(mut reactor: Reactor, socket: &Path) -> Result<Self, VmmError> {
        let set = SignalSet::of(&[libc::SIGTERM, libc::SIGINT])
            .and_then(|set| set.block().map(|_| set))
            .map_err(VmmError::io("cannot block signals"))?;
        let signals = SignalFd::new(&set).map_err(VmmError::io("cannot watch signals"))?;
        reactor
            .add(&signals, tokens::SIGNALS, Interest::READ)
            .map_err(VmmError::io("cannot watch signals"))?;
        let listener = forkd_sys::unix_path::bind_listener(socket)
            .map_err(|e| VmmError::Setup("cannot serve the API", e.into()))?;
        let mut api =
            Server::new(listener, tokens::API).map_err(VmmError::io("cannot serve the API"))?;
        api.register(&mut reactor).map_err(VmmError::io("cannot serve the API"))?;
        Ok(Self { reactor, api, signals, offspring: Offspring::new(tokens::OFFSPRING) })
    }

    /// Handles an event of the common part; none if the token belongs to the role.
    ///
    /// # Errors
    /// The reactor fails.
    pub fn handle(&mut self, readiness: Readiness) -> io::Result<Option<Handled>> {
        let token = readiness.token;
        if self.offspring.owns(token) {
            self.offspring.handle(&self.reactor, readiness)?;
            return Ok(Some(Handled::Nothing));
        }
        if token == tokens::SIGNALS {
            let received = self.signals.read()?;
            return Ok(Some(if received.is_some() {
                Handled::Terminate
            } else {
                Handled::Nothing
            }));
        }
        if self.api.owns(token) {
            return Ok(Some(Handled::Requests(self.api.handle(&mut self.reactor, readiness)?)));
        }
        Ok(None)
    }

    /// Answers a request with JSON.
    ///
    /// # Errors
    /// The reactor fails. A client that is gone is no error.
    pub fn answer<T: Serialize>(&mut self, to: RequestId, status: u16, body: &T) -> io::Result<()> {
        self.api.respond(&mut self.reactor, to, Response::json(status, body)).map(drop)
    }

    /// Answers a request without a body.
    ///
    /// # Errors
    /// As for [`Control::answer`].
    pub fn answer_empty(&mut self, to: RequestId) -> io::Result<()> {
        self.api.respond(&mut self.reactor, to, Response::empty(204)).map(drop)
    }

    /// Answers a request with a fault.
    ///
    /// # Errors
    /// As for [`Control::answer`].
    pub fn answer_fault(&mut self, to: RequestId, status: u16, why: String) -> io::Result<()> {
        self.answer(to, status, &Fault { fault_message: why })
    }

    /// Answers the fork requests whose children have all spoken.
    ///
    /// # Errors
    /// As for [`Control::answer`].
    pub fn answer_forks(&mut self) -> io::Result<()> {
        for Answered { request, form, response } in self.offspring.take_answered() {
            let Some(request) = request else { continue };
            match (form, response.children.first()) {
                (AnswerAs::Zygote, Some(child)) => {
                    let child = child.clone();
                    let answer = ZygoteResponse { child, source: response.source };
                    self.answer(request, 200, &answer)?;
                }
                (AnswerAs::Receipt, Some(ChildResult { error: Some(why), .. })) => {
                    let why = why.clone();
                    self.answer_fault(request, 500, why)?;
                }
                (AnswerAs::Receipt, Some(writer)) => {
                    let source = response.source.unwrap_or_default();
                    let ready_us = monotonic_ns().saturating_sub(writer.timing.requested_ns) / 1000;
                    let receipt =
                        SnapshotReceipt { source, ready_us, ..SnapshotReceipt::default() };
                    self.answer(request, 200, &receipt)?;
                }
                _ => self.answer(request, 200, &response)?,
            }
        }
        Ok(())
    }
}

/// What came of an event.
pub enum Handled {
    /// Nothing for the role.
    Nothing,
    /// End this process in good order.
    Terminate,
    /// Requests for the role to act on.
    Requests(Vec<(RequestId, Request)>),
}

/// What an event means for a role's loop.
pub(crate) enum Flow {
    /// Wait for the next.
    Go,
    /// End in good order, with this exit status.
    Exit(u8),
    /// This process is a child now.
    Child(Box<Birth>),
}

/// What a process is for, as far as the API knows it.
pub(crate) trait Serve {
    /// The common part.
    fn control(&mut self) -> &mut Control;

    /// Does what a client asks for, or refuses to.
    fn act(&mut self, id: RequestId, action: VmmAction) -> io::Result<Result<Flow, Refusal>>;

    /// Takes a request in. None if the role has kept it for later.
    fn admit(&mut self, _id: RequestId, action: VmmAction) -> Option<VmmAction> {
        Some(action)
    }

    /// Acts on a request, or refuses it.
    fn carry_out(&mut self, id: RequestId, action: Result<VmmAction, Refusal>) -> io::Result<Flow> {
        let outcome = match action.map(|action| self.admit(id, action)) {
            Ok(Some(action)) => self.act(id, action)?,
            Ok(None) => return Ok(Flow::Go),
            Err(refusal) => Err(refusal),
        };
        match outcome {
            Ok(flow) => Ok(flow),
            Err(Refusal { status, message }) => {
                self.control().answer_fault(id, status, message)?;
                Ok(Flow::Go)
            }
        }
    }

    /// Acts on requests, one after the other, until one ends this role.
    fn on_requests(&mut self, requests: Vec<(RequestId, Request)>) -> io::Result<Flow> {
        for (id, request) in requests {
            match self.carry_out(id, VmmAction::parse(&request))? {
                Flow::Go => {}
                other => return Ok(other),
            }
        }
        Ok(Flow::Go)
    }
}

/// Firecracker's instance info.
pub fn instance_info(id: &str, state: &str) -> InstanceInfo {
    InstanceInfo {
        app_name: "forkd".to_owned(),
        id: id.to_owned(),
        state: state.to_owned(),
        vmm_version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}
