//! A split virtqueue as a device uses it.
//!
//! Ring arithmetic is rust-vmm's `virtio_queue::Queue`; this adds the registers that a driver sets before
//! the queue is ready, checks on everything that is read from the guest, the interrupt suppression of
//! both kinds, and a saved form.

use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueState as RingState, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::virtio::chain::{Chain, ChainError};
use crate::virtio::{Memory, Progress};

/// What a guest can do wrong with a queue.
#[derive(Debug, Error)]
pub enum QueueError {
    /// Size, alignment or place of the rings is wrong.
    #[error(
        "rings are misplaced: size {size}, descriptors {desc:#x}, available {avail:#x}, used {used:#x}"
    )]
    BadRings {
        /// Entries.
        size: u16,
        /// Address of the descriptor table.
        desc: u64,
        /// Address of the available ring.
        avail: u64,
        /// Address of the used ring.
        used: u64,
    },
    /// The queue is not ready.
    #[error("queue is not ready")]
    NotReady,
    /// A ring could not be read or written, or an index in it jumped.
    #[error("ring: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// A chain is malformed.
    #[error(transparent)]
    Chain(#[from] ChainError),
}

/// Registers and ring positions of a queue, for a durable snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Entries chosen by the driver.
    pub size: u16,
    /// The driver has enabled the queue.
    pub ready: bool,
    /// Address of the descriptor table.
    pub desc: u64,
    /// Address of the available ring.
    pub avail: u64,
    /// Address of the used ring.
    pub used: u64,
    /// Next entry of the available ring to look at.
    pub next_avail: u16,
    /// Next entry of the used ring to fill.
    pub next_used: u16,
    /// VIRTIO_F_RING_EVENT_IDX was negotiated.
    pub event_idx: bool,
}

/// Which of a queue's three addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RingPart {
    /// Descriptor table.
    Desc,
    /// Available (driver) ring.
    Avail,
    /// Used (device) ring.
    Used,
}

/// One virtqueue.
#[derive(Debug)]
pub struct VirtQueue {
    max_size: u16,
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    /// Present while the queue is ready.
    ring: Option<Queue>,
    /// Chains were used since the guest was last considered for an interrupt.
    used_any: bool,
}

impl VirtQueue {
    /// A queue of at most `max_size` entries, not ready.
    pub fn new(max_size: u16) -> Self {
        Self { max_size, size: max_size, desc: 0, avail: 0, used: 0, ring: None, used_any: false }
    }

    /// Most entries that the driver may choose.
    pub fn max_size(&self) -> u16 {
        self.max_size
    }

    /// True once the driver has enabled the queue with valid rings.
    pub fn ready(&self) -> bool {
        self.ring.is_some()
    }

    pub(super) fn set_size(&mut self, size: u32) {
        // Kept as it is, even if wrong: enabling checks it. A size over u16 is as wrong as 0.
        self.size = u16::try_from(size).unwrap_or(0);
    }

    pub(super) fn set_address(&mut self, part: RingPart, high: bool, value: u32) {
        let address = match part {
            RingPart::Desc => &mut self.desc,
            RingPart::Avail => &mut self.avail,
            RingPart::Used => &mut self.used,
        };
        let (shift, keep) = if high { (32, 0xffff_ffff) } else { (0, 0xffff_ffff_0000_0000) };
        *address = (*address & keep) | (u64::from(value) << shift);
    }

    fn ring_state(&self, positions: (u16, u16), event_idx: bool) -> RingState {
        RingState {
            max_size: self.max_size,
            next_avail: positions.0,
            next_used: positions.1,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: true,
            desc_table: self.desc,
            avail_ring: self.avail,
            used_ring: self.used,
        }
    }

    fn start(
        &mut self,
        mem: &Memory,
        positions: (u16, u16),
        event_idx: bool,
    ) -> Result<(), QueueError> {
        let ring = Queue::try_from(self.ring_state(positions, event_idx))
            .ok()
            .filter(|q| q.is_valid(mem) && self.avail != 0)
            .ok_or(QueueError::BadRings {
                size: self.size,
                desc: self.desc,
                avail: self.avail,
                used: self.used,
            })?;
        self.ring = Some(ring);
        Ok(())
    }

    /// The driver enables the queue: checks size, alignment and that all rings are RAM.
    pub(super) fn enable(&mut self, mem: &Memory, event_idx: bool) -> Result<(), QueueError> {
        self.start(mem, (0, 0), event_idx)
    }

    pub(super) fn disable(&mut self) {
        self.ring = None;
        self.used_any = false;
    }

    pub(super) fn reset(&mut self) {
        *self = Self::new(self.max_size);
    }

    pub(super) fn save(&self) -> QueueState {
        QueueState {
            size: self.size,
            ready: self.ready(),
            desc: self.desc,
            avail: self.avail,
            used: self.used,
            next_avail: self.ring.as_ref().map_or(0, QueueT::next_avail),
            next_used: self.ring.as_ref().map_or(0, QueueT::next_used),
            event_idx: self.ring.as_ref().is_some_and(QueueT::event_idx_enabled),
        }
    }

    pub(super) fn restore(&mut self, mem: &Memory, state: &QueueState) -> Result<(), QueueError> {
        self.reset();
        self.size = state.size;
        (self.desc, self.avail, self.used) = (state.desc, state.avail, state.used);
        if state.ready {
            self.start(mem, (state.next_avail, state.next_used), state.event_idx)?;
        }
        Ok(())
    }

    fn ring(&mut self) -> Result<&mut Queue, QueueError> {
        self.ring.as_mut().ok_or(QueueError::NotReady)
    }

    /// Takes the next chain, if the guest has made one available.
    ///
    /// # Errors
    /// The guest broke a rule; the queue is of no use until the driver resets the device.
    pub fn pop(&mut self, mem: &Memory) -> Result<Option<Chain>, QueueError> {
        let ring = self.ring()?;
        let size = ring.size();
        let Some(descriptors) = ring.iter(mem)?.next() else {
            return Ok(None);
        };
        Ok(Some(Chain::copy_from(descriptors, size)?))
    }

    /// Puts the chain that was popped last back.
    pub fn undo_pop(&mut self) {
        if let Some(ring) = self.ring.as_mut() {
            ring.go_to_previous_position();
        }
    }

    /// Gives chain `head` back to the guest, with `len` bytes written into it.
    ///
    /// # Errors
    /// The used ring cannot be written.
    pub fn push_used(&mut self, mem: &Memory, head: u16, len: u32) -> Result<(), QueueError> {
        self.ring()?.add_used(mem, head, len)?;
        self.used_any = true;
        Ok(())
    }

    /// Position in the available ring: how many chains were popped, modulo 2^16.
    pub fn popped(&self) -> u16 {
        self.ring.as_ref().map_or(0, QueueT::next_avail)
    }

    /// How many chains the guest has made available so far, modulo 2^16.
    ///
    /// # Errors
    /// The available ring cannot be read.
    pub fn offered(&mut self, mem: &Memory) -> Result<u16, QueueError> {
        Ok(self.ring()?.avail_idx(mem, Ordering::Acquire)?.0)
    }

    /// Asks the guest to notify for the next chain. Returns true if one is there already.
    ///
    /// # Errors
    /// A ring cannot be read or written.
    pub fn rearm(&mut self, mem: &Memory) -> Result<bool, QueueError> {
        Ok(self.ring()?.enable_notification(mem)?)
    }

    /// Asks the guest to notify as soon as it offers more chains than `offered` (modulo 2^16), however many
    /// were popped of those. The caller then looks whether it has already.
    ///
    /// # Errors
    /// The used ring cannot be written.
    pub fn notify_after(&mut self, mem: &Memory, offered: u16) -> Result<(), QueueError> {
        let (used, size) = (self.used, u64::from(self.size));
        let ring = self.ring()?;
        let (address, value) = if ring.event_idx_enabled() {
            // avail_event, behind flags, index and entries (virtio 1.2, section 2.7.8).
            (used + 4 + 8 * size, offered)
        } else {
            (used, 0)
        };
        mem.store(value.to_le(), GuestAddress(address), Ordering::Relaxed)
            .map_err(virtio_queue::Error::GuestMemory)?;
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Tells the guest that it need not notify for now.
    ///
    /// # Errors
    /// The used ring cannot be written.
    pub fn quiet(&mut self, mem: &Memory) -> Result<(), QueueError> {
        Ok(self.ring()?.disable_notification(mem)?)
    }

    /// True if chains were used and the guest wants to hear of it. Asks once.
    pub(super) fn take_interrupt(&mut self, mem: &Memory) -> Result<bool, QueueError> {
        if !std::mem::take(&mut self.used_any) {
            return Ok(false);
        }
        // The guest allows interrupts, then looks at the used ring: the other way round here (virtio 1.2, section 2.7.7).
        fence(Ordering::SeqCst);
        let avail = GuestAddress(self.avail);
        let ring = self.ring()?;
        if ring.event_idx_enabled() {
            return Ok(ring.needs_notification(mem)?);
        }
        // Virtio 1.2, section 2.7.7.1: the crude form of suppression, which rust-vmm leaves out.
        let flags: u16 =
            mem.load(avail, Ordering::Acquire).map_err(virtio_queue::Error::GuestMemory)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Works through the queue: `handle` gets each chain and returns the bytes it wrote and what the
    /// request cost; after `budget` of cost the rest is left for the next call.
    ///
    /// # Errors
    /// As [`VirtQueue::pop`] and [`VirtQueue::push_used`].
    pub fn drain(
        &mut self,
        mem: &Memory,
        budget: u64,
        mut handle: impl FnMut(Chain) -> Served,
    ) -> Result<Progress, QueueError> {
        let mut spent = 0u64;
        self.quiet(mem)?;
        loop {
            while let Some(chain) = self.pop(mem)? {
                let head = chain.head;
                let served = handle(chain);
                self.push_used(mem, head, served.written)?;
                // At least 1, so that requests without cost are bounded too.
                spent = spent.saturating_add(served.cost.max(1));
                if spent >= budget {
                    return Ok(Progress::More);
                }
            }
            if !self.rearm(mem)? {
                return Ok(Progress::Done);
            }
            self.quiet(mem)?;
        }
    }
}

/// What became of one chain in [`VirtQueue::drain`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Served {
    /// Bytes written into the chain, as told to the guest.
    pub written: u32,
    /// Cost, in the unit of the budget.
    pub cost: u64,
}
