//! Forking a VM: the witness that all stands still, and fork(2) itself.
//!
//! ```text
//!   source                                    child
//!   ------                                    -----
//!   quiesce() -> Quiesced                     .
//!   Quiesced::fork() ------------------------> drop sockets, epoll, KVM fds, kvm_run maps; sweep
//!   resume vCPUs                              new VM: memslots, irqchip, vCPUs; restore
//!   watch the report pipe                     rewire devices, renew vmgenid, start vCPUs
//!   .                                         run directory, API socket, vsock socket
//!   answer the request <---- one line ------- "my vCPUs run"
//! ```
//!
//! Known hole: memory that other threads of the source allocated (their stacks) is copied into the child
//! and is reused there by the C library, never given back.

#![allow(unsafe_code)]

pub mod child;
pub mod crowd;
pub mod fds;
pub mod offspring;

use std::io;
use std::sync::Arc;

use forkd_api::types::{ChildSpec, SourcePause, Timing};
use forkd_sys::clock::monotonic_ns;
use forkd_sys::fork::{Child, Fork};
use forkd_vm::{GuestMode, VcpuState, VmState};

use self::crowd::Crowd;
use crate::pause::Limit;
use crate::snapshot::Errand;

/// State that KVM holds and fork(2) does not copy. Everything else of a VM is process memory.
#[derive(Debug)]
pub struct SavedKvm {
    /// How the guest runs kernel mode.
    pub mode: GuestMode,
    /// Interrupt controllers, timer, clock.
    pub vm: VmState,
    /// vCPUs, in order.
    pub vcpus: Vec<VcpuState>,
}

/// Witness that a VM stands still: no vCPU runs, no device works, no lock is held. Only this type forks.
#[derive(Debug)]
pub struct Quiesced {
    saved: Arc<SavedKvm>,
}

impl Quiesced {
    /// Vouches that the VM stands still.
    ///
    /// # Safety
    /// All vCPU threads of this process must be parked (or there are none), and stay so while this
    /// witness lives; the caller must be the event-loop thread and hold no lock.
    pub(crate) unsafe fn vouch(saved: Arc<SavedKvm>) -> Self {
        Self { saved }
    }

    /// What KVM held.
    pub fn saved(&self) -> &SavedKvm {
        &self.saved
    }

    fn fork(&self) -> io::Result<Fork> {
        // SAFETY: the witness says that every other thread is a parked vCPU thread, which holds no lock:
        // it waits on its condition variable. The child never runs those threads' destructors
        // (`VcpuSet::abandon_in_child` forgets them).
        unsafe { forkd_sys::fork::fork() }
    }
}

/// What a child is to become.
#[derive(Debug)]
pub enum Destiny {
    /// A VM that runs.
    Vm,
    /// A zygote.
    Zygote,
    /// A process that writes a durable snapshot and ends.
    Writer(Box<Errand>),
}

/// A child, in the child: who it is to be, and all it needs from its source's stack.
#[derive(Debug)]
pub struct Birth {
    /// Who it is.
    pub spec: ChildSpec,
    /// What it becomes.
    pub destiny: Destiny,
    /// Where it reports.
    pub report: io::PipeWriter,
    /// KVM's state at the fork.
    pub saved: Arc<SavedKvm>,
    /// What it waits at before it wakes up.
    pub crowd: Option<Crowd>,
    /// Marks so far.
    pub timing: Timing,
}

/// A child, in the source.
#[derive(Debug)]
pub struct Delivered {
    /// Number in the request.
    pub index: usize,
    /// Who it is.
    pub spec: ChildSpec,
    /// The process and its report, or why there is none.
    pub outcome: io::Result<(Child, io::PipeReader)>,
}

/// Which side of [`fork_all`] this is.
#[derive(Debug)]
pub enum Forked {
    /// The source, with all its children, and what they were to become.
    Source(Vec<Delivered>, Destiny),
    /// One of the children.
    Child(Box<Birth>),
}

/// Pipes for the reports of `count` children. Made before the pause, so that they do not lengthen it.
pub fn report_pipes(count: usize) -> Vec<io::Result<(io::PipeReader, io::PipeWriter)>> {
    (0..count).map(|_| io::pipe()).collect()
}

/// The crowd that `count` children make, if there is a limit to those that wake up at once and they exceed it.
pub fn crowd_of(count: usize, limit: Option<usize>) -> Option<Crowd> {
    let limit = limit.filter(|limit| count > *limit)?;
    Crowd::new(limit)
        .inspect_err(|e| crate::log::line(&format!("children wake up all at once: {e}")))
        .ok()
}

/// Forks one child for each spec. One that can't be forked does not keep the others from being.
pub fn fork_all(
    quiesced: &Quiesced,
    specs: Vec<ChildSpec>,
    pipes: Vec<io::Result<(io::PipeReader, io::PipeWriter)>>,
    crowd: Option<Crowd>,
    destiny: Destiny,
    requested_ns: u64,
) -> Forked {
    let mut delivered: Vec<Delivered> = Vec::with_capacity(specs.len());
    for (index, (spec, pipe)) in specs.into_iter().zip(pipes).enumerate() {
        let fork_begin_ns = monotonic_ns();
        let outcome = match pipe {
            Err(e) => Err(e),
            Ok((reader, writer)) => match quiesced.fork() {
                Err(e) => Err(e),
                Ok(Fork::Parent(child)) => Ok((child, reader)),
                Ok(Fork::Child) => {
                    let fork_end_ns = monotonic_ns();
                    let timing =
                        Timing { requested_ns, fork_begin_ns, fork_end_ns, ..Timing::default() };
                    let saved = Arc::clone(&quiesced.saved);
                    let birth = Birth { spec, destiny, report: writer, saved, crowd, timing };
                    return Forked::Child(Box::new(birth));
                }
            },
        };
        delivered.push(Delivered { index, spec, outcome });
    }
    Forked::Source(delivered, destiny)
}

/// Clock of a source's pause.
#[derive(Debug)]
pub struct PauseClock {
    began_ns: u64,
    /// When the step before ended.
    last_ns: u64,
    pause: SourcePause,
}

impl PauseClock {
    /// The first kick is about to be given.
    pub fn start() -> Self {
        let began_ns = monotonic_ns();
        Self { began_ns, last_ns: began_ns, pause: SourcePause::default() }
    }

    /// An attempt to park was given up; this is the next.
    pub fn restart(&mut self) {
        *self = Self::start();
    }

    /// Microseconds since the step before.
    fn step(&mut self) -> u64 {
        let now = monotonic_ns();
        let us = now.saturating_sub(self.last_ns) / 1000;
        self.last_ns = now;
        us
    }

    /// All vCPUs are parked and saved.
    pub fn quiesced(&mut self) {
        self.pause.quiesce_us += self.step();
    }

    /// The VM's own state is saved, or encoded.
    pub fn saved(&mut self) {
        self.pause.save_us += self.step();
    }

    /// The last fork(2) has returned.
    pub fn forked(&mut self) {
        self.pause.fork_us += self.step();
    }

    /// RAM is write-protected.
    pub fn armed(&mut self) {
        self.pause.arm_us += self.step();
    }

    /// The vCPUs were told to go on. The limit is what the pause was to keep to.
    pub fn stop(self, limit: Limit) -> SourcePause {
        let pause_us = monotonic_ns().saturating_sub(self.began_ns) / 1000;
        let max_pause_us = limit.us();
        let exceeded = max_pause_us.is_some_and(|limit| pause_us > limit);
        SourcePause { pause_us, max_pause_us, exceeded, ..self.pause }
    }
}
