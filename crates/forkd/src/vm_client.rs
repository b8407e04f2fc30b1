//! Requests to a VM process or zygote, over the API socket in its run directory.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use forkd_api::client::Client;
use forkd_api::types::{
    Action, ChildResult, ChildSpec, ForkRequest, ForkResponse, HotPages, Metrics, PageRanges,
    PersistRequest, SnapshotMode, SnapshotReceipt, SnapshotRequest, VmInfo, VmPhase, ZygoteRequest,
    ZygoteResponse,
};
use forkd_sys::fork::PidFd;
use rustix::process::Signal;

/// A VM process answers from its event loop: what takes longer than this is no answer.
const QUICK: Duration = Duration::from_secs(30);
/// Forking takes 16 ms per GiB at worst; a request may ask for a thousand children.
const FORK: Duration = Duration::from_secs(300);
/// Writing a snapshot: 64 GiB to a disk of 50 MB/s take half an hour.
const WRITE: Duration = Duration::from_secs(3600);
/// How long a process has to take note that it shall end; one that is stopped (SIGSTOP) does not.
const ASK_STOP: Duration = Duration::from_secs(5);
/// How long a process has to end after it was told to.
const STOP: Duration = Duration::from_secs(10);
/// Added to a wait's own time limit before the client gives up on the server.
const GRACE: Duration = Duration::from_secs(10);

/// A VM process or zygote.
#[derive(Debug, Clone)]
pub struct VmClient {
    dir: PathBuf,
    /// What users call it, for errors.
    who: String,
    max_pause: Option<Duration>,
}

impl VmClient {
    /// The process that owns a run directory; `who` is what users call it.
    pub fn new(dir: &Path, who: &str) -> Self {
        Self { dir: dir.to_path_buf(), who: who.to_string(), max_pause: None }
    }

    /// The same, for requests that pause it no longer than that, or else are refused.
    #[must_use]
    pub fn within(self, max_pause: Option<Duration>) -> Self {
        Self { max_pause, ..self }
    }

    /// As the API has it.
    fn max_pause_us(&self) -> Option<u64> {
        self.max_pause.map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX))
    }

    /// What users call it.
    pub fn who(&self) -> &str {
        &self.who
    }

    /// Its run directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The socket through which ports of the guest are reached.
    pub fn vsock(&self) -> PathBuf {
        self.dir.join("vsock.sock")
    }

    /// Where its console's output is.
    pub fn console(&self) -> PathBuf {
        self.dir.join("console.log")
    }

    fn connect(&self, timeout: Duration) -> Result<Client> {
        let client = Client::connect(&self.dir.join("api.sock"));
        let client = client.with_context(|| format!("{} does not answer", self.who))?;
        Ok(client.with_timeout(timeout))
    }

    /// What it says of itself.
    ///
    /// # Errors
    /// It does not answer; so for all below.
    pub fn info(&self) -> Result<VmInfo> {
        Ok(self.connect(QUICK)?.get_json("/vm")?)
    }

    /// Waits until it is ready to serve, or has failed, at most `timeout`.
    ///
    /// # Errors
    /// It failed or was not ready in time: says why.
    pub fn wait_ready(&self, timeout: Duration) -> Result<VmInfo> {
        let target = format!("/vm?wait=ready&timeout_s={}", timeout.as_secs().max(1));
        let answer = self.connect(timeout + GRACE)?.get_json(&target);
        let info: VmInfo =
            answer.with_context(|| format!("{} ended, or does not answer", self.who))?;
        match info.phase {
            VmPhase::Ready | VmPhase::Paused | VmPhase::Zygote => Ok(info),
            VmPhase::Failed => bail!("{}", info.error.as_deref().unwrap_or("its agent failed")),
            VmPhase::Starting => {
                bail!("its agent did not answer within {} s", timeout.as_secs())
            }
        }
    }

    /// Forks children.
    ///
    /// # Errors
    /// The request as a whole was refused; a child that failed says so in its result.
    pub fn fork(&self, children: Vec<ChildSpec>) -> Result<ForkResponse> {
        let request = ForkRequest { children, max_pause_us: self.max_pause_us() };
        Ok(self.connect(FORK)?.post_json("/fork", &request)?)
    }

    /// Has a zygote write itself into a store.
    ///
    /// # Errors
    /// It was refused, or writing failed.
    pub fn persist(&self, store: &Path, wait: bool) -> Result<()> {
        let request = PersistRequest { store: store.to_path_buf(), wait };
        if !wait {
            self.connect(QUICK)?.send_json("POST", "/persist", &request)?;
            return Ok(());
        }
        let result: ChildResult = self.connect(WRITE)?.post_json("/persist", &request)?;
        match result.error {
            Some(error) => bail!("{error}"),
            None => Ok(()),
        }
    }

    /// Has a running VM write a durable snapshot of itself. Without `wait` the writing has begun when this returns.
    ///
    /// # Errors
    /// It was refused, or writing failed.
    pub fn snapshot(
        &self,
        store: &Path,
        tag: &str,
        mode: SnapshotMode,
        wait: bool,
    ) -> Result<SnapshotReceipt> {
        let (store, tag) = (store.to_path_buf(), tag.to_string());
        let request = SnapshotRequest { store, tag, mode, wait, max_pause_us: self.max_pause_us() };
        Ok(self.connect(WRITE)?.post_json("/snapshot", &request)?)
    }

    /// Forks a zygote. `rehearse`: see [`ZygoteRequest`].
    ///
    /// # Errors
    /// It was refused, or the zygote failed.
    pub fn zygote(&self, tag: &str, dir: &Path, rehearse: bool) -> Result<ZygoteResponse> {
        let request = ZygoteRequest {
            tag: tag.to_string(),
            dir: dir.to_path_buf(),
            rehearse,
            max_pause_us: self.max_pause_us(),
        };
        let result: ZygoteResponse = self.connect(FORK)?.post_json("/zygote", &request)?;
        match &result.child.error {
            Some(error) => bail!("cannot make the snapshot {tag}: {error}"),
            None => Ok(result),
        }
    }

    /// Its counters.
    ///
    /// # Errors
    /// It does not answer.
    pub fn metrics(&self) -> Result<Metrics> {
        Ok(self.connect(QUICK)?.get_json("/metrics")?)
    }

    /// The pages that it has written since it was forked.
    ///
    /// # Errors
    /// It does not answer, or does not tell of RAM like its own.
    pub fn written(&self) -> Result<PageRanges> {
        Ok(self.connect(QUICK)?.get_json("/written")?)
    }

    /// Has a zygote copy these pages for each child ahead of its writes.
    ///
    /// # Errors
    /// It was refused.
    pub fn set_hot(&self, pages: &HotPages) -> Result<()> {
        self.connect(QUICK)?.send_json("PUT", "/hot", pages)?;
        Ok(())
    }

    /// Ends it and waits until it is gone, with its run directory: by request, and if that does not help by
    /// SIGKILL. `pid` is the one of its record.
    ///
    /// # Errors
    /// It can't be killed, or its directory can't be removed.
    pub fn stop(&self, pid: u32) -> Result<()> {
        // Opened while the lock says that the pid is still its own.
        let process = self.process(pid)?;
        let asked = self
            .connect(ASK_STOP)
            .and_then(|mut c| Ok(c.send_json("PUT", "/actions", &Action::Stop)?));
        if let Some(process) = process {
            let gone = |limit| process.wait(Some(limit)).context("cannot wait for the process");
            if asked.is_err() || !gone(STOP)? {
                match process.send_signal(Signal::KILL) {
                    Err(e) if e.raw_os_error() != Some(rustix::io::Errno::SRCH.raw_os_error()) => {
                        return Err(e)
                            .with_context(|| format!("cannot kill process {pid} of {}", self.who));
                    }
                    _ => {}
                }
                if !gone(STOP)? {
                    bail!("process {pid} of {} does not end, not even by SIGKILL", self.who);
                }
            }
        }
        match std::fs::remove_dir_all(&self.dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("cannot remove {}", self.dir.display()))
            }
            _ => Ok(()),
        }
    }

    /// A stable reference to its process; none if it has ended.
    fn process(&self, pid: u32) -> Result<Option<PidFd>> {
        if !forkd_vmm::run_dir::is_alive(&self.dir) {
            return Ok(None);
        }
        match PidFd::open(pid) {
            // Between the two steps it may have ended and its pid may have gone to another process.
            Ok(process) if forkd_vmm::run_dir::is_alive(&self.dir) => Ok(Some(process)),
            Ok(_) => Ok(None),
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => Ok(None),
            Err(e) => Err(e).with_context(|| format!("cannot open process {pid} of {}", self.who)),
        }
    }
}
