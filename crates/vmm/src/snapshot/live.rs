//! Mode `live`: the snapshot is of one instant, and is written while the VM runs on.
//!
//! ```text
//!   source                                     writer
//!   ------                                     ------
//!   stage                       guest runs
//!   protect RAM ahead           guest runs     a thread serves faults, and notes them
//!   park vCPUs, encode state    guest stands
//!   join the thread, protect what it has noted
//!   fork ------------------------------------> has state and disks as they are now, copied on write;
//!                                              serves faults from here on
//!   go                          guest runs     copies RAM page by page, then writes state and disks, and commits
//!   poll, at the writer's end
//! ```
//!
//! The writer is forked inside the pause, unlike what [`forkd_memory::capture`] needs: so it has the state and the disks
//! of the instant as process memory, and nothing of them has to be copied while the guest stands. RAM is a shared memfd,
//! so this fork copies none of its page tables.
//!
//! Both processes hold the [`Staged`]: the writer to commit it, the source to say why there is no snapshot if the
//! writer could not. A writer whose source dies gives up; then both have let go of its lock, and the store sees it as
//! failed.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use forkd_api::server::RequestId;
use forkd_api::types::{SnapshotMode, SnapshotReceipt, SnapshotRequest, SourcePause, VmRecord};
use forkd_memory::capture::{
    LiveCapture, LiveConfig, PageSink, PreArm, PreReport, Progress, Protected, Report,
};
use forkd_memory::{BranchMode, GuestRam, MemfdRegion};
use forkd_snapshot::{Facts, Mode, PageWriter, Parent, Staged};
use forkd_sys::clock::monotonic_ns;
use forkd_sys::reactor::wait_readable;

use super::save::{SaveError, facts, stage, stage_diff, write_disks};
use crate::fork::{PauseClock, Quiesced};
use crate::machine::Machine;
use crate::machine::engine::Engine;
use crate::machine::saved::Disks;
use crate::pause::Limit;
use crate::requests::Refusal;

/// How long a writer that was killed has to end. It takes as long as freeing its memory.
const KILLED: Duration = Duration::from_secs(5);

/// The staged snapshot, shared by the sink and the source; after the fork each process has one.
type Shared = Arc<Mutex<Option<Staged>>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is ready before the pause.
pub struct Prepared {
    staged: Shared,
    memory: PageWriter,
    facts: Facts,
    fds: Vec<RawFd>,
}

/// A live snapshot under way.
pub struct Capturing {
    capture: LiveCapture,
    staged: Shared,
    /// Its tag.
    pub tag: String,
    /// Who waits for it.
    pub request: Option<RequestId>,
    requested_ns: u64,
    source: SourcePause,
    ahead: PreReport,
}

/// A live snapshot whose RAM is being protected ahead of the pause.
pub struct Preparing {
    /// What is ready.
    pub prepared: Prepared,
    /// The thread that does it.
    pub ahead: PreArm,
    /// Its tag.
    pub tag: String,
    /// Who asked for it.
    pub request: RequestId,
    /// Whether he waits until it is durable.
    pub wait: bool,
    /// When it was asked for.
    pub requested_ns: u64,
    /// How long the pause may be.
    pub limit: Limit,
    /// How often it was found not to fit.
    pub in_vain: u32,
}

impl Preparing {
    /// It is not to be. Takes the protection away, and waits for that.
    pub fn give_up(self, why: &str) {
        drop(self.ahead);
        self.prepared.fail(why);
    }
}

/// Where the writer process puts it all.
struct Sink {
    staged: Shared,
    memory: PageWriter,
    fds: Vec<RawFd>,
    /// What [`Sink::commit`] takes.
    rest: Mutex<Option<Rest>>,
}

/// What is written after RAM.
struct Rest {
    state: Vec<u8>,
    disks: Disks,
    facts: Facts,
}

impl Sink {
    fn commit(&self) -> Result<(), SaveError> {
        // Both are there: this is called once, in a process of its own.
        let (Some(rest), Some(mut staged)) = (lock(&self.rest).take(), lock(&self.staged).take())
        else {
            return Ok(());
        };
        staged.state(&rest.state)?;
        write_disks(&rest.disks, &mut staged)?;
        staged.commit(rest.facts)?;
        Ok(())
    }
}

impl PageSink for Sink {
    fn write_page_run(&self, ram_offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.memory.write(ram_offset, bytes).map_err(io::Error::other)
    }

    fn finish(&self) -> io::Result<()> {
        self.commit().map_err(io::Error::other)
    }

    fn kept_fds(&self) -> Vec<RawFd> {
        self.fds.clone()
    }
}

/// Begins a live snapshot of a VM that runs, or a diff that is taken in the same way: what can be done before the
/// pause.
///
/// # Errors
/// 409 if its RAM is not for that, the tag is taken or the store can't be used; 500.
pub fn prepare(
    machine: &mut Machine,
    source: &VmRecord,
    request: &SnapshotRequest,
) -> Result<Prepared, Refusal> {
    if let Some(why) = machine.ram().why_not(BranchMode::Live) {
        let backend = machine.ram().backend_name();
        return Err(Refusal::new(409, format!("RAM of this VM is {backend}: {why}")));
    }
    let (store, tag) = (&request.store, &request.tag);
    let (mode, staged) = match request.mode {
        SnapshotMode::Diff => (Mode::Diff, stage_diff(machine, store, tag)),
        _ => (Mode::Live, stage(store, tag).map_err(|e| e.to_string())),
    };
    let facts = facts(machine, source, mode).map_err(|e| Refusal::new(500, e.to_string()))?;
    let mut staged = staged.map_err(|why| Refusal::new(409, why))?;
    let memory = match staged.memory(u64::from(machine.ram().mem_mib()) << 20) {
        Ok(memory) => memory,
        Err(error) => {
            // The refusal tells, and so does the list.
            drop(staged.fail(&error.to_string()));
            return Err(Refusal::new(500, error.to_string()));
        }
    };
    let mut fds = staged.kept_fds();
    fds.extend(machine.disk_fds());
    Ok(Prepared { staged: Arc::new(Mutex::new(Some(staged))), memory, facts, fds })
}

/// RAM as a capture wants it: regions lie one after the other, in a memfd and in this process.
fn config<'a>(ram: &GuestRam, memfd: &'a MemfdRegion) -> LiveConfig<'a> {
    let address = ram.regions().next().map_or(0, |region| region.host_addr);
    let len = ram.regions().map(|region| region.len).sum();
    let page_size = if memfd.has_huge_pages() { 2 << 20 } else { 4096 };
    LiveConfig { page_size, ..LiveConfig::new(address, len, std::os::fd::AsFd::as_fd(memfd)) }
}

impl Prepared {
    /// Starts to protect RAM ahead of the pause; with as few pages as `enough` written since, it is ready.
    ///
    /// # Errors
    /// No userfaultfd, no thread.
    pub fn start_ahead(&self, machine: &Machine, enough: usize) -> Result<PreArm, String> {
        let memfd = machine.ram().memfd_region().ok_or("RAM is not in a memfd")?;
        PreArm::start(&config(machine.ram(), memfd), enough).map_err(|e| e.to_string())
    }

    /// Inside the pause: forks the writer of RAM that is protected. `state` was encoded before it was: from then on to
    /// the fork nobody serves faults.
    ///
    /// # Errors
    /// Why there will be no snapshot. Nothing is protected then, and the VM can go on; what is to be cleared away is
    /// left for when it does.
    pub fn arm(
        self,
        machine: &Machine,
        engine: &Engine,
        _quiesced: &Quiesced,
        state: Vec<u8>,
        protected: Protected,
        clock: &mut PauseClock,
    ) -> Result<Armed, Unarmed> {
        let Self { staged, memory, facts, fds } = self;
        let ahead = protected.report;
        let begun: Result<LiveCapture, String> = (|| {
            let memfd = machine.ram().memfd_region().ok_or("RAM is not in a memfd")?;
            let rest = Mutex::new(Some(Rest { state, disks: machine.disks(), facts }));
            let sink = Sink { staged: Arc::clone(&staged), memory, fds, rest };
            let config = config(machine.ram(), memfd);
            let in_child = || engine.vcpus.release_in_child();
            // SAFETY: the witness says that every other thread is a parked vCPU thread, which holds no lock. The
            // closure drops the vCPUs, whose descriptors nothing in the writer uses.
            let capture = unsafe { LiveCapture::adopt(&config, protected, sink, in_child) };
            clock.forked();
            capture.map_err(|e| e.to_string())
        })();
        match begun {
            Ok(capture) => Ok(Armed { capture, staged, ahead }),
            Err(why) => Err(Unarmed { why, staged }),
        }
    }

    /// There was no pause in which it could be taken.
    pub fn fail(self, why: &str) {
        fail(&self.staged, why);
    }
}

/// A snapshot that could not be armed.
pub struct Unarmed {
    why: String,
    staged: Shared,
}

impl Unarmed {
    /// The VM runs again: lets the store say why there is no snapshot. Gives the reason.
    pub fn clear(self) -> String {
        fail(&self.staged, &self.why);
        self.why
    }
}

/// Ends a writer by force and waits for its end, which comes at once; what it had become by then.
fn end(capture: &mut LiveCapture) -> Progress {
    capture.kill();
    // If it does not end in time what is said of it is still true, and its lock tells that it is about.
    let _ended = wait_readable(capture.pidfd(), Some(KILLED));
    capture.poll()
}

/// A snapshot whose instant is fixed.
pub struct Armed {
    capture: LiveCapture,
    staged: Shared,
    ahead: PreReport,
}

impl Armed {
    /// The VM runs again: the writer copies RAM from here on.
    ///
    /// # Errors
    /// The writer can't be told. There is no snapshot then.
    pub fn go(
        mut self,
        request: Option<RequestId>,
        requested_ns: u64,
        source: SourcePause,
    ) -> Result<Capturing, String> {
        let tag = lock(&self.staged).as_ref().map_or_else(String::new, |s| s.tag().to_owned());
        let told = self.capture.go();
        let Self { capture, staged, ahead } = self;
        let capturing = Capturing { capture, staged, tag, request, requested_ns, source, ahead };
        match told {
            Ok(()) => Ok(capturing),
            Err(error) => {
                capturing.give_up(&error.to_string());
                Err(error.to_string())
            }
        }
    }
}

impl Capturing {
    /// Readable when the writer has ended.
    pub fn pidfd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.capture.pidfd()
    }

    /// What is known of it once the VM runs again.
    pub fn receipt_so_far(&self) -> SnapshotReceipt {
        let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let ahead = self.ahead;
        SnapshotReceipt {
            source: self.source,
            prearm_us: us(ahead.protecting),
            pages_rearmed: ahead.left,
            longest_stall_us: us(ahead.longest_stall),
            ..SnapshotReceipt::default()
        }
    }

    /// What came of it; none while the writer is at work.
    pub fn outcome(&mut self) -> Option<Result<SnapshotReceipt, String>> {
        match self.capture.poll() {
            Progress::Running => None,
            Progress::Done(report) => Some(Ok(self.receipt(&report))),
            Progress::Failed(error) => {
                let why = error.to_string();
                fail(&self.staged, &why);
                Some(Err(why))
            }
        }
    }

    /// What its writer has published.
    pub fn written(&self) -> Option<Parent> {
        lock(&self.staged).as_ref().and_then(Staged::published)
    }

    fn receipt(&self, report: &Report) -> SnapshotReceipt {
        let stall = report.longest_fault.max(report.longest_claim);
        let so_far = self.receipt_so_far();
        let stall_us = u64::try_from(stall.as_micros()).unwrap_or(u64::MAX);
        SnapshotReceipt {
            bytes: report.bytes,
            pages_by_bulk: report.pages_by_bulk,
            pages_by_handler: report.pages_by_handler,
            longest_stall_us: so_far.longest_stall_us.max(stall_us),
            ready_us: monotonic_ns().saturating_sub(self.requested_ns) / 1000,
            ..so_far
        }
    }

    /// Ends the writer by force, and lets the store say why there is no snapshot. Waits for its end, which comes at
    /// once: RAM is free then.
    pub fn give_up(mut self, why: &str) {
        if !matches!(end(&mut self.capture), Progress::Done(_)) {
            fail(&self.staged, why);
        }
    }
}

/// Lets the store say why; without that it says that the writer died.
fn fail(staged: &Shared, why: &str) {
    if let Some(staged) = lock(staged).take() {
        drop(staged.fail(why));
    }
}
