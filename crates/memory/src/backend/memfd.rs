//! RAM in a memfd, mapped shared or privately.
//!
//! Shared, the memfd *is* the VM's RAM: another process that has its descriptor sees each write, so
//! it can capture RAM while the VM runs. fork(2) would leave parent and child with the same RAM, so
//! such a VM is not forked.
//!
//! Privately, the memfd is a snapshot's memory, and the VM's writes stay in its process: any number
//! of children map one memfd, and share its pages until they write to them. Then nobody may have it
//! mapped shared and write to it, as children see such writes in pages that they have not written.
//! Large holes of it are not mapped but zeroes of the process's own: to touch a hole of a memfd
//! would fill it, for all, with a page of zeroes.
//!
//! Known holes: huge pages of the pool are for shared memfds only, as a private copy of one that the
//! pool has no page for kills the process that writes, or its forked children. They are not given
//! back by a discard but zeroed, as a hole would lose the page's reservation.

use std::io;
use std::ops::Range;

use forkd_sys::memfd::{next_data, punch_hole};
use forkd_sys::mmap::{Mapping, page_size};

use super::extents::MAX_MAPPED;
use super::remap::{Holes, check_mappable, map_file, reserve, write_zeroes};
use super::{Backend, ForkBehaviour, HUGE_PAGE, MemoryBackend};
use crate::MemoryError;
use crate::memfd::MemfdRegion;

/// Whether writes to a mapping reach what is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Writes reach it, and all who map it (`MAP_SHARED`).
    Shared,
    /// Writes stay in the process (`MAP_PRIVATE`).
    Private,
}

/// Most runs of data that are told apart.
const MAX_RUNS: usize = 16_384;

/// RAM in a memfd.
#[derive(Debug)]
pub struct Memfd {
    mapping: Mapping,
    region: MemfdRegion,
    sharing: Sharing,
    holes: Holes,
}

impl Memfd {
    /// Maps `len` bytes, the whole of `region`.
    ///
    /// # Errors
    /// [`MemoryError::Memfd`] for a region of another size, and for one of huge pages that is to be
    /// private, or is of an odd number of MiB; [`MemoryError::Reserve`].
    pub fn new(len: usize, region: MemfdRegion, sharing: Sharing) -> Result<Self, MemoryError> {
        let refused = |reason: String| MemoryError::Memfd { len, reason };
        if region.size_bytes() != len as u64 {
            return Err(refused(format!("it has {} bytes", region.size_bytes())));
        }
        if region.has_huge_pages() && sharing == Sharing::Private {
            return Err(refused(
                "huge pages cannot be mapped privately; make the memfd without them".to_owned(),
            ));
        }
        if region.has_huge_pages() && !len.is_multiple_of(HUGE_PAGE) {
            return Err(refused(
                "it has pages of 2 MiB, which RAM must be a multiple of".to_owned(),
            ));
        }
        let mapping = reserve(len).map_err(|source| MemoryError::Reserve { len, source })?;
        let page = if region.has_huge_pages() { HUGE_PAGE } else { page_size() };
        check_mappable(&region, page, sharing)
            .and_then(|()| match sharing {
                Sharing::Shared => map_file(&mapping, 0, len, &region, 0, sharing),
                Sharing::Private => map_data(&mapping, &region),
            })
            .map_err(|error| refused(error.to_string()))?;
        Ok(Self { holes: Holes::new(&mapping), mapping, region, sharing })
    }
}

/// Maps privately what data a memfd has, and its smaller holes.
fn map_data(mapping: &Mapping, region: &MemfdRegion) -> io::Result<()> {
    let len = mapping.len() as u64;
    let least = least_hole(len);
    let mut next = next_data(region, 0, len)?;
    while let Some(mut run) = next {
        next = next_data(region, run.end, len)?;
        while let Some(more) = next.take_if(|more| more.start - run.end < least) {
            run.end = more.end;
            next = next_data(region, run.end, len)?;
        }
        // Within the mapping.
        let (start, len) = (run.start as usize, (run.end - run.start) as usize);
        map_file(mapping, start, len, region, run.start, Sharing::Private)?;
    }
    Ok(())
}

/// The smallest hole that is left out: one that a huge page fits in, and not so small that RAM could
/// be of more pieces than a process may have mappings for.
fn least_hole(len: u64) -> u64 {
    (len / MAX_MAPPED as u64).max(HUGE_PAGE as u64)
}

impl Backend for Memfd {
    fn kind(&self) -> MemoryBackend {
        match self.sharing {
            Sharing::Shared => MemoryBackend::MemfdShared,
            Sharing::Private => MemoryBackend::MemfdPrivate,
        }
    }

    fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    fn fork_behaviour(&self) -> ForkBehaviour {
        match self.sharing {
            Sharing::Shared => ForkBehaviour::Shared,
            Sharing::Private => ForkBehaviour::CopyOnWrite,
        }
    }

    fn discard(&self, offset: usize, len: usize) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        match self.sharing {
            Sharing::Private => self.holes.punch(&self.mapping, offset, len),
            Sharing::Shared if self.region.has_huge_pages() => {
                write_zeroes(&self.mapping, offset, len)
            }
            Sharing::Shared => {
                // The mapping begins at the memfd's first byte.
                if offset.checked_add(len).is_none_or(|end| end > self.mapping.len()) {
                    return Err(io::ErrorKind::InvalidInput.into());
                }
                punch_hole(&self.region, offset as u64, len as u64)
            }
        }
    }

    fn backed(&self) -> io::Result<Vec<Range<u64>>> {
        let len = self.mapping.len() as u64;
        if self.region.has_huge_pages() {
            // hugetlbfs does not tell data from holes.
            return Ok(std::iter::once(0..len).collect());
        }
        let mut data = Vec::new();
        let mut at = 0;
        while let Some(run) = next_data(&self.region, at, len)? {
            if data.len() == MAX_RUNS {
                // To go on asking would take longer than to read what is asked about.
                data.push(run.start..len);
                break;
            }
            at = run.end;
            data.push(run);
        }
        Ok(data)
    }

    fn memfd(&self) -> Option<&MemfdRegion> {
        Some(&self.region)
    }
}

#[cfg(test)]
#[path = "memfd_tests.rs"]
mod tests;
