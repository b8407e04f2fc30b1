//! Where pages come from.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::MemoryError;
use crate::backend::FileExtent;
use crate::backend::extents::Extents;

/// A place that has the bytes of a guest's RAM.
///
/// Both of the loader's threads call it, at times for the same bytes, and a guest waits meanwhile: a
/// source that can hang has to have time limits of its own.
pub trait PageSource: Send + Sync + std::fmt::Debug {
    /// Bytes of RAM that it has.
    fn size(&self) -> u64;

    /// Reads the bytes of RAM from `offset` (as [`FileExtent::ram_offset`]).
    ///
    /// # Errors
    /// They cannot be had now. The pages stay missing; see [`super::Userfault::retry`].
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// Whether a range is known to be zero, so that it need not be read. Must be quick; false if in
    /// doubt.
    fn is_zero(&self, offset: u64, len: u64) -> bool {
        let _ = (offset, len);
        false
    }
}

/// The memory files of a snapshot as a source.
#[derive(Debug)]
pub struct FileSource {
    size: u64,
    files: Vec<File>,
    /// Ascending, none overlapping.
    extents: Vec<FileExtent>,
}

impl FileSource {
    /// RAM of `size` bytes, of which `extents` say which bytes of which of `files` are where; the rest
    /// is zero.
    ///
    /// # Errors
    /// [`MemoryError::Extent`], as for [`crate::backend::FileBacked::new`].
    pub fn new(size: u64, files: Vec<File>, extents: &[FileExtent]) -> Result<Self, MemoryError> {
        let checked = Extents::check(size, &files, extents)?;
        let extents = checked.sorted.into_iter().map(|(_, extent)| extent).collect();
        Ok(Self { size, files, extents })
    }

    /// The parts of a range of RAM that are in a file: where in RAM, how long, and where in which file.
    fn parts(&self, offset: u64, len: u64) -> impl Iterator<Item = FileExtent> + '_ {
        let end = offset.saturating_add(len);
        let first = self.extents.partition_point(|e| e.ram_offset + e.len <= offset);
        let overlapping = self.extents[first..].iter().take_while(move |e| e.ram_offset < end);
        overlapping.map(move |e| {
            let start = e.ram_offset.max(offset);
            let stop = (e.ram_offset + e.len).min(end);
            FileExtent {
                ram_offset: start,
                len: stop - start,
                file: e.file,
                file_offset: e.file_offset + (start - e.ram_offset),
            }
        })
    }
}

impl PageSource for FileSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.fill(0);
        for part in self.parts(offset, buffer.len() as u64) {
            let at = usize::try_from(part.ram_offset - offset).map_err(io::Error::other)?;
            let len = usize::try_from(part.len).map_err(io::Error::other)?;
            self.files[part.file].read_exact_at(&mut buffer[at..at + len], part.file_offset)?;
        }
        Ok(())
    }

    fn is_zero(&self, offset: u64, len: u64) -> bool {
        self.parts(offset, len).all(|part| {
            let end = part.file_offset + part.len;
            // A file that has become too short has no data there, but no zeroes either.
            let there = |file: &File| file.metadata().is_ok_and(|m| m.len() >= end);
            let file = &self.files[part.file];
            matches!(forkd_sys::memfd::next_data(file, part.file_offset, end), Ok(None))
                && there(file)
        })
    }
}
