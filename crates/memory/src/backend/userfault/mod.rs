//! RAM that is loaded as the guest touches it.
//!
//! RAM is an empty anonymous mapping whose first touches are reported through userfaultfd(2). Two
//! threads fill it from a [`PageSource`]: one serves faults, the other fetches ahead, first the working
//! set that an earlier load recorded, and then all the rest once [`Userfault::load_all`] or
//! [`Userfault::complete`] asks for it. When all is there the watch ends, the threads end, and RAM is
//! plain anonymous memory.
//!
//! # Forking
//!
//! Only the event loop of a VM process forks, and at that moment no other thread may hold a lock that
//! the child needs. A userfaultfd does not follow a fork either: pages that are not there yet would
//! read as zeroes in the child. So a VM whose RAM is being loaded is not forked:
//! [`Backend::check_fork`] and [`Backend::detach_child`] refuse until all is loaded and both threads
//! have been joined. A process that is forked only to exec something else does not touch RAM and is
//! not concerned.
//!
//! # A source that fails
//!
//! Its pages stay missing and whoever touches them waits, as there is nothing right to show them. That
//! is said three ways: the descriptor of [`Userfault::events`] becomes readable, [`Userfault::status`]
//! has the reason, and the function given to [`Userfault::on_failure`] is called on the loading thread.
//! The last is there because the event loop may itself be waiting, for a page that a device wanted. All
//! other pages are served on. [`Userfault::retry`] asks the source again.
//!
//! Known holes: dropping it closes the userfaultfd, upon which the kernel lets all who wait go on with
//! zeroes; vCPUs must have ended before. Pages are of 4 KiB; the kernel makes no huge ones until all
//! is loaded.

mod pages;
mod source;
#[cfg(test)]
mod tests;
mod threads;
mod working_set;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use forkd_sys::mmap::Mapping;
use forkd_sys::userfaultfd::{Features, Mode, Userfaultfd};

pub use source::{FileSource, PageSource};
pub use working_set::{WorkingSet, WorkingSetError};

use super::remap::reserve;
use super::{Backend, BranchMode, ForkBehaviour, MemoryBackend};
use crate::MemoryError;
use threads::{PAGE, Shared};

const STILL_LOADING: &str = "its RAM is still being loaded from its page source; wait until that is complete, or branch with --mode full";

/// A page source did not give pages.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot load {len:#x} bytes at {offset:#x} of RAM from its page source: {error}")]
pub struct SourceFailure {
    /// Where, in bytes from the start of RAM.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
    /// Why.
    pub error: String,
}

/// How far loading has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LoadStatus {
    /// Pages are loaded as they are touched, or all of them one after the other.
    Loading {
        /// Bytes whose content is not known yet.
        remaining: u64,
    },
    /// The source failed: guests may be waiting. [`Userfault::retry`] asks it again.
    Failed(SourceFailure),
    /// RAM is plain memory.
    Complete,
}

/// RAM that is loaded as it is touched.
#[derive(Debug)]
pub struct Userfault {
    mapping: Mapping,
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// The process that has the threads.
    owner: u32,
    /// All is loaded and the threads are gone. Set once, and read by forked children too, which must
    /// not take a lock that a thread of the parent may have had.
    plain: AtomicBool,
}

impl Userfault {
    /// Reserves `len` bytes, watches them, and begins to fetch `working_set` ahead.
    ///
    /// # Errors
    /// [`MemoryError::Userfault`] if the kernel has no userfaultfd or does not permit it (see
    /// [`Userfaultfd`]), or the source is of another size; [`MemoryError::WorkingSet`] for one that is
    /// not of this RAM; [`MemoryError::Reserve`].
    pub fn new(
        len: usize,
        source: Box<dyn PageSource>,
        working_set: Option<WorkingSet>,
    ) -> Result<Self, MemoryError> {
        let failed = |action| move |source| MemoryError::Userfault { len, action, source };
        if source.size() != len as u64 {
            let text = format!("its page source has {:#x} bytes", source.size());
            return Err(failed("use")(io::Error::new(io::ErrorKind::InvalidInput, text)));
        }
        let working_set = working_set.unwrap_or_default();
        working_set.check(len as u64)?;
        let mapping = reserve(len).map_err(|source| MemoryError::Reserve { len, source })?;
        let uffd = Userfaultfd::new(Features::NONE, Features::NONE)
            .map_err(failed("get a userfaultfd for"))?;
        let start = mapping.address() as u64;
        uffd.register(start..start + len as u64, Mode::MISSING)
            .map_err(failed("watch the page faults of"))?;
        let shared = Shared::new(uffd, &mapping, source).map_err(failed("make an eventfd for"))?;
        let shared = Arc::new(shared);
        let owner = std::process::id();
        // From here on, dropping it ends what threads there are.
        let ram = Self { mapping, shared, threads: Mutex::default(), owner, plain: false.into() };
        ram.shared.lock().recorded = working_set.clone();
        ram.spawn("ram-faults", |shared| shared.serve_faults())
            .and_then(|()| {
                ram.spawn("ram-ahead", move |shared| shared.fetch_ahead(working_set.ranges()))
            })
            .map_err(failed("start a thread for"))?;
        Ok(ram)
    }

    fn spawn(&self, name: &str, body: impl FnOnce(&Shared) + Send + 'static) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let thread =
            std::thread::Builder::new().name(name.to_owned()).spawn(move || body(&shared))?;
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(())
    }

    /// How far loading has come.
    pub fn status(&self) -> LoadStatus {
        let pages = self.shared.lock();
        if pages.complete {
            return LoadStatus::Complete;
        }
        match &pages.failure {
            Some(failure) => LoadStatus::Failed(failure.clone()),
            None => LoadStatus::Loading { remaining: pages.wanted() * PAGE },
        }
    }

    /// Readable once [`Self::status`] has become failed or complete, for the event loop;
    /// [`Self::drain_events`] resets it.
    pub fn events(&self) -> BorrowedFd<'_> {
        self.shared.events.as_fd()
    }

    /// Makes [`Self::events`] unreadable until something new happens.
    ///
    /// # Errors
    /// None in practice.
    pub fn drain_events(&self) -> io::Result<bool> {
        self.shared.events.drain()
    }

    /// Calls `hook` at each failure of the source, on the thread that loads. It must not touch RAM, nor
    /// wait for the event loop, which may be waiting for the page.
    pub fn on_failure(&self, hook: impl Fn(&SourceFailure) + Send + Sync + 'static) {
        let mut place = self.shared.on_failure.lock().unwrap_or_else(PoisonError::into_inner);
        *place = Some(Arc::new(hook));
    }

    /// Asks the source again for what it failed to give.
    ///
    /// # Errors
    /// The kernel does not wake those who wait.
    pub fn retry(&self) -> io::Result<()> {
        self.shared.retry()
    }

    /// Begins to load all at low priority, and returns at once; [`Self::events`] tells of the end.
    pub fn load_all(&self) {
        self.shared.lock().load_all = true;
        self.shared.notify();
    }

    /// Loads all and waits for the end. RAM is plain anonymous memory then, and can be forked.
    ///
    /// # Errors
    /// The source fails; after [`Self::retry`] it may be called again.
    pub fn complete(&self) -> Result<(), SourceFailure> {
        self.load_all();
        let mut pages = self.shared.lock();
        while !pages.complete {
            if let Some(failure) = &pages.failure {
                return Err(failure.clone());
            }
            pages = self.shared.wait(pages);
        }
        drop(pages);
        self.is_plain_memory();
        Ok(())
    }

    /// What was fetched ahead and what was touched since, in order: the working set for the next load.
    pub fn recorded(&self) -> WorkingSet {
        let recorded = self.shared.lock().recorded.clone();
        recorded.distinct(self.mapping.len() as u64)
    }

    /// How many page faults were served.
    pub fn faults(&self) -> u64 {
        self.shared.lock().faults
    }

    /// Its descriptors, for who closes others: they stay open for as long as this lives, in a forked child too.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 3] {
        self.shared.descriptors()
    }

    /// Whether all is loaded and the threads are gone. They end by themselves right after the last
    /// page, so this does not wait for long.
    fn is_plain_memory(&self) -> bool {
        // What the threads did happened before they were joined; the flag itself orders nothing.
        if self.plain.load(Ordering::Relaxed) {
            return true;
        }
        if self.is_childs() || !self.shared.lock().complete {
            return false;
        }
        self.join();
        self.plain.store(true, Ordering::Relaxed);
        true
    }

    /// Whether this is a forked child's copy, which has no threads.
    fn is_childs(&self) -> bool {
        std::process::id() != self.owner
    }

    fn join(&self) {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for thread in threads.drain(..) {
            // One that panicked has ended as well.
            let _ended = thread.join();
        }
    }
}

impl Drop for Userfault {
    fn drop(&mut self) {
        if !self.is_childs() {
            self.shared.stop();
            self.join();
        }
    }
}

impl Backend for Userfault {
    fn kind(&self) -> MemoryBackend {
        MemoryBackend::Userfault
    }

    fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    fn fork_behaviour(&self) -> ForkBehaviour {
        if self.is_plain_memory() { ForkBehaviour::CopyOnWrite } else { ForkBehaviour::Incomplete }
    }

    fn branch_modes(&self) -> &'static [BranchMode] {
        if self.is_plain_memory() { self.kind().branch_modes() } else { &[BranchMode::Full] }
    }

    fn why_not(&self, mode: BranchMode) -> Option<&'static str> {
        match mode {
            // A range can be watched for missing pages or for dirty ones, not by two at once.
            BranchMode::Fork | BranchMode::Diff if !self.is_plain_memory() => Some(STILL_LOADING),
            _ => self.kind().why_not(mode),
        }
    }

    fn discard(&self, offset: usize, len: usize) -> io::Result<()> {
        if self.is_plain_memory() {
            return self.mapping.discard(offset, len);
        }
        self.shared.discard(&self.mapping, offset, len)
    }

    fn populate_write(&self, offset: usize, len: usize) -> io::Result<()> {
        if self.is_plain_memory() {
            return self.mapping.populate_write(offset, len);
        }
        let end = offset.checked_add(len).filter(|&end| end <= self.mapping.len());
        let end = end.ok_or(io::ErrorKind::InvalidInput)? as u64;
        // Here, so that a source that fails is an error and not a wait.
        let pages = offset as u64 / PAGE..end.div_ceil(PAGE);
        let mut buffer = Vec::new();
        for start in pages.clone().step_by(threads::FAULT_PAGES as usize) {
            let piece = start..pages.end.min(start + threads::FAULT_PAGES);
            self.shared.load(piece, Some(start), &mut buffer).map_err(io::Error::other)?;
        }
        self.mapping.populate_write(offset, len)
    }

    fn userfault(&self) -> Option<&Userfault> {
        Some(self)
    }
}
