//! Why guest RAM could not be made or used.

use std::io;

use crate::backend::{ExtentFault, FileExtent, MemoryBackend, WorkingSetError};

/// An operation on guest RAM failed.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A size outside of what a VM can have.
    #[error("{mem_mib} MiB of guest RAM: must be 1 to {max_mib} MiB")]
    Size {
        /// Size asked for.
        mem_mib: u32,
        /// The largest size.
        max_mib: u32,
    },
    /// The host has not enough memory.
    #[error(
        "{mem_mib} MiB of guest RAM are more than the {available_mib} MiB that this host has available; ask for less, or end something"
    )]
    HostTooSmall {
        /// Size asked for.
        mem_mib: u32,
        /// What the host could give without swapping (`MemAvailable`).
        available_mib: u64,
    },
    /// The kernel refused the mapping.
    #[error("cannot map {mem_mib} MiB of guest RAM: {source}")]
    Map {
        /// Size asked for.
        mem_mib: u32,
        /// Why.
        source: io::Error,
    },
    /// The kernel gives no addresses for RAM that is mapped from elsewhere.
    #[error("cannot reserve addresses for {len:#x} bytes of guest RAM: {source}")]
    Reserve {
        /// Size in bytes.
        len: usize,
        /// Why.
        source: io::Error,
    },
    /// A piece of a memory file cannot be laid into RAM.
    #[error(
        "extent #{index}, {:#x} bytes at {:#x} of RAM, from {:#x} of memory file #{}{path}: {reason}",
        extent.len, extent.ram_offset, extent.file_offset, extent.file
    )]
    Extent {
        /// Index among the extents given.
        index: usize,
        /// The extent, with those that go on behind it if there are such.
        extent: FileExtent,
        /// Path of its file in parentheses, or nothing.
        path: String,
        /// What is wrong.
        reason: ExtentFault,
    },
    /// A memfd cannot be RAM of that size.
    #[error("cannot use a memfd as {len:#x} bytes of guest RAM: {reason}")]
    Memfd {
        /// Size of RAM in bytes.
        len: usize,
        /// Why not.
        reason: String,
    },
    /// RAM cannot be loaded as it is touched.
    #[error("cannot {action} {len:#x} bytes of guest RAM that is loaded lazily: {source}")]
    Userfault {
        /// Size of RAM in bytes.
        len: usize,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The working set is not one of this RAM.
    #[error(transparent)]
    WorkingSet(#[from] WorkingSetError),
    /// RAM that fork(2) would not give the child a copy of.
    #[error("guest RAM ({backend}) cannot be forked: {why}")]
    NotForkable {
        /// Where RAM comes from.
        backend: MemoryBackend,
        /// Why not, and what to do instead.
        why: &'static str,
    },
    /// The host's memory figures cannot be read.
    #[error("cannot tell how much memory the host has, from /proc/meminfo: {0}")]
    HostMemory(io::Error),
    /// A guest-physical range is not in RAM.
    #[error("guest-physical range {gpa:#x}, {len:#x} bytes, is not within one region of RAM")]
    NotRam {
        /// Start of the range.
        gpa: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The kernel refused an advice on a range.
    #[error("cannot {action} guest-physical range {gpa:#x}, {len:#x} bytes: {source}")]
    Advise {
        /// What was tried.
        action: &'static str,
        /// Start of the range.
        gpa: u64,
        /// Its length in bytes.
        len: u64,
        /// Why.
        source: io::Error,
    },
    /// The regions do not make up an address space; a fault of this crate.
    #[error("cannot build the guest's address space: {0}")]
    AddressSpace(String),
}
