//! A driver that plays the guest, for tests: it sets a device up through its registers and puts
//! chains into queues in guest memory, as Linux would.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress};

use crate::bus::BusDevice;
use crate::interrupt::{Doorbell, Interrupt};
use crate::virtio::Memory;

/// Size of the guest memory that [`memory`] makes.
pub const MEMORY_SIZE: usize = 64 << 20;
/// Largest buffer of a chain.
pub const SLOT: usize = 80 * 1024;
/// Most entries of a queue that the driver uses.
const MAX_SIZE: u16 = 128;
/// Where queue n has its rings and buffers.
const QUEUE_SPAN: u64 = 16 << 20;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;

/// Guest memory for a [`Guest`] of up to four queues.
///
/// # Panics
/// Without memory.
#[allow(clippy::expect_used)]
pub fn memory() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)]).expect("64 MiB of memory")
}

/// Counts how often it was triggered or rung.
#[derive(Debug, Default)]
pub struct Counter(AtomicUsize);

impl Counter {
    /// The count, which starts again at 0.
    pub fn take(&self) -> usize {
        self.0.swap(0, Ordering::SeqCst)
    }
}

impl Interrupt for Counter {
    fn trigger(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Doorbell for Counter {
    fn ring(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A chain that the device has given back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Used {
    /// The chain, as [`Guest::submit`] named it.
    pub head: u16,
    /// Bytes written, as the device says.
    pub len: u32,
    /// The device-writable buffers, one after the other, whole.
    pub written: Vec<u8>,
}

#[derive(Debug)]
struct DriverQueue {
    size: u16,
    base: u64,
    free: Vec<u16>,
    offered: u16,
    seen: u16,
    /// Descriptors of each chain in flight, and the lengths of its writable buffers.
    chains: HashMap<u16, Vec<(u16, usize)>>,
}

impl DriverQueue {
    fn avail(&self) -> u64 {
        self.base + 0x1000
    }

    fn used(&self) -> u64 {
        self.base + 0x2000
    }

    fn slot(&self, index: u16) -> u64 {
        self.base + 0x4000 + u64::from(index) * SLOT as u64
    }
}

/// The driver's side of one device.
pub struct Guest {
    /// Guest memory.
    pub mem: Memory,
    front: Arc<Mutex<dyn BusDevice>>,
    queues: Vec<DriverQueue>,
}

#[allow(clippy::unwrap_used)]
impl Guest {
    /// A driver that talks to the registers of `front`. Nothing is set up yet.
    pub fn new(mem: Memory, front: Arc<Mutex<dyn BusDevice>>) -> Self {
        Self { mem, front, queues: Vec::new() }
    }

    /// Goes on where `other` stands, with the registers of `front`: the guest of a restored device.
    pub fn adopt(&mut self, other: &mut Self, front: Arc<Mutex<dyn BusDevice>>) {
        self.mem = other.mem.clone();
        self.queues = std::mem::take(&mut other.queues);
        self.front = front;
    }

    /// Reads a register.
    pub fn read(&self, offset: u32) -> u32 {
        let mut bytes = [0; 4];
        let mut front = self.front.lock().unwrap_or_else(PoisonError::into_inner);
        front.read(u64::from(offset), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Writes a register.
    pub fn write(&self, offset: u32, value: u32) {
        let mut front = self.front.lock().unwrap_or_else(PoisonError::into_inner);
        front.write(u64::from(offset), &value.to_le_bytes());
    }

    /// Reads the configuration space.
    pub fn config(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mut front = self.front.lock().unwrap_or_else(PoisonError::into_inner);
        front.read(u64::from(reg::VIRTIO_MMIO_CONFIG) + offset, &mut bytes);
        bytes
    }

    /// Takes the device through its life up to DRIVER_OK, with all features that are both offered and in
    /// `wanted`, and VERSION_1. Returns the features taken.
    pub fn start(&mut self, wanted: u64) -> u64 {
        self.write(reg::VIRTIO_MMIO_STATUS, 0);
        self.write(reg::VIRTIO_MMIO_STATUS, 1);
        self.write(reg::VIRTIO_MMIO_STATUS, 3);
        let mut features = 0;
        for half in 0..2u32 {
            self.write(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
            features |= u64::from(self.read(reg::VIRTIO_MMIO_DEVICE_FEATURES)) << (32 * half);
        }
        features &= wanted | 1 << 32;
        for half in 0..2u32 {
            self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.write(reg::VIRTIO_MMIO_STATUS, 11);
        self.queues.clear();
        for index in 0.. {
            self.write(reg::VIRTIO_MMIO_QUEUE_SEL, index);
            let max = self.read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX);
            if max == 0 {
                break;
            }
            let size = (max as u16).min(MAX_SIZE);
            self.start_queue(index, size);
        }
        self.write(reg::VIRTIO_MMIO_STATUS, 15);
        features
    }

    fn start_queue(&mut self, index: u32, size: u16) {
        let base = u64::from(index) * QUEUE_SPAN;
        let queue = DriverQueue {
            size,
            base,
            free: (0..size).rev().collect(),
            offered: 0,
            seen: 0,
            chains: HashMap::new(),
        };
        self.mem.write_slice(&[0; 0x3000], GuestAddress(base)).unwrap();
        self.write(reg::VIRTIO_MMIO_QUEUE_NUM, u32::from(size));
        for (low, address) in [
            (reg::VIRTIO_MMIO_QUEUE_DESC_LOW, base),
            (reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, queue.avail()),
            (reg::VIRTIO_MMIO_QUEUE_USED_LOW, queue.used()),
        ] {
            self.write(low, address as u32);
            self.write(low + 4, (address >> 32) as u32);
        }
        self.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
        self.queues.push(queue);
    }

    /// Descriptors that are free in `queue`.
    pub fn free(&self, queue: usize) -> usize {
        self.queues[queue].free.len()
    }

    /// Makes a chain available: `readable` buffers with their content, and `writable` ones of these
    /// lengths. Returns its name; `None` if there are not enough descriptors. Does not notify.
    pub fn submit(&mut self, queue: usize, readable: &[&[u8]], writable: &[usize]) -> Option<u16> {
        let q = &mut self.queues[queue];
        let count = readable.len() + writable.len();
        if q.free.len() < count || count == 0 {
            return None;
        }
        let indices = q.free.split_off(q.free.len() - count);
        for (n, &index) in indices.iter().enumerate() {
            let (len, mut flags) = match readable.get(n) {
                Some(data) => {
                    self.mem.write_slice(data, GuestAddress(q.slot(index))).unwrap();
                    (data.len(), 0)
                }
                None => (writable[n - readable.len()], DESC_WRITE),
            };
            assert!(len <= SLOT, "a buffer of {len} bytes is longer than a slot");
            let next = indices.get(n + 1).copied();
            flags |= if next.is_some() { DESC_NEXT } else { 0 };
            let mut desc = [0; 16];
            desc[..8].copy_from_slice(&q.slot(index).to_le_bytes());
            desc[8..12].copy_from_slice(&(len as u32).to_le_bytes());
            desc[12..14].copy_from_slice(&flags.to_le_bytes());
            desc[14..].copy_from_slice(&next.unwrap_or(0).to_le_bytes());
            let address = q.base + 16 * u64::from(index);
            self.mem.write_slice(&desc, GuestAddress(address)).unwrap();
        }
        let lens = (0..count).map(|n| n.checked_sub(readable.len()).map_or(0, |w| writable[w]));
        let head = indices[0];
        q.chains.insert(head, indices.iter().copied().zip(lens).collect());
        let entry = q.avail() + 4 + 2 * u64::from(q.offered % q.size);
        self.mem.write_obj(head, GuestAddress(entry)).unwrap();
        q.offered = q.offered.wrapping_add(1);
        let offered = q.offered;
        self.mem.store(offered, GuestAddress(q.avail() + 2), Ordering::Release).unwrap();
        Some(head)
    }

    /// Notifies `queue`.
    pub fn notify(&self, queue: usize) {
        self.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, queue as u32);
    }

    /// Notifies `queue` if the device wants to hear of the last `added` chains: for a driver without
    /// EVENT_IDX by the used ring's flags, with it by `avail_event`.
    pub fn notify_if_wanted(&self, queue: usize, added: u16, event_idx: bool) -> bool {
        let q = &self.queues[queue];
        let wanted = if event_idx {
            let at = q.used() + 4 + 8 * u64::from(q.size);
            let event: u16 = self.mem.read_obj(GuestAddress(at)).unwrap();
            q.offered.wrapping_sub(event).wrapping_sub(1) < added
        } else {
            let flags: u16 = self.mem.read_obj(GuestAddress(q.used())).unwrap();
            flags & 1 == 0
        };
        if wanted {
            self.notify(queue);
        }
        wanted
    }

    /// Takes the next chain that the device has given back.
    pub fn take_used(&mut self, queue: usize) -> Option<Used> {
        let q = &mut self.queues[queue];
        let offered: u16 = self.mem.load(GuestAddress(q.used() + 2), Ordering::Acquire).unwrap();
        if offered == q.seen {
            return None;
        }
        let entry = q.used() + 4 + 8 * u64::from(q.seen % q.size);
        let [head, len]: [u32; 2] = self.mem.read_obj(GuestAddress(entry)).unwrap();
        q.seen = q.seen.wrapping_add(1);
        let head = head as u16;
        let chain =
            q.chains.remove(&head).unwrap_or_else(|| panic!("chain {head} is not in flight"));
        let mut written = Vec::new();
        for &(index, len) in &chain {
            let at = written.len();
            written.resize(at + len, 0);
            self.mem.read_slice(&mut written[at..], GuestAddress(q.slot(index))).unwrap();
        }
        q.free.extend(chain.iter().map(|&(index, _)| index));
        Some(Used { head, len, written })
    }

    /// Reads and acknowledges the interrupt status.
    pub fn acknowledge(&self) -> u32 {
        let status = self.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS);
        self.write(reg::VIRTIO_MMIO_INTERRUPT_ACK, status);
        status
    }

    /// The device status register.
    pub fn status(&self) -> u32 {
        self.read(reg::VIRTIO_MMIO_STATUS)
    }
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest").field("queues", &self.queues).finish()
    }
}
