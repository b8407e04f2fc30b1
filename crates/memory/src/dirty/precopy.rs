//! Copying dirty pages while the guest runs, so that few are left for the pause.
//!
//! ```text
//!   round, round, ... while the guest runs      each copies what was written since the one before
//!     -> Again                                  more rounds would help, or it is too early to say
//!     -> Fits(estimate)                         pause the guest, then final_round
//!     -> TooLong(estimate)                      rounds do not help any more: refuse, with the estimate
//!   final_round, in the pause                   looks again what is left, and refuses before it copies;
//!                                               gives the pages, each in its latest version
//! ```
//!
//! What a pause would take is estimated as what it takes in any case (the caller says: saving state),
//! a scan, and the copy of what is dirty now at the slowest rate of any round so far. Pages that were
//! told by the tracker and did not become part of a snapshot are marked again when this is dropped, so
//! nothing is lost by giving up.

use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use forkd_sys::mmap::Mapping;

use super::{DirtyError, DirtyTracker, Staging};

/// A round has to bring the dirty bytes below this part of the best so far, or it did not help.
const PROGRESS: f64 = 0.9;
/// Rounds in a row that do not help before it is called hopeless.
const PATIENCE: u32 = 2;
/// Rounds smaller than this say nothing about the rate of copying.
const TELLING_BYTES: u64 = 256 << 10;
/// Bytes a second, if no round says more: as slow as memory is.
const ASSUMED_RATE: u64 = 1 << 30;

/// What a pause may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The longest pause that is allowed; `None`: any, after [`Self::max_rounds`].
    pub max_pause: Option<Duration>,
    /// What the pause takes besides scan and copy.
    pub fixed: Duration,
    /// Most rounds before the pause.
    pub max_rounds: u32,
}

/// What a pause would take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// In all.
    pub pause: Duration,
    /// Bytes that it would copy.
    pub dirty_bytes: u64,
    /// At this rate, in bytes a second.
    pub bandwidth: u64,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Another round.
    Again(Estimate),
    /// The pause.
    Fits(Estimate),
    /// Nothing: the guest writes faster than can be copied.
    TooLong(Estimate),
}

/// What one round did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Round {
    /// Bytes copied.
    pub bytes: u64,
    /// Time for finding them.
    pub scan: Duration,
    /// Time for copying them.
    pub copy: Duration,
}

/// What it came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// The rounds before the pause.
    pub rounds: Vec<Round>,
    /// The one in the pause.
    pub last: Round,
    /// Bytes copied in all, versions that were replaced included.
    pub copied_bytes: u64,
    /// Bytes of the result: every page once.
    pub result_bytes: u64,
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum PreCopyError {
    /// Pages cannot be tracked.
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    /// There is no memory for the copies.
    #[error("cannot set memory aside for the pages that the guest has written: {0}")]
    Staging(io::Error),
    /// The pause would be longer than allowed. Nothing was copied in it.
    #[error(
        "the pause would take {:?}, with {} bytes to copy at {} bytes/s; {allowed:?} are allowed",
        estimate.pause, estimate.dirty_bytes, estimate.bandwidth
    )]
    TooLong {
        /// What it would take.
        estimate: Estimate,
        /// What is allowed.
        allowed: Duration,
    },
    /// The tracker told of pages that are not RAM.
    #[error("pages at {:#x} to {:#x} were written, which are not RAM", .0.start, .0.end)]
    NotRam(Range<u64>),
}

/// Copies of what was written, in the making.
#[derive(Debug)]
pub struct PreCopy<'a> {
    tracker: &'a mut DirtyTracker,
    ram: &'a Mapping,
    limits: Limits,
    /// `None` once it is a result: then what the tracker has told is not marked again.
    staging: Option<Staging>,
    rounds: Vec<Round>,
    best: u64,
    in_vain: u32,
    /// Buffer for the ranges of a round.
    found: Vec<Range<u64>>,
}

impl<'a> PreCopy<'a> {
    /// Begins. `ram` is the mapping that all tracked ranges lie in. For a full image instead of a
    /// diff, [`DirtyTracker::mark_all`] first.
    ///
    /// # Errors
    /// [`PreCopyError::Staging`].
    pub fn new(
        tracker: &'a mut DirtyTracker,
        ram: &'a Mapping,
        limits: Limits,
    ) -> Result<Self, PreCopyError> {
        let staging = Some(Staging::new(ram.len()).map_err(PreCopyError::Staging)?);
        let (rounds, found) = (Vec::new(), Vec::new());
        Ok(Self { tracker, ram, limits, staging, rounds, best: u64::MAX, in_vain: 0, found })
    }

    /// Copies what is dirty, while the guest runs, and says what to do next. Takes as long as the copy
    /// does; an event loop may do other work between rounds.
    ///
    /// # Errors
    /// [`PreCopyError::Dirty`], [`PreCopyError::NotRam`].
    pub fn round(&mut self) -> Result<Next, PreCopyError> {
        if self.rounds.is_empty() {
            let dirty = self.tracker.peek()?;
            self.reserve(dirty)?;
        }
        let scan = self.scan()?;
        let round = self.copy(scan)?;
        self.rounds.push(round);
        let dirty = self.tracker.peek()?;
        self.reserve(dirty)?;
        let estimate = self.estimate(dirty);
        if (dirty as f64) < self.best as f64 * PROGRESS {
            self.in_vain = 0;
        } else {
            self.in_vain += 1;
        }
        self.best = self.best.min(dirty);
        let hopeless =
            self.in_vain >= PATIENCE || self.rounds.len() >= self.limits.max_rounds.max(1) as usize;
        Ok(match self.limits.max_pause {
            Some(allowed) if estimate.pause <= allowed => Next::Fits(estimate),
            Some(_) if hopeless => Next::TooLong(estimate),
            None if hopeless => Next::Fits(estimate),
            _ => Next::Again(estimate),
        })
    }

    /// Rounds until there is something else to do.
    ///
    /// # Errors
    /// As for [`Self::round`]; [`PreCopyError::TooLong`].
    pub fn run(&mut self) -> Result<Estimate, PreCopyError> {
        loop {
            match (self.round()?, self.limits.max_pause) {
                (Next::Again(_), _) => {}
                (Next::TooLong(estimate), Some(allowed)) => {
                    return Err(PreCopyError::TooLong { estimate, allowed });
                }
                (Next::Fits(estimate) | Next::TooLong(estimate), _) => return Ok(estimate),
            }
        }
    }

    /// Copies what is left, in the pause. The result is every page that was written since the tracker
    /// started, or last told, as it is in the pause; it is the caller's to write out after that. If it
    /// does not become a snapshot after all, [`DirtyTracker::mark`] its runs.
    ///
    /// # Errors
    /// [`PreCopyError::TooLong`]: more is dirty than when the last round looked, and the pause would be
    /// longer than allowed. Nothing was copied in it. As for [`Self::round`]. In any case what was
    /// written counts as written again: resume the guest, and it is all as before.
    pub fn final_round(mut self) -> Result<(Staging, Receipt), PreCopyError> {
        let scan = self.scan()?;
        let bytes = self.found.iter().map(|range| range.end - range.start).sum();
        let bandwidth = self.bandwidth();
        // The scan has been: it counts as it was.
        let pause = self.limits.fixed + scan + self.copy_time(bytes);
        if let Some(allowed) = self.limits.max_pause.filter(|&allowed| pause > allowed) {
            let estimate = Estimate { pause, dirty_bytes: bytes, bandwidth };
            self.mark_found();
            return Err(PreCopyError::TooLong { estimate, allowed });
        }
        let last = self.copy(scan)?;
        let staging = self.staging.take().ok_or_else(Self::no_staging)?;
        let receipt = Receipt {
            copied_bytes: self.rounds.iter().map(|round| round.bytes).sum::<u64>() + last.bytes,
            rounds: std::mem::take(&mut self.rounds),
            last,
            result_bytes: (staging.pages() * forkd_sys::mmap::page_size()) as u64,
        };
        Ok((staging, receipt))
    }

    /// Makes room ready for what is dirty and what becomes so until the pause, half as much again:
    /// memory that is touched first in the pause would make it longer.
    ///
    /// # Errors
    /// [`PreCopyError::Staging`].
    pub fn reserve(&mut self, dirty_bytes: u64) -> Result<(), PreCopyError> {
        let bytes = usize::try_from(dirty_bytes.saturating_mul(3) / 2).unwrap_or(usize::MAX);
        let staging = self.staging.as_mut().ok_or_else(Self::no_staging)?;
        staging.reserve(bytes).map_err(PreCopyError::Staging)
    }

    fn no_staging() -> PreCopyError {
        PreCopyError::Staging(io::ErrorKind::NotFound.into())
    }

    /// Gives back what was found and not copied.
    fn mark_found(&mut self) {
        for range in self.found.drain(..) {
            self.tracker.mark(range);
        }
    }

    fn scan(&mut self) -> Result<Duration, PreCopyError> {
        let since = Instant::now();
        self.found.clear();
        let found = &mut self.found;
        self.tracker.collect(|range| found.push(range))?;
        Ok(since.elapsed())
    }

    fn copy(&mut self, scan: Duration) -> Result<Round, PreCopyError> {
        let since = Instant::now();
        let base = self.ram.address() as u64;
        let at = |address: u64| usize::try_from(address.wrapping_sub(base)).unwrap_or(usize::MAX);
        let staging = self.staging.as_mut().ok_or_else(Self::no_staging)?;
        let mut bytes = 0;
        let mut failed = None;
        for range in &self.found {
            if let Err(error) = staging.put(self.ram, at(range.start)..at(range.end)) {
                failed = Some(match error.kind() {
                    io::ErrorKind::InvalidInput => PreCopyError::NotRam(range.clone()),
                    _ => PreCopyError::Staging(error),
                });
                break;
            }
            bytes += range.end - range.start;
        }
        if let Some(error) = failed {
            self.mark_found();
            return Err(error);
        }
        self.found.clear();
        Ok(Round { bytes, scan, copy: since.elapsed() })
    }

    fn estimate(&self, dirty_bytes: u64) -> Estimate {
        let scan = self.rounds.last().map_or(Duration::ZERO, |round| round.scan);
        let pause = self.limits.fixed + scan + self.copy_time(dirty_bytes);
        Estimate { pause, dirty_bytes, bandwidth: self.bandwidth() }
    }

    fn copy_time(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.bandwidth().max(1) as f64)
    }

    /// Bytes a second: the slowest of the rounds that say something.
    fn bandwidth(&self) -> u64 {
        let rate =
            |bytes: u64, time: Duration| (bytes as f64 / time.as_secs_f64().max(1e-9)) as u64;
        let telling = self.rounds.iter().filter(|round| round.bytes >= TELLING_BYTES);
        telling.map(|round| rate(round.bytes, round.copy)).min().unwrap_or(ASSUMED_RATE)
    }
}

impl Drop for PreCopy<'_> {
    fn drop(&mut self) {
        let base = self.ram.address() as u64;
        for run in self.staging.iter().flat_map(Staging::runs) {
            self.tracker.mark(base + run.start as u64..base + run.end as u64);
        }
    }
}
