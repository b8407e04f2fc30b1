//! Protecting RAM before the pause, while the guest runs, so that the pause need not.
//!
//! To protect a page costs 0.12 us and more, so all of a large guest's RAM takes tens of milliseconds:
//! too long for a pause. [`PreArm`] starts a thread that does it ahead, in pieces of 1 MiB, and lets
//! go, and notes, what the guest writes meanwhile (notes.rs has the rule that this keeps). It then
//! protects again what is noted, round after round, until few enough pages are, or rounds do not help
//! any more. In the pause the thread is stopped and joined, and what is noted by then is protected for
//! the last time: the pause is proportional to what was written within the last moments, not to RAM.
//!
//! ```text
//!   start       register RAM, start the thread                    guest runs
//!   .           protect pieces, serve and note writes             guest runs; each of its writes may wait once a round
//!   told_fd     few are noted: now is the time                    guest runs; it is served on
//!   finish      join the thread, protect what is noted            guest is paused
//!   LiveCapture::adopt   fork the writer, which serves from now   guest is paused
//! ```
//!
//! # What the caller sees to
//!
//! All that the capture asks for, and:
//!
//! - The thread serves whoever writes RAM: vCPU threads, and the event loop. So `finish` is for when all
//!   others are parked, by a thread that writes no RAM until the writer has been forked: from then on to
//!   the fork nobody serves. Parking itself needs the thread: a vCPU that waits for its page parks late.
//! - Who forks joins the thread before: `finish`, or a drop.
//!
//! # What a fork does to protected RAM
//!
//! The child's copy of the mapping is not registered (no `UFFD_FEATURE_EVENT_FORK` was asked for: the
//! kernel resets it before it copies page tables, `dup_userfaultfd`), and page tables of a shared file
//! are not copied then (`vma_needs_copy`): a fork with all of RAM protected costs what it costs without.
//!
//! Huge pages of a file cannot be registered by halves, so RAM is one range and is registered whole.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use forkd_sys::userfaultfd::{Fault, FaultKind, Features, Userfaultfd};
use forkd_sys::wake::Waker;

use super::CaptureError;
use super::live::{LiveConfig, failed, register};
use super::notes::{Notes, PIECE, Protection};
use super::priority::{Turns, Urgency};
use super::writer::wait_for;

/// A round has to bring the noted pages below this part of the best so far, or it did not help.
const PROGRESS: f64 = 0.75;
/// Rounds in a row that do not help before it is left at that.
const PATIENCE: u32 = 2;
/// Most rounds in a row.
const MAX_ROUNDS: u32 = 12;
/// Stack of the thread, in bytes: a page of fault messages, and little else.
const STACK_BYTES: usize = 128 << 10;

/// Where the thread is.
const WORKING: u8 = 0;
const READY: u8 = 1;
const ENDED: u8 = 2;
/// What the thread is told.
const NOTHING: u8 = 0;
const AGAIN: u8 = 1;
const STOP: u8 = 2;
const ABORT: u8 = 3;

/// What it cost before the pause, and what it left to do in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PreReport {
    /// From the start of the thread until it said for the first time that it is ready.
    pub protecting: Duration,
    /// Rounds over what was noted.
    pub rounds: u32,
    /// Faults that were served.
    pub faults: u64,
    /// The longest that one of them can have waited: the time between two looks for them.
    pub longest_stall: Duration,
    /// Pages that were protected again in the pause.
    pub left: u64,
}

/// How far a [`PreArm`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ahead {
    /// It protects.
    Working,
    /// All is protected but so many pages, and rounds do not help, or need not.
    Ready {
        /// Noted now.
        noted: usize,
    },
    /// It could not go on; [`PreArm::finish`] says why.
    Ended,
}

#[derive(Debug)]
struct Shared {
    command: AtomicU8,
    /// Rings for the thread when there is a command.
    commanded: Waker,
    phase: AtomicU8,
    /// Rings for the source when the phase changes.
    told: Waker,
    noted: AtomicUsize,
    /// As few noted pages are enough.
    enough: AtomicUsize,
}

/// RAM that is being protected ahead. Dropping it takes the protection away and waits for that: tens of
/// milliseconds for a large guest.
#[derive(Debug)]
pub struct PreArm {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<Held, CaptureError>>>,
}

/// RAM that is all protected, and not served by anyone: for [`super::LiveCapture::adopt`]. Dropping it
/// takes the protection away.
#[derive(Debug)]
pub struct Protected {
    pub(super) uffd: Userfaultfd,
    pub(super) ram: Range<u64>,
    /// What it took.
    pub report: PreReport,
}

/// What the thread works with, and gives back.
#[derive(Debug)]
struct Held {
    wp: Wp,
    notes: Notes,
    report: PreReport,
}

#[derive(Debug)]
struct Wp {
    uffd: Userfaultfd,
    ram: Range<u64>,
    page_size: u64,
}

impl Wp {
    fn addresses(&self, pages: Range<usize>) -> Range<u64> {
        let at = |page: usize| self.ram.start + page as u64 * self.page_size;
        at(pages.start)..at(pages.end)
    }

    fn page_at(&self, address: u64) -> Option<usize> {
        let offset = address.checked_sub(self.ram.start).filter(|_| address < self.ram.end)?;
        usize::try_from(offset / self.page_size).ok()
    }
}

impl Protection for Wp {
    fn protect(&self, pages: Range<usize>) -> io::Result<()> {
        self.uffd.write_protect(self.addresses(pages))
    }

    fn unprotect(&self, pages: Range<usize>) -> io::Result<()> {
        self.uffd.write_unprotect(self.addresses(pages), true)
    }
}

impl PreArm {
    /// Registers RAM and starts to protect it. `enough`: with as few noted pages it is ready at once.
    ///
    /// # Errors
    /// As for [`super::LiveCapture::prepare`]; nothing is left behind.
    pub fn start(config: &LiveConfig<'_>, enough: usize) -> Result<Self, CaptureError> {
        config.check()?;
        let uffd = Userfaultfd::new(Features::WP_HUGETLBFS_SHMEM, Features::NONE)
            .map_err(failed("make a userfaultfd"))?;
        let ram = config.address..config.address + config.len;
        let pages = usize::try_from(config.len / config.page_size)
            .map_err(|_| CaptureError::Config("RAM has too many pages".to_owned()))?;
        let waker = || Waker::new().map_err(failed("make an eventfd"));
        let shared = Arc::new(Shared {
            command: AtomicU8::new(NOTHING),
            commanded: waker()?,
            phase: AtomicU8::new(WORKING),
            told: waker()?,
            noted: AtomicUsize::new(0),
            enough: AtomicUsize::new(enough),
        });
        register(&uffd, ram.clone())?;
        let wp = Wp { uffd, ram, page_size: config.page_size };
        let held = Held { wp, notes: Notes::new(pages), report: PreReport::default() };
        let server = Server { held, shared: Arc::clone(&shared), faults: Vec::with_capacity(64) };
        let thread = std::thread::Builder::new()
            .name("prearm".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || server.run())
            .map_err(failed("start a thread"))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Readable when it is ready, or has ended; [`Self::look`] takes the ring.
    pub fn told_fd(&self) -> BorrowedFd<'_> {
        self.shared.told.as_fd()
    }

    /// How far it is. Does not wait.
    pub fn look(&self) -> Ahead {
        // An eventfd that cannot be read rings on: the phase is what counts.
        let _rang = self.shared.told.drain();
        match self.shared.phase.load(Ordering::Acquire) {
            WORKING => Ahead::Working,
            READY => Ahead::Ready { noted: self.shared.noted.load(Ordering::Relaxed) },
            _ => Ahead::Ended,
        }
    }

    /// Has it protect again what is noted, until as few as `enough` are or rounds do not help. It is to
    /// be ready; it will be so again.
    pub fn again(&self, enough: usize) {
        self.shared.enough.store(enough, Ordering::Relaxed);
        self.shared.phase.store(WORKING, Ordering::Release);
        self.tell(AGAIN);
    }

    fn tell(&self, command: u8) {
        self.shared.command.store(command, Ordering::Release);
        // It fails for no counter that exists.
        let _rung = self.shared.commanded.wake();
    }

    /// In the pause: stops the thread, waits for its end, and protects what is left. One that is not ready
    /// gets so first.
    ///
    /// # Errors
    /// [`CaptureError::Source`]: why RAM is not protected; none of it is then.
    pub fn finish(mut self) -> Result<Protected, CaptureError> {
        let held = self.join(STOP).unwrap_or_else(|| Err(CaptureError::Aborted))?;
        let Held { wp, mut notes, mut report } = held;
        report.left = notes.noted() as u64;
        let mut from = 0;
        // On an error the userfaultfd is dropped, and with it the protection.
        while let Some(next) =
            notes.protect_next(&wp, from).map_err(failed("write-protect RAM again"))?
        {
            from = next;
        }
        let Wp { uffd, ram, .. } = wp;
        Ok(Protected { uffd, ram, report })
    }

    fn join(&mut self, command: u8) -> Option<Result<Held, CaptureError>> {
        let thread = self.thread.take()?;
        self.tell(command);
        let panicked =
            |_| failed("protect RAM ahead")(io::Error::other("the thread for it panicked"));
        Some(thread.join().map_err(panicked).and_then(|held| held))
    }
}

impl Drop for PreArm {
    fn drop(&mut self) {
        // Whatever it says: the userfaultfd is gone with it, and so is the protection.
        let _ended = self.join(ABORT);
    }
}

/// The thread.
struct Server {
    held: Held,
    shared: Arc<Shared>,
    faults: Vec<Fault>,
}

/// What the rounds end with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Go,
    Stop,
    Abort,
}

/// Tells the source when the thread ends, in whatever way.
struct TellEnd(Arc<Shared>);

impl Drop for TellEnd {
    fn drop(&mut self) {
        self.0.phase.store(ENDED, Ordering::Release);
        let _rung = self.0.told.wake();
    }
}

impl Server {
    fn run(mut self) -> Result<Held, CaptureError> {
        let _told = TellEnd(Arc::clone(&self.shared));
        let since = Instant::now();
        let urgency = Urgency::of_this_thread();
        let mut told = self.reach_all(urgency)?;
        loop {
            if told == Told::Go {
                told = self.rounds(urgency)?;
            }
            match told {
                Told::Abort => return self.release(),
                Told::Stop => return Ok(self.held),
                Told::Go => {}
            }
            if self.held.report.protecting.is_zero() {
                self.held.report.protecting = since.elapsed();
            }
            self.shared.phase.store(READY, Ordering::Release);
            let _rung = self.shared.told.wake();
            told = self.attend(urgency)?;
        }
    }

    /// Protects all of RAM once.
    fn reach_all(&mut self, urgency: Urgency) -> Result<Told, CaptureError> {
        let mut turns = Turns::new();
        while !self.held.notes.is_complete() {
            let since = Instant::now();
            // Page tables are locked meanwhile.
            urgency.hurry();
            self.held.notes.reach(&self.held.wp).map_err(failed("write-protect RAM"))?;
            self.serve(since)?;
            urgency.relax();
            turns.pause();
            if self.shared.command.load(Ordering::Acquire) == ABORT {
                return Ok(Told::Abort);
            }
        }
        Ok(Told::Go)
    }

    /// Protects what is noted, until little enough is.
    fn rounds(&mut self, urgency: Urgency) -> Result<Told, CaptureError> {
        let (mut best, mut in_vain) = (usize::MAX, 0);
        let mut turns = Turns::new();
        for _ in 0..MAX_ROUNDS {
            let noted = self.held.notes.noted();
            if noted <= self.shared.enough.load(Ordering::Relaxed) {
                break;
            }
            let helped = (noted as f64) < best as f64 * PROGRESS;
            in_vain = if helped { 0 } else { in_vain + 1 };
            best = best.min(noted);
            if in_vain >= PATIENCE {
                break;
            }
            let mut from = Some(0);
            while let Some(at) = from {
                match self.shared.command.load(Ordering::Acquire) {
                    ABORT => return Ok(Told::Abort),
                    STOP => return Ok(Told::Stop),
                    _ => {}
                }
                let since = Instant::now();
                urgency.hurry();
                let next = self.held.notes.protect_next(&self.held.wp, at);
                from = next.map_err(failed("write-protect RAM again"))?;
                self.serve(since)?;
                urgency.relax();
                turns.pause();
            }
            self.held.report.rounds += 1;
        }
        Ok(Told::Go)
    }

    /// Serves until there is a command.
    fn attend(&mut self, urgency: Urgency) -> Result<Told, CaptureError> {
        // It sleeps most of the time, and a vCPU waits when it does not.
        urgency.hurry();
        loop {
            let fds: [&dyn AsFd; 2] = [&self.shared.commanded, &self.held.wp.uffd];
            wait_for(fds).map_err(failed("wait for faults"))?;
            self.serve(Instant::now())?;
            // In one step: a command that comes after it is not lost.
            match self.shared.command.swap(NOTHING, Ordering::AcqRel) {
                NOTHING => {}
                command => {
                    let _rang = self.shared.commanded.drain();
                    urgency.relax();
                    return Ok(match command {
                        AGAIN => Told::Go,
                        STOP => Told::Stop,
                        _ => Told::Abort,
                    });
                }
            }
        }
    }

    /// Serves the faults that have come. They may have come at any time from `since` on.
    fn serve(&mut self, since: Instant) -> Result<(), CaptureError> {
        let Held { wp, notes, report } = &mut self.held;
        loop {
            self.faults.clear();
            let got = wp.uffd.read(&mut self.faults).map_err(failed("read faults"))?;
            if got == 0 {
                break;
            }
            for fault in &self.faults {
                let page = wp.page_at(fault.address);
                let page =
                    page.filter(|_| fault.kind == FaultKind::WriteProtect).ok_or_else(|| {
                        failed("serve a fault")(io::Error::other(format!(
                            "{fault:?} is not for it"
                        )))
                    })?;
                notes.serve(wp, page).map_err(failed("let a page go"))?;
            }
            report.faults += got as u64;
            report.longest_stall = report.longest_stall.max(since.elapsed());
        }
        self.shared.noted.store(notes.noted(), Ordering::Relaxed);
        Ok(())
    }

    /// Takes all protection away, in pieces: at once, the mappings would be locked for tens of
    /// milliseconds. A page of a piece that is still registered is served meanwhile.
    fn release(mut self) -> Result<Held, CaptureError> {
        let end = self.held.wp.ram.end;
        let piece = PIECE as u64 * self.held.wp.page_size;
        let mut at = self.held.wp.ram.start;
        while at < end {
            let next = (at + piece).min(end);
            self.held.wp.uffd.unregister(at..next).map_err(failed("unregister RAM"))?;
            at = next;
            // What waits for a page of a piece that was just unregistered was woken by that.
            let Held { wp, notes, .. } = &mut self.held;
            self.faults.clear();
            wp.uffd.read(&mut self.faults).map_err(failed("read faults"))?;
            for page in
                self.faults.iter().filter(|f| f.address >= at).filter_map(|f| wp.page_at(f.address))
            {
                notes.serve(wp, page).map_err(failed("let a page go"))?;
            }
        }
        Err(CaptureError::Aborted)
    }
}
