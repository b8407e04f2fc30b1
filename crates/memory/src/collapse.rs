//! Making RAM huge pages ahead of a fork, while the guest runs.
//!
//! fork(2) copies an entry for each page of private memory: 512 for 2 MiB of small pages, one for a huge page. RAM is in
//! small pages wherever it was written to after a fork, so a VM that is branched again and again has longer and
//! longer pauses. [`CollapseAhead`] starts a thread that makes huge pages of the small ones (`MADV_COLLAPSE`) until
//! few enough are left, and tells by an eventfd; the caller joins it ([`CollapseAhead::finish`]), and forks.
//!
//! # What it costs
//!
//! - Memory. A range is taken if at least half of its 512 pages are this process's alone, so what a VM has for itself
//!   is doubled at most. Pages that are shared with other VMs are copied then. The thread stops where the host would
//!   be left with less than a reserve.
//! - The guest waits where it touches the very 2 MiB that are being copied, or faults while the address space is
//!   locked, which it is for the copy of one huge page, half a millisecond. So that this is no longer on a busy host
//!   the thread is a real-time one meanwhile, as the writer of a live snapshot is. (Two CPUs, five processes that want
//!   them: 0.6 to 1.4 ms for each huge page, 3 to 8 ms as an ordinary thread.)
//! - Where the host is a VM itself, memory that was free for a while has been given back to the hypervisor, and its first
//!   use takes 5 ms for 2 MiB. So the thread touches as much memory before, where no lock is held, and frees it: that
//!   is what the kernel takes next. (A call for 4 huge pages: 2.3 ms, not 20 ms.)
//!
//! # What it does not do
//!
//! Ranges with fewer pages of their own stay small: there the fork costs what it did. Memory of files cannot be
//! collapsed this way.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use forkd_sys::hugepages::{self, HUGE_PAGE};
use forkd_sys::mmap::{AnonymousOptions, Mapping, page_size};
use forkd_sys::pagemap::{Categories, Pagemap, Query};
use forkd_sys::wake::Waker;
use vm_memory::GuestMemoryMmap;

use crate::capture::priority::{Turns, Urgency};
use crate::ram::{GuestRam, host_available_mib};

/// So many of a huge page's 512 small ones have to be there, and of no other process.
const LEAST: u64 = 256;
/// Huge pages that one call makes. A call cannot be ended early, and keeps a CPU for 0.6 ms each; what a call costs by
/// itself (`lru_add_drain_all`) is less.
const BATCH: usize = 4;
/// Calls in a row that made nothing before it is left at that.
const PATIENCE: u32 = 8;
/// Stack of the thread, in bytes.
const STACK_BYTES: usize = 128 << 10;

const SMALL: Query = Query {
    all_of: Categories::PRESENT,
    any_of: Categories::NONE,
    none_of: NOT_SMALL,
    tell: Categories::NONE,
    protect: false,
};
const HUGE: Query = Query {
    all_of: Categories::HUGE,
    any_of: Categories::NONE,
    none_of: Categories::FILE,
    tell: Categories::NONE,
    protect: false,
};
const NOT_SMALL: Categories = Categories::HUGE.and(Categories::FILE).and(Categories::ZERO);

/// When to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CollapseGoal {
    /// If there are no more small pages than so many, nothing is done.
    pub most: u64,
    /// Otherwise, until as few are left.
    pub enough: u64,
    /// It may take so long. A call that has begun goes on, for some milliseconds.
    pub time: Duration,
    /// So much of the host's available memory is not used, in MiB.
    pub reserve_mib: u64,
}

/// What RAM is now, and what was done to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Collapsed {
    /// Small pages of private memory.
    pub small: u64,
    /// Huge pages.
    pub huge: u64,
    /// Huge pages that were made.
    pub made: u64,
    /// How long it took.
    pub took: Duration,
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    told: Waker,
}

/// RAM that is being made huge pages. Dropping it stops the thread and waits for that, as long as one call takes.
#[derive(Debug)]
pub struct CollapseAhead {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<Collapsed, io::Error>>>,
}

impl CollapseAhead {
    /// Starts the thread. RAM is of a kind that [`GuestRam::can_collapse`].
    ///
    /// # Errors
    /// There is no thread, or no descriptor, to be had.
    pub fn start(ram: &GuestRam, goal: CollapseGoal) -> io::Result<Self> {
        let shared = Arc::new(Shared { stop: AtomicBool::new(false), told: Waker::new()? });
        let work = Work {
            ranges: ram.regions().map(|r| r.host_addr..r.host_addr + r.len).collect(),
            forbidden: ram.prefers_small_pages(),
            goal,
            begun: Instant::now(),
            shared: Arc::clone(&shared),
            _mapped: ram.guest().clone(),
        };
        let thread = std::thread::Builder::new()
            .name("collapse".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let _told = TellEnd(Arc::clone(&work.shared));
                work.run()
            })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Readable when it is done.
    pub fn told_fd(&self) -> BorrowedFd<'_> {
        self.shared.told.as_fd()
    }

    /// Stops the thread, if it is not done, and waits for its end.
    ///
    /// # Errors
    /// RAM could not be looked at, or the thread panicked; RAM is as good as before.
    pub fn finish(mut self) -> io::Result<Collapsed> {
        self.join().unwrap_or_else(|| Ok(Collapsed::default()))
    }

    fn join(&mut self) -> Option<io::Result<Collapsed>> {
        let thread = self.thread.take()?;
        self.shared.stop.store(true, Ordering::Relaxed);
        let panicked = |_| Err(io::Error::other("the thread that makes huge pages panicked"));
        Some(thread.join().unwrap_or_else(panicked))
    }
}

impl Drop for CollapseAhead {
    fn drop(&mut self) {
        // Whatever it says: RAM is RAM.
        let _ended = self.join();
    }
}

/// Tells the caller when the thread ends, in whatever way.
struct TellEnd(Arc<Shared>);

impl Drop for TellEnd {
    fn drop(&mut self) {
        // It fails for no counter that exists.
        let _rung = self.0.told.wake();
    }
}

/// What the thread works with.
struct Work {
    ranges: Vec<Range<u64>>,
    /// RAM is advised to have no huge pages.
    forbidden: bool,
    goal: CollapseGoal,
    begun: Instant,
    shared: Arc<Shared>,
    /// RAM stays mapped while this is held.
    _mapped: GuestMemoryMmap,
}

/// A huge page's range, and its small pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    address: u64,
    small: u64,
}

/// What the thread has for itself.
struct Means {
    urgency: Urgency,
    pagemap: Pagemap,
    /// Memory for one call, to be touched and freed.
    scratch: Mapping,
}

impl Means {
    fn new() -> io::Result<Self> {
        let align = HUGE_PAGE as usize;
        let options = AnonymousOptions { noreserve: true, huge_pages: true, align };
        Ok(Self {
            urgency: Urgency::of_this_thread(),
            pagemap: Pagemap::own().map_err(io::Error::other)?,
            scratch: Mapping::anonymous(BATCH * align, options)?,
        })
    }

    /// Has memory for so many huge pages be there when the kernel wants it.
    fn warm(&self, count: usize) -> io::Result<()> {
        let len = count.min(BATCH) * HUGE_PAGE as usize;
        self.scratch.populate_write(0, len)?;
        self.scratch.discard(0, len)
    }
}

impl Work {
    fn run(&self) -> io::Result<Collapsed> {
        let mut means = Means::new()?;
        let pagemap = &mut means.pagemap;
        let mut done = Collapsed::default();
        let mut places = Vec::new();
        for range in &self.ranges {
            let small = small_pages(pagemap, range.clone())?;
            done.small += small.iter().map(|place| place.small).sum::<u64>();
            done.huge += pages(pagemap, range.clone(), HUGE)? / (HUGE_PAGE / page());
            let whole = |place: &Place| place.address + HUGE_PAGE <= range.end;
            places.extend(small.into_iter().filter(|p| p.small >= LEAST && whole(p)));
        }
        if done.small > self.goal.most {
            self.collapse_all(&mut means, &places, &mut done)?;
        }
        done.took = self.begun.elapsed();
        Ok(done)
    }

    fn collapse_all(
        &self,
        means: &mut Means,
        places: &[Place],
        done: &mut Collapsed,
    ) -> io::Result<()> {
        let (mut in_vain, mut turns) = (0, Turns::new());
        let neighbours = |a: &Place, b: &Place| a.address + HUGE_PAGE == b.address;
        for run in places.chunk_by(neighbours).flat_map(|run| run.chunks(BATCH)) {
            let own = own_pages(&means.pagemap, run)?;
            for batch in own.chunk_by(neighbours) {
                if done.small <= self.goal.enough || in_vain >= PATIENCE || !self.may_go_on(batch) {
                    return Ok(());
                }
                let Some(made) = self.collapse(means, batch)? else { return Ok(()) };
                turns.pause();
                in_vain = if made == 0 { in_vain + 1 } else { 0 };
                let small: u64 = batch.iter().map(|place| place.small).sum();
                done.small -= (small * made / batch.len() as u64).min(done.small);
                done.huge += made;
                done.made += made;
            }
        }
        Ok(())
    }

    fn may_go_on(&self, batch: &[Place]) -> bool {
        let needed = (batch.len() as u64 * HUGE_PAGE) >> 20;
        !self.shared.stop.load(Ordering::Relaxed)
            && self.begun.elapsed() < self.goal.time
            && host_available_mib().is_ok_and(|mib| mib >= self.goal.reserve_mib + needed)
    }

    /// Makes huge pages of neighbours. How many there are now; none if there will be no more.
    ///
    /// RAM may be advised to have no huge pages ([`GuestRam::prefer_small_pages`]), so that first touches cost 4 KiB,
    /// and collapsing respects the advice. So it is taken back for these ranges alone, and given again: each of
    /// them has its page table, so that no touch of it can make a huge page meanwhile. If it cannot be given again,
    /// ranges are left without it that are huge, or have a page table, already.
    fn collapse(&self, means: &mut Means, batch: &[Place]) -> io::Result<Option<u64>> {
        let (Some(first), Some(last)) = (batch.first(), batch.last()) else { return Ok(Some(0)) };
        let range = first.address..last.address + HUGE_PAGE;
        if means.warm(batch.len()).is_err() {
            return Ok(None);
        }
        if self.forbidden && hugepages::allow(range.clone()).is_err() {
            return Ok(None);
        }
        means.urgency.hurry();
        let outcome = hugepages::collapse(range.clone());
        means.urgency.relax();
        if self.forbidden {
            // It was just split there; if it fails nonetheless, see above.
            let _again = hugepages::forbid(range.clone());
        }
        if outcome.is_err_and(|e| e.kind() == io::ErrorKind::OutOfMemory) {
            return Ok(None);
        }
        Ok(Some(pages(&mut means.pagemap, range, HUGE)? / (HUGE_PAGE / page())))
    }
}

fn page() -> u64 {
    page_size() as u64
}

/// How many pages match.
fn pages(pagemap: &mut Pagemap, range: Range<u64>, query: Query) -> io::Result<u64> {
    let mut bytes = 0;
    pagemap.scan(range, query, |found| bytes += found.range.end - found.range.start)?;
    Ok(bytes / page())
}

/// The ranges of huge pages that have small ones, ascending.
fn small_pages(pagemap: &mut Pagemap, range: Range<u64>) -> io::Result<Vec<Place>> {
    let mut places: Vec<Place> = Vec::new();
    pagemap.scan(range, SMALL, |found| {
        let mut at = found.range.start;
        while at < found.range.end {
            let address = at - at % HUGE_PAGE;
            let end = found.range.end.min(address + HUGE_PAGE);
            let small = (end - at) / page();
            match places.last_mut() {
                Some(last) if last.address == address => last.small += small,
                _ => places.push(Place { address, small }),
            }
            at = end;
        }
    })?;
    Ok(places)
}

/// Those of which enough is this process's alone.
fn own_pages(pagemap: &Pagemap, run: &[Place]) -> io::Result<Vec<Place>> {
    let mut own = Vec::with_capacity(run.len());
    for place in run {
        let range = place.address..place.address + HUGE_PAGE;
        if pagemap.count_exclusive(range)? >= LEAST {
            own.push(*place);
        }
    }
    Ok(own)
}
