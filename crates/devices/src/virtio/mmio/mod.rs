//! The virtio-mmio transport, version 2 (virtio 1.2, section 4.2).
//!
//! A transport has two faces. vCPU threads see registers ([`MmioTransport::front`], put on the MMIO bus);
//! the event loop sees a [`Transport`]. Between them:
//!
//! ```text
//!   vCPU: QueueNotify ──> pending bits (atomic) ──ring──> event loop: process_pending ──> device
//!   guest <── interrupt <── interrupt status (atomic) <───────────────────────────────────┘
//! ```
//!
//! What happens often (QueueNotify, interrupt status and acknowledge) takes no lock that the event loop
//! holds while it works; everything else locks the core: registers, queues, device.
//!
//! Status, as bits that the driver adds one after the other and that only a reset takes away:
//!
//! ```text
//!   0 ──> ACKNOWLEDGE ──> DRIVER ──> FEATURES_OK ──> DRIVER_OK   queues are processed here, and only here
//!                                    (unset if the               │
//!                                     features are not ours)     ├──> NEEDS_RESET  the guest broke a rule
//!                                                                └──> FAILED       the driver gave up
//! ```

mod registers;
mod state;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};

use crate::bus::BusDevice;
use crate::interrupt::{Doorbell, Interrupt, InterruptSlot};
use crate::virtio::queue::VirtQueue;
use crate::virtio::{Counters, DeviceError, Memory, Progress, QueueIo, RestoreError, VirtioDevice};

pub use registers::Front;
pub use state::TransportState;

/// Length of a transport's register window in bytes, configuration space included.
pub const WINDOW: u64 = 0x1000;

/// Most queues of a device: pending queues are bits of a word.
const MAX_QUEUES: usize = 64;

/// A transport as the event loop sees it, whatever its device is.
pub trait Transport: Send + Sync {
    /// Device id; see [`crate::virtio::id`].
    fn device_type(&self) -> u32;

    /// True if the guest has notified a queue that was not processed yet.
    fn has_pending(&self) -> bool;

    /// Works on notified queues, each within its budget. What is left stays pending, and the doorbell is
    /// rung, so that other devices get their turn first.
    fn process_pending(&self);

    /// Replaces interrupt and doorbell: for the child of a fork, before its vCPUs run.
    fn rewire(&self, interrupt: Arc<dyn Interrupt>, doorbell: Arc<dyn Doorbell>);

    /// After a fork or a restore: has all queues looked at, and repeats an interrupt that the guest has not
    /// acknowledged. Both are harmless if nothing was lost.
    fn resume(&self);

    /// Registers, queues and device, for a durable snapshot. The vCPUs must be parked.
    fn save(&self) -> TransportState;

    /// Puts saved state back into a fresh transport.
    ///
    /// # Errors
    /// The state is of another device, or not valid.
    fn restore(&self, state: &TransportState) -> Result<(), RestoreError>;

    /// Counters of transport and device.
    fn metrics(&self) -> Counters;

    /// The fault that stopped the device, if one did.
    fn fault(&self) -> Option<String>;
}

/// What both faces use without locking the core.
struct Shared {
    /// One bit for each queue that the guest has notified.
    pending: AtomicU64,
    interrupt_status: AtomicU32,
    interrupt: InterruptSlot,
    doorbell: Mutex<Arc<dyn Doorbell>>,
    notifications: AtomicU64,
    interrupts: AtomicU64,
}

impl Shared {
    fn ring(&self) {
        let doorbell = Arc::clone(&lock(&self.doorbell));
        doorbell.ring();
    }

    fn mark_pending(&self, queues: u64) {
        self.pending.fetch_or(queues, Ordering::AcqRel);
        self.ring();
    }

    fn raise(&self, cause: u32) {
        self.interrupt_status.fetch_or(cause, Ordering::AcqRel);
        self.interrupts.fetch_add(1, Ordering::Relaxed);
        self.interrupt.trigger();
    }
}

/// Registers, queues and the device itself.
struct Core<D> {
    device: D,
    mem: Memory,
    queues: Vec<VirtQueue>,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    config_generation: u32,
    fault: Option<String>,
    faults: u64,
    bad_accesses: u64,
}

/// A virtio device behind virtio-mmio registers.
pub struct MmioTransport<D> {
    shared: Arc<Shared>,
    core: Arc<Mutex<Core<D>>>,
    device_type: u32,
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The bit of queue `index`; none for a number out of the word.
fn queue_bit(index: usize) -> u64 {
    u32::try_from(index).ok().and_then(|n| 1u64.checked_shl(n)).unwrap_or(0)
}

fn all_queues(count: usize) -> u64 {
    u64::MAX.checked_shr(64u32.saturating_sub(count as u32)).unwrap_or(0)
}

impl<D: VirtioDevice + 'static> MmioTransport<D> {
    /// Puts `device` behind a transport that uses `mem` (RAM only), signals `interrupt` and rings
    /// `doorbell` when a queue is notified.
    ///
    /// At most the first 64 queues of a device are used.
    pub fn new(
        device: D,
        mem: Memory,
        interrupt: Arc<dyn Interrupt>,
        doorbell: Arc<dyn Doorbell>,
    ) -> Self {
        let queues =
            device.queue_max_sizes().iter().take(MAX_QUEUES).map(|&n| VirtQueue::new(n)).collect();
        let shared = Shared {
            pending: AtomicU64::new(0),
            interrupt_status: AtomicU32::new(0),
            interrupt: InterruptSlot::new(interrupt),
            doorbell: Mutex::new(doorbell),
            notifications: AtomicU64::new(0),
            interrupts: AtomicU64::new(0),
        };
        let device_type = device.device_type();
        let core = Core {
            device,
            mem,
            queues,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            config_generation: 0,
            fault: None,
            faults: 0,
            bad_accesses: 0,
        };
        Self { shared: Arc::new(shared), core: Arc::new(Mutex::new(core)), device_type }
    }

    /// The registers, to be put on the MMIO bus with a length of [`WINDOW`].
    pub fn front(&self) -> Arc<Mutex<dyn BusDevice>> {
        Arc::new(Mutex::new(Front::new(Arc::clone(&self.shared), Arc::clone(&self.core))))
    }

    /// Rings the doorbell: there is work for the event loop.
    pub fn ring(&self) {
        self.shared.ring();
    }

    /// Has queue `index` processed, as if the guest had notified it.
    pub fn notify(&self, index: usize) {
        self.shared.mark_pending(queue_bit(index));
    }

    /// Calls `f` with the device alone, whatever its status.
    pub fn with_device<T>(&self, f: impl FnOnce(&mut D) -> T) -> T {
        f(&mut lock(&self.core).device)
    }

    /// Calls `f` with the device and, if the driver has it running, its queues; then interrupts the guest
    /// if `f` used chains that it wants to hear of. If `f` leaves work, queue `rest` is processed again
    /// later; a fault stops the device.
    pub fn with_io<T>(
        &self,
        rest: usize,
        f: impl FnOnce(&mut D, Option<&mut QueueIo<'_>>) -> (T, Result<Progress, DeviceError>),
    ) -> T {
        let mut core = lock(&self.core);
        let core = &mut *core;
        let running = core.running();
        let mut io = QueueIo { mem: &core.mem, queues: &mut core.queues };
        let (value, result) = f(&mut core.device, running.then_some(&mut io));
        if running && core.finish(&self.shared, result) == Some(Progress::More) {
            self.shared.mark_pending(queue_bit(rest));
        }
        value
    }
}

impl<D: VirtioDevice> Core<D> {
    /// True while the driver has the device running and neither side has given up.
    fn running(&self) -> bool {
        let stopped = VIRTIO_CONFIG_S_NEEDS_RESET | VIRTIO_CONFIG_S_FAILED;
        self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 && self.status & stopped == 0
    }

    fn process(&mut self, shared: &Shared, index: usize) {
        if !self.queues.get(index).is_some_and(VirtQueue::ready) {
            return;
        }
        let mut io = QueueIo { mem: &self.mem, queues: &mut self.queues };
        let result = self.device.process_queue(index, &mut io);
        if self.finish(shared, result) == Some(Progress::More) {
            shared.mark_pending(queue_bit(index));
        }
    }

    /// Interrupts the guest for used chains; turns an error into a stopped device.
    fn finish(
        &mut self,
        shared: &Shared,
        result: Result<Progress, DeviceError>,
    ) -> Option<Progress> {
        let mut interrupt = false;
        let mut fault = None;
        for (index, queue) in self.queues.iter_mut().enumerate().filter(|(_, q)| q.ready()) {
            match queue.take_interrupt(&self.mem) {
                Ok(wanted) => interrupt |= wanted,
                Err(source) => fault = Some(DeviceError::Queue { index, source }),
            }
        }
        if interrupt {
            shared.raise(VIRTIO_MMIO_INT_VRING);
        }
        match (result, fault) {
            (Ok(value), None) => Some(value),
            (Err(error), _) | (Ok(_), Some(error)) => {
                self.stop(shared, &error.to_string());
                None
            }
        }
    }

    /// Sets DEVICE_NEEDS_RESET and tells the driver (virtio 1.2, section 2.1.2).
    fn stop(&mut self, shared: &Shared, why: &str) {
        self.faults += 1;
        self.fault = Some(why.to_owned());
        self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        if self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.config_generation = self.config_generation.wrapping_add(1);
            shared.raise(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    fn reset(&mut self, shared: &Shared) {
        self.device.reset();
        self.queues.iter_mut().for_each(VirtQueue::reset);
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        self.fault = None;
        shared.pending.store(0, Ordering::Release);
        shared.interrupt_status.store(0, Ordering::Release);
        // The device may have closed things that the event loop still watches.
        shared.ring();
    }
}

impl<D: VirtioDevice + 'static> Transport for MmioTransport<D> {
    fn device_type(&self) -> u32 {
        self.device_type
    }

    fn has_pending(&self) -> bool {
        self.shared.pending.load(Ordering::Acquire) != 0
    }

    fn process_pending(&self) {
        if !self.has_pending() {
            return;
        }
        let mut core = lock(&self.core);
        let mut queues = self.shared.pending.swap(0, Ordering::AcqRel);
        while queues != 0 && core.running() {
            let index = queues.trailing_zeros();
            queues &= queues - 1;
            core.process(&self.shared, index as usize);
        }
    }

    fn rewire(&self, interrupt: Arc<dyn Interrupt>, doorbell: Arc<dyn Doorbell>) {
        self.shared.interrupt.replace(interrupt);
        *lock(&self.shared.doorbell) = doorbell;
    }

    fn resume(&self) {
        self.shared.mark_pending(all_queues(lock(&self.core).queues.len()));
        if self.shared.interrupt_status.load(Ordering::Acquire) != 0 {
            self.shared.interrupt.trigger();
        }
    }

    fn save(&self) -> TransportState {
        lock(&self.core).save(&self.shared)
    }

    fn restore(&self, state: &TransportState) -> Result<(), RestoreError> {
        lock(&self.core).restore(&self.shared, state)
    }

    fn metrics(&self) -> Counters {
        let core = lock(&self.core);
        let mut counters = vec![
            ("notifications".into(), self.shared.notifications.load(Ordering::Relaxed)),
            ("interrupts".into(), self.shared.interrupts.load(Ordering::Relaxed)),
            ("faults".into(), core.faults),
            ("bad_accesses".into(), core.bad_accesses),
        ];
        counters.extend(core.device.metrics());
        counters
    }

    fn fault(&self) -> Option<String> {
        lock(&self.core).fault.clone()
    }
}

impl<D> std::fmt::Debug for MmioTransport<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MmioTransport").field("device_type", &self.device_type).finish()
    }
}
