//! The copy-on-write layer: which blocks of a disk were changed, and their content.
//!
//! Every block is in one of three states. Absent: it reads as the base does. Stored: its 4 KiB are in the
//! layer's memory. Zero: it reads as zeroes and takes no memory.
//!
//! Memory is mapped for the whole disk without reservation; only stored blocks have pages.

use std::io;

use forkd_sys::mmap::{AnonymousOptions, Mapping};

use crate::virtio::block::bitmap::Bitmap;

/// Granularity of copy-on-write, in bytes: the size of a page, so that a block can be given back.
pub const BLOCK_SIZE: usize = 4096;

/// Where a block's content is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Absent,
    Stored,
    Zero,
}

#[derive(Debug)]
pub(super) struct Layer {
    memory: Mapping,
    stored: Bitmap,
    zero: Bitmap,
    stored_count: u64,
    quota_blocks: u64,
}

impl Layer {
    /// An empty layer of `blocks` blocks, of which at most `quota_blocks` may be stored.
    pub(super) fn new(blocks: usize, quota_blocks: u64) -> io::Result<Self> {
        let len = blocks
            .checked_mul(BLOCK_SIZE)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "disk is too large"))?;
        let options = AnonymousOptions { noreserve: true, ..AnonymousOptions::default() };
        Ok(Self {
            memory: Mapping::anonymous(len, options)?,
            stored: Bitmap::new(blocks),
            zero: Bitmap::new(blocks),
            stored_count: 0,
            quota_blocks,
        })
    }

    pub(super) fn place(&self, block: usize) -> Place {
        if self.stored.get(block) {
            Place::Stored
        } else if self.zero.get(block) {
            Place::Zero
        } else {
            Place::Absent
        }
    }

    pub(super) fn stored_count(&self) -> u64 {
        self.stored_count
    }

    /// True if one more block may be stored.
    pub(super) fn has_room(&self) -> bool {
        self.stored_count < self.quota_blocks
    }

    /// Copies from stored memory.
    pub(super) fn read(&self, offset: usize, out: &mut [u8]) -> io::Result<()> {
        Ok(self.memory.read_at(offset, out)?)
    }

    /// Copies into memory of blocks that are stored, or about to be (see [`Layer::set_stored`]).
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) -> io::Result<()> {
        Ok(self.memory.write_at(offset, data)?)
    }

    pub(super) fn set_stored(&mut self, block: usize) {
        self.zero.replace(block, false);
        if !self.stored.replace(block, true) {
            self.stored_count += 1;
        }
    }

    /// Makes `count` blocks absent or zero, and gives their memory back.
    pub(super) fn clear(&mut self, first: usize, count: usize, place: Place) -> io::Result<()> {
        // Memory first: if that fails, the blocks stay what they were, or stored with zeroes.
        self.memory.discard(first * BLOCK_SIZE, count * BLOCK_SIZE)?;
        for block in first..first + count {
            if self.stored.replace(block, false) {
                self.stored_count -= 1;
            }
            self.zero.replace(block, place == Place::Zero);
        }
        Ok(())
    }

    pub(super) fn stored_blocks(&self) -> impl Iterator<Item = usize> + '_ {
        self.stored.ones()
    }

    pub(super) fn zero_blocks(&self) -> impl Iterator<Item = usize> + '_ {
        self.zero.ones()
    }
}
