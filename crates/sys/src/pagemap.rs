//! `PAGEMAP_SCAN`: which pages of a process are what, and which were written since.
//!
//! The written ones are those that [`crate::userfaultfd`] with `WP_ASYNC` has protected and the
//! kernel has unprotected again at the first write. A scan can protect afresh what it reports, in one
//! step per page: a write either comes before and is reported now, or after and is reported next time.
//!
//! All numbers are from `include/uapi/linux/fs.h`, Linux 6.12; the request exists since 6.7.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::{BitOr, Range};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::error::PathError;

/// `PAGEMAP_SCAN`: `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::Ioctl = {
    let size = size_of::<ScanArgs>() as u32;
    ((3 << 30) | (size << 16) | ((b'f' as u32) << 8) | 16) as libc::Ioctl
};
/// `PM_SCAN_WP_MATCHING`.
const WP_MATCHING: u64 = 1 << 0;
/// `PM_SCAN_CHECK_WPASYNC`.
const CHECK_WPASYNC: u64 = 1 << 1;
/// Regions told by one call, 12 KiB of them. More are fetched by more calls.
const REGIONS: usize = 512;

#[repr(C)]
struct ScanArgs {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct RawRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// What a page is: `PAGE_IS_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Categories(u64);

impl Categories {
    /// None.
    pub const NONE: Self = Self(0);
    /// Its range is watched by a userfaultfd with `WP_ASYNC`.
    pub const WP_ALLOWED: Self = Self(1 << 0);
    /// It is not write-protected by a userfaultfd: written since it was.
    pub const WRITTEN: Self = Self(1 << 1);
    /// It is of a file (memfd included), not anonymous.
    pub const FILE: Self = Self(1 << 2);
    /// It is in memory and mapped.
    pub const PRESENT: Self = Self(1 << 3);
    /// It is swapped out.
    pub const SWAPPED: Self = Self(1 << 4);
    /// It is the zero page.
    pub const ZERO: Self = Self(1 << 5);
    /// It is mapped as part of a huge page.
    pub const HUGE: Self = Self(1 << 6);

    /// These and `other`, in a constant.
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` are among these.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for Categories {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Which pages to tell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Query {
    /// Pages that are all of these.
    pub all_of: Categories,
    /// And at least one of these, if there are any.
    pub any_of: Categories,
    /// And none of these.
    pub none_of: Categories,
    /// What to tell of each. Neighbours of which the same is told are told as one range.
    pub tell: Categories,
    /// Write-protect what is told, atomically with telling it. All of the range has to be watched
    /// with `WP_ASYNC`, else it is an error.
    pub protect: bool,
}

impl Query {
    /// The pages that were written since they were last protected.
    pub const WRITTEN: Self = Self {
        all_of: Categories::WRITTEN,
        any_of: Categories::NONE,
        none_of: Categories::NONE,
        tell: Categories::WRITTEN,
        protect: false,
    };
    /// As [`Query::WRITTEN`], and protects them again.
    pub const TAKE_WRITTEN: Self = Self { protect: true, ..Self::WRITTEN };
}

/// A range of pages of which the same is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pages {
    /// Their addresses.
    pub range: Range<u64>,
    /// Those of [`Query::tell`] that they are.
    pub categories: Categories,
}

/// `/proc/<pid>/pagemap`: the pages of the address space that the process had when it was opened.
/// Inherited by a fork it still means the parent's.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    regions: Vec<RawRegion>,
}

impl Pagemap {
    /// This process's.
    ///
    /// # Errors
    /// It cannot be opened: no `/proc`.
    pub fn own() -> Result<Self, PathError> {
        Self::open("/proc/self/pagemap")
    }

    /// Another process's.
    ///
    /// # Errors
    /// It cannot be opened: `NotFound`; `PermissionDenied` unless this process may trace it.
    pub fn of(pid: u32) -> Result<Self, PathError> {
        Self::open(&format!("/proc/{pid}/pagemap"))
    }

    fn open(path: &str) -> Result<Self, PathError> {
        let file = File::open(path).map_err(|e| PathError::new("open", path.as_ref(), e))?;
        Ok(Self { file, regions: vec![RawRegion::default(); REGIONS] })
    }

    /// Calls `each` with the pages of `range` that match, ascending. Adjacent ranges may be told
    /// apart. Memory that is not mapped is skipped.
    ///
    /// # Errors
    /// `InvalidInput` for a start that is no multiple of the page size; `PermissionDenied` (EPERM)
    /// if the query protects and a part is not watched with `WP_ASYNC`; `Unsupported` before Linux
    /// 6.7. Pages that `each` was called with until then were told (and protected); of the others
    /// none was protected, but for those of the failing call itself.
    pub fn scan(
        &mut self,
        range: Range<u64>,
        query: Query,
        mut each: impl FnMut(Pages),
    ) -> io::Result<()> {
        let flags = if query.protect { WP_MATCHING | CHECK_WPASYNC } else { 0 };
        // A category in both masks has to be there; one that is inverted, too, must not be.
        let mut args = ScanArgs {
            size: size_of::<ScanArgs>() as u64,
            flags,
            start: range.start,
            end: range.end,
            walk_end: range.start,
            vec: self.regions.as_mut_ptr().addr() as u64,
            vec_len: self.regions.len() as u64,
            max_pages: 0,
            category_inverted: query.none_of.0,
            category_mask: query.all_of.0 | query.none_of.0,
            category_anyof_mask: query.any_of.0,
            return_mask: query.tell.0,
        };
        while args.start < args.end {
            let count = match self.call(&mut args) {
                Ok(count) => count,
                // Interrupted before anything was done, or the mappings were changing.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            for region in self.regions.get(..count).unwrap_or(&[]) {
                let categories = Categories(region.categories);
                each(Pages { range: region.start..region.end, categories });
            }
            if args.walk_end <= args.start {
                return Err(io::Error::other(format!(
                    "a scan of the pages from {:#x} does not get on",
                    args.start
                )));
            }
            args.start = args.walk_end;
        }
        Ok(())
    }

    /// How many pages of `range` are this process's alone: private memory that no other process maps (bit 56 of an entry,
    /// Documentation/admin-guide/mm/pagemap.rst). Of file pages, those that one process maps count as well.
    ///
    /// # Errors
    /// That of `pread(2)`; `UnexpectedEof` for addresses beyond the address space.
    pub fn count_exclusive(&self, range: Range<u64>) -> io::Result<u64> {
        let mut found = 0;
        self.each_exclusive(range, |_| found += 1)?;
        Ok(found)
    }

    /// Calls `each` with the address of each page that [`Pagemap::count_exclusive`] counts, ascending.
    ///
    /// # Errors
    /// As there.
    pub fn each_exclusive(&self, range: Range<u64>, mut each: impl FnMut(u64)) -> io::Result<()> {
        const EXCLUSIVE: u64 = 1 << 56;
        let page = crate::mmap::page_size() as u64;
        let mut entries = [0u8; 4096];
        let (mut at, end) = (range.start / page, range.end.div_ceil(page));
        while at < end {
            let count = (end - at).min(entries.len() as u64 / 8) as usize;
            let bytes = entries.get_mut(..count * 8).unwrap_or_default();
            self.file.read_exact_at(bytes, at * 8)?;
            let (words, _) = bytes.as_chunks::<8>();
            for (index, word) in words.iter().enumerate() {
                if u64::from_ne_bytes(*word) & EXCLUSIVE != 0 {
                    each((at + index as u64) * page);
                }
            }
            at += count as u64;
        }
        Ok(())
    }

    fn call(&mut self, args: &mut ScanArgs) -> io::Result<usize> {
        // SAFETY: the argument is the structure that the request reads and writes, and `vec` and
        // `vec_len` say where `regions` is, which is borrowed for as long as the call lasts.
        let count =
            unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, std::ptr::from_mut(args)) };
        match usize::try_from(count) {
            Ok(count) => Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.raw_os_error() == Some(libc::ENOTTY) {
                    let text = "this kernel has no PAGEMAP_SCAN; it needs Linux 6.7";
                    return Err(io::Error::new(io::ErrorKind::Unsupported, text));
                }
                Err(error)
            }
        }
    }
}

#[cfg(test)]
mod tests;
