//! Writes the pages of a layer's file, from any thread and in any order.
//!
//! Pages are hashed from the caller's buffer, on the caller's thread: what goes wrong on the way to
//! the disk is found later, because nothing is read back to be hashed. No writer waits for another
//! while pages are hashed or written.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use rustix::io::Errno;

use crate::SnapshotError;
use crate::below::Below;
use crate::digest::{
    BLOCK_SIZE, PAGE, PAGE_SIZE, PAGES_PER_BLOCK, PageHash, PageSet, block_hash, is_zero, page_hash,
};
use crate::io::Io;
use crate::pages::{Kind, PageMap, Run, block_count, page_range};

/// After so many bytes a writer looks whether the snapshot has been deleted meanwhile.
const LOOK_EVERY: u64 = 16 << 20;

/// What a file holds, and how it is to treat zero pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    pub len: u64,
    /// Nothing of older layers shows through.
    pub whole: bool,
    /// What no layer holds is zero: then a whole file need not list its zero pages. So it is for
    /// memory; under a disk there may be a base image.
    pub absent_is_zero: bool,
}

impl Shape {
    fn lists_zeroes(&self) -> bool {
        !(self.whole && self.absent_is_zero)
    }
}

#[derive(Debug, Default)]
struct Block {
    data: PageSet,
    zero: PageSet,
    /// By page of the block; made with its first data page. 16 KiB.
    hashes: Option<Box<[PageHash]>>,
}

#[derive(Debug)]
struct Inner {
    io: Arc<dyn Io>,
    file: File,
    path: PathBuf,
    /// Goes away when the snapshot is deleted.
    home: PathBuf,
    tag: String,
    shape: Shape,
    /// What a diff is over.
    below: Option<Below>,
    blocks: Vec<Mutex<Block>>,
    written: AtomicU64,
    /// No more is written: what is published must not change. Writers share it while they write.
    sealed: RwLock<bool>,
}

/// Writes pages. Clones write the same file.
///
/// Different threads may write different pages at once. If two write the same page at once, the page
/// may be damaged; one after the other, the later counts.
#[derive(Debug, Clone)]
pub struct PageWriter(Arc<Inner>);

impl PageWriter {
    pub(crate) fn create(
        io: Arc<dyn Io>,
        path: PathBuf,
        home: PathBuf,
        tag: &str,
        shape: Shape,
        below: Option<Below>,
    ) -> Result<Self, SnapshotError> {
        let file =
            io.create(&path, shape.len).map_err(|e| SnapshotError::io("create", &path, e))?;
        let blocks = (0..block_count(shape.len)).map(|_| Mutex::default()).collect();
        let (tag, written, sealed) = (tag.to_string(), AtomicU64::new(0), RwLock::new(false));
        Ok(Self(Arc::new(Inner {
            io,
            file,
            path,
            home,
            tag,
            shape,
            below,
            blocks,
            written,
            sealed,
        })))
    }

    /// Length of the file in bytes.
    pub fn len(&self) -> u64 {
        self.0.shape.len
    }

    /// The file's descriptor, as long as this lives.
    pub(crate) fn fd(&self) -> RawFd {
        self.0.file.as_raw_fd()
    }

    /// Gives back what the file takes on the disk, which to delete it does not do while it is open. Its content is
    /// of no use any more.
    pub(crate) fn free(&self) {
        // Best effort: it is on a way on which something failed already.
        drop(self.0.file.set_len(0));
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes whole pages at an offset in bytes, a multiple of 4096. Pages that are zero take no room
    /// on the disk; in a diff, those that are as in the parent are not kept, and zero pages that are not
    /// zero there count as changed to zero. The bytes must not change during the call.
    ///
    /// # Errors
    /// [`SnapshotError::Misuse`] if the range is not of whole pages within the file, or the snapshot is
    /// being committed or was,
    /// [`SnapshotError::Cancelled`] if the snapshot was deleted, [`SnapshotError::DiskFull`], or the
    /// file cannot be written.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), SnapshotError> {
        let end = offset.saturating_add(bytes.len() as u64);
        self.0.check(&(offset..end))?;
        let _open = self.0.open()?;
        let mut rest = bytes;
        let mut at = offset;
        while !rest.is_empty() {
            let room = (BLOCK_SIZE - at % BLOCK_SIZE).min(rest.len() as u64);
            let (piece, behind) = rest.split_at(room as usize);
            self.0.write_in_block(at, piece)?;
            (rest, at) = (behind, at + room);
        }
        self.0.look(bytes.len() as u64)
    }

    /// Makes whole pages zero, as [`PageWriter::write`] with zeroes does.
    ///
    /// # Errors
    /// As [`PageWriter::write`].
    pub fn write_zero(&self, range: Range<u64>) -> Result<(), SnapshotError> {
        self.0.check(&range)?;
        let _open = self.0.open()?;
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at / BLOCK_SIZE + 1) * BLOCK_SIZE);
            let first = (at % BLOCK_SIZE / PAGE_SIZE) as usize;
            let theirs = match &self.0.below {
                Some(below) => below.zero(&(at..end))?,
                None => vec![false; ((end - at) / PAGE_SIZE) as usize],
            };
            let known = self.0.known(at / BLOCK_SIZE, first, theirs);
            for run in runs(&known, |known| !known) {
                self.0.set_zero(at / BLOCK_SIZE, first + run.start..first + run.end)?;
            }
            at = end;
        }
        Ok(())
    }

    /// What has been written.
    pub(crate) fn map(&self) -> PageMap {
        let Shape { len, whole, .. } = self.0.shape;
        let mut map = PageMap { len, whole, runs: Vec::new(), hashes: Vec::new() };
        for (index, block) in self.0.blocks.iter().enumerate() {
            let block = locked(block);
            for page in 0..PAGES_PER_BLOCK {
                let kind = match (block.data.has(page), block.zero.has(page)) {
                    (true, _) => Kind::Data,
                    (false, true) => Kind::Zero,
                    (false, false) => continue,
                };
                let first = (index * PAGES_PER_BLOCK + page) as u64;
                PageMap::push(&mut map.runs, Run { first, count: 1, kind });
            }
            if let Some(hashes) = block.hashes.as_ref().filter(|_| !block.data.is_empty()) {
                map.hashes.push(block_hash(&block.data, &|page| hashes[page]));
            }
        }
        map
    }

    /// Waits for writes at work, refuses later ones, and makes the file durable.
    pub(crate) fn finish(&self) -> Result<(), SnapshotError> {
        *self.0.sealed.write().unwrap_or_else(PoisonError::into_inner) = true;
        let Inner { io, file, path, .. } = &*self.0;
        io.sync_file(file, path).map_err(|e| SnapshotError::io("sync", path, e))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0.path
    }
}

/// What is to be done with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Nothing: it is as in the parent.
    Known,
    Zero,
    Data,
}

/// Maximal runs of what is wanted, as ranges of indices.
fn runs<T>(all: &[T], wanted: impl Fn(&T) -> bool) -> impl Iterator<Item = Range<usize>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = at + all[at..].iter().position(&wanted)?;
        let len = all[start..].iter().take_while(|one| wanted(one)).count();
        at = start + len;
        Some(start..at)
    })
}

/// The state of a block is valid at each instant, so it is after a panic elsewhere.
fn locked(block: &Mutex<Block>) -> MutexGuard<'_, Block> {
    block.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    fn check(&self, range: &Range<u64>) -> Result<(), SnapshotError> {
        page_range(range, self.shape.len).map_err(|e| SnapshotError::misuse(&self.path, e))?;
        Ok(())
    }

    fn open(&self) -> Result<RwLockReadGuard<'_, bool>, SnapshotError> {
        let sealed = self.sealed.read().unwrap_or_else(PoisonError::into_inner);
        if *sealed {
            return Err(SnapshotError::misuse(
                &self.path,
                "it is complete, nothing is written now",
            ));
        }
        Ok(sealed)
    }

    /// Counts bytes, and looks now and then whether the snapshot still has a place.
    fn look(&self, bytes: u64) -> Result<(), SnapshotError> {
        let before = self.written.fetch_add(bytes, Ordering::Relaxed);
        if before / LOOK_EVERY != (before + bytes) / LOOK_EVERY && !self.home.exists() {
            return Err(SnapshotError::Cancelled(self.tag.clone()));
        }
        Ok(())
    }

    /// Which of the pages from `first` of a block on need not be kept: those that are as in the parent (`same`), unless
    /// this layer has them by now.
    fn known(&self, block: u64, first: usize, mut same: Vec<bool>) -> Vec<bool> {
        if same.iter().any(|same| *same) {
            let state = locked(&self.blocks[block as usize]);
            for (page, same) in (first..).zip(&mut same) {
                *same &= !state.data.has(page) && !state.zero.has(page);
            }
        }
        same
    }

    /// What is to be done with each page of `bytes`, which lie within one block.
    fn sort(&self, offset: u64, bytes: &[u8]) -> Result<Vec<Fate>, SnapshotError> {
        let base = (offset % BLOCK_SIZE / PAGE_SIZE) as usize;
        let known = match &self.below {
            Some(below) => self.known(offset / BLOCK_SIZE, base, below.same(offset, bytes)?),
            None => vec![false; bytes.len() / PAGE],
        };
        let fate = |(known, page): (bool, &[u8])| match known {
            true => Fate::Known,
            false if is_zero(page) => Fate::Zero,
            false => Fate::Data,
        };
        Ok(known.into_iter().zip(bytes.chunks(PAGE)).map(fate).collect())
    }

    /// `bytes` lie within one block.
    fn write_in_block(&self, offset: u64, bytes: &[u8]) -> Result<(), SnapshotError> {
        let base = (offset % BLOCK_SIZE / PAGE_SIZE) as usize;
        let fates = self.sort(offset, bytes)?;
        for zero in runs(&fates, |fate| *fate == Fate::Zero) {
            self.set_zero(offset / BLOCK_SIZE, base + zero.start..base + zero.end)?;
        }
        let mut hashes: Vec<(usize, PageHash)> = Vec::with_capacity(fates.len());
        for data in runs(&fates, |fate| *fate == Fate::Data) {
            let run = &bytes[data.start * PAGE..data.end * PAGE];
            let pages = (base + data.start..).zip(run.chunks(PAGE));
            hashes.extend(pages.map(|(page, bytes)| (page, page_hash(page, bytes))));
            self.io
                .write_at(&self.file, &self.path, run, offset + (data.start * PAGE) as u64)
                .map_err(|e| SnapshotError::io("write", &self.path, e))?;
        }
        if hashes.is_empty() {
            return Ok(());
        }
        let mut block = locked(&self.blocks[(offset / BLOCK_SIZE) as usize]);
        let Block { data, zero, hashes: all } = &mut *block;
        let all = all.get_or_insert_with(|| vec![[0; 32]; PAGES_PER_BLOCK].into_boxed_slice());
        for (page, hash) in hashes {
            all[page] = hash;
            data.insert(page);
            zero.remove(page);
        }
        Ok(())
    }

    fn set_zero(&self, block: u64, pages: Range<usize>) -> Result<(), SnapshotError> {
        let mut had_data = false;
        {
            let mut state = locked(&self.blocks[block as usize]);
            for page in pages.clone() {
                had_data |= state.data.has(page);
                state.data.remove(page);
                if self.shape.lists_zeroes() {
                    state.zero.insert(page);
                }
            }
        }
        // Nothing maps what is not listed as data, but the file shall read as what it means.
        if had_data { self.erase(block, pages) } else { Ok(()) }
    }

    fn erase(&self, block: u64, pages: Range<usize>) -> Result<(), SnapshotError> {
        let at = block * BLOCK_SIZE + (pages.start * PAGE) as u64;
        let len = pages.len() * PAGE;
        let failed = |e| SnapshotError::io("erase pages of", &self.path, e);
        match self.io.punch(&self.file, &self.path, at, len as u64) {
            Err(e) if e.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error()) => {
                self.io.write_at(&self.file, &self.path, &vec![0; len], at).map_err(failed)
            }
            result => result.map_err(failed),
        }
    }
}
