//! What a diff is over: a page that the parent has already is not kept again.
//!
//! So the writer of a diff need not know what changed. Whatever it is given is compared with the
//! parent's bytes, which are in the page cache as a rule, and what is the same is dropped. A writer
//! that knows better gives less.
//!
//! The parent is not verified for this: if its file is damaged then what is dropped is what the damaged
//! file has, and the diff's load finds the damage by the parent's hash.

use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};

use crate::SnapshotError;
use crate::chain::{Grain, Resolved, resolve_all};
use crate::digest::{PAGE, PAGE_SIZE};
use crate::manifest::Parent;
use crate::store::Store;

/// The files of a parent, open.
#[derive(Debug)]
pub(crate) struct Parents {
    memory: Below,
    disks: Vec<Below>,
}

/// One file of a parent.
#[derive(Debug, Clone)]
pub(crate) struct Below {
    resolved: Resolved,
    /// What is nowhere in it is zero. Of a disk it is the base image's.
    absent_is_zero: bool,
}

impl Parents {
    /// Opens the parent of the diff `tag`.
    ///
    /// # Errors
    /// It is not there any more, is not that one, or its files cannot be opened.
    pub(crate) fn open(store: &Store, tag: &str, parent: &Parent) -> Result<Self, SnapshotError> {
        let _names = store.share_names()?;
        store.check_parent(tag, parent)?;
        let (memory, disks) = resolve_all(&store.layers(&parent.tag)?, Grain::Data)?;
        let memory = Below { resolved: memory, absent_is_zero: true };
        let disk = |resolved| Below { resolved, absent_is_zero: false };
        Ok(Self { memory, disks: disks.into_iter().map(disk).collect() })
    }

    /// Its memory, if that is `len` bytes long.
    pub(crate) fn memory(&self, len: u64) -> Option<Below> {
        Some(self.memory.clone()).filter(|below| below.resolved.len == len)
    }

    /// A disk's layer, if there is such a one of that length.
    pub(crate) fn disk(&self, index: usize, len: u64) -> Option<Below> {
        self.disks.get(index).filter(|below| below.resolved.len == len).cloned()
    }

    /// The descriptors of its files.
    pub(crate) fn fds(&self) -> impl Iterator<Item = RawFd> {
        let all = std::iter::once(&self.memory).chain(&self.disks);
        all.flat_map(|below| below.resolved.files.iter().map(|source| source.file.as_raw_fd()))
    }
}

impl Below {
    /// Which of the pages at `offset` have the same content there: one for each page of `bytes`.
    ///
    /// # Errors
    /// Its files cannot be read.
    pub(crate) fn same(&self, offset: u64, bytes: &[u8]) -> Result<Vec<bool>, SnapshotError> {
        let mut theirs = vec![0; bytes.len()];
        self.resolved.read_at(offset, &mut theirs)?;
        let pages = bytes.chunks(PAGE).zip(theirs.chunks(PAGE));
        let at = (offset..).step_by(PAGE);
        Ok(pages.zip(at).map(|((ours, theirs), at)| ours == theirs && self.has(at)).collect())
    }

    /// Which of the pages of a range are zero there.
    ///
    /// # Errors
    /// Its files cannot be read.
    pub(crate) fn zero(&self, range: &Range<u64>) -> Result<Vec<bool>, SnapshotError> {
        // At most a block.
        self.same(range.start, &vec![0; (range.end - range.start) as usize])
    }

    /// Whether it has the page at `offset` at all.
    fn has(&self, offset: u64) -> bool {
        let Resolved { extents, zeroes, .. } = &self.resolved;
        let end = offset + PAGE_SIZE;
        let extent = extents.partition_point(|extent| extent.offset + extent.len < end);
        let zero = zeroes.partition_point(|range| range.end < end);
        self.absent_is_zero
            || extents.get(extent).is_some_and(|extent| extent.offset <= offset)
            || zeroes.get(zero).is_some_and(|range| range.start <= offset)
    }
}
