//! RAM in a memfd, mapped shared or privately.
//!
//! Shared, the memfd *is* the VM's RAM: another process that has its descriptor sees each write, so
//! it can capture RAM while the VM runs. fork(2) would leave parent and child with the same RAM, so
//! such a VM is not forked.
//!
//! Privately, the memfd is a snapshot's memory, and the VM's writes stay in its process: any number
//! of children map one memfd, and share its pages until they write to them. Then nobody may have it
//! mapped shared and write to it, as children see such writes in pages that they have not written.
//!
//! Known holes: huge pages of the pool are for shared memfds only, as a private copy of one that the
//! pool has no page for kills the process that writes, or its forked children. They are not given
//! back by a discard but zeroed, as a hole would lose the page's reservation.

use std::io;

use forkd_sys::memfd::punch_hole;
use forkd_sys::mmap::{Mapping, page_size};

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
            .and_then(|()| map_file(&mapping, 0, len, &region, 0, sharing))
            .map_err(|error| refused(error.to_string()))?;
        Ok(Self { holes: Holes::new(&mapping), mapping, region, sharing })
    }
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

    fn memfd(&self) -> Option<&MemfdRegion> {
        Some(&self.region)
    }
}

#[cfg(test)]
#[path = "memfd_tests.rs"]
mod tests;
