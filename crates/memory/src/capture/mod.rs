//! Live capture: an image of guest RAM as it is at one instant, written while the guest goes on.
//!
//! # How
//!
//! RAM is a memfd, mapped shared. In the pause all of it is write-protected (*armed*): that is all the
//! pause holds. Then the guest runs, and each page is copied once, either by the *bulk copier*, which
//! goes from the first page to the last, or by the *fault handler*, when the guest is about to write
//! it. Each copy is made before the page is unprotected, so the image is that of the arm.
//!
//! ```text
//!   prepare      fork the writer, register RAM with a userfaultfd      guest runs
//!   arm          UFFDIO_WRITEPROTECT over RAM; drop the userfaultfd    guest is paused
//!   go           one byte on a pipe: the bulk copier starts            guest runs
//!   poll         the writer's report, or its death                     guest runs
//! ```
//!
//! For a large guest even that is long. So RAM can be protected *ahead*, by a thread, while the guest
//! runs; then the pause holds the protection of what was written since (prearm.rs):
//!
//! ```text
//!   PreArm::start    register RAM; a thread protects it, serves faults     guest runs
//!   PreArm::finish   join the thread, protect what it has noted           guest is paused
//!   adopt            fork the writer                                      guest is paused
//!   go, poll         as above
//! ```
//!
//! Either way, when the guest goes on every page is protected: one that is in memory by its entry in the
//! page table, one that is not (a hole of the memfd, or reclaimed) by a marker in its place
//! ([`forkd_sys::userfaultfd::Features::WP_HUGETLBFS_SHMEM`]). Letting a page go takes the marker away,
//! and protecting it again puts it, or the entry that has come instead, back.
//!
//! # Why a process of its own
//!
//! The VM process has one event-loop thread, which alone forks, and vCPU threads: a thread more would
//! be one more holder of locks at each fork. (The one that protects RAM ahead is joined before the next
//! fork.) That event loop writes RAM itself (virtqueues), so it can
//! be the one who waits for a page: whoever serves faults must not be it. And RAM in a memfd is
//! readable by file descriptor, in another process as well as here. So [`LiveCapture::prepare`] forks
//! a writer before the pause (and before RAM is registered, as then fork(2) would copy its page
//! tables). It keeps the memfd, the userfaultfd and the sink's files, and closes all else. Its threads
//! are its own: control, handler, bulk copier, flusher.
//!
//! It reads RAM by `pread(2)` of the memfd and not through the mapping it inherits: no page tables are
//! filled for it, and a hole stays a hole, where touching a shared mapping would allocate it.
//!
//! # Who waits for what
//!
//! - A guest's write to a protected page waits until the page has been copied *into the writer's
//!   memory*, not until it is on disk. The handler's pages go to the flusher through a bounded pool,
//!   the bulk copier's through its own buffer, and no lock is held across a copy or a write. So a slow
//!   write never holds up a fault, until the pool is full: then faults wait for a buffer, as long as
//!   [`LiveConfig::max_stall`] at most, and after that the capture fails and the guest goes on.
//! - Pages are claimed one by one or in chunks of 128 KiB (pages.rs); a fault on a page that another
//!   copies waits for that copy, some ten microseconds.
//! - The last copy of the userfaultfd is the writer's: the source drops its own when it has armed.
//!   When the writer dies, in whatever way, the kernel drops the protection and wakes all who wait,
//!   the event loop among them. Nothing needs to watch for that. [`LiveCapture::abort`] is the end of a pipe; the
//!   control thread, which never touches the disk, unregisters RAM, even if a write hangs.
//!
//! - Who has a page that a vCPU may wait for is a real-time thread meanwhile, if this process may have
//!   such; between its chunks the bulk copier gives the CPU away (priority.rs).
//! - RAM is unregistered in pieces of 2 MiB, behind the bulk copier: all at once would lock the source's
//!   mappings for 20 ms with 768 MiB.
//!
//! # What the caller sees to
//!
//! - From arm to the end no page of RAM may be discarded (`MADV_DONTNEED`, `MADV_REMOVE`, punched
//!   holes; a balloon's free pages): it would go without having been captured.
//! - RAM stays mapped where it is until the writer has ended, an aborted or killed one too: it knows RAM
//!   by address, and the kernel lets one userfaultfd unprotect what another has protected.
//! - Only writes through the mapping are caught: not `write(2)` to the memfd or another mapping of it,
//!   and not a device's DMA into pages that were pinned before. Drain I/O before the arm.
//! - One userfaultfd per mapping: what else watches the same RAM has to stop first.
//!
//! # Known holes
//!
//! The image of RAM with transparent huge pages in shared memory is right, but arming maps them as
//! small ones. The sink is told of pages that are zero unless they are holes.

mod copier;
mod guest;
mod live;
mod maps;
mod notes;
mod pages;
mod prearm;
pub(crate) mod priority;
mod report;
mod writer;

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::RawFd;

pub use live::{LiveCapture, LiveConfig, Progress};
pub use prearm::{Ahead, PreArm, PreReport, Protected};
pub use report::Report;

/// Where captured pages go. Used from two threads of the writer process at once.
///
/// Made before the fork, used only in the writer after it, and dropped in the source without having
/// been used: nothing may be buffered in it by then.
pub trait PageSink: Send + Sync + 'static {
    /// Takes the bytes of whole pages, adjacent in RAM. `ram_offset` is in bytes from the start of
    /// RAM. Each page is given once, in no order; what is not given is zero.
    ///
    /// # Errors
    /// They cannot be kept: the capture fails with this error.
    fn write_page_run(&self, ram_offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// All pages have been given: makes them last (`fsync`). Called once, after the guest has been
    /// let go.
    ///
    /// # Errors
    /// As for [`Self::write_page_run`].
    fn finish(&self) -> io::Result<()> {
        Ok(())
    }

    /// The descriptors that it uses. All others are closed in the writer.
    fn kept_fds(&self) -> Vec<RawFd>;
}

/// Why there is no image. The guest goes on in every case.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// RAM, as it was described, cannot be captured.
    #[error("cannot capture RAM live: {0}")]
    Config(String),
    /// A system call of the source failed.
    #[error("cannot {action} for a live capture: {source}")]
    Source {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The capture is not at the point at which this can be done.
    #[error("a live capture that is {is} cannot be told to {action}")]
    Order {
        /// What was asked for.
        action: &'static str,
        /// What it is.
        is: &'static str,
    },
    /// The writer could not go on, and said why.
    #[error("the writer of a live capture cannot {action}: {source}")]
    Writer {
        /// What it tried.
        action: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The sink is so slow that guest writes would have waited longer than allowed.
    #[error("the writer of a live capture gave up: {0}")]
    TooSlow(String),
    /// [`LiveCapture::abort`] was called.
    #[error("the live capture was aborted")]
    Aborted,
    /// The writer ended without a word.
    #[error("the writer of a live capture, process {pid}, died: {status}")]
    Died {
        /// Its process id.
        pid: u32,
        /// How it ended.
        status: std::process::ExitStatus,
    },
}
