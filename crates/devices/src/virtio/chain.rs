//! A descriptor chain, read from guest memory once and then held by the device.
//!
//! The guest may change a descriptor at any time. So a chain is copied out first, and checked as it is
//! copied: it must end, be no longer than the queue, and have its device-readable part before its
//! device-writable part (virtio 1.2, section 2.7.4.2). Buffers may lie anywhere, overlap, or point
//! to no memory: that shows when they are used, as an [`AccessError`].

use std::ops::Deref;

use thiserror::Error;
use virtio_queue::DescriptorChain;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, Permissions};

use crate::virtio::Memory;

/// Guest memory of a buffer could not be used: it is no RAM, or the buffer is too short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("buffer at {address:#x} cannot be used for {len} bytes")]
pub struct AccessError {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes wanted.
    pub len: usize,
}

/// Why a chain is not a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ChainError {
    /// No descriptor could be read.
    #[error("descriptor chain {0} is empty or its head is out of range")]
    Empty(u16),
    /// The chain does not end: it loops, is longer than its queue, or leads out of the table.
    #[error("descriptor chain {0} does not end properly")]
    Broken(u16),
    /// A device-readable buffer follows a device-writable one.
    #[error("descriptor chain {0} has a readable buffer after a writable one")]
    Order(u16),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    address: GuestAddress,
    len: usize,
}

/// A sequence of guest buffers that is read or written from front to back.
#[derive(Debug, Clone, Default)]
pub struct Buffers {
    segments: Vec<Segment>,
    /// Segment and offset in it of the next byte.
    at: (usize, usize),
    left: usize,
}

impl Buffers {
    fn push(&mut self, address: GuestAddress, len: u32) {
        if len > 0 {
            self.segments.push(Segment { address, len: len as usize });
            self.left += len as usize;
        }
    }

    /// Bytes not used yet.
    pub fn remaining(&self) -> usize {
        self.left
    }

    /// Number of buffers, empty ones not counted.
    pub fn segments(&self) -> usize {
        self.segments.len()
    }

    /// The next piece of at most `want` bytes that lies in one buffer.
    fn piece(&self, want: usize) -> Option<(GuestAddress, usize)> {
        let segment = self.segments.get(self.at.0)?;
        let n = want.min(segment.len - self.at.1);
        // An address that wraps is no memory; the access then fails on u64::MAX.
        let address = segment.address.checked_add(self.at.1 as u64);
        Some((address.unwrap_or(GuestAddress(u64::MAX)), n))
    }

    fn advance(&mut self, n: usize) {
        self.left -= n;
        self.at.1 += n;
        if self.segments.get(self.at.0).is_some_and(|s| s.len == self.at.1) {
            self.at = (self.at.0 + 1, 0);
        }
    }

    /// Calls `f` with address, offset and length of each piece of the next `len` bytes. On error the
    /// position is that of the piece that failed.
    fn for_pieces(
        &mut self,
        len: usize,
        mut f: impl FnMut(GuestAddress, usize, usize) -> Result<(), ()>,
    ) -> Result<(), AccessError> {
        let mut done = 0;
        while done < len {
            let (address, n) =
                self.piece(len - done).ok_or(AccessError { address: 0, len: len - done })?;
            f(address, done, n).map_err(|()| AccessError { address: address.0, len: n })?;
            self.advance(n);
            done += n;
        }
        Ok(())
    }

    /// Reads the next bytes into all of `out`.
    ///
    /// # Errors
    /// Fewer bytes are left, or a buffer is no RAM.
    pub fn read(&mut self, mem: &Memory, out: &mut [u8]) -> Result<(), AccessError> {
        self.for_pieces(out.len(), |address, at, n| {
            mem.read_slice(&mut out[at..at + n], address).map_err(drop)
        })
    }

    /// Writes all of `data` into the next bytes.
    ///
    /// # Errors
    /// Fewer bytes are left, or a buffer is no RAM.
    pub fn write(&mut self, mem: &Memory, data: &[u8]) -> Result<(), AccessError> {
        self.for_pieces(data.len(), |address, at, n| {
            mem.write_slice(&data[at..at + n], address).map_err(drop)
        })
    }

    /// Skips the next `len` bytes.
    ///
    /// # Errors
    /// Fewer bytes are left.
    pub fn skip(&mut self, len: usize) -> Result<(), AccessError> {
        self.for_pieces(len, |_, _, _| Ok(()))
    }

    /// Takes the last `len` bytes away into buffers of their own. `None`, with nothing changed, if there
    /// are fewer or some bytes have been used.
    pub fn split_tail(&mut self, len: usize) -> Option<Buffers> {
        if self.at != (0, 0) || len > self.left {
            return None;
        }
        let mut tail = Vec::new();
        let mut want = len;
        while want > 0 {
            let last = self.segments.last_mut()?;
            if last.len <= want {
                want -= last.len;
                tail.extend(self.segments.pop());
            } else {
                last.len -= want;
                let address = last.address.checked_add(last.len as u64);
                let address = address.unwrap_or(GuestAddress(u64::MAX));
                tail.push(Segment { address, len: want });
                want = 0;
            }
        }
        tail.reverse();
        self.left -= len;
        Some(Buffers { segments: tail, at: (0, 0), left: len })
    }

    /// True if all bytes left are RAM.
    pub fn are_ram(&self, mem: &Memory) -> bool {
        let mut rest = self.clone();
        let len = rest.left;
        rest.for_pieces(len, |address, _, n| {
            mem.check_range(address, n, Permissions::ReadWrite).then_some(()).ok_or(())
        })
        .is_ok()
    }
}

/// A checked chain: what the guest gives the device to read, and room for the answer.
#[derive(Debug, Clone)]
pub struct Chain {
    /// Index of the first descriptor: the name of the chain in the used ring.
    pub head: u16,
    /// Device-readable buffers.
    pub readable: Buffers,
    /// Device-writable buffers.
    pub writable: Buffers,
}

impl Chain {
    /// Copies a chain out of guest memory. `limit` is the most descriptors a chain may have: the queue's
    /// size (virtio 1.2, section 2.7.5.3.1), which holds for indirect ones too.
    pub(super) fn copy_from<M>(
        descriptors: DescriptorChain<M>,
        limit: u16,
    ) -> Result<Self, ChainError>
    where
        M: Deref,
        M::Target: GuestMemory,
    {
        let head = descriptors.head_index();
        let mut chain = Self { head, readable: Buffers::default(), writable: Buffers::default() };
        let mut last_has_next = None;
        let mut writing = false;
        for (n, descriptor) in descriptors.enumerate() {
            if n >= usize::from(limit) {
                return Err(ChainError::Broken(head));
            }
            if descriptor.is_write_only() {
                writing = true;
                chain.writable.push(descriptor.addr(), descriptor.len());
            } else if writing {
                return Err(ChainError::Order(head));
            } else {
                chain.readable.push(descriptor.addr(), descriptor.len());
            }
            last_has_next = Some(descriptor.has_next());
        }
        match last_has_next {
            None => Err(ChainError::Empty(head)),
            // The iterator stops silently where it cannot go on: a good chain says itself that it ends.
            Some(true) => Err(ChainError::Broken(head)),
            Some(false) => Ok(chain),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn buffers(segments: &[(u64, u32)]) -> Buffers {
        let mut b = Buffers::default();
        segments.iter().for_each(|&(a, n)| b.push(GuestAddress(a), n));
        b
    }

    fn memory() -> Memory {
        Memory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap()
    }

    #[test]
    fn reads_across_segments_and_stops_at_the_end() {
        let mem = memory();
        mem.write_slice(b"abcdef", GuestAddress(0x100)).unwrap();
        let mut b = buffers(&[(0x103, 3), (0, 0), (0x100, 3)]);
        let mut out = [0; 5];
        b.read(&mem, &mut out).unwrap();
        assert_eq!(&out, b"defab");
        assert_eq!(b.remaining(), 1);
        assert!(b.read(&mem, &mut [0; 2]).is_err());
    }

    #[test]
    fn unusable_addresses_are_errors() {
        let mem = memory();
        for (address, len) in [(0xffff, 2), (u64::MAX, 1), (u64::MAX - 1, 8), (0x1_0000, 1)] {
            let mut b = buffers(&[(address, len)]);
            assert!(!b.are_ram(&mem), "{address:#x}");
            assert!(b.write(&mem, &vec![1; len as usize]).is_err(), "{address:#x}");
        }
    }

    proptest! {
        /// Splitting a tail off and reading both parts gives what reading the whole gives.
        #[test]
        fn split_tail_keeps_every_byte(
            lens in prop::collection::vec(0u32..40, 1..8),
            tail in 0usize..200,
        ) {
            let mem = memory();
            let pattern: Vec<u8> = (0..0x8000u32).map(|i| (i % 251) as u8).collect();
            mem.write_slice(&pattern, GuestAddress(0)).unwrap();
            let segments: Vec<_> = lens.iter().enumerate().map(|(i, &n)| (i as u64 * 100, n)).collect();
            let mut whole = buffers(&segments);
            let total = whole.remaining();
            let mut expected = vec![0; total];
            whole.clone().read(&mem, &mut expected).unwrap();
            match whole.split_tail(tail) {
                None => prop_assert!(tail > total),
                Some(mut rest) => {
                    prop_assert_eq!(rest.remaining(), tail);
                    let mut got = vec![0; total];
                    whole.read(&mem, &mut got[..total - tail]).unwrap();
                    rest.read(&mem, &mut got[total - tail..]).unwrap();
                    prop_assert_eq!(got, expected);
                }
            }
        }
    }
}
