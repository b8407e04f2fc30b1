//! Virtio 1.2 devices over MMIO.
//!
//! Three parts, each of which knows only the next:
//!
//! - [`mmio::MmioTransport`] is what the guest's driver talks to: registers, the status machine, features,
//!   queue addresses, interrupts. It owns the queues and the device.
//! - [`VirtioDevice`] is one kind of device. It sees its queues as [`QueueIo`] while it is called, and has
//!   no thread, lock or interrupt of its own.
//! - [`queue::VirtQueue`] and [`chain::Chain`] read what the guest wrote, and trust none of it.
//!
//! A guest that breaks the rules (a broken chain, a ring index that jumps) gets its device stopped with
//! DEVICE_NEEDS_RESET; a request that merely cannot be done gets an error status. Neither panics, and no
//! call does unbounded work: a device stops at its budget and asks to be called again.
//!
//! The memory given to a transport is what devices may read *and write*: RAM. A read-only mapping (pmem)
//! must not be part of it.

pub mod block;
pub mod chain;
pub mod mmio;
pub mod pmem;
pub mod queue;
pub mod rng;
pub mod vsock;

#[cfg(any(test, feature = "test-support"))]
pub mod testing;

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::virtio::queue::{QueueError, VirtQueue};

/// Guest RAM as devices see it.
pub type Memory = vm_memory::GuestMemoryMmap<()>;

/// Counters of a device: name and value.
pub type Counters = Vec<(String, u64)>;

/// Virtio device ids (virtio 1.2, section 5).
pub mod id {
    /// Block device.
    pub const BLOCK: u32 = 2;
    /// Entropy source.
    pub const RNG: u32 = 4;
    /// Socket device.
    pub const VSOCK: u32 = 19;
    /// Persistent memory.
    pub const PMEM: u32 = 27;
}

/// What a device may use while it is called: guest memory and its queues.
#[derive(Debug)]
pub struct QueueIo<'a> {
    /// Guest RAM.
    pub mem: &'a Memory,
    /// All queues of the device, in order.
    pub queues: &'a mut [VirtQueue],
}

/// How a call to a device ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Progress {
    /// Nothing left to do until the guest or the host does something.
    Done,
    /// The budget of this call is used up: call again, after others had their turn.
    More,
}

/// A fault that stops the device until the driver resets it.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// The guest broke the rules of the virtqueue.
    #[error("queue {index}: {source}")]
    Queue {
        /// Number of the queue.
        index: usize,
        /// What was wrong.
        source: QueueError,
    },
    /// The device was asked about a queue that it does not have.
    #[error("no queue {0}")]
    NoSuchQueue(usize),
}

/// Why saved state cannot be put back.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RestoreError {
    /// The state is of another kind of device.
    #[error("state of a {found} device cannot be restored into a {expected} device")]
    WrongDevice {
        /// Kind of the device.
        expected: &'static str,
        /// Kind of the state.
        found: &'static str,
    },
    /// The state contradicts itself, the device's configuration or guest memory.
    #[error("saved state is not valid: {0}")]
    Invalid(String),
}

/// One kind of virtio device.
///
/// Life: `new`, then any number of (`ack_features`, `activate`, `process_queue`..., `reset`).
pub trait VirtioDevice: Send {
    /// Device id; see [`id`].
    fn device_type(&self) -> u32;

    /// Largest size of each queue: powers of two.
    fn queue_max_sizes(&self) -> &[u16];

    /// Feature bits of this kind of device. The transport adds its own.
    fn features(&self) -> u64;

    /// The driver has chosen `features`, a part of those offered.
    fn ack_features(&mut self, features: u64);

    /// Reads device configuration at `offset` into all of `data`; zeroes past its end.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes device configuration. Most devices have nothing to write.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready (DRIVER_OK).
    fn activate(&mut self) {}

    /// Works on queue `index`, which the guest has notified.
    ///
    /// # Errors
    /// A fault that only a reset can cure.
    fn process_queue(
        &mut self,
        index: usize,
        io: &mut QueueIo<'_>,
    ) -> Result<Progress, DeviceError>;

    /// Back to where `new` left it, as far as the driver can see.
    fn reset(&mut self);

    /// State for a durable snapshot.
    fn save(&self) -> DeviceState;

    /// Puts saved state back.
    ///
    /// # Errors
    /// State of another device, or state that is not valid; the device is then unchanged.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError>;

    /// The device's counters.
    fn metrics(&self) -> Counters;
}

/// Saved state of any device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// Persistent memory.
    Pmem(pmem::PmemState),
    /// Block device; the copy-on-write layer is saved apart.
    Block(block::BlockState),
    /// Entropy source.
    Rng(rng::RngState),
    /// Socket device.
    Vsock(vsock::VsockState),
}

impl DeviceState {
    /// Name of the kind of device.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Pmem(_) => "pmem",
            Self::Block(_) => "block",
            Self::Rng(_) => "rng",
            Self::Vsock(_) => "vsock",
        }
    }
}

/// Copies configuration space `config` from `offset` into `data`; zeroes past its end.
fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset).ok().and_then(|o| config.get(o..)).unwrap_or(&[]);
    let n = rest.len().min(data.len());
    data[..n].copy_from_slice(&rest[..n]);
}
