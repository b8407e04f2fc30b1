//! Where RAM comes from, and how it forks.
//!
//! A backend owns one mapping of the whole of RAM. The trait is the seam at which backends differ:
//! what fork(2) by itself does to the mapping, what the child has to do before it touches it, how a
//! VM with such RAM can be branched, and how pages are given back so that zeroes are read there.

mod anonymous;
pub(crate) mod extents;
mod file;
mod memfd;
mod mode;
mod remap;
#[cfg(test)]
mod tests;
mod userfault;

use std::io;
use std::ops::Range;

use forkd_sys::mmap::Mapping;

pub use anonymous::Anonymous;
pub use extents::{ExtentFault, FileExtent};
pub use file::FileBacked;
pub use memfd::{Memfd, Sharing};
pub use mode::{BranchMode, MemoryBackend, UnknownName};
pub use userfault::{
    FileSource, LoadStatus, PageSource, SourceFailure, Userfault, WorkingSet, WorkingSetError,
};

use crate::MemoryError;
use crate::memfd::MemfdRegion;

/// Size of a transparent huge page on x86-64, and so the alignment of RAM.
const HUGE_PAGE: usize = 2 << 20;

/// What fork(2) does to the RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForkBehaviour {
    /// Parent and child share all pages, and whoever writes one gets a copy: the fork is complete
    /// when fork(2) returns, and either side may run.
    CopyOnWrite,
    /// Parent and child would write the same pages: a VM must not be forked. In a child that there
    /// is all the same, [`Backend::detach_child`] fails.
    Shared,
    /// Pages that are not loaded yet would be lost to the child: a VM must not be forked now. It can
    /// be once all is loaded ([`Userfault::complete`]).
    Incomplete,
}

/// A source of guest RAM.
pub trait Backend: std::fmt::Debug + Send + Sync {
    /// Which one it is.
    fn kind(&self) -> MemoryBackend;

    /// The whole of RAM. Its address must stay the same for the life of the backend, in forked
    /// children too.
    fn mapping(&self) -> &Mapping;

    /// What fork(2) does to it now.
    fn fork_behaviour(&self) -> ForkBehaviour {
        ForkBehaviour::CopyOnWrite
    }

    /// Called in a forked child before anything touches RAM: makes it the child's own, at the same
    /// addresses.
    ///
    /// # Errors
    /// The child cannot have RAM of its own; it must end.
    fn detach_child(&mut self) -> Result<(), MemoryError> {
        self.check_fork()
    }

    /// Whether fork(2) now gives a child RAM of its own.
    ///
    /// # Errors
    /// [`MemoryError::NotForkable`] says why not, and what to do instead.
    fn check_fork(&self) -> Result<(), MemoryError> {
        match self.why_not(BranchMode::Fork) {
            Some(why) => Err(MemoryError::NotForkable { backend: self.kind(), why }),
            None => Ok(()),
        }
    }

    /// The modes in which a VM with this RAM can be branched now, the preferred one first.
    fn branch_modes(&self) -> &'static [BranchMode] {
        self.kind().branch_modes()
    }

    /// Why the VM cannot be branched in that mode now, and what to do instead; `None` if it can.
    fn why_not(&self, mode: BranchMode) -> Option<&'static str> {
        self.kind().why_not(mode)
    }

    /// Gives the pages of a range back to the host as far as it can, and lets zeroes be read there.
    /// Offset and length are multiples of the page size.
    ///
    /// # Errors
    /// `InvalidInput` for a range that is not within RAM; the kernel refuses.
    fn discard(&self, offset: usize, len: usize) -> io::Result<()> {
        self.mapping().discard(offset, len)
    }

    /// Makes the pages of a range present and writable. Offset and length are multiples of the page
    /// size.
    ///
    /// # Errors
    /// `InvalidInput` for a range that is not within RAM; no memory is left; pages cannot be loaded.
    fn populate_write(&self, offset: usize, len: usize) -> io::Result<()> {
        self.mapping().populate_write(offset, len)
    }

    /// The parts of RAM, as offsets in ascending order, that may hold bytes of which this process's page tables do not
    /// tell: what is in none of them, and was never touched here, is zero.
    ///
    /// # Errors
    /// What RAM is in cannot be asked.
    fn backed(&self) -> io::Result<Vec<Range<u64>>> {
        Ok(std::iter::once(0..self.mapping().len() as u64).collect())
    }

    /// The memfd that RAM is in, or was copied from.
    fn memfd(&self) -> Option<&MemfdRegion> {
        None
    }

    /// The controls of RAM that is loaded as it is touched.
    fn userfault(&self) -> Option<&Userfault> {
        None
    }
}
