//! Private mappings of a snapshot's memory files: RAM of a child of a durable snapshot.
//!
//! Nothing is read when it is made: the guest's first access to a page finds it in the host's page
//! cache, which all children share, or on the disk. Writes stay in the process. What no extent is
//! for reads as zeroes. fork(2) shares it copy-on-write as it does anonymous memory.
//!
//! A snapshot of several files (a base and its differences) is resolved into extents by whoever
//! knows the chain; here nothing is assembled or copied, with one exception: a process can have only
//! some ten thousand mappings, so of more than 8,192 extents the smallest are read into memory.
//!
//! Known holes: a file that is truncated while it is mapped turns accesses into SIGBUS, and one that
//! is written to may show the guest the new bytes. Snapshot files are never changed once they have
//! their name.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use forkd_sys::mmap::Mapping;

use super::extents::{ExtentFault, Extents, FileExtent, MAX_MAPPED, fault};
use super::remap::{Holes, map_file, reserve};
use super::{Backend, MemoryBackend, Sharing};
use crate::MemoryError;

/// Private mappings of files.
#[derive(Debug)]
pub struct FileBacked {
    mapping: Mapping,
    holes: Holes,
    /// Where the files have something, as offsets in RAM, ascending.
    data: Vec<Range<u64>>,
}

impl FileBacked {
    /// Lays extents of files over `len` bytes of zeroes. The files may be closed afterwards. `data` is where they have
    /// something: a file that is mapped in one piece may have holes, and to read those takes time and page cache.
    ///
    /// # Errors
    /// [`MemoryError::Extent`] for an extent that is not of whole pages, not within RAM or its file,
    /// or overlaps another, and for a file that cannot be mapped or read; [`MemoryError::Reserve`].
    pub fn new(
        len: usize,
        files: &[File],
        extents: &[FileExtent],
        data: Vec<Range<u64>>,
    ) -> Result<Self, MemoryError> {
        let mapped = Self::with_at_most(MAX_MAPPED, len, files, extents)?;
        Ok(Self { data, ..mapped })
    }

    fn with_at_most(
        mappings: usize,
        len: usize,
        files: &[File],
        extents: &[FileExtent],
    ) -> Result<Self, MemoryError> {
        let (map, read) = Extents::check(len as u64, files, extents)?.split(mappings);
        let mapping = reserve(len).map_err(|source| MemoryError::Reserve { len, source })?;
        for (index, extent) in map {
            let mapped = map_extent(&mapping, &files[extent.file], extent);
            mapped.map_err(|source| {
                fault(index, extent, files, ExtentFault::File { action: "map it", source })
            })?;
        }
        for (index, extent) in read {
            let read = read_extent(&mapping, &files[extent.file], extent);
            read.map_err(|source| {
                fault(index, extent, files, ExtentFault::File { action: "read it", source })
            })?;
        }
        Ok(Self { holes: Holes::new(&mapping), mapping, data: Vec::new() })
    }
}

fn map_extent(mapping: &Mapping, file: &File, extent: FileExtent) -> io::Result<()> {
    let offset = usize::try_from(extent.ram_offset).map_err(io::Error::other)?;
    let len = usize::try_from(extent.len).map_err(io::Error::other)?;
    map_file(mapping, offset, len, file, extent.file_offset, Sharing::Private)
}

fn read_extent(mapping: &Mapping, file: &File, extent: FileExtent) -> io::Result<()> {
    const PIECE: u64 = 256 << 10;
    let mut buffer = Vec::new();
    let mut done = 0;
    while done < extent.len {
        let piece = PIECE.min(extent.len - done);
        buffer.resize(usize::try_from(piece).map_err(io::Error::other)?, 0);
        file.read_exact_at(&mut buffer, extent.file_offset + done)?;
        let at = usize::try_from(extent.ram_offset + done).map_err(io::Error::other)?;
        mapping.write_at(at, &buffer)?;
        done += piece;
    }
    Ok(())
}

impl Backend for FileBacked {
    fn kind(&self) -> MemoryBackend {
        MemoryBackend::File
    }

    fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    fn backed(&self) -> io::Result<Vec<Range<u64>>> {
        Ok(self.data.clone())
    }

    fn discard(&self, offset: usize, len: usize) -> io::Result<()> {
        self.holes.punch(&self.mapping, offset, len)
    }
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
