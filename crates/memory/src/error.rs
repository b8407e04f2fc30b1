//! Why guest RAM could not be made or used.

use std::io;

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
