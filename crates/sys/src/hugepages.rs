//! Huge pages of this process's memory, by address.
//!
//! For memory that somebody else maps and keeps mapped, from a thread of its own. Nothing here changes what memory
//! holds, or what is mapped: that an address is of some other mapping is no danger to anyone.

#![allow(unsafe_code)]

use std::io;
use std::ops::Range;

/// `MADV_HUGEPAGE`, `MADV_NOHUGEPAGE`, `MADV_COLLAPSE` (include/uapi/asm-generic/mman-common.h).
const HUGEPAGE: libc::c_int = 14;
const NOHUGEPAGE: libc::c_int = 15;
const COLLAPSE: libc::c_int = 25;

/// Size of a huge page of x86-64, in bytes.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Makes huge pages of the small ones in `range`, now (`MADV_COLLAPSE`, Linux 6.1), whatever the system's setting
/// is; holes in it are filled with zeroes. The memory is written and read meanwhile as always; a fault in it waits for up to
/// the copy of 2 MiB. The whole range is tried.
///
/// # Errors
/// That of the last huge page that could not be made, others may have been. `InvalidInput`: the kernel has no such
/// call, or the range is advised [`forbid`] or not mapped. `OutOfMemory`, `ResourceBusy` (no memory within the cgroup):
/// the rest was not tried. `WouldBlock`: some pages were in use by the kernel.
pub fn collapse(range: Range<u64>) -> io::Result<()> {
    advise(range, COLLAPSE)
}

/// Lets first touches of the range make huge pages (`MADV_HUGEPAGE`).
///
/// # Errors
/// `InvalidInput`: the kernel has no huge pages; `OutOfMemory`: the range is not all mapped, or a mapping cannot be split.
pub fn allow(range: Range<u64>) -> io::Result<()> {
    advise(range, HUGEPAGE)
}

/// Has no huge pages be made in the range (`MADV_NOHUGEPAGE`); those that are, stay.
///
/// # Errors
/// As for [`allow`].
pub fn forbid(range: Range<u64>) -> io::Result<()> {
    advise(range, NOHUGEPAGE)
}

fn advise(range: Range<u64>, advice: libc::c_int) -> io::Result<()> {
    let bad = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let start = usize::try_from(range.start).map_err(bad)?;
    let len = usize::try_from(range.end.saturating_sub(range.start)).map_err(bad)?;
    loop {
        // SAFETY: none of the three advices changes what memory holds, what is mapped, or how it may be
        // accessed, of whomever it is; an address that is not mapped is an error.
        let done = unsafe { libc::madvise(std::ptr::without_provenance_mut(start), len, advice) };
        if done == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mmap::{AnonymousOptions, Mapping};
    use crate::pagemap::{Categories, Pagemap, Query};
    use crate::testing::turn;

    #[test]
    fn advice_decides_and_collapsing_follows() {
        // A fork of another test would make pages shared.
        let _turn = turn();
        let options =
            AnonymousOptions { align: HUGE_PAGE as usize, huge_pages: false, noreserve: true };
        let mapping = Mapping::anonymous(2 * HUGE_PAGE as usize, options).expect("mapping");
        let start = mapping.address() as u64;
        let (first, all) = (start..start + HUGE_PAGE, start..start + 2 * HUGE_PAGE);
        forbid(all.clone()).expect("forbid");
        mapping.populate_write(0, mapping.len()).expect("populate");
        mapping.write_at(5000, b"here").expect("write");
        let huge = |range: &Range<u64>| {
            let query = Query { all_of: Categories::HUGE, ..Query::default() };
            let mut bytes = 0;
            let mut pagemap = Pagemap::own().expect("pagemap");
            pagemap
                .scan(range.clone(), query, |p| bytes += p.range.end - p.range.start)
                .expect("scan");
            bytes
        };
        let refused = collapse(first.clone()).expect_err("it is forbidden");
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(
            Pagemap::own().expect("pagemap").count_exclusive(all.clone()).expect("count"),
            1024
        );
        allow(first.clone()).expect("allow");
        collapse(first.clone()).expect("collapse");
        assert_eq!((huge(&first), huge(&all)), (HUGE_PAGE, HUGE_PAGE));
        let mut bytes = [0; 4];
        mapping.read_at(5000, &mut bytes).expect("read");
        assert_eq!(&bytes, b"here");
        drop(mapping);
        assert!(collapse(first.clone()).is_err() && allow(first).is_err(), "it is not mapped");
    }
}
