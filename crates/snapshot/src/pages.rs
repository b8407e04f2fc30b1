//! Which pages a layer holds, with the hashes of its blocks; and the `extents` file they are kept in.
//!
//! `extents` is a forkd-state envelope (magic, version, CRC) with one section for memory, `MEM `, and
//! one for each disk, `DSK` and its number. The saved type is [`PageMapV1`].

use std::ops::Range;
use std::path::Path;

use forkd_state::{Reader, Tag, Writer};
use serde::{Deserialize, Serialize};

use crate::SnapshotError;
use crate::digest::{BLOCK_SIZE, Digest, PAGE_SIZE, PAGES_PER_BLOCK, PageSet};

/// Most disks of a snapshot.
pub const MAX_DISKS: usize = 32;
/// Most bytes of a memory or disk file, 16 TiB: page numbers stay far from overflow.
pub(crate) const MAX_FILE: u64 = 16 << 40;

const MEMORY_TAG: Tag = Tag::new(b"MEM ");
const MAP_VERSION: u16 = 1;

fn disk_tag(index: usize) -> Tag {
    // At most MAX_DISKS.
    Tag::indexed(b"DSK", index as u8)
}

/// What a run of pages is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Their bytes are in the layer's file.
    Data,
    /// They are zero, whatever older layers have there.
    Zero,
}

/// A run of pages of one kind. Pages between runs are not the layer's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub first: u64,
    pub count: u64,
    pub kind: Kind,
}

impl Run {
    pub(crate) fn end(&self) -> u64 {
        self.first + self.count
    }
}

/// What a layer holds of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PageMap {
    /// Length of the file in bytes, a multiple of the page size.
    pub len: u64,
    /// Nothing of older layers shows through.
    pub whole: bool,
    /// Sorted, apart or of different kinds, within `len`.
    pub runs: Vec<Run>,
    /// One for each block that has data pages, in order.
    pub hashes: Vec<Digest>,
}

/// As saved. A change of this is a new type, and a new `MAP_VERSION`.
#[derive(Debug, Serialize, Deserialize)]
struct PageMapV1 {
    len: u64,
    whole: bool,
    /// Pages between the last run's end and this run, number of pages, whether they are zero.
    runs: Vec<(u64, u64, bool)>,
    hashes: Vec<[u8; 32]>,
}

impl PageMap {
    /// Adds a run behind all others; it becomes one with the last where it can.
    pub(crate) fn push(runs: &mut Vec<Run>, run: Run) {
        match runs.last_mut() {
            Some(last) if last.end() == run.first && last.kind == run.kind => {
                last.count += run.count;
            }
            _ => runs.push(run),
        }
    }

    pub(crate) fn data_bytes(&self) -> u64 {
        let data = self.runs.iter().filter(|run| run.kind == Kind::Data);
        data.map(|run| run.count * PAGE_SIZE).sum()
    }

    /// The blocks that have data pages: index, and which pages.
    pub(crate) fn blocks(&self) -> Vec<(u64, PageSet)> {
        let mut blocks: Vec<(u64, PageSet)> = Vec::new();
        for run in self.runs.iter().filter(|run| run.kind == Kind::Data) {
            for page in run.first..run.end() {
                let block = page / PAGES_PER_BLOCK as u64;
                if blocks.last().is_none_or(|(last, _)| *last != block) {
                    blocks.push((block, PageSet::default()));
                }
                if let Some((_, pages)) = blocks.last_mut() {
                    pages.insert((page % PAGES_PER_BLOCK as u64) as usize);
                }
            }
        }
        blocks
    }

    fn save(&self) -> PageMapV1 {
        let mut end = 0;
        let mut runs = Vec::with_capacity(self.runs.len());
        for run in &self.runs {
            runs.push((run.first - end, run.count, run.kind == Kind::Zero));
            end = run.end();
        }
        let hashes = self.hashes.iter().map(|hash| hash.0).collect();
        PageMapV1 { len: self.len, whole: self.whole, runs, hashes }
    }

    fn restore(saved: PageMapV1) -> Result<Self, &'static str> {
        if !saved.len.is_multiple_of(PAGE_SIZE) || saved.len > MAX_FILE {
            return Err("a file has an impossible length");
        }
        let pages = saved.len / PAGE_SIZE;
        let mut runs: Vec<Run> = Vec::with_capacity(saved.runs.len());
        let mut at = 0u64;
        for (gap, count, zero) in saved.runs {
            let first = at.checked_add(gap).ok_or("a run is behind the end")?;
            let end = first.checked_add(count).ok_or("a run is behind the end")?;
            if end > pages {
                return Err("a run is behind the end");
            }
            let kind = if zero { Kind::Zero } else { Kind::Data };
            if count == 0 {
                return Err("a run is empty");
            }
            if gap == 0 && runs.last().is_some_and(|last| last.kind == kind) {
                return Err("a run is in two pieces");
            }
            runs.push(Run { first, count, kind });
            at = end;
        }
        let hashes = saved.hashes.into_iter().map(Digest).collect();
        let map = Self { len: saved.len, whole: saved.whole, runs, hashes };
        if map.data_blocks() != map.hashes.len() as u64 {
            return Err("there are not as many hashes as blocks");
        }
        Ok(map)
    }

    /// Number of blocks that have data pages.
    fn data_blocks(&self) -> u64 {
        let per_block = PAGES_PER_BLOCK as u64;
        let (mut count, mut counted_to) = (0, 0);
        for run in self.runs.iter().filter(|run| run.kind == Kind::Data) {
            let blocks = run.first / per_block..run.end().div_ceil(per_block);
            count += blocks.end.saturating_sub(blocks.start.max(counted_to));
            counted_to = blocks.end;
        }
        count
    }
}

/// The maps of all files of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Maps {
    pub memory: PageMap,
    pub disks: Vec<PageMap>,
}

impl Maps {
    pub(crate) fn encode(&self, path: &Path) -> Result<Vec<u8>, SnapshotError> {
        let cannot = |error| SnapshotError::misuse(path, error);
        let mut writer = Writer::new();
        writer.add(MEMORY_TAG, MAP_VERSION, &self.memory.save()).map_err(cannot)?;
        for (index, disk) in self.disks.iter().enumerate() {
            writer.add(disk_tag(index), MAP_VERSION, &disk.save()).map_err(cannot)?;
        }
        Ok(writer.finish())
    }

    /// `path` is for errors.
    pub(crate) fn decode(bytes: &[u8], path: &Path) -> Result<Self, SnapshotError> {
        let damaged = |error: &dyn std::fmt::Display| SnapshotError::damaged(path, error);
        let reader = Reader::parse(bytes).map_err(|e| damaged(&e))?;
        let map = |tag| {
            let saved: PageMapV1 = reader.section(tag, MAP_VERSION).map_err(|e| damaged(&e))?;
            PageMap::restore(saved).map_err(|e| damaged(&format_args!("{tag}: {e}")))
        };
        let memory = map(MEMORY_TAG)?;
        let count = reader.tags().count() - 1;
        if count > MAX_DISKS {
            return Err(damaged(&"it has too many disks"));
        }
        let disks = (0..count).map(|index| map(disk_tag(index))).collect::<Result<_, _>>()?;
        Ok(Self { memory, disks })
    }
}

/// A range of bytes as pages, if it is one of whole pages below `len`.
pub(crate) fn page_range(range: &Range<u64>, len: u64) -> Result<Range<u64>, String> {
    if !range.start.is_multiple_of(PAGE_SIZE) || !range.end.is_multiple_of(PAGE_SIZE) {
        return Err(format!("{:#x}..{:#x} is not of whole pages", range.start, range.end));
    }
    if range.start > range.end || range.end > len {
        return Err(format!(
            "{:#x}..{:#x} is not within its {len:#x} bytes",
            range.start, range.end
        ));
    }
    Ok(range.start / PAGE_SIZE..range.end / PAGE_SIZE)
}

/// Number of blocks of a file.
pub(crate) fn block_count(len: u64) -> u64 {
    len.div_ceil(BLOCK_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn map(cells: &[u8], whole: bool) -> PageMap {
        let mut runs = Vec::new();
        for (page, cell) in cells.iter().enumerate() {
            let kind = match cell % 3 {
                0 => continue,
                1 => Kind::Data,
                _ => Kind::Zero,
            };
            PageMap::push(&mut runs, Run { first: page as u64, count: 1, kind });
        }
        let mut map =
            PageMap { len: cells.len() as u64 * PAGE_SIZE, whole, runs, hashes: Vec::new() };
        map.hashes = map.blocks().iter().map(|(index, _)| Digest([*index as u8; 32])).collect();
        map
    }

    proptest! {
        #[test]
        fn maps_come_back(
            cells in proptest::collection::vec(any::<u8>(), 0..2000),
            disk in proptest::collection::vec(any::<u8>(), 0..20),
            whole: bool,
        ) {
            let maps = Maps { memory: map(&cells, whole), disks: vec![map(&disk, !whole)] };
            let bytes = maps.encode(Path::new("/x")).expect("encode");
            prop_assert_eq!(Maps::decode(&bytes, Path::new("/x")).expect("decode"), maps);
        }
    }

    #[test]
    fn what_cannot_be_is_refused_and_names_the_file() {
        let good = || map(&[1, 1, 0, 2, 1], true).save();
        assert!(PageMap::restore(good()).is_ok());
        let hash = [0; 32];
        let forged = [
            PageMapV1 { len: 100, ..good() },
            PageMapV1 { len: !0xfff, ..good() },
            PageMapV1 { runs: vec![(u64::MAX, 2, false)], ..good() },
            PageMapV1 { runs: vec![(1, u64::MAX, false)], ..good() },
            PageMapV1 { runs: vec![(3, 3, false)], ..good() },
            PageMapV1 { runs: vec![(0, 0, false), (0, 1, false)], ..good() },
            PageMapV1 { runs: vec![(0, 1, false), (0, 1, false)], ..good() },
            PageMapV1 { hashes: vec![hash, hash], ..good() },
            PageMapV1 { hashes: vec![], ..good() },
        ];
        for saved in forged {
            let bytes = Writer::new().section(MEMORY_TAG, 1, &saved).expect("a section").finish();
            let error = Maps::decode(&bytes, Path::new("/s/extents")).expect_err("forged");
            assert!(error.to_string().contains("/s/extents"), "{error}");
        }
    }

    #[test]
    fn disks_are_numbered_without_a_gap() {
        let saved = map(&[1], true).save();
        let writer = Writer::new().section(MEMORY_TAG, 1, &saved).expect("memory");
        let bytes = writer.section(disk_tag(1), 1, &saved).expect("a disk").finish();
        assert!(Maps::decode(&bytes, Path::new("/x")).is_err());
    }
}
