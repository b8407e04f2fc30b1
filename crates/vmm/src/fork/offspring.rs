//! The source's side of its children: what they report, and their ends.
//!
//! Each child gets the write end of a pipe and sends one JSON line on it, a [`ChildResult`], when its
//! vCPUs run or when it has failed before. A pipe that ends without a line is a child that died. One
//! request for n children is answered when all n have spoken or the deadline has passed; a child that
//! misses the deadline is killed, since nobody would know of it.
//!
//! A child is also this process's child in the sense of wait(2), so it is reaped here, and the run
//! directory of one that was killed is removed. If the source dies first, init reaps, and the next CLI
//! verb sweeps the directory.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use forkd_api::server::RequestId;
use forkd_api::types::{ChildResult, ChildSpec, ForkResponse, SourcePause, Timing};
use forkd_snapshot::Parent;
use forkd_sys::fork::{Child, PidFd};

use forkd_sys::reactor::{Interest, Reactor, Readiness, Token};

use super::Delivered;

/// How long a batch of children has to report that they run, and how much longer for each child of it:
/// where they wake up a few at a time, each takes a fraction of a second.
const REPORT_TIMEOUT: Duration = Duration::from_secs(60);
const REPORT_TIMEOUT_EACH: Duration = Duration::from_secs(2);

/// Longest report in bytes: a pipe takes this much in one write(2) without blocking.
const REPORT_MAX: usize = 4096;

/// How a fork request is to be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnswerAs {
    /// With a [`ForkResponse`].
    Fork,
    /// With the one [`ChildResult`].
    Zygote,
}

/// An answered request.
#[derive(Debug)]
pub struct Answered {
    /// Whose; none if nobody waits.
    pub request: Option<RequestId>,
    /// In what form.
    pub form: AnswerAs,
    /// What became of the children.
    pub response: ForkResponse,
}

struct Batch {
    request: Option<RequestId>,
    form: AnswerAs,
    results: Vec<Option<ChildResult>>,
    source: Option<SourcePause>,
    deadline: Instant,
}

struct Report {
    batch: u64,
    index: usize,
    spec: ChildSpec,
    pid: u32,
    pipe: io::PipeReader,
    text: Vec<u8>,
}

struct Living {
    child: Child,
    pidfd: PidFd,
    dir: PathBuf,
}

/// All children of this process.
pub struct Offspring {
    first: u64,
    next: u64,
    batches: BTreeMap<u64, Batch>,
    reports: BTreeMap<u64, Report>,
    living: BTreeMap<u64, Living>,
    /// Durable snapshots that writers have told of.
    written: Vec<Parent>,
}

impl Offspring {
    /// No children yet; reactor tokens from `first` on are its own.
    pub fn new(first: u64) -> Self {
        Self {
            first,
            next: first,
            batches: BTreeMap::new(),
            reports: BTreeMap::new(),
            living: BTreeMap::new(),
            written: Vec::new(),
        }
    }

    /// Whether `token` is one of its own.
    pub fn owns(&self, token: Token) -> bool {
        token.0 >= self.first
    }

    fn token(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Opens a batch for `count` children of one request, which have so long to report; by default the time that
    /// children need to run.
    pub fn open_batch(
        &mut self,
        request: Option<RequestId>,
        form: AnswerAs,
        count: usize,
        limit: Option<Duration>,
    ) -> u64 {
        let id = self.token();
        let limit = limit.unwrap_or(REPORT_TIMEOUT + REPORT_TIMEOUT_EACH * count as u32);
        let batch = Batch {
            request,
            form,
            results: vec![None; count],
            source: None,
            deadline: Instant::now() + limit,
        };
        self.batches.insert(id, batch);
        id
    }

    /// Records what the source felt.
    pub fn set_source_pause(&mut self, batch: u64, pause: SourcePause) {
        if let Some(batch) = self.batches.get_mut(&batch) {
            batch.source = Some(pause);
        }
    }

    /// Takes forked children into care, and records those that could not be forked.
    pub fn adopt_all(&mut self, reactor: &Reactor, batch: u64, delivered: Vec<Delivered>) {
        for Delivered { index, spec, outcome } in delivered {
            let result = match outcome {
                Err(error) => Err(failed(&spec.id, None, format!("cannot fork: {error}"))),
                Ok((child, pipe)) => {
                    let pid = child.pid();
                    self.watch(reactor, batch, index, &spec, child, pipe).map_err(|error| {
                        failed(&spec.id, Some(pid), format!("cannot watch it: {error}"))
                    })
                }
            };
            if let Err(result) = result {
                self.settle(batch, index, result);
            }
        }
    }

    /// A child that can't be watched is ended: nobody would know of it.
    fn watch(
        &mut self,
        reactor: &Reactor,
        batch: u64,
        index: usize,
        spec: &ChildSpec,
        child: Child,
        pipe: io::PipeReader,
    ) -> io::Result<()> {
        let pid = child.pid();
        let (report, life) = (self.token(), self.token());
        let watched = child.pidfd().and_then(|pidfd| {
            reactor.add(&pidfd, Token(life), Interest::READ)?;
            Ok(pidfd)
        });
        let pidfd = match watched {
            Ok(pidfd) => pidfd,
            Err(error) => {
                end(child, &spec.dir);
                return Err(error);
            }
        };
        self.living.insert(life, Living { child, pidfd, dir: spec.dir.clone() });
        if let Err(error) = reactor.add(&pipe, Token(report), Interest::READ) {
            // Its pidfd brings its end.
            self.kill(pid);
            return Err(error);
        }
        let text = Vec::with_capacity(512);
        self.reports.insert(report, Report { batch, index, spec: spec.clone(), pid, pipe, text });
        Ok(())
    }

    fn settle(&mut self, batch: u64, index: usize, result: ChildResult) {
        if let Some(slot) = self.batches.get_mut(&batch).and_then(|b| b.results.get_mut(index)) {
            slot.get_or_insert(result);
        }
    }

    /// Why a child of a batch has failed, if one has by now.
    pub fn failure(&self, batch: u64) -> Option<String> {
        let results = &self.batches.get(&batch)?.results;
        results.iter().flatten().find_map(|result| result.error.clone())
    }

    /// Handles an event on one of its tokens.
    ///
    /// # Errors
    /// The reactor fails, which is fatal for the loop.
    pub fn handle(&mut self, reactor: &Reactor, readiness: Readiness) -> io::Result<()> {
        let token = readiness.token.0;
        if self.reports.contains_key(&token) {
            self.read_report(reactor, token)
        } else if let Some(mut living) = self.living.remove(&token) {
            reactor.remove(&living.pidfd)?;
            living.child.wait()?;
            forget_dir(&living.dir, living.child.pid());
            Ok(())
        } else {
            Ok(())
        }
    }

    fn read_report(&mut self, reactor: &Reactor, token: u64) -> io::Result<()> {
        let Some(report) = self.reports.get_mut(&token) else { return Ok(()) };
        let mut chunk = [0; 1024];
        match report.pipe.read(&mut chunk) {
            Ok(0) => {}
            Ok(n) if report.text.len() + n <= REPORT_MAX => {
                report.text.extend_from_slice(&chunk[..n]);
                if !report.text.ends_with(b"\n") {
                    return Ok(());
                }
            }
            // Too long is no report at all: what is there will not parse.
            Ok(_) => report.text.clear(),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(e) => return Err(e),
        }
        let Some(report) = self.reports.remove(&token) else { return Ok(()) };
        reactor.remove(&report.pipe)?;
        let result: ChildResult = serde_json::from_slice(&report.text).unwrap_or_else(|_| {
            let why = "its process died before it reported: see its vmm.log, or the kernel's log";
            failed(&report.spec.id, Some(report.pid), why.to_owned())
        });
        if let Some(root) = result.root.as_ref().and_then(|root| root.parse().ok()) {
            self.written.push(Parent { tag: report.spec.id, root });
        }
        self.settle(report.batch, report.index, result);
        Ok(())
    }

    /// Durable snapshots that have been written since this was asked.
    pub fn take_written(&mut self) -> Vec<Parent> {
        std::mem::take(&mut self.written)
    }

    /// Batches whose children have all spoken, or had the time to.
    pub fn take_answered(&mut self) -> Vec<Answered> {
        let now = Instant::now();
        let done: Vec<u64> = self
            .batches
            .iter()
            .filter(|(_, b)| b.deadline <= now || b.results.iter().all(Option::is_some))
            .map(|(id, _)| *id)
            .collect();
        done.into_iter().filter_map(|id| self.answer(id)).collect()
    }

    fn answer(&mut self, id: u64) -> Option<Answered> {
        let late: Vec<u64> =
            self.reports.iter().filter(|(_, r)| r.batch == id).map(|(t, _)| *t).collect();
        for token in late {
            // Its pipe closes, which takes it out of epoll; the pidfd brings its end.
            if let Some(report) = self.reports.remove(&token) {
                self.kill(report.pid);
                let why = "it did not run in time: killed".to_owned();
                self.settle(id, report.index, failed(&report.spec.id, Some(report.pid), why));
            }
        }
        let batch = self.batches.remove(&id)?;
        let children = batch.results.into_iter().flatten().collect();
        let response = ForkResponse { children, source: batch.source };
        Some(Answered { request: batch.request, form: batch.form, response })
    }

    fn kill(&self, pid: u32) {
        for living in self.living.values().filter(|l| l.child.pid() == pid) {
            // ESRCH: it has ended by itself, which is what is wanted.
            let _ = living.pidfd.send_signal(rustix::process::Signal::KILL);
        }
    }

    /// How long the loop may sleep before a batch is due; none if nothing is pending.
    pub fn next_deadline(&self) -> Option<Duration> {
        let now = Instant::now();
        self.batches.values().map(|b| b.deadline.saturating_duration_since(now)).min()
    }
}

/// Ends a child that was just forked.
fn end(mut child: Child, dir: &std::path::Path) {
    // Both fail only for a child that was reaped.
    let _ = child.send_signal(rustix::process::Signal::KILL);
    let _ = child.wait();
    forget_dir(dir, child.pid());
}

/// Removes the run directory of a child that ended without doing so. The record says whose it is: a child that
/// failed because the path was taken must not take what was there along.
fn forget_dir(dir: &std::path::Path, pid: u32) {
    let its_own = crate::run_dir::read_record(dir).is_ok_and(|record| record.pid == pid);
    if its_own && !crate::run_dir::is_alive(dir) {
        // Best effort: the next CLI verb sweeps what can't be removed now, and says why it can't.
        let _ = std::fs::remove_dir_all(dir);
    }
}

/// The result of a child that failed.
pub fn failed(id: &str, pid: Option<u32>, error: String) -> ChildResult {
    ChildResult {
        id: id.to_owned(),
        pid,
        error: Some(error),
        root: None,
        timing: Timing::default(),
    }
}
