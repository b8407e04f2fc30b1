//! Extents of files that make up RAM: checked, merged, and split into what is mapped and what is
//! read.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use forkd_sys::memfd::is_hugetlb;
use forkd_sys::mmap::page_size;

use super::Sharing;
use super::remap::check_mappable;
use crate::MemoryError;

/// Most extents that are mapped: with the gaps between them a quarter of the 65,530 mappings that a
/// process may have (`vm.max_map_count`).
pub(crate) const MAX_MAPPED: usize = 8192;

/// A piece of RAM whose bytes are in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileExtent {
    /// Where it begins, in bytes from the start of RAM. This is not a guest-physical address: RAM
    /// goes on behind the MMIO hole as if there were none.
    pub ram_offset: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Index of the file.
    pub file: usize,
    /// Where it begins in the file, in bytes.
    pub file_offset: u64,
}

impl FileExtent {
    /// Whether `next` goes on where this ends, in RAM and in the same file. For checked extents.
    fn goes_on_in(&self, next: &Self) -> bool {
        self.file == next.file
            && self.ram_offset + self.len == next.ram_offset
            && self.file_offset + self.len == next.file_offset
    }
}

/// An extent with its index in what was given.
pub(crate) type Numbered = (usize, FileExtent);

/// What is wrong with an extent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExtentFault {
    /// It has no bytes.
    #[error("it is empty")]
    Empty,
    /// It does not begin and end at pages.
    #[error("its offsets and length must be multiples of {page:#x}")]
    Unaligned {
        /// Size of a page in bytes.
        page: u64,
    },
    /// It goes beyond the end of RAM.
    #[error("RAM has {ram_len:#x} bytes")]
    OutsideRam {
        /// Size of RAM in bytes.
        ram_len: u64,
    },
    /// It names a file that was not given.
    #[error("there are {files} files")]
    NoSuchFile {
        /// Number of files.
        files: usize,
    },
    /// It goes beyond the end of its file.
    #[error("the file has only {file_len:#x} bytes")]
    FileTooShort {
        /// Size of the file in bytes.
        file_len: u64,
    },
    /// Another one is for the same bytes of RAM.
    #[error("extent #{other} is for the same RAM")]
    Overlaps {
        /// Index of the other.
        other: usize,
    },
    /// Its file cannot be mapped or read.
    #[error("cannot {action}: {source}")]
    File {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// Extents of some RAM that have been checked, with their indices in what was given.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Extents {
    /// Ascending in RAM, none overlapping or going on in the next.
    pub(crate) sorted: Vec<Numbered>,
}

impl Extents {
    /// Checks extents against RAM of `ram_len` bytes and against their files, of which each must be
    /// a regular file that can be mapped.
    pub(crate) fn check(
        ram_len: u64,
        files: &[File],
        extents: &[FileExtent],
    ) -> Result<Self, MemoryError> {
        let lengths = lengths_of(files, extents)?;
        let mut sorted: Vec<Numbered> = extents.iter().copied().enumerate().collect();
        for &(index, extent) in &sorted {
            check_one(extent, ram_len, &lengths)
                .map_err(|reason| fault(index, extent, files, reason))?;
        }
        sorted.sort_unstable_by_key(|&(index, extent)| (extent.ram_offset, index));
        let mut merged: Vec<Numbered> = Vec::with_capacity(sorted.len());
        for (index, extent) in sorted {
            match merged.last_mut() {
                Some((other, last)) if last.ram_offset + last.len > extent.ram_offset => {
                    let reason = ExtentFault::Overlaps { other: *other };
                    return Err(fault(index, extent, files, reason));
                }
                Some((_, last)) if last.goes_on_in(&extent) => last.len += extent.len,
                _ => merged.push((index, extent)),
            }
        }
        Ok(Self { sorted: merged })
    }

    /// Splits them into at most `most` to map, and the others, the smallest ones, to read.
    pub(crate) fn split(self, most: usize) -> (Vec<Numbered>, Vec<Numbered>) {
        let mut map = self.sorted;
        if map.len() <= most {
            return (map, Vec::new());
        }
        map.sort_by_key(|&(_, extent)| std::cmp::Reverse(extent.len));
        let read = map.split_off(most);
        (map, read)
    }
}

/// Sizes of the files that are used; of the others 0.
fn lengths_of(files: &[File], extents: &[FileExtent]) -> Result<Vec<u64>, MemoryError> {
    let mut lengths = vec![0; files.len()];
    for (number, file) in files.iter().enumerate() {
        let Some(index) = extents.iter().position(|extent| extent.file == number) else { continue };
        let failed = |action, source| {
            fault(index, extents[index], files, ExtentFault::File { action, source })
        };
        let metadata = file.metadata().map_err(|error| failed("ask for its size", error))?;
        let unfit = |why: &str| failed("use it", io::Error::new(io::ErrorKind::InvalidInput, why));
        if !metadata.is_file() {
            return Err(unfit("not a regular file"));
        }
        // The kernel rounds the length of such a mapping up, over what is behind the extent.
        if is_hugetlb(file).map_err(|error| failed("ask for its file system", error))? {
            return Err(unfit("it has huge pages"));
        }
        check_mappable(file, page_size(), Sharing::Private)
            .map_err(|error| failed("map it", error))?;
        lengths[number] = metadata.len();
    }
    Ok(lengths)
}

fn check_one(extent: FileExtent, ram_len: u64, lengths: &[u64]) -> Result<(), ExtentFault> {
    let page = page_size() as u64;
    let FileExtent { ram_offset, len, file, file_offset } = extent;
    if len == 0 {
        return Err(ExtentFault::Empty);
    }
    if [ram_offset, len, file_offset].iter().any(|number| !number.is_multiple_of(page)) {
        return Err(ExtentFault::Unaligned { page });
    }
    if ram_offset.checked_add(len).is_none_or(|end| end > ram_len) {
        return Err(ExtentFault::OutsideRam { ram_len });
    }
    let files = lengths.len();
    let file_len = *lengths.get(file).ok_or(ExtentFault::NoSuchFile { files })?;
    if file_offset.checked_add(len).is_none_or(|end| end > file_len) {
        return Err(ExtentFault::FileTooShort { file_len });
    }
    Ok(())
}

/// The error for an extent, with the path of its file if the kernel still knows one.
pub(crate) fn fault(
    index: usize,
    extent: FileExtent,
    files: &[File],
    reason: ExtentFault,
) -> MemoryError {
    let link = |file: &File| std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok();
    let path = files.get(extent.file).and_then(link);
    let path = path.map_or_else(String::new, |path| format!(" ({})", path.display()));
    MemoryError::Extent { index, extent, path, reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = 4096;

    fn extent(ram: u64, pages: u64, file: usize, at: u64) -> FileExtent {
        FileExtent { ram_offset: ram * PAGE, len: pages * PAGE, file, file_offset: at * PAGE }
    }

    fn files() -> Vec<File> {
        [16, 4]
            .map(|pages| {
                let file = tempfile::tempfile().expect("a file");
                file.set_len(pages * PAGE).expect("size");
                file
            })
            .into()
    }

    fn sorted(extents: &[FileExtent]) -> Vec<FileExtent> {
        let checked = Extents::check(64 * PAGE, &files(), extents).expect("valid");
        checked.sorted.into_iter().map(|(_, extent)| extent).collect()
    }

    #[test]
    fn neighbours_are_merged() {
        let given =
            [extent(4, 2, 0, 8), extent(0, 1, 0, 0), extent(1, 3, 0, 1), extent(6, 2, 0, 10)];
        assert_eq!(sorted(&given), [extent(0, 4, 0, 0), extent(4, 4, 0, 8)]);
        let apart = [extent(0, 1, 0, 0), extent(1, 1, 1, 1), extent(2, 1, 1, 0)];
        assert_eq!(sorted(&apart), apart, "other files, other places");
        assert_eq!(sorted(&[]), []);
    }

    #[test]
    fn each_fault_names_the_extent_and_the_file() {
        let odd =
            |ram_offset, len, file_offset| FileExtent { ram_offset, len, file: 0, file_offset };
        let cases: [(FileExtent, &str); 9] = [
            (extent(1, 0, 0, 0), "it is empty"),
            (odd(100, PAGE, 0), "multiples of 0x1000"),
            (odd(0, 100, 0), "multiples of 0x1000"),
            (odd(0, PAGE, 100), "multiples of 0x1000"),
            (extent(63, 2, 0, 0), "RAM has 0x40000 bytes"),
            (odd(u64::MAX - PAGE + 1, PAGE, 0), "RAM has 0x40000 bytes"),
            (extent(10, 1, 2, 0), "there are 2 files"),
            (extent(10, 5, 1, 0), "the file has only 0x4000 bytes"),
            (odd(0, PAGE, u64::MAX - PAGE + 1), "the file has only 0x10000 bytes"),
        ];
        for (bad, reason) in cases {
            let given = [extent(20, 1, 0, 3), bad];
            let error = Extents::check(64 * PAGE, &files(), &given).expect_err(reason).to_string();
            let file = format!("file #{}", bad.file);
            assert!(error.contains("extent #1") && error.contains(&file), "{error}");
            assert!(error.contains(reason), "{error}");
        }
        let twice = [extent(2, 2, 0, 0), extent(8, 1, 0, 0), extent(3, 1, 1, 0)];
        let error = Extents::check(64 * PAGE, &files(), &twice).expect_err("overlap").to_string();
        assert!(error.contains("extent #2") && error.contains("extent #0 is for"), "{error}");
    }

    #[test]
    fn files_that_cannot_be_mapped_are_named() {
        let named = tempfile::NamedTempFile::new().expect("a file");
        named.as_file().set_len(PAGE).expect("size");
        let write_only = File::options().write(true).open(named.path()).expect("open");
        let directory = File::open(std::env::temp_dir()).expect("open");
        let path = named.path().display().to_string();
        let (use_it, place) = ("not a regular file", std::env::temp_dir().display().to_string());
        for (file, reason, path) in
            [(write_only, "cannot map it", path), (directory, use_it, place)]
        {
            let error = Extents::check(PAGE, &[file], &[extent(0, 1, 0, 0)]).expect_err("refused");
            let error = error.to_string();
            assert!(error.contains(reason) && error.contains(&path), "{error}");
        }
    }

    proptest! {
        #[test]
        fn a_split_reads_the_smallest(lens in proptest::collection::vec(1u64..4, 0..10), most in 0usize..12) {
            // Every other page stays free, and places in the file go down, so that nothing merges.
            let given: Vec<FileExtent> = lens.iter().enumerate()
                .map(|(i, &len)| extent(i as u64 * 4, len, 0, 12 - i as u64)).collect();
            let checked = Extents::check(64 * PAGE, &files(), &given).expect("valid");
            let (map, read) = checked.split(most);
            prop_assert_eq!(map.len(), given.len().min(most));
            let smallest = map.iter().map(|e| e.1.len).min().unwrap_or(u64::MAX);
            prop_assert!(read.iter().all(|e| e.1.len <= smallest));
            let mut all: Vec<usize> = map.iter().chain(&read).map(|e| e.0).collect();
            all.sort_unstable();
            prop_assert_eq!(all, (0..given.len()).collect::<Vec<_>>());
        }
    }
}
