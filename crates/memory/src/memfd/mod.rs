//! Guest RAM in a memfd: memory that has a descriptor, so that several processes can map it.
//!
//! A [`MemfdRegion`] is either the RAM of one running VM, mapped shared so that another process can
//! see and capture it, or the memory of a snapshot, copied in once by [`create_and_populate`] and
//! mapped privately by any number of children: they share its pages until they write.
//!
//! Its size is sealed: a shrink would turn the accesses of all who map it into SIGBUS. Its bytes are
//! sealed only if that is asked for ([`MemfdOptions::immutable`]), as a VM that maps it shared writes
//! them. Memory is given back when the last
//! descriptor and the last mapping are gone.
//!
//! Known holes: a copy is checked for its source's size, not against a change of bytes underway
//! (block hashes of the snapshot format are for that). The source's holes and zero pages take no
//! memory, unless huge pages are used: those are allocated as a whole.

#[cfg(target_os = "linux")]
mod copy;
mod error;
#[cfg(target_os = "linux")]
mod make;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

pub use error::MemfdError;

use crate::backend::FileExtent;

/// How to make a memfd.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemfdOptions {
    /// Take 2 MiB pages of the host's pool (`vm.nr_hugepages`). If it has too few, 4 KiB pages are
    /// used, and [`MemfdRegion::fallback`] says so.
    pub huge_pages: bool,
    /// Size that the source must have, in bytes, as recorded when it was written.
    pub expected_len: Option<u64>,
    /// Seal its bytes as well once they are there: for the memory of a snapshot, which children map
    /// privately. A memfd that is to be RAM itself must not be.
    pub immutable: bool,
}

/// Memory with a descriptor, of a fixed size. See the module's text.
#[derive(Debug)]
pub struct MemfdRegion {
    file: File,
    size: u64,
    allocated: u64,
    huge_pages: bool,
    fallback: Option<String>,
}

/// Makes a memfd with the bytes of the file at `source`, of the same size. `name` is what
/// `/proc/<pid>/maps` shows.
///
/// A child of fork(2) that another thread makes meanwhile has a descriptor of the memfd as well, so
/// in a VM process only the event loop may call this. The threads that copy end before it returns.
///
/// # Errors
/// [`MemfdError`]; no memfd is left then. Outside of Linux always [`MemfdError::Unsupported`].
pub fn create_and_populate(
    source: &Path,
    name: &str,
    options: &MemfdOptions,
) -> Result<MemfdRegion, MemfdError> {
    #[cfg(target_os = "linux")]
    {
        let source = copy::Source::open(source, options.expected_len)?;
        make::populated(&source, name, options, copy::threads_for)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (source, name, options);
        Err(MemfdError::Unsupported)
    }
}

/// Makes a memfd of `len` bytes from the memory files of a snapshot, given with their paths, of which
/// `extents` say which bytes are where; the rest is zero. Otherwise as [`create_and_populate`];
/// [`MemfdOptions::expected_len`] has no meaning here.
///
/// # Errors
/// [`MemfdError`]; no memfd is left then. Outside of Linux always [`MemfdError::Unsupported`].
pub fn create_from_extents(
    len: u64,
    files: Vec<(PathBuf, File)>,
    extents: &[FileExtent],
    name: &str,
    options: &MemfdOptions,
) -> Result<MemfdRegion, MemfdError> {
    #[cfg(target_os = "linux")]
    {
        let source = copy::Source::of_extents(len, files, extents)?;
        make::populated(&source, name, options, copy::threads_for)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (len, files, extents, name, options);
        Err(MemfdError::Unsupported)
    }
}

/// Makes a memfd of `len` zero bytes, for the RAM of a VM that boots.
/// [`MemfdOptions::expected_len`] has no meaning here.
///
/// # Errors
/// [`MemfdError`]; no memfd is left then. Outside of Linux always [`MemfdError::Unsupported`].
pub fn create_empty(
    len: u64,
    name: &str,
    options: &MemfdOptions,
) -> Result<MemfdRegion, MemfdError> {
    #[cfg(target_os = "linux")]
    {
        make::empty(len, name, options.huge_pages)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (len, name, options);
        Err(MemfdError::Unsupported)
    }
}

impl MemfdRegion {
    /// Takes a memfd that another process made (from [`create_and_populate`] or
    /// [`create_empty`]) and passed on.
    ///
    /// # Errors
    /// [`MemfdError::Foreign`] unless its size is sealed and not 0.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, MemfdError> {
        let what = format!("descriptor {}", fd.as_raw_fd());
        Self::adopt(File::from(fd), &what)
    }

    /// Opens the [`MemfdRegion::backend_path`] that another process gave.
    ///
    /// # Errors
    /// [`MemfdError::Source`] if it cannot be opened; [`MemfdError::Foreign`] unless it is a memfd
    /// whose size is sealed and not 0.
    pub fn open(path: &Path) -> Result<Self, MemfdError> {
        let file = File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|error| forkd_sys::PathError::new("open memfd", path, error))?;
        Self::adopt(file, &path.display().to_string())
    }

    /// Whether nobody can change its bytes: [`MemfdOptions::immutable`].
    pub fn is_immutable(&self) -> bool {
        // Not to be told is not to know.
        forkd_sys::memfd::is_immutable(&self.file).unwrap_or(false)
    }

    /// [`Self::from_fd`] of a snapshot's memory, to be mapped privately.
    ///
    /// # Errors
    /// As for [`Self::from_fd`]; and unless its bytes are sealed.
    pub fn immutable_from_fd(fd: OwnedFd) -> Result<Self, MemfdError> {
        let region = Self::from_fd(fd)?;
        if region.is_immutable() {
            return Ok(region);
        }
        Err(MemfdError::Foreign {
            what: format!("descriptor {}", region.file.as_raw_fd()),
            reason: "its bytes are not sealed, so that they could change under a guest".to_owned(),
        })
    }

    fn adopt(file: File, what: &str) -> Result<Self, MemfdError> {
        let foreign = |reason: String| MemfdError::Foreign { what: what.to_owned(), reason };
        let size = file.metadata().map_err(|error| foreign(error.to_string()))?.len();
        let sealed =
            forkd_sys::memfd::size_is_sealed(&file).map_err(|error| foreign(error.to_string()))?;
        if !sealed {
            return Err(foreign(
                "its size is not sealed, so that it could shrink under a guest".to_owned(),
            ));
        }
        if size == 0 {
            return Err(foreign("it is empty".to_owned()));
        }
        let huge_pages =
            forkd_sys::memfd::is_hugetlb(&file).map_err(|error| foreign(error.to_string()))?;
        Ok(Self { file, size, allocated: size, huge_pages, fallback: None })
    }

    /// Size in bytes: that of the source. A region that was passed on as a descriptor and has huge
    /// pages says [`Self::allocated_bytes`], as the descriptor knows no better.
    pub fn size_bytes(&self) -> u64 {
        self.size
    }

    /// Size of the memfd in bytes: with huge pages a multiple of 2 MiB.
    pub fn allocated_bytes(&self) -> u64 {
        self.allocated
    }

    /// Whether its pages are huge ones.
    pub fn has_huge_pages(&self) -> bool {
        self.huge_pages
    }

    /// Why it has 4 KiB pages although huge ones were asked for: a warning for the user.
    pub fn fallback(&self) -> Option<&str> {
        self.fallback.as_deref()
    }

    /// A path by which another process can open the memfd while this one holds it:
    /// `/proc/<pid>/fd/<number>`, with the pid of this process. The other needs to be allowed to
    /// ptrace this one (same user, or root).
    pub fn backend_path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()).into()
    }

    /// Another descriptor of the same memory.
    ///
    /// # Errors
    /// That of `fcntl(2)`: out of descriptors.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self {
            file: self.file.try_clone()?,
            size: self.size,
            allocated: self.allocated,
            huge_pages: self.huge_pages,
            fallback: self.fallback.clone(),
        })
    }

    /// The memfd as a file, to read and write by offset.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl AsFd for MemfdRegion {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
