//! Which pages a guest needs first: recorded at one load, fetched ahead at the next.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::Path;

use forkd_state::{Reader, StateError, Tag, Writer};
use forkd_sys::PathError;
use serde::{Deserialize, Serialize};

use super::pages::Pages;

const TAG: Tag = Tag::new(b"WSET");
const VERSION: u16 = 1;
/// Unit of what is saved, in bytes.
const UNIT: u64 = 4096;
/// Most bytes of a file: a range takes 3 to 6, and few have many.
const MAX_FILE: u64 = 16 << 20;

/// Ranges of RAM in the order in which a guest came to need them.
///
/// It is a hint: loading without it, or with that of another snapshot of the same size, is right but
/// slower.
///
/// A recorded set has what was fetched ahead as well, as nothing tells whether that was used: it only
/// ever grows from one load to the next, up to all of RAM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkingSet {
    ranges: Vec<Range<u64>>,
}

/// A working set could not be read or saved.
#[derive(Debug, thiserror::Error)]
pub enum WorkingSetError {
    /// The file cannot be read or written.
    #[error(transparent)]
    File(#[from] PathError),
    /// The file is not a working set that this version can read.
    #[error("working set {path}: {source}")]
    Content {
        /// The file.
        path: String,
        /// What is wrong.
        source: StateError,
    },
    /// It has more bytes than RAM.
    #[error("the working set has {bytes:#x} bytes, of RAM of {size:#x}")]
    TooLong {
        /// Bytes in all.
        bytes: u64,
        /// Size of RAM in bytes.
        size: u64,
    },
    /// A range is empty, not of whole pages, or overflows.
    #[error("range {index} of the working set, {start:#x}..{end:#x}, is not of whole pages of RAM")]
    Range {
        /// Its index.
        index: usize,
        /// Where it begins, in bytes of RAM.
        start: u64,
        /// Where it ends.
        end: u64,
    },
}

/// Version 1: first page and number of pages of each range.
#[derive(Serialize, Deserialize)]
struct RangesV1(Vec<(u64, u64)>);

impl WorkingSet {
    /// The ranges, in order, in bytes from the start of RAM.
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }

    /// Bytes in all.
    pub fn len_bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.end - range.start).sum()
    }

    /// Adds a range, of whole pages.
    pub(super) fn push(&mut self, range: Range<u64>) {
        match self.ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.ranges.push(range),
        }
    }

    /// The same without pages that are in it before, for RAM of `size` bytes.
    pub(super) fn distinct(&self, size: u64) -> Self {
        let mut seen = Pages::new(size / UNIT);
        let mut set = Self::default();
        for range in &self.ranges {
            let (mut at, end) = (range.start / UNIT, range.end / UNIT);
            while let Some(run) = seen.first_wanted(at..end, u64::MAX) {
                at = run.end;
                set.push(run.start * UNIT..run.end * UNIT);
                seen.settle(run);
            }
        }
        set
    }

    /// Whether all ranges are pages of RAM of `size` bytes, and no more than that.
    ///
    /// # Errors
    /// [`WorkingSetError::Range`], [`WorkingSetError::TooLong`].
    pub fn check(&self, size: u64) -> Result<(), WorkingSetError> {
        for (index, &Range { start, end }) in self.ranges.iter().enumerate() {
            let whole = start.is_multiple_of(UNIT) && end.is_multiple_of(UNIT);
            if start >= end || end > size || !whole {
                return Err(WorkingSetError::Range { index, start, end });
            }
        }
        let bytes = self.ranges.iter().fold(0u64, |sum, r| sum.saturating_add(r.end - r.start));
        if bytes > size {
            return Err(WorkingSetError::TooLong { bytes, size });
        }
        Ok(())
    }

    /// Reads a file that [`Self::save`] wrote.
    ///
    /// # Errors
    /// It cannot be read, is damaged, or is of a newer version.
    pub fn load(path: &Path) -> Result<Self, WorkingSetError> {
        let bytes = read(path).map_err(|e| PathError::new("read working set", path, e))?;
        let content =
            |source| WorkingSetError::Content { path: path.display().to_string(), source };
        let reader = Reader::parse(&bytes).map_err(content)?;
        let RangesV1(saved) = reader.section(TAG, VERSION).map_err(content)?;
        let mut ranges = Vec::with_capacity(saved.len());
        for (index, (first, count)) in saved.into_iter().enumerate() {
            let end = first.checked_add(count).and_then(|end| end.checked_mul(UNIT));
            let wrong = WorkingSetError::Range { index, start: first, end: u64::MAX };
            let end = end.ok_or(wrong)?;
            ranges.push(first * UNIT..end);
        }
        Ok(Self { ranges })
    }

    /// Writes it to a file, in place of one that is there: readers see the old or the new one. It is
    /// not synced, as a hint that is lost costs nothing but time.
    ///
    /// # Errors
    /// The file cannot be written or renamed.
    pub fn save(&self, path: &Path) -> Result<(), WorkingSetError> {
        let pages: Vec<_> =
            self.ranges.iter().map(|r| (r.start / UNIT, (r.end - r.start) / UNIT)).collect();
        let mut writer = Writer::new();
        let added = writer.add(TAG, VERSION, &RangesV1(pages));
        added.map_err(|source| WorkingSetError::Content {
            path: path.display().to_string(),
            source,
        })?;
        let name = path.file_name().ok_or_else(|| {
            PathError::new("write working set", path, io::Error::from(io::ErrorKind::InvalidInput))
        })?;
        let mut staged = name.to_owned();
        staged.push(format!(".{}.tmp", std::process::id()));
        let staged = path.with_file_name(staged);
        std::fs::write(&staged, writer.finish())
            .and_then(|()| std::fs::rename(&staged, path))
            .map_err(|error| {
                // What cannot be removed is a leftover, no fault of the save's own.
                let _removed = std::fs::remove_file(&staged);
                PathError::new("write working set", path, error)
            })?;
        Ok(())
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        let text = format!("it has more than {MAX_FILE} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn neighbours_in_order_are_one_range() {
        let mut set = WorkingSet::default();
        for range in [0..4096, 4096..8192, 16384..20480, 12288..16384] {
            set.push(range);
        }
        assert_eq!(set.ranges(), [0..8192, 16384..20480, 12288..16384]);
        assert_eq!(set.len_bytes(), 16384);
    }

    /// Version 1 as it was first written.
    #[test]
    fn version_1_is_still_read() {
        let golden = b"FORKD\r\n\x1a\x01\0\x01\0WSET\x01\0\0\0\x07\0\0\0\
            \x02\x01\x02\x80\x80\x30\x01\xc9\xd4\xc5\xdb";
        let dir = tempfile::TempDir::new().expect("a directory");
        let path = dir.path().join("working-set");
        std::fs::write(&path, golden).expect("write");
        let set = WorkingSet::load(&path).expect("load");
        assert_eq!(set.ranges(), [4096..12288, 3 << 30..(3 << 30) + 4096]);
        set.save(&path).expect("save");
        assert_eq!(std::fs::read(&path).expect("read"), golden);
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let dir = tempfile::TempDir::new().expect("a directory");
        let path = dir.path().join("working-set");
        let error = WorkingSet::load(&path).expect_err("missing").to_string();
        assert!(error.contains(path.to_str().expect("UTF-8")), "{error}");
        let mut set = WorkingSet::default();
        set.push(0..4096);
        set.save(&path).expect("save");
        let mut bytes = std::fs::read(&path).expect("read");
        *bytes.last_mut().expect("bytes") ^= 1;
        std::fs::write(&path, bytes).expect("write");
        let error = WorkingSet::load(&path).expect_err("damaged").to_string();
        assert!(error.contains(path.to_str().expect("UTF-8")), "{error}");
        let mut writer = Writer::new();
        writer.add(TAG, VERSION, &RangesV1(vec![(0, 1), (u64::MAX, 2)])).expect("add");
        std::fs::write(&path, writer.finish()).expect("write");
        let error = WorkingSet::load(&path).expect_err("overflow");
        assert!(matches!(error, WorkingSetError::Range { index: 1, .. }), "{error}");
        File::create(&path).and_then(|file| file.set_len(MAX_FILE + 1)).expect("a large file");
        let error = WorkingSet::load(&path).expect_err("too large").to_string();
        assert!(error.contains("more than"), "{error}");
        assert!(set.save(Path::new("/nowhere/at/all")).is_err());
        let left = std::fs::read_dir(dir.path()).expect("list").count();
        assert_eq!(left, 1, "no staged file stays");
    }

    #[test]
    fn what_was_recorded_twice_is_saved_once() {
        let mut set = WorkingSet::default();
        for range in [8192..16384, 0..4096, 4096..12288, 0..20480] {
            set.push(range);
        }
        assert!(matches!(set.check(20480), Err(WorkingSetError::TooLong { size: 20480, .. })));
        let once = set.distinct(20480);
        assert_eq!(once.ranges(), [8192..16384, 0..8192, 16384..20480]);
        once.check(20480).expect("fits");
    }

    proptest! {
        #[test]
        fn saved_sets_are_loaded_alike(ranges in proptest::collection::vec((0u64..1 << 24, 1u64..512), 0..50)) {
            let mut set = WorkingSet::default();
            for (page, pages) in ranges {
                set.push(page * UNIT..(page + pages) * UNIT);
            }
            let dir = tempfile::TempDir::new().expect("a directory");
            let path = dir.path().join("working-set");
            set.save(&path).expect("save");
            prop_assert_eq!(&WorkingSet::load(&path).expect("load"), &set);
            let end = set.ranges.iter().map(|r| r.end).max().unwrap_or(0);
            let set = set.distinct(end);
            prop_assert!(set.check(end).is_ok());
            prop_assert_eq!(set.check(end.saturating_sub(UNIT)).is_ok(), set.ranges.is_empty());
        }
    }
}
