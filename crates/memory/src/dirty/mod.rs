//! Which pages of RAM were written: what a `diff` holds, and what is copied again before a pause.
//!
//! A [`DirtyTracker`] write-protects RAM by a userfaultfd with `WP_ASYNC`: at the first write to a page
//! the kernel takes the protection away by itself, in the fault that the write takes anyway, and nobody
//! waits. [`DirtyTracker::collect`] asks for the unprotected pages (`PAGEMAP_SCAN`) and protects each
//! again as it is told, so that none is missed and none is told twice for one write. Writes by KVM, by
//! this process and by system calls all go through the same page tables, and are all seen.
//!
//! [`PreCopy`] uses it to make a pause short: it copies what is dirty while the guest runs, again and
//! again, until what is left can be copied within the pause that is allowed.
//!
//! # What counts as written
//!
//! - A page of 4 KiB, in memory that is made of such. It is told if its content *may* have changed.
//! - A transparent huge page that was there when it was protected is split by the first write to it, and
//!   one small page is told. One that came into being since, by a single write maybe, is told whole:
//!   2 MiB. To track is to lose huge pages where the guest writes.
//! - Pages of anonymous memory that were never touched are left alone ([`Kind::Anonymous`]): they are
//!   told once they are written, and not when they are only read. Were they marked as protected, each
//!   would need its place in a page table, and huge pages could not come there any more.
//! - Pages of a file or memfd that this process has not touched are protected by a marker in the page
//!   table, 8 bytes each: else reading a page would look like writing it.
//!
//! # What the caller sees to
//!
//! - Pages that are *discarded* read differently and were not written; the kernel says nothing. Tell
//!   [`DirtyTracker::mark`]. The same goes for changes of a shared memfd from elsewhere.
//! - fork(2): the child's memory is not tracked, and the tracker that it inherits is the parent's. It
//!   must be [abandoned](DirtyTracker::abandon_in_child); the parent's goes on.
//! - One userfaultfd per mapping: no [`crate::capture::LiveCapture`] of RAM that is tracked.
//! - `/proc` is needed when it starts, not after.

mod precopy;
mod staging;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;

use forkd_sys::PathError;
use forkd_sys::pagemap::{Categories, Pagemap, Query};
use forkd_sys::userfaultfd::{Features, Mode, Userfaultfd};

pub use precopy::{Estimate, Limits, Next, PreCopy, PreCopyError, Receipt, Round};
pub use staging::Staging;

/// What memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Private anonymous memory, huge pages or not.
    Anonymous,
    /// A file or memfd, mapped shared or private.
    File,
}

/// A range of memory to track.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tracked {
    /// Addresses in this process: whole pages.
    pub range: Range<u64>,
    /// What it is made of.
    pub kind: Kind,
}

/// Why memory cannot be tracked.
#[derive(Debug, thiserror::Error)]
pub enum DirtyError {
    /// The process's page map cannot be opened.
    #[error("cannot track what the guest writes: {0}")]
    Pagemap(#[from] PathError),
    /// A call for no range in particular failed.
    #[error("cannot {action} to track what the guest writes: {source}")]
    Setup {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A call for a range failed.
    #[error("cannot {action} RAM at {:#x}, {:#x} bytes: {source}", range.start, range.end - range.start)]
    Range {
        /// What was tried.
        action: &'static str,
        /// On which range.
        range: Range<u64>,
        /// Why it failed.
        source: io::Error,
    },
}

/// Tracks which pages are written.
#[derive(Debug)]
pub struct DirtyTracker {
    tracked: Vec<Tracked>,
    uffd: Userfaultfd,
    pagemap: Pagemap,
    /// Told by the next collect whatever the kernel says.
    marked: Vec<Range<u64>>,
    /// Process id of who tracks; the memory is its.
    owner: u32,
}

fn on<'a>(action: &'static str, range: &'a Range<u64>) -> impl Fn(io::Error) -> DirtyError + 'a {
    move |source| DirtyError::Range { action, range: range.clone(), source }
}

impl DirtyTracker {
    /// Starts: nothing counts as written at this moment. Costs a walk over the page tables, and for a
    /// clean cut wants the guest paused.
    ///
    /// # Errors
    /// [`DirtyError`]: `Unsupported` before Linux 6.7; a range that is not mapped, not of whole
    /// pages, or watched by another userfaultfd.
    pub fn start(tracked: Vec<Tracked>) -> Result<Self, DirtyError> {
        let pagemap = Pagemap::own()?;
        let needed = Features::WP_ASYNC | Features::WP_HUGETLBFS_SHMEM;
        let uffd = Userfaultfd::new(needed, Features::NONE)
            .map_err(|source| DirtyError::Setup { action: "make a userfaultfd", source })?;
        for Tracked { range, .. } in &tracked {
            uffd.register(range.clone(), Mode::WRITE_PROTECT).map_err(on("register", range))?;
        }
        let owner = forkd_sys::fork::pid();
        let mut tracker = Self { tracked, uffd, pagemap, marked: Vec::new(), owner };
        tracker.protect_all()?;
        Ok(tracker)
    }

    /// Forgets what was written: nothing counts as written at this moment.
    ///
    /// # Errors
    /// That of the kernel. All of RAM counts as written then.
    pub fn restart(&mut self) -> Result<(), DirtyError> {
        self.mark_all();
        self.protect_all()?;
        self.marked.clear();
        Ok(())
    }

    fn protect_all(&mut self) -> Result<(), DirtyError> {
        for Tracked { range, kind } in &self.tracked {
            let protected = match kind {
                Kind::File => self.uffd.write_protect(range.clone()),
                Kind::Anonymous => {
                    let there = Query {
                        any_of: Categories::PRESENT | Categories::SWAPPED,
                        none_of: Categories::ZERO,
                        protect: true,
                        ..Query::default()
                    };
                    self.pagemap.scan(range.clone(), there, |_| {})
                }
            };
            protected.map_err(on("write-protect", range))?;
        }
        Ok(())
    }

    /// Calls `each` with the ranges of pages that may have been written since they were last told,
    /// or since the start: ascending within each tracked range, not overlapping there, whole pages.
    /// From now on they count as not written. Returns the number of bytes.
    ///
    /// Copy a page after it was told, not before: a write that comes in between is then told the next
    /// time, and the copy may or may not have it.
    ///
    /// # Errors
    /// That of `PAGEMAP_SCAN`. `each` has not been called then, and all counts as written.
    pub fn collect(&mut self, mut each: impl FnMut(Range<u64>)) -> Result<u64, DirtyError> {
        let mut found = Vec::new();
        if let Err(error) = self.scan(true, |range| found.push(range)) {
            // Some pages may have been protected without having been told.
            self.mark_all();
            return Err(error);
        }
        let mut bytes = 0;
        for range in merged(found, std::mem::take(&mut self.marked)) {
            bytes += range.end - range.start;
            each(range);
        }
        Ok(bytes)
    }

    /// How many bytes a collect would tell now. Changes nothing.
    ///
    /// # Errors
    /// That of `PAGEMAP_SCAN`.
    pub fn peek(&mut self) -> Result<u64, DirtyError> {
        let mut found = Vec::new();
        self.scan(false, |range| found.push(range))?;
        let all = merged(found, self.marked.clone());
        Ok(all.iter().map(|range| range.end - range.start).sum())
    }

    fn scan(&mut self, protect: bool, mut each: impl FnMut(Range<u64>)) -> Result<(), DirtyError> {
        for Tracked { range, kind } in &self.tracked {
            let mut query = Query { protect, ..Query::WRITTEN };
            if *kind == Kind::Anonymous {
                // Not what is not there, nor what was only read and so is the zero page.
                query.any_of = Categories::PRESENT | Categories::SWAPPED;
                query.none_of = Categories::ZERO;
            }
            let scanned = self.pagemap.scan(range.clone(), query, |pages| each(pages.range));
            scanned.map_err(on("look for written pages in", range))?;
        }
        Ok(())
    }

    /// Counts the pages of a range as written, for changes that the kernel does not see: a discard.
    /// It is widened to whole pages, and cut to what is tracked.
    pub fn mark(&mut self, range: Range<u64>) {
        let page = forkd_sys::mmap::page_size() as u64;
        let start = range.start - range.start % page;
        let end = range.end.checked_next_multiple_of(page).unwrap_or(range.end);
        for Tracked { range, .. } in &self.tracked {
            let part = start.max(range.start)..end.min(range.end);
            if !part.is_empty() {
                self.marked.push(part);
            }
        }
    }

    /// Counts all pages as written.
    pub fn mark_all(&mut self) {
        self.marked = self.tracked.iter().map(|tracked| tracked.range.clone()).collect();
    }

    /// What is tracked.
    pub fn tracked(&self) -> &[Tracked] {
        &self.tracked
    }

    /// Stops tracking, in the process that started it. Dropping does the same, without telling.
    ///
    /// # Errors
    /// That of `UFFDIO_UNREGISTER`.
    pub fn stop(self) -> Result<(), DirtyError> {
        self.unregister()
    }

    fn unregister(&self) -> Result<(), DirtyError> {
        // A copy of the descriptor in some child would keep the registration else.
        for Tracked { range, .. } in &self.tracked {
            self.uffd.unregister(range.clone()).map_err(on("unregister", range))?;
        }
        Ok(())
    }

    /// In a forked child: closes the copies of the parent's descriptors, and leaves its memory alone.
    /// Dropping it there does the same; this says that it is meant.
    pub fn abandon_in_child(self) {
        drop(self);
    }
}

impl Drop for DirtyTracker {
    fn drop(&mut self) {
        if self.owner == forkd_sys::fork::pid() {
            // The last copy's end does it as well, and a parent's memory is not a child's to free.
            let _stopped = self.unregister();
        }
    }
}

/// Two lists of ranges as one, ascending, joined where they touch or overlap.
fn merged(mut a: Vec<Range<u64>>, b: Vec<Range<u64>>) -> Vec<Range<u64>> {
    a.extend(b);
    a.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(a.len());
    for range in a {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}
