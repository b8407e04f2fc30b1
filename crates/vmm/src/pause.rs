//! What a pause will take, told before it: `--max-pause` is a contract.
//!
//! A pause parks the vCPUs, saves state, and does its [`Work`]. Each of these has a prior, measured on the development
//! hosts, times a factor that is learned from the pauses that this process has had. If the sum does not fit the limit
//! the VM is not paused at all. If it fits, parking has what the rest leaves of the limit, and is given up and
//! tried again if it takes longer (a vCPU thread that the host does not let run). What comes after that cannot be cut
//! off; if the host was slower than ever before, the receipt says `exceeded`.
//!
//! Estimates are of a pause as it usually is, not of the worst one: a limit a little above the estimate is exceeded
//! now and then, and never silently.

use std::fmt;
use std::time::Duration;

use forkd_api::types::{SourcePause, VmPhase};
use forkd_memory::{GuestRam, MemoryBackend};

use crate::fork::{PauseClock, Quiesced, SavedKvm};
use crate::machine::engine::QuiesceError;
use crate::requests::Refusal;
use crate::running::Running;

/// Kicking vCPUs out of KVM and saving their state, in microseconds (docs/branching.md, p50).
const PARK_US: f64 = 150.0;
/// Saving irqchip, clock and devices.
const SAVE_US: f64 = 60.0;
/// fork(2) of a VM process without its RAM, and by each page of private memory (docs/branching.md: 0.85 ms with 55 MiB,
/// 0.38 ms with RAM in shared memory).
const FORK_US: f64 = 380.0;
const FORK_PAGE_US: f64 = 0.035;
/// The same where each page is far from the next in the host's records (bench/RESULTS.md: 8.5 ms for 339 MiB that a
/// guest had used).
const DEAR_PAGE_US: f64 = 0.1;
/// By each huge page (bench/RESULTS.md: 0.47 ms with 460 of them).
const FORK_HUGE_US: f64 = 0.25;
/// Ending the thread that protected RAM ahead, and protecting one noted page again: a call for each.
const ARM_US: f64 = 120.0;
const ARM_PAGE_US: f64 = 1.5;
/// Copying RAM into files, by the byte: 1 GiB/s, the rate that pre-copy assumes.
const COPY_BYTE_US: f64 = 1e6 / (1u64 << 30) as f64;
/// What is shorter than a fork.
pub(crate) const SHORTER_THAN_FORK: &str = "allow more; or start the VM by `forkd fork TAG --memory memfd-shared`, whose \
    pause in mode live does not grow with its memory";

/// The new one of two values counts for so much.
const WEIGHT: f64 = 0.5;
/// Farther than this from the prior is a fluke.
const FACTORS: std::ops::RangeInclusive<f64> = 0.05..=50.0;

/// What a pause holds besides parking and saving.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// fork(2).
    Fork {
        /// What is copied, for all children.
        tables: Tables,
    },
    /// Write protection of what was written since RAM was protected ahead, and a fork that copies none of it.
    Arm {
        /// Pages that were written since.
        noted: u64,
        /// Pages of private memory.
        private: u64,
    },
    /// Copying.
    Copy {
        /// Bytes of RAM that are read.
        bytes: u64,
    },
}

/// Entries in page tables that fork(2) copies: those of private memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tables {
    /// Of small pages.
    pub small: u64,
    /// Of huge pages.
    pub huge: u64,
    /// Some that are counted as small may be huge ones: nothing is learned from such a fork.
    pub rough: bool,
}

/// A part of a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
enum Part {
    Park,
    Save,
    Fork,
    Arm,
    Copy,
}

const PARTS: usize = 5;

/// What pauses have cost in this process, against the priors.
#[derive(Debug, Clone)]
pub struct Costs([f64; PARTS]);

/// What a pause is expected to take.
#[derive(Debug, Clone)]
pub struct Expected {
    park_us: f64,
    /// In the order in which they come.
    rest: Vec<(&'static str, f64)>,
}

/// How long a pause may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limit(pub Option<Duration>);

/// Pages of this process, as the kernel counts them without a walk through its page tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Resident {
    /// Of anonymous memory.
    pub anonymous: u64,
    /// Of files.
    pub file: u64,
    /// Of shared memory.
    pub shared: u64,
}

impl Resident {
    /// Now. All zero if `/proc/self/status` cannot be read: then an estimate is what is fixed.
    pub fn now() -> Self {
        std::fs::read_to_string("/proc/self/status")
            .map_or(Self::default(), |text| Self::parse(&text))
    }

    fn parse(status: &str) -> Self {
        let pages = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            let kib: u64 = line.trim().trim_end_matches(" kB").parse().unwrap_or(0);
            kib / 4
        };
        Self { anonymous: pages("RssAnon:"), file: pages("RssFile:"), shared: pages("RssShmem:") }
    }

    /// Pages whose table entries fork(2) copies: those of private mappings that were written to. Of a shared mapping
    /// it copies none.
    pub fn private(self, ram: &GuestRam) -> u64 {
        match ram.kind() {
            MemoryBackend::File => self.anonymous + self.file,
            _ => self.anonymous,
        }
    }
}

impl Limit {
    /// From a request.
    pub fn from_us(us: Option<u64>) -> Self {
        Self(us.map(Duration::from_micros))
    }

    /// In microseconds.
    pub fn us(self) -> Option<u64> {
        self.0.map(|limit| u64::try_from(limit.as_micros()).unwrap_or(u64::MAX))
    }

    /// Whether a pause as expected is within it.
    pub fn allows(self, expected: &Expected) -> bool {
        self.0.is_none_or(|limit| expected.total() <= limit)
    }

    /// Refuses (409) what would be longer; `help` says what is shorter. If it fits, how long parking may take.
    ///
    /// # Errors
    /// It does not fit: the refusal has the estimate and the limit.
    pub fn check(self, expected: &Expected, help: &str) -> Result<Option<Duration>, Refusal> {
        let Some(limit) = self.0 else { return Ok(None) };
        if !self.allows(expected) {
            let why = format!("the pause would take {expected}; {limit:?} are allowed: {help}");
            return Err(Refusal::new(409, why));
        }
        Ok(Some(limit.saturating_sub(expected.after_parking())))
    }
}

/// A number of microseconds, in which no cost is negative or out of range.
fn time(us: f64) -> Duration {
    Duration::from_nanos((us * 1000.0) as u64)
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let us = |us: f64| format!("{:?}", Duration::from_micros(us.round() as u64));
        let total = self.park_us + self.rest.iter().map(|(_, us)| us).sum::<f64>();
        write!(f, "about {} (parking {}", us(total), us(self.park_us))?;
        for (name, cost) in &self.rest {
            write!(f, ", {name} {}", us(*cost))?;
        }
        f.write_str(")")
    }
}

impl Expected {
    /// All of it.
    pub fn total(&self) -> Duration {
        time(self.park_us) + self.after_parking()
    }

    /// What comes before the last part.
    pub fn before_last(&self) -> Duration {
        let last = self.rest.last().map_or(0.0, |(_, us)| *us);
        self.total().saturating_sub(time(last))
    }

    fn after_parking(&self) -> Duration {
        time(self.rest.iter().map(|(_, us)| us).sum())
    }
}

impl Default for Costs {
    fn default() -> Self {
        Self([1.0; PARTS])
    }
}

impl Costs {
    fn cost(&self, part: Part, prior_us: f64) -> f64 {
        prior_us * self.0.get(part as usize).copied().unwrap_or(1.0)
    }

    /// Small pages that a fork may copy to be as quick as `us`, by what is known or at their dearest, whichever is longer.
    pub fn small_pages_within(&self, us: f64) -> u64 {
        let factor = self.cost(Part::Fork, 1.0).max(1.0);
        let page_us = DEAR_PAGE_US.max(FORK_PAGE_US * factor);
        (((us - FORK_US * factor) / page_us).max(0.0)) as u64
    }

    /// What a pause with this work will take.
    pub fn expect(&self, work: Work) -> Expected {
        let mut rest = vec![("saving state", self.cost(Part::Save, SAVE_US))];
        rest.extend(prior(work).into_iter().flatten().map(|(part, us)| {
            let name = match part {
                Part::Fork => "fork",
                Part::Arm => "write protection",
                _ => "copying",
            };
            (name, self.cost(part, us))
        }));
        Expected { park_us: self.cost(Part::Park, PARK_US), rest }
    }

    /// Pages that may be noted for a pause to fit: `most` without a limit or with much room.
    pub fn room(&self, limit: Limit, private: u64, most: usize) -> usize {
        let Some(limit) = limit.0 else { return most };
        let left = limit.saturating_sub(self.expect(Work::Arm { noted: 0, private }).total());
        let page_us = self.cost(Part::Arm, ARM_PAGE_US);
        // Half of it: the guest goes on writing until it is parked.
        most.min((left.as_secs_f64() * 1e6 / page_us / 2.0) as usize)
    }

    /// Takes note of a pause that was.
    pub fn learn(&mut self, work: Work, pause: &SourcePause) {
        self.see(Part::Park, PARK_US, pause.quiesce_us);
        self.see(Part::Save, SAVE_US, pause.save_us);
        if matches!(work, Work::Fork { tables: Tables { rough: true, .. } }) {
            return;
        }
        for (part, prior_us) in prior(work).into_iter().flatten() {
            let seen = match part {
                Part::Arm => pause.arm_us,
                _ => pause.fork_us,
            };
            self.see(part, prior_us, seen);
        }
    }

    fn see(&mut self, part: Part, prior_us: f64, seen_us: u64) {
        if let Some(factor) = self.0.get_mut(part as usize) {
            let seen = (seen_us as f64 / prior_us).clamp(*FACTORS.start(), *FACTORS.end());
            *factor += (seen - *factor) * WEIGHT;
        }
    }
}

impl Running {
    /// The fork or copy is done: the VM goes on. What the pause took, which estimates learn from.
    pub(crate) fn end_pause(
        &mut self,
        mut clock: PauseClock,
        limit: Limit,
        work: Work,
    ) -> SourcePause {
        clock.forked();
        self.go_on();
        let pause = clock.stop(limit);
        self.costs.learn(work, &pause);
        pause
    }

    /// Quiesces the VM; vCPUs have so long to park. If that fails it goes on, and the refusal says that it cannot be
    /// `done` now.
    pub(crate) fn pause(
        &self,
        clock: &mut PauseClock,
        patience: Option<Duration>,
        done: &str,
    ) -> Result<Quiesced, Refusal> {
        let (quiesced, ()) = self.pause_and(clock, patience, done, |_, _| Ok(()))?;
        Ok(quiesced)
    }

    /// As [`Self::pause`], with something to do before the witness exists: see [`Engine::quiesce`].
    pub(crate) fn pause_and<T>(
        &self,
        clock: &mut PauseClock,
        patience: Option<Duration>,
        done: &str,
        last: impl FnOnce(&SavedKvm, &mut PauseClock) -> Result<T, String>,
    ) -> Result<(Quiesced, T), Refusal> {
        if let Some(preparing) = &self.preparing {
            // Its thread may not be there at a fork; its own pause takes it out first.
            let why =
                format!("snapshot {} of this VM is being written: ask again later", preparing.tag);
            return Err(Refusal::new(409, why));
        }
        if self.collapsing.is_some() {
            let why = "a fork of this VM is being made: ask again later";
            return Err(Refusal::new(409, why));
        }
        self.engine.quiesce(clock, patience, last).map_err(|error| {
            self.go_on();
            let status = if matches!(error, QuiesceError::Slow(..)) { 409 } else { 500 };
            Refusal::new(status, format!("the VM cannot be {done} now: {error}"))
        })
    }

    /// Lets the vCPUs go on, unless the VM is paused by request.
    pub(crate) fn go_on(&self) {
        if self.phase != VmPhase::Paused {
            self.engine.vcpus.resume();
        }
    }
}

/// The parts of a work, with what they take if nothing else is known.
fn prior(work: Work) -> [Option<(Part, f64)>; 2] {
    let fork = |small: u64, huge: u64| {
        (Part::Fork, FORK_US + FORK_PAGE_US * small as f64 + FORK_HUGE_US * huge as f64)
    };
    match work {
        Work::Fork { tables } => [Some(fork(tables.small, tables.huge)), None],
        Work::Arm { noted, private } => {
            [Some((Part::Arm, ARM_US + ARM_PAGE_US * noted as f64)), Some(fork(private, 0))]
        }
        Work::Copy { bytes } => [Some((Part::Copy, COPY_BYTE_US * (bytes as f64).max(1.0))), None],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(us: u64) -> Limit {
        Limit::from_us(Some(us))
    }

    fn small(small: u64) -> Tables {
        Tables { small, ..Tables::default() }
    }

    #[test]
    fn huge_pages_cost_less_and_rough_counts_teach_nothing() {
        let mut costs = Costs::default();
        let whole = |costs: &Costs, tables| costs.expect(Work::Fork { tables }).total();
        let (huge, split) = (Tables { huge: 460, ..small(1000) }, small(460 * 512 + 1000));
        assert!(whole(&costs, huge) < Duration::from_millis(1));
        assert!(whole(&costs, split) > Duration::from_millis(8));
        // A fork that took what a small one takes, of what may have been huge.
        let quick =
            SourcePause { quiesce_us: 150, save_us: 60, fork_us: 400, ..SourcePause::default() };
        let before = whole(&costs, split);
        costs.learn(Work::Fork { tables: Tables { rough: true, ..split } }, &quick);
        assert_eq!(whole(&costs, split), before);
        costs.learn(Work::Fork { tables: split }, &quick);
        assert!(whole(&costs, split) < before);
    }

    #[test]
    fn small_pages_within_a_time_are_by_the_dearest_or_what_is_known() {
        let mut costs = Costs::default();
        assert_eq!(costs.small_pages_within(100.0), 0);
        let within = costs.small_pages_within(4000.0);
        assert!((36_000..37_000).contains(&within), "{within}");
        let pause = |fork_us| SourcePause {
            quiesce_us: 150,
            save_us: 60,
            fork_us,
            ..SourcePause::default()
        };
        let work = Work::Fork { tables: small(within) };
        costs.learn(work, &pause(400));
        assert_eq!(costs.small_pages_within(4000.0), within, "never more than at their dearest");
        (0..20).for_each(|_| costs.learn(work, &pause(8000)));
        let known = costs.small_pages_within(4000.0);
        assert!((12_000..14_000).contains(&known), "{known}");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_estimate() {
        let expected = Costs::default().expect(Work::Fork { tables: small(14_080) });
        assert_eq!(expected.total(), Duration::from_nanos(1_082_800));
        let refusal = limit(1).check(&expected, "take mode live").expect_err("refused");
        assert_eq!(refusal.status, 409);
        let message = refusal.message;
        for part in ["about 1.083ms", "parking 150µs", "fork 873µs", "1µs are", "take mode live"]
        {
            assert!(message.contains(part), "{message}");
        }
        // What fits: parking has what is left.
        let patience = limit(2000).check(&expected, "").expect("it fits").expect("a limit");
        assert_eq!(patience, Duration::from_nanos(2_000_000 - 932_800));
        assert_eq!(Limit(None).check(&expected, ""), Ok(None));
    }

    #[test]
    fn costs_are_learned_from_pauses() {
        let mut costs = Costs::default();
        let work = Work::Arm { noted: 40_000, private: 0 };
        let before = costs.expect(work).total();
        assert!(before > Duration::from_millis(60));
        let pause = SourcePause {
            quiesce_us: 300,
            save_us: 60,
            fork_us: 380,
            arm_us: 16_000,
            ..SourcePause::default()
        };
        for _ in 0..20 {
            costs.learn(work, &pause);
        }
        let after = costs.expect(work).total().as_micros() as i64;
        assert!((after - 16_740).abs() < 20, "{after}");
        // Nothing, and the end of the world, are no measures.
        for _ in 0..100 {
            costs.learn(work, &SourcePause { arm_us: u64::MAX, ..SourcePause::default() });
        }
        let expected = costs.expect(work).total();
        assert!(expected > Duration::from_secs(3) && expected < Duration::from_secs(4));
    }

    #[test]
    fn room_for_noted_pages_is_what_the_limit_leaves() {
        let costs = Costs::default();
        assert_eq!(costs.room(Limit(None), 0, 64), 64);
        assert_eq!(costs.room(limit(1), 0, 64), 0);
        assert_eq!(costs.room(limit(1_000_000), 0, 64), 64);
        // 710 us are fixed.
        assert_eq!(costs.room(limit(770), 0, 64), 20);
    }

    #[test]
    fn resident_pages_are_those_of_proc() {
        let status =
            "Name:\tx\nVmRSS:\t 99 kB\nRssAnon:\t    4096 kB\nRssFile:\t 8 kB\nRssShmem:\t 0 kB\n";
        let expected = Resident { anonymous: 1024, file: 2, shared: 0 };
        assert_eq!(Resident::parse(status), expected);
        assert!(Resident::now().anonymous > 0);
    }
}
