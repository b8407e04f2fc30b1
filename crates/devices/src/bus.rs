//! Port and memory-mapped I/O: address ranges, each of which leads to one device.
//!
//! A bus is built before the first vCPU runs and does not change after; vCPU threads share it. Each
//! device has its own lock, so vCPUs that talk to different devices do not wait for one another.
//! What no device claims reads as all ones, as on a real bus, and is counted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

/// What a bus asks of a device. Accesses are 1 to 8 bytes long; a device must take any length.
pub trait BusDevice: Send {
    /// Reads at `offset` from the device's base into all of `data`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset` from the device's base.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Why a range could not be put on a bus.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BusError {
    /// The range is empty or runs past the end of the address space.
    #[error("bus range {base:#x}+{len:#x} is empty or wraps")]
    BadRange {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The range meets one that is taken.
    #[error("bus range {base:#x}+{len:#x} overlaps {other_base:#x}+{other_len:#x}")]
    Overlap {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
        /// First address of the range that is there.
        other_base: u64,
        /// Its length in bytes.
        other_len: u64,
    },
}

struct Entry {
    base: u64,
    len: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// One address space of devices.
#[derive(Default)]
pub struct Bus {
    entries: Vec<Entry>,
    unclaimed_reads: AtomicU64,
    unclaimed_writes: AtomicU64,
}

impl Bus {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `base..base + len`.
    ///
    /// # Errors
    /// An empty or wrapping range, or one that meets another.
    pub fn insert(
        &mut self,
        base: u64,
        len: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), BusError> {
        // The last address, so that a range may end at the top of the address space.
        let last = len
            .checked_sub(1)
            .and_then(|n| base.checked_add(n))
            .ok_or(BusError::BadRange { base, len })?;
        let at = self.entries.partition_point(|e| e.base < base);
        let before = at.checked_sub(1).and_then(|i| self.entries.get(i));
        let taken = before
            .filter(|e| base - e.base < e.len)
            .or_else(|| self.entries.get(at).filter(|e| e.base <= last));
        if let Some(other) = taken {
            return Err(BusError::Overlap {
                base,
                len,
                other_base: other.base,
                other_len: other.len,
            });
        }
        self.entries.insert(at, Entry { base, len, device });
        Ok(())
    }

    fn find(&self, address: u64) -> Option<(&Entry, u64)> {
        let at = self.entries.partition_point(|e| e.base <= address).checked_sub(1)?;
        let entry = self.entries.get(at)?;
        let offset = address - entry.base;
        (offset < entry.len).then_some((entry, offset))
    }

    /// Reads at `address`. Returns false, with `data` all ones, if no device is there.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let Some((entry, offset)) = self.find(address) else {
            data.fill(0xff);
            self.unclaimed_reads.fetch_add(1, Ordering::Relaxed);
            return false;
        };
        entry.device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
        true
    }

    /// Writes at `address`. Returns false if no device is there; the write is then lost.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((entry, offset)) = self.find(address) else {
            self.unclaimed_writes.fetch_add(1, Ordering::Relaxed);
            return false;
        };
        entry.device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        true
    }

    /// Reads and writes that no device claimed, so far.
    pub fn unclaimed(&self) -> (u64, u64) {
        (
            self.unclaimed_reads.load(Ordering::Relaxed),
            self.unclaimed_writes.load(Ordering::Relaxed),
        )
    }
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.entries.iter().map(|e| (e.base, e.len))).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Probe(u8, Vec<(u64, Vec<u8>)>);

    impl BusDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 ^ offset as u8);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.1.push((offset, data.to_vec()));
        }
    }

    fn probe(id: u8) -> Arc<Mutex<Probe>> {
        Arc::new(Mutex::new(Probe(id, Vec::new())))
    }

    #[test]
    fn routes_by_range_and_counts_the_rest() {
        let mut bus = Bus::new();
        let (a, b) = (probe(0xa0), probe(0xb0));
        bus.insert(0x3f8, 8, a.clone()).unwrap();
        bus.insert(0x60, 5, b.clone()).unwrap();
        let mut byte = [0];
        assert!(bus.read(0x3ff, &mut byte));
        assert_eq!(byte, [0xa7]);
        assert!(!bus.read(0x400, &mut byte));
        assert_eq!(byte, [0xff]);
        assert!(bus.write(0x64, &[0xfe]));
        assert!(!bus.write(0x65, &[0xfe]));
        assert_eq!(b.lock().unwrap().1, vec![(4, vec![0xfe])]);
        assert!(a.lock().unwrap().1.is_empty());
        assert_eq!(bus.unclaimed(), (1, 1));
    }

    #[test]
    fn refuses_bad_ranges_and_accepts_the_top() {
        let mut bus = Bus::new();
        assert!(matches!(bus.insert(5, 0, probe(0)), Err(BusError::BadRange { .. })));
        assert!(matches!(bus.insert(u64::MAX, 2, probe(0)), Err(BusError::BadRange { .. })));
        bus.insert(u64::MAX, 1, probe(0)).unwrap();
        assert!(bus.read(u64::MAX, &mut [0]));
    }

    proptest! {
        /// Whatever ranges are offered, those accepted are disjoint and each address leads to its own.
        #[test]
        fn accepted_ranges_never_overlap(ranges in prop::collection::vec((0u64..200, 1u64..20), 1..30)) {
            let mut bus = Bus::new();
            let mut owner = vec![None; 256];
            for (id, (base, len)) in ranges.into_iter().enumerate() {
                let span = base as usize..(base + len) as usize;
                let free = owner[span.clone()].iter().all(Option::is_none);
                let accepted = bus.insert(base, len, probe(id as u8)).is_ok();
                prop_assert_eq!(accepted, free);
                if accepted {
                    owner[span].iter_mut().enumerate().for_each(|(o, x)| *x = Some(id as u8 ^ o as u8));
                }
            }
            for (address, expected) in owner.iter().enumerate() {
                let mut byte = [0];
                let found = bus.read(address as u64, &mut byte);
                prop_assert_eq!(found.then_some(byte[0]), *expected);
            }
        }
    }
}
