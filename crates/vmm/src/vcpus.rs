//! The vCPU threads, and how the event loop stops them.
//!
//! ```text
//!            resume                park / exit
//!   Parked ----------> Running ----------------> Parked | Gone
//!      ^                  |
//!      +------------------+   guest reset, shutdown, error: an event for the loop, then Parked
//! ```
//!
//! A thread owns its vCPU only while it runs: the [`Vcpu`] lives in a slot, and a parked thread waits on
//! a condition variable and holds no lock. So after fork(2), in a process where these threads do not
//! exist, the one thread that does can take the vCPUs out of their slots and drop them.
//!
//! To park: the wish is written, then the thread is kicked out of KVM_RUN by `immediate_exit` and a
//! signal; see [`KickHandle`].

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use forkd_sys::clock::monotonic_ns;
use forkd_sys::wake::Waker;
use forkd_vm::vcpu::View;
use forkd_vm::{Exit, ExitBus, KickHandle, Vcpu, VcpuError, VcpuState};

/// How long a vCPU has to leave KVM_RUN. It takes microseconds; emulation of guest kernel code looks for
/// signals after each batch. Past this the host is in trouble.
pub const PARK_TIMEOUT: Duration = Duration::from_secs(10);

/// After this it is kicked once more: the kernel refuses a signal (EAGAIN) to a user who has too many of them waiting.
const KICK_AGAIN: Duration = Duration::from_millis(50);

/// How long a vCPU may take to open its counters; it takes microseconds.
const COUNTERS_WAIT: Duration = Duration::from_millis(50);

/// Stack of a vCPU thread, in bytes. The run loop is shallow; what is touched counts for each VM.
const STACK_BYTES: usize = 256 * 1024;

/// What a vCPU thread tells the event loop.
#[derive(Debug)]
pub enum VcpuEvent {
    /// The guest asked for a reset, which is how it ends a VM.
    Reset,
    /// The guest powered off or triple-faulted.
    Shutdown,
    /// The vCPU can't go on.
    Failed(u8, VcpuError),
}

/// Why vCPUs could not be started or parked.
#[derive(Debug, thiserror::Error)]
pub enum VcpusError {
    /// No thread could be made.
    #[error("cannot start the thread of vCPU {0}: {1}")]
    Spawn(u8, std::io::Error),
    /// It did not leave KVM_RUN.
    #[error("vCPU {0} did not park within {1:?}")]
    Stuck(u8, Duration),
    /// Its state could not be read.
    #[error("vCPU {0}: {1}")]
    Save(u8, VcpuError),
    /// It has failed before and holds no state worth saving.
    #[error("vCPU {0} has stopped for good")]
    Gone(u8),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Want {
    Park,
    Run,
    Exit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Parked,
    Running,
    Gone,
}

#[derive(Debug)]
struct Control {
    want: Want,
    state: State,
    save_on_park: bool,
    saved: Option<Result<VcpuState, VcpuError>>,
    started_ns: u64,
    events: Vec<VcpuEvent>,
}

struct Slot {
    index: u8,
    vcpu: Mutex<Option<Vcpu>>,
    control: Mutex<Control>,
    changed: Condvar,
    kick: KickHandle,
}

impl Slot {
    fn parked(vcpu: Vcpu) -> Arc<Self> {
        Arc::new(Self {
            index: vcpu.index(),
            kick: vcpu.kick_handle(),
            vcpu: Mutex::new(Some(vcpu)),
            control: Mutex::new(Control {
                want: Want::Park,
                state: State::Parked,
                save_on_park: false,
                saved: None,
                started_ns: 0,
                events: Vec::new(),
            }),
            changed: Condvar::new(),
        })
    }

    /// The control block. Poisoning is passed over: a thread that panics aborts the process in release,
    /// and each field is valid on its own.
    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_want(&self, want: Want) {
        let mut control = self.control();
        control.want = want;
        let running = control.state == State::Running;
        drop(control);
        if running {
            self.kick.kick();
        }
        self.changed.notify_all();
    }
}

/// All vCPUs of a VM, with their threads.
pub struct VcpuSet {
    slots: Vec<Arc<Slot>>,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for VcpuSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VcpuSet").field("vcpus", &self.slots.len()).finish()
    }
}

impl VcpuSet {
    /// Starts one parked thread for each vCPU, with the time slice given, or else the host's default.
    ///
    /// # Errors
    /// A thread can't be made; those made before stay parked until the process ends.
    pub fn spawn(
        vcpus: Vec<Vcpu>,
        bus: &Arc<dyn ExitBus + Send + Sync>,
        waker: &Waker,
        slice: Option<Duration>,
    ) -> Result<Self, VcpusError> {
        let slots: Vec<Arc<Slot>> = vcpus.into_iter().map(Slot::parked).collect();
        let mut set = Self { slots, threads: Vec::new() };
        for slot in &set.slots {
            let slot = Arc::clone(slot);
            let (bus, waker) = (Arc::clone(bus), waker.clone());
            let index = slot.index;
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(STACK_BYTES)
                .spawn(move || thread_main(&slot, bus.as_ref(), &waker, slice))
                .map_err(|e| VcpusError::Spawn(index, e))?;
            set.threads.push(thread);
        }
        Ok(set)
    }

    /// Lets all vCPUs run.
    pub fn resume(&self) {
        for slot in &self.slots {
            slot.set_want(Want::Run);
        }
    }

    /// Asks all vCPUs to park; does not wait.
    pub fn request_park(&self) {
        // A lone vCPU saves its own state on the way. With several, one that is parked can still be sent
        // an interrupt by one that runs: their state may only be read once all are parked.
        let save_on_park = self.slots.len() == 1;
        for slot in &self.slots {
            let mut control = slot.control();
            control.save_on_park = save_on_park;
            control.saved = None;
            drop(control);
            slot.set_want(Want::Park);
        }
    }

    /// Waits until all vCPUs are parked, at most so long.
    ///
    /// # Errors
    /// One does not park in time.
    pub fn wait_parked(&self, limit: Duration) -> Result<(), VcpusError> {
        let deadline = Instant::now() + limit;
        for slot in &self.slots {
            let mut control = slot.control();
            while control.state == State::Running {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(VcpusError::Stuck(slot.index, limit));
                }
                let (after, waited) = slot
                    .changed
                    .wait_timeout(control, left.min(KICK_AGAIN))
                    .unwrap_or_else(PoisonError::into_inner);
                control = after;
                if waited.timed_out() && control.state == State::Running {
                    drop(control);
                    slot.kick.kick();
                    control = slot.control();
                }
            }
        }
        Ok(())
    }

    /// States of all vCPUs, in order of their indices, once all are parked. Those that did not save their
    /// own are saved now, by the caller's thread.
    ///
    /// # Errors
    /// A state could not be read, or a vCPU has stopped for good.
    pub fn take_saved(&self) -> Result<Vec<VcpuState>, VcpusError> {
        let mut states = Vec::with_capacity(self.slots.len());
        for slot in &self.slots {
            let saved = slot.control().saved.take();
            let state = match saved {
                Some(saved) => saved.map_err(|e| VcpusError::Save(slot.index, e))?,
                None => self.save_here(slot)?,
            };
            states.push(state);
        }
        Ok(states)
    }

    fn save_here(&self, slot: &Slot) -> Result<VcpuState, VcpusError> {
        let mut vcpu = slot.vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        let vcpu = vcpu.as_mut().ok_or(VcpusError::Gone(slot.index))?;
        vcpu.save().map_err(|e| VcpusError::Save(slot.index, e))
    }

    /// What the vCPUs have told since the last call.
    pub fn take_events(&self) -> Vec<VcpuEvent> {
        self.slots.iter().flat_map(|slot| std::mem::take(&mut slot.control().events)).collect()
    }

    /// Whether all of them sleep, as those of an idle guest do; see [`KickHandle::is_asleep`].
    pub fn are_asleep(&self) -> bool {
        self.slots.iter().all(|slot| slot.kick.is_asleep())
    }

    /// KVM's counters, each summed over the vCPUs. Empty if the host has none.
    pub fn counters(&self) -> BTreeMap<String, u64> {
        // All at once: each is to leave KVM_RUN the first time.
        self.slots.iter().for_each(|slot| slot.kick.want_counters());
        let mut sums = BTreeMap::new();
        for (name, value) in
            self.slots.iter().filter_map(|s| s.kick.counters(COUNTERS_WAIT)).flatten()
        {
            let sum: &mut u64 = sums.entry(name).or_default();
            *sum = sum.wrapping_add(value);
        }
        sums
    }

    /// Where each vCPU stands, by index. All must be parked.
    pub fn views(&self) -> Vec<(u8, View)> {
        let view = |slot: &Arc<Slot>| {
            let vcpu = slot.vcpu.lock().unwrap_or_else(PoisonError::into_inner);
            vcpu.as_ref().map(|vcpu| (slot.index, vcpu.view()))
        };
        self.slots.iter().filter_map(view).collect()
    }

    /// When the last vCPU first ran (CLOCK_MONOTONIC, ns), once all have.
    pub fn running_since(&self) -> Option<u64> {
        let mut latest = 0;
        for slot in &self.slots {
            match slot.control().started_ns {
                0 => return None,
                ns => latest = latest.max(ns),
            }
        }
        Some(latest)
    }

    /// Ends the threads and drops the vCPUs.
    ///
    /// # Errors
    /// One does not park in time: its thread is left behind, and so is its vCPU.
    pub fn stop(mut self) -> Result<(), VcpusError> {
        for slot in &self.slots {
            slot.set_want(Want::Exit);
        }
        self.wait_parked(PARK_TIMEOUT)?;
        for thread in self.threads.drain(..) {
            // A panic was reported by the panic hook when it happened.
            let _ = thread.join();
        }
        Ok(())
    }

    /// In a forked child that is no VM: drops the vCPUs, as [`Self::abandon_in_child`]; the threads are left alone, as
    /// this is never dropped there. All vCPUs must have been parked.
    pub fn release_in_child(&self) {
        for slot in &self.slots {
            slot.vcpu.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
    }

    /// In a forked child: drops the vCPUs (which unmaps their kvm_run pages and closes their fds) and
    /// forgets the threads, which do not exist in this process.
    #[expect(clippy::mem_forget, reason = "detaching a thread that does not exist is undefined")]
    pub fn abandon_in_child(mut self) {
        self.release_in_child();
        for thread in self.threads.drain(..) {
            std::mem::forget(thread);
        }
    }
}

fn thread_main(slot: &Slot, bus: &dyn ExitBus, waker: &Waker, slice: Option<Duration>) {
    if let Some(Err(error)) = slice.map(forkd_sys::sched::set_slice) {
        crate::log::line(&format!("vCPU {} keeps the host's time slice: {error}", slot.index));
    }
    if let Err(error) = forkd_sys::signal::block_all_but_kick() {
        crate::log::line(&format!("vCPU {} cannot block signals: {error}", slot.index));
    }
    loop {
        let mut control = slot.control();
        while control.want == Want::Park {
            control = slot.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
        }
        if control.want == Want::Exit {
            control.state = State::Gone;
            drop(control);
            slot.changed.notify_all();
            return;
        }
        control.state = State::Running;
        let first = control.started_ns == 0;
        if first {
            control.started_ns = monotonic_ns();
        }
        drop(control);
        if first {
            wake(waker);
        }
        let event = run(slot, bus);
        let told = event.is_some();
        let mut control = slot.control();
        if let Some(event) = event {
            control.events.push(event);
            if control.want == Want::Run {
                control.want = Want::Park;
            }
        }
        control.state = State::Parked;
        drop(control);
        slot.changed.notify_all();
        if told {
            wake(waker);
        }
    }
}

/// Tells the loop. An eventfd that can't be written to is broken beyond what this thread could mend.
fn wake(waker: &Waker) {
    if let Err(error) = waker.wake() {
        crate::log::line(&format!("a vCPU cannot wake the event loop: {error}"));
    }
}

/// Runs the vCPU until it is wanted elsewhere (none) or can't go on.
fn run(slot: &Slot, bus: &dyn ExitBus) -> Option<VcpuEvent> {
    let mut guard = slot.vcpu.lock().unwrap_or_else(PoisonError::into_inner);
    let vcpu = guard.as_mut()?;
    loop {
        match vcpu.run(bus) {
            Ok(Exit::Kicked) => {
                let mut control = slot.control();
                if control.want == Want::Run {
                    continue;
                }
                if control.save_on_park && control.want == Want::Park {
                    drop(control);
                    let saved = vcpu.save();
                    control = slot.control();
                    control.saved = Some(saved);
                }
                return None;
            }
            Ok(Exit::Reset) => return Some(VcpuEvent::Reset),
            Ok(Exit::Shutdown | Exit::Hlt | Exit::SystemEvent(_)) => {
                return Some(VcpuEvent::Shutdown);
            }
            Err(error) => return Some(VcpuEvent::Failed(slot.index, error)),
        }
    }
}
