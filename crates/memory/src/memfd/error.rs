//! Why a memfd could not be made or filled.

use std::io;
use std::path::PathBuf;

use forkd_sys::PathError;

/// A memfd with guest RAM could not be made, filled or adopted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemfdError {
    /// The memory file cannot be opened or read.
    #[error(transparent)]
    Source(#[from] PathError),
    /// The memory file is a directory, a device or the like.
    #[error("memory file {}: not a regular file", path.display())]
    NotAFile {
        /// The memory file.
        path: PathBuf,
    },
    /// The memory file has not the size that was recorded when it was written.
    #[error("memory file {}: has {found} bytes, but {expected} were recorded", path.display())]
    Length {
        /// The memory file.
        path: PathBuf,
        /// Size that was recorded, in bytes.
        expected: u64,
        /// Its size now, in bytes.
        found: u64,
    },
    /// The memory file changed its size while it was copied.
    #[error(
        "memory file {}: had {before} bytes when it was opened and {after} while it was copied; something writes to it",
        path.display()
    )]
    Changed {
        /// The memory file.
        path: PathBuf,
        /// Size at the beginning, in bytes.
        before: u64,
        /// Size that was found later, in bytes.
        after: u64,
    },
    /// No bytes: neither a guest nor mmap can do with none.
    #[error("memory of 0 bytes ({what})")]
    Empty {
        /// The memory file or the memfd's name.
        what: String,
    },
    /// A name that the kernel does not take.
    #[error("{name:?} cannot name a memfd: at most {max} bytes, none of them NUL")]
    Name {
        /// The name.
        name: String,
        /// Most bytes of a name.
        max: usize,
    },
    /// The kernel gives no memfd of that size.
    #[error("cannot {action} memfd {name:?} of {len} bytes: {source}")]
    Create {
        /// What was tried.
        action: &'static str,
        /// Its name.
        name: String,
        /// Its size in bytes.
        len: u64,
        /// Why.
        source: io::Error,
    },
    /// Bytes could not be put into the memfd.
    #[error("cannot write {len} bytes at {offset:#x} of memfd {name:?}: {source}")]
    Write {
        /// Its name.
        name: String,
        /// Where, in bytes.
        offset: u64,
        /// How many bytes.
        len: usize,
        /// Why.
        source: io::Error,
    },
    /// A descriptor from elsewhere cannot be guest RAM.
    #[error("cannot use {what} as guest RAM: {reason}")]
    Foreign {
        /// The path or descriptor.
        what: String,
        /// Why not.
        reason: String,
    },
    /// The extents of the memory files do not fit.
    #[error(transparent)]
    Extents(Box<crate::MemoryError>),
    /// Not on this operating system.
    #[error("guest RAM in a memfd needs Linux")]
    Unsupported,
}
