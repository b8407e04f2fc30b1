//! A disk: an optional base file under an optional copy-on-write layer.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use thiserror::Error;

use crate::virtio::block::layer::{BLOCK_SIZE, Layer, Place};
use crate::virtio::block::state::{Extent, ExtentKind, LayerState};

/// The unit of addresses on a disk (virtio 1.2, section 5.2), in bytes.
pub(super) const SECTOR_SIZE: u64 = 512;
const BLOCK: u64 = BLOCK_SIZE as u64;

/// What a disk is made of.
#[derive(Debug)]
pub struct DiskConfig {
    /// Base image, opened for reading; without one the disk starts as zeroes.
    pub base: Option<File>,
    /// Size in bytes; needed without a base, otherwise at least the base's size. Rounded up to 512.
    pub size: Option<u64>,
    /// Refuse writes.
    pub read_only: bool,
    /// Most bytes that the layer may take; `u64::MAX` for no limit.
    pub layer_quota: u64,
}

/// Why a disk could not be made or used.
#[derive(Debug, Error)]
pub enum DiskError {
    /// Neither a base nor a size, or a size of 0.
    #[error("a disk needs a base image or a size, and a size over 0")]
    NoSize,
    /// The size is less than the base's.
    #[error("disk size {size} is less than its base image's {base}")]
    TooSmall {
        /// Size asked for, in bytes.
        size: u64,
        /// Size of the base, in bytes.
        base: u64,
    },
    /// Larger than this process could map.
    #[error("disk size {0} is too large")]
    TooLarge(u64),
    /// The range is not on the disk.
    #[error("{len} bytes at {offset} are beyond the disk's {size}")]
    OutOfRange {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// Size of the disk.
        size: u64,
    },
    /// A write to a read-only disk.
    #[error("disk is read-only")]
    ReadOnly,
    /// The layer is full.
    #[error("copy-on-write layer is full")]
    Full,
    /// The base ends before its size when it was opened.
    #[error("base image was cut short at {0}")]
    BaseShrunk(u64),
    /// Reading the base, or mapping memory, failed.
    #[error("disk: {0}")]
    Io(#[from] io::Error),
    /// A saved layer does not fit this disk.
    #[error("saved layer is not valid: {0}")]
    BadLayer(String),
}

/// A disk.
#[derive(Debug)]
pub struct Disk {
    base: Option<File>,
    base_len: u64,
    size: u64,
    /// Absent in a read-only disk.
    layer: Option<Layer>,
}

impl Disk {
    /// A disk over `config.base`, with an empty layer.
    ///
    /// # Errors
    /// A size that does not fit, or no memory.
    pub fn new(config: DiskConfig) -> Result<Self, DiskError> {
        let base_len = match &config.base {
            // Not the metadata's length, which is 0 for a block device.
            Some(file) => (&mut &*file).seek(SeekFrom::End(0))?,
            None => 0,
        };
        let wanted = config.size.unwrap_or(base_len);
        if wanted < base_len {
            return Err(DiskError::TooSmall { size: wanted, base: base_len });
        }
        if wanted == 0 {
            return Err(DiskError::NoSize);
        }
        let too_large = || DiskError::TooLarge(wanted);
        let size = wanted.checked_next_multiple_of(SECTOR_SIZE).ok_or_else(too_large)?;
        let layer = if config.read_only {
            None
        } else {
            let blocks = usize::try_from(size.div_ceil(BLOCK)).map_err(|_| too_large())?;
            Some(Layer::new(blocks, config.layer_quota / BLOCK)?)
        };
        Ok(Self { base: config.base, base_len, size, layer })
    }

    /// Size in bytes, a multiple of 512.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// True if writes are refused.
    pub fn read_only(&self) -> bool {
        self.layer.is_none()
    }

    /// Bytes that the layer holds.
    pub fn dirty_bytes(&self) -> u64 {
        self.layer.as_ref().map_or(0, |l| l.stored_count() * BLOCK)
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
            return Err(DiskError::OutOfRange { offset, len, size: self.size });
        }
        Ok(())
    }

    fn place(&self, block: u64) -> Place {
        self.layer.as_ref().map_or(Place::Absent, |l| l.place(block as usize))
    }

    /// Reads the base, which is followed by zeroes without end.
    fn read_base(&self, offset: u64, out: &mut [u8]) -> Result<(), DiskError> {
        let there = self.base_len.saturating_sub(offset).min(out.len() as u64) as usize;
        let (head, tail) = out.split_at_mut(there);
        tail.fill(0);
        if let Some(base) = self.base.as_ref().filter(|_| there > 0) {
            base.read_exact_at(head, offset).map_err(|e| match e.kind() {
                io::ErrorKind::UnexpectedEof => DiskError::BaseShrunk(offset),
                _ => DiskError::Io(e),
            })?;
        }
        Ok(())
    }

    /// Reads at `offset` into all of `out`.
    ///
    /// # Errors
    /// The range is not on the disk, or the base cannot be read.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), DiskError> {
        self.check(offset, out.len() as u64)?;
        let end = offset + out.len() as u64;
        let mut at = offset;
        while at < end {
            // As far as blocks lie in the same place: one read for all of them.
            let place = self.place(at / BLOCK);
            let mut next = (at / BLOCK + 1) * BLOCK;
            while next < end && self.place(next / BLOCK) == place {
                next += BLOCK;
            }
            let next = next.min(end);
            let piece = &mut out[(at - offset) as usize..(next - offset) as usize];
            match (place, &self.layer) {
                (Place::Stored, Some(layer)) => layer.read(at as usize, piece)?,
                (Place::Zero, _) => piece.fill(0),
                _ => self.read_base(at, piece)?,
            }
            at = next;
        }
        Ok(())
    }

    /// Writes all of `data` at `offset`.
    ///
    /// # Errors
    /// The range is not on the disk, the disk is read-only, the layer is full, or the base cannot be
    /// read. Then a part, from the front and in whole blocks, may have been written.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.check(offset, data.len() as u64)?;
        let end = offset + data.len() as u64;
        let mut at = offset;
        while at < end {
            let next = ((at / BLOCK + 1) * BLOCK).min(end);
            self.write_in_block(at, &data[(at - offset) as usize..(next - offset) as usize])?;
            at = next;
        }
        Ok(())
    }

    fn write_in_block(&mut self, at: u64, data: &[u8]) -> Result<(), DiskError> {
        let block = at / BLOCK;
        let mut fill = None;
        match self.place(block) {
            Place::Stored => {}
            _ if self.layer.as_ref().is_some_and(|l| !l.has_room()) => return Err(DiskError::Full),
            // Memory of a block that is not stored is zero.
            Place::Zero => {}
            Place::Absent if data.len() < BLOCK_SIZE => {
                let mut old = [0; BLOCK_SIZE];
                self.read_base(block * BLOCK, &mut old)?;
                fill = Some(old);
            }
            Place::Absent => {}
        }
        let layer = self.layer.as_mut().ok_or(DiskError::ReadOnly)?;
        if let Some(old) = fill {
            layer.write((block * BLOCK) as usize, &old)?;
        }
        layer.write(at as usize, data)?;
        layer.set_stored(block as usize);
        Ok(())
    }

    /// Makes a range read as zeroes. Whole blocks give their memory back.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.check(offset, len)?;
        if self.read_only() {
            return Err(DiskError::ReadOnly);
        }
        let end = offset + len;
        let first = offset.div_ceil(BLOCK);
        // The last block of a disk may be shorter than a block.
        let last = if end == self.size { end.div_ceil(BLOCK) } else { end / BLOCK };
        if first >= last {
            return self.write(offset, &vec![0; len as usize]);
        }
        self.write(offset, &vec![0; (first * BLOCK - offset) as usize])?;
        self.clear(first, last - first)?;
        let tail = end.saturating_sub(last * BLOCK);
        self.write(end - tail, &vec![0; tail as usize])
    }

    /// Tells that the content of a range is not needed. Whole blocks read as zeroes after, the rest
    /// stays as it is.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn discard(&mut self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.check(offset, len)?;
        if self.read_only() {
            return Err(DiskError::ReadOnly);
        }
        let end = offset + len;
        let first = offset.div_ceil(BLOCK);
        let last = if end == self.size { end.div_ceil(BLOCK) } else { end / BLOCK };
        if first < last { self.clear(first, last - first) } else { Ok(()) }
    }

    fn clear(&mut self, first: u64, count: u64) -> Result<(), DiskError> {
        // Past the base an absent block reads as zeroes by itself.
        let base_blocks = self.base_len.div_ceil(BLOCK);
        let layer = self.layer.as_mut().ok_or(DiskError::ReadOnly)?;
        let over_base = base_blocks.saturating_sub(first).min(count);
        if over_base > 0 {
            layer.clear(first as usize, over_base as usize, Place::Zero)?;
        }
        if count > over_base {
            layer.clear(
                (first + over_base) as usize,
                (count - over_base) as usize,
                Place::Absent,
            )?;
        }
        Ok(())
    }

    /// The shape of the layer, for a durable snapshot.
    pub fn layer_state(&self) -> LayerState {
        let mut extents: Vec<Extent> = Vec::new();
        if let Some(layer) = &self.layer {
            let data = layer.stored_blocks().map(|b| (b, ExtentKind::Data));
            let zero = layer.zero_blocks().map(|b| (b, ExtentKind::Zero));
            let mut all: Vec<_> = data.chain(zero).collect();
            all.sort_unstable_by_key(|&(block, _)| block);
            for (block, kind) in all {
                let block = block as u64;
                match extents.last_mut() {
                    Some(e) if e.kind == kind && e.first + e.count == block => e.count += 1,
                    _ => extents.push(Extent { first: block, count: 1, kind }),
                }
            }
        }
        LayerState { extents }
    }

    /// Writes the data of the layer's blocks, in the order of [`Disk::layer_state`].
    ///
    /// # Errors
    /// That of `out`.
    pub fn write_layer(&self, out: &mut dyn Write) -> io::Result<()> {
        let Some(layer) = &self.layer else { return Ok(()) };
        let mut buffer = [0; BLOCK_SIZE];
        for block in layer.stored_blocks() {
            layer.read(block * BLOCK_SIZE, &mut buffer)?;
            out.write_all(&buffer)?;
        }
        Ok(())
    }

    /// Fills an empty layer from a saved shape and its data.
    ///
    /// # Errors
    /// The shape does not fit the disk, its quota, or what is there already; the data ends early.
    pub fn read_layer(&mut self, state: &LayerState, data: &mut dyn Read) -> Result<(), DiskError> {
        let bad = |what: &str| Err(DiskError::BadLayer(what.to_owned()));
        let blocks = self.size.div_ceil(BLOCK);
        let Some(layer) = &mut self.layer else {
            return if state.extents.is_empty() { Ok(()) } else { bad("disk is read-only") };
        };
        if layer.stored_blocks().next().is_some() || layer.zero_blocks().next().is_some() {
            return bad("layer is not empty");
        }
        let mut free_from = 0;
        for extent in &state.extents {
            let end = extent.first.checked_add(extent.count).filter(|&end| end <= blocks);
            let (true, Some(end)) = (extent.first >= free_from && extent.count > 0, end) else {
                return bad("an extent is empty, out of order or beyond the disk");
            };
            free_from = end;
        }
        let mut buffer = [0; BLOCK_SIZE];
        for extent in &state.extents {
            let (first, count) = (extent.first as usize, extent.count as usize);
            if extent.kind == ExtentKind::Zero {
                layer.clear(first, count, Place::Zero)?;
                continue;
            }
            for block in first..first + count {
                if !layer.has_room() {
                    return Err(DiskError::Full);
                }
                data.read_exact(&mut buffer)?;
                layer.write(block * BLOCK_SIZE, &buffer)?;
                layer.set_stored(block);
            }
        }
        Ok(())
    }
}
