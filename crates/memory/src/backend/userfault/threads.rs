//! The two threads that load: one serves faults, one fetches ahead.
//!
//! Two, so that a fault never waits for a large read of what nobody asked for. They take the lock of
//! [`Pages`] for as long as putting bytes in place takes, not for reading the source.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use forkd_sys::mmap::Mapping;
use forkd_sys::userfaultfd::{Fault, FaultKind, Placed, Userfaultfd};
use forkd_sys::wake::Waker;
use rustix::event::{PollFd, PollFlags, poll};

use super::pages::Pages;
use super::{PageSource, SourceFailure};

/// Size of a page in bytes: that of x86-64 and of saved working sets.
pub(super) const PAGE: u64 = 4096;
/// Pages that are loaded around a fault, aligned: 64 KiB cost little more to read than 4.
pub(super) const FAULT_PAGES: u64 = 16;
/// Pages that are fetched ahead at once: 256 KiB.
const AHEAD_PAGES: u64 = 64;

/// Nice value of the thread that fetches ahead, once that is what nobody has needed so far: the least.
const BACKGROUND: i32 = 19;

static ZERO_PAGE: [u8; PAGE as usize] = [0; PAGE as usize];

type FailureHook = Arc<dyn Fn(&SourceFailure) + Send + Sync>;

/// What the backend and its threads share.
pub(super) struct Shared {
    pub(super) uffd: Userfaultfd,
    /// First address of RAM.
    base: u64,
    pub(super) source: Box<dyn PageSource>,
    pages: Mutex<Pages>,
    /// For the thread that fetches ahead, and for who waits for the end of loading.
    changed: Condvar,
    /// For the event loop: a failure, or the end of loading.
    pub(super) events: Waker,
    /// For the thread that serves faults: the end.
    kick: Waker,
    pub(super) on_failure: Mutex<Option<FailureHook>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("base", &self.base).field("source", &self.source).finish()
    }
}

impl Shared {
    pub(super) fn new(
        uffd: Userfaultfd,
        mapping: &Mapping,
        source: Box<dyn PageSource>,
    ) -> io::Result<Self> {
        Ok(Self {
            uffd,
            base: mapping.address() as u64,
            source,
            pages: Mutex::new(Pages::new(mapping.len() as u64 / PAGE)),
            changed: Condvar::new(),
            events: Waker::new()?,
            kick: Waker::new()?,
            on_failure: Mutex::default(),
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Pages> {
        // Each change of the state is complete in itself, so a panic elsewhere leaves it usable.
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn descriptors(&self) -> [BorrowedFd<'_>; 3] {
        [self.uffd.as_fd(), self.events.as_fd(), self.kick.as_fd()]
    }

    /// Waits for a change of what the lock guards.
    pub(super) fn wait<'a>(&self, pages: MutexGuard<'a, Pages>) -> MutexGuard<'a, Pages> {
        self.changed.wait(pages).unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells who waits that something changed.
    pub(super) fn notify(&self) {
        self.changed.notify_all();
    }

    /// Ends the threads: the one that serves faults as well, which waits in poll.
    pub(super) fn stop(&self) {
        self.lock().stop = true;
        self.notify();
        // An eventfd's write fails only for lack of memory in the kernel's own books: never.
        let _woken = self.kick.wake();
    }

    fn addresses(&self, pages: &Range<u64>) -> Range<u64> {
        self.base + pages.start * PAGE..self.base + pages.end * PAGE
    }

    /// Loads the pages of a range that are wanted. With `touched` they are recorded as needed, and it
    /// is said whether that page was put in place, and so who waits for it woken.
    pub(super) fn load(
        &self,
        range: Range<u64>,
        touched: Option<u64>,
        buffer: &mut Vec<u8>,
    ) -> Result<bool, SourceFailure> {
        let mut at = range.start;
        let mut placed = false;
        loop {
            let Some(run) = self.lock().first_wanted(at..range.end, u64::MAX) else {
                return Ok(placed);
            };
            at = run.end;
            let (offset, len) = (run.start * PAGE, (run.end - run.start) * PAGE);
            let zero = self.source.is_zero(offset, len);
            if !zero {
                buffer.resize(usize::try_from(len).unwrap_or(usize::MAX), 0);
                self.source.read_at(offset, buffer).map_err(|error| SourceFailure {
                    offset,
                    len,
                    error: error.to_string(),
                })?;
            }
            let mut pages = self.lock();
            if touched.is_some() {
                pages.recorded.push(offset..offset + len);
            }
            let bytes = (!zero).then_some(&buffer[..]);
            let settled = self.settle(&mut pages, run, bytes, touched);
            placed |= settled.map_err(|error| SourceFailure {
                offset,
                len,
                error: format!("cannot put pages in place: {error}"),
            })?;
            if pages.wanted() == 0 {
                self.notify();
            }
        }
    }

    /// Settles what is still wanted of a run with the source's bytes for the run, or as zero; true if
    /// the touched page is now in place.
    fn settle(
        &self,
        pages: &mut Pages,
        run: Range<u64>,
        bytes: Option<&[u8]>,
        touched: Option<u64>,
    ) -> io::Result<bool> {
        let mut at = run.start;
        let mut placed = false;
        // Pages that a discard or the other thread settled meanwhile are left out.
        while let Some(piece) = pages.first_wanted(at..run.end, u64::MAX) {
            at = piece.end;
            if let Some(bytes) = bytes {
                let index = |page: u64| ((page - run.start) * PAGE) as usize;
                let bytes = &bytes[index(piece.start)..index(piece.end)];
                self.place(&piece, bytes)?;
                placed |= touched.is_some_and(|page| piece.contains(&page));
            }
            // Zero pages are put in place when they are touched, as most never are.
            pages.settle(piece);
        }
        Ok(placed)
    }

    fn place(&self, pages: &Range<u64>, bytes: &[u8]) -> io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let at = self.addresses(pages).start + done as u64;
            match self.uffd.copy(at, &bytes[done..], true, false)? {
                Placed::Done => break,
                // A page that is there has bytes of its own already, which are not to be changed.
                Placed::Exists(more) => done += more + PAGE as usize,
            }
        }
        Ok(())
    }

    /// Resolves one fault, of a page that is settled: it is zero, or was put in place meanwhile.
    fn put_zero(&self, pages: &Pages, page: u64, write: bool) -> io::Result<()> {
        if pages.complete {
            return Ok(());
        }
        let range = self.addresses(&(page..page + 1));
        let placed = if write {
            // The shared zero page would fault again at once.
            self.uffd.copy(range.start, &ZERO_PAGE, true, false)?
        } else {
            self.uffd.zero(range.clone(), true)?
        };
        match placed {
            Placed::Done => Ok(()),
            // It was put in place after the access faulted, and nobody was woken for it.
            Placed::Exists(_) => self.uffd.wake(range),
        }
    }

    fn serve(&self, fault: Fault, buffer: &mut Vec<u8>) -> Result<(), SourceFailure> {
        self.lock().faults += 1;
        let page = fault.address.saturating_sub(self.base) / PAGE;
        let write = matches!(fault.kind, FaultKind::Missing { write: true });
        let first = page - page % FAULT_PAGES;
        let placed = match self.load(first..first + FAULT_PAGES, Some(page), buffer) {
            Ok(placed) => placed,
            // Its neighbours may be what cannot be had.
            Err(failure) => self.load(page..page + 1, Some(page), buffer).map_err(|_| failure)?,
        };
        if placed {
            return Ok(());
        }
        let pages = self.lock();
        self.put_zero(&pages, page, write).map_err(|error| SourceFailure {
            offset: page * PAGE,
            len: PAGE,
            error: format!("cannot put a page in place: {error}"),
        })
    }

    /// Remembers a failure, and tells of it. `waiting` is the range that a guest waits for.
    fn fail(&self, failure: SourceFailure, waiting: Option<Range<u64>>) {
        {
            let mut pages = self.lock();
            pages.failed.extend(waiting);
            pages.failure.get_or_insert_with(|| failure.clone());
        }
        self.notify();
        // As in `stop`.
        let _woken = self.events.wake();
        let hook = self.on_failure.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(hook) = hook {
            hook(&failure);
        }
    }

    /// Forgets failures, and lets those who wait for their pages ask again.
    pub(super) fn retry(&self) -> io::Result<()> {
        let failed = {
            let mut pages = self.lock();
            pages.failure = None;
            std::mem::take(&mut pages.failed)
        };
        self.notify();
        failed.iter().try_for_each(|pages| self.uffd.wake(self.addresses(pages)))
    }

    /// Settles a range as zero and takes its pages away.
    pub(super) fn discard(&self, mapping: &Mapping, offset: usize, len: usize) -> io::Result<()> {
        let run = offset as u64 / PAGE..(offset as u64).saturating_add(len as u64) / PAGE;
        let mut pages = self.lock();
        mapping.discard(offset, len)?;
        pages.settle(run.clone());
        if pages.wanted() == 0 {
            self.notify();
        }
        if run.is_empty() || pages.complete {
            return Ok(());
        }
        // Who waits for a page that the source did not give is served zeroes now.
        self.uffd.wake(self.addresses(&run))
    }

    /// The thread that serves faults.
    pub(super) fn serve_faults(&self) {
        if let Err(error) = self.serve_until_stopped() {
            let text = format!("page faults are not served any more: {error}");
            self.fail(SourceFailure { offset: 0, len: 0, error: text }, None);
        }
    }

    fn serve_until_stopped(&self) -> io::Result<()> {
        let (mut faults, mut buffer) = (Vec::new(), Vec::new());
        loop {
            if self.lock().stop {
                return Ok(());
            }
            if self.uffd.read(&mut faults)? == 0 {
                let mut fds = [
                    PollFd::new(&self.uffd, PollFlags::IN),
                    PollFd::new(&self.kick, PollFlags::IN),
                ];
                match poll(&mut fds, None) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(errno) => return Err(errno.into()),
                }
            }
            for fault in faults.drain(..) {
                if let Err(failure) = self.serve(fault, &mut buffer) {
                    let page = fault.address.saturating_sub(self.base) / PAGE;
                    self.fail(failure, Some(page..page + 1));
                }
            }
        }
    }

    /// The thread that fetches ahead: first `ahead`, then all if that is asked for. Ends when all is
    /// loaded, or is told to.
    pub(super) fn fetch_ahead(&self, ahead: &[Range<u64>]) {
        let mut unhurried = false;
        let mut todo: Vec<Range<u64>> =
            ahead.iter().rev().map(|r| r.start / PAGE..r.end / PAGE).collect();
        let mut buffer = Vec::new();
        let mut next = 0;
        loop {
            let Some(range) = self.next_range(&mut todo, &mut next) else { return };
            if next > 0 && !unhurried {
                unhurried = true;
                // Of this thread alone (setpriority(2)); only to be nicer may be refused to nobody.
                let _nicer = rustix::process::setpriority_process(None, BACKGROUND);
            }
            if let Err(failure) = self.load(range.clone(), None, &mut buffer) {
                // To be asked for again after a retry.
                todo.push(range);
                self.fail(failure, None);
            }
        }
    }

    /// Waits for something to fetch; `None` at the end.
    fn next_range(&self, todo: &mut Vec<Range<u64>>, next: &mut u64) -> Option<Range<u64>> {
        let mut pages = self.lock();
        loop {
            if pages.stop {
                return None;
            }
            if pages.wanted() == 0 {
                self.finish(pages);
                return None;
            }
            if pages.failure.is_none() {
                if let Some(mut range) = todo.pop() {
                    if range.end - range.start > AHEAD_PAGES {
                        let cut = range.start + AHEAD_PAGES;
                        todo.push(cut..range.end);
                        range.end = cut;
                    }
                    return Some(range);
                }
                if pages.load_all
                    && let Some(run) = pages.first_wanted(*next..u64::MAX, AHEAD_PAGES)
                {
                    *next = run.end;
                    return Some(run);
                }
            }
            pages = self.wait(pages);
        }
    }

    /// All is settled: RAM becomes plain memory, of which untouched pages are zero by themselves.
    fn finish(&self, mut pages: MutexGuard<'_, Pages>) {
        let all = self.base..self.base + self.source.size();
        match self.uffd.unregister(all) {
            Ok(()) => pages.complete = true,
            Err(error) => {
                drop(pages);
                let text = format!("cannot end the watch of page faults: {error}");
                self.fail(SourceFailure { offset: 0, len: 0, error: text }, None);
                return;
            }
        }
        pages.stop = true;
        drop(pages);
        self.notify();
        // As in `stop`.
        let _woken = self.kick.wake();
        let _woken = self.events.wake();
    }
}
