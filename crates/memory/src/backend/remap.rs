//! Replacing parts of a mapping that is RAM: by a file's bytes, or by fresh zeroes.
//!
//! A private mapping of a file cannot be discarded by advice, as that brings the file's bytes back.
//! Fresh anonymous memory is mapped over the range instead. Each such piece may cost two of the
//! process's mappings, of which Linux allows 65,530 (`vm.max_map_count`), so they are counted, and
//! when the allowance is used up, zeroes are written instead.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use forkd_sys::mmap::{AnonymousOptions, Mapping, page_size};
use rustix::mm::{MapFlags, ProtFlags};

use super::{HUGE_PAGE, Sharing};

/// Most pieces that discards may map over RAM: half of the process's mappings at most.
const MAX_HOLES: usize = 16_384;

const READ_WRITE: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// Reserves `len` bytes of addresses, aligned for huge pages, that read as zeroes. They do not count
/// as used memory until written to.
pub(super) fn reserve(len: usize) -> io::Result<Mapping> {
    let options = AnonymousOptions { noreserve: true, huge_pages: false, align: HUGE_PAGE };
    Mapping::anonymous(len, options)
}

/// Maps `len` bytes of a file from `file_offset` over the mapping's from `offset`; all three are
/// multiples of the page size. The file must be one that can be mapped at all: see [`check_mappable`].
pub(super) fn map_file(
    mapping: &Mapping,
    offset: usize,
    len: usize,
    file: impl AsFd,
    file_offset: u64,
    sharing: Sharing,
) -> io::Result<()> {
    let start = checked(mapping, offset, len)?;
    let flags = match sharing {
        Sharing::Shared => MapFlags::SHARED,
        // Children write little of what they map: not counted against the overcommit limit.
        Sharing::Private => MapFlags::PRIVATE | MapFlags::NORESERVE,
    };
    // SAFETY: the range is of whole pages within `mapping` (checked), so nothing that is not RAM is
    // replaced, and it stays readable and writable, which is all that holders of raw pointers into it
    // rely on: the bytes of RAM may change at any time. If the kernel refuses, it does so before it
    // has unmapped anything: limits are checked first, and the file can be mapped.
    unsafe {
        rustix::mm::mmap(start, len, READ_WRITE, flags | MapFlags::FIXED, file, file_offset)?;
    }
    Ok(())
}

/// Finds out whether a file can be mapped, apart from any range: a file system may refuse, and a
/// refusal in the midst of replacing a range may leave a gap there.
/// `page` is the size of its pages.
pub(super) fn check_mappable(file: impl AsFd, page: usize, sharing: Sharing) -> io::Result<()> {
    match sharing {
        Sharing::Shared => Mapping::file_shared(file, 0, page).map(drop),
        Sharing::Private => Mapping::file_private(file, 0, page).map(drop),
    }
}

fn map_zeroes(mapping: &Mapping, offset: usize, len: usize) -> io::Result<()> {
    let start = checked(mapping, offset, len)?;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
    // SAFETY: as in `map_file`; anonymous memory can be mapped always.
    unsafe { rustix::mm::mmap_anonymous(start, len, READ_WRITE, flags)? };
    Ok(())
}

/// Writes zeroes: for where pages cannot be given back.
pub(super) fn write_zeroes(mapping: &Mapping, offset: usize, len: usize) -> io::Result<()> {
    static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
    checked(mapping, offset, len)?;
    for at in (offset..offset + len).step_by(ZEROES.len()) {
        let piece = ZEROES.len().min(offset + len - at);
        mapping.write_at(at, &ZEROES[..piece])?;
    }
    Ok(())
}

/// The first address of the range, if it is of whole pages and within the mapping.
fn checked(mapping: &Mapping, offset: usize, len: usize) -> io::Result<*mut core::ffi::c_void> {
    let page = page_size();
    let inside = offset.checked_add(len).is_some_and(|end| end <= mapping.len());
    if !inside || !offset.is_multiple_of(page) || !len.is_multiple_of(page) {
        let text = format!("{len:#x} bytes at {offset:#x} are not whole pages within RAM");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    // SAFETY: the offset is at most the mapping's length.
    Ok(unsafe { mapping.as_ptr().add(offset) }.cast())
}

/// Zeroes that are mapped over private mappings of files, and how many more may be.
#[derive(Debug)]
pub(super) struct Holes {
    left: AtomicUsize,
    /// A bit for each page that is anonymous memory by now, and can be discarded by advice.
    anonymous: Vec<AtomicU64>,
}

impl Holes {
    /// For a mapping in which there are none yet.
    pub(super) fn new(mapping: &Mapping) -> Self {
        Self::at_most(MAX_HOLES, mapping)
    }

    pub(super) fn at_most(count: usize, mapping: &Mapping) -> Self {
        let words = mapping.len().div_ceil(64 * page_size());
        let anonymous = (0..words).map(|_| AtomicU64::new(0)).collect();
        Self { left: AtomicUsize::new(count), anonymous }
    }

    /// Lets zeroes be read in a range of a private mapping of files.
    pub(super) fn punch(&self, mapping: &Mapping, offset: usize, len: usize) -> io::Result<()> {
        checked(mapping, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let pages = offset / page_size()..(offset + len) / page_size();
        // Atomics only so that it can be shared: who discards the same pages at the same time gets
        // zeroes by either way.
        let bit = |page: usize| (&self.anonymous[page / 64], 1u64 << (page % 64));
        let is_anonymous = |page| {
            let (word, bit) = bit(page);
            word.load(Ordering::Relaxed) & bit != 0
        };
        if pages.clone().all(is_anonymous) {
            return mapping.discard(offset, len);
        }
        let allowed = self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
            .is_ok();
        if allowed {
            match map_zeroes(mapping, offset, len) {
                Ok(()) => {
                    for (word, bit) in pages.map(bit) {
                        word.fetch_or(bit, Ordering::Relaxed);
                    }
                    return Ok(());
                }
                // ENOMEM: no mappings are left, as other parts of the process used them.
                Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => {}
                Err(error) => return Err(error),
            }
        }
        // Private copies that the range has are given back by this, those of zeroes are made anew.
        mapping.discard(offset, len)?;
        write_zeroes(mapping, offset, len)
    }
}
