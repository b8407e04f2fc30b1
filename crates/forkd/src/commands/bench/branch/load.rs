//! The guest's side of the bench: writers that tick, and what they noted, in the host's time.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use forkd_sys::clock::monotonic_ns;
use forkd_vm::clock::host_tsc;
use serde::Deserialize;

use super::super::measure::WAIT;
use crate::guest::{Guest, Stream};
use crate::vm_client::VmClient;

/// What runs in the guest's interpreter.
const SCRIPT: &str = include_str!("load.py");
/// Size of the pages that are written.
const PAGE: u64 = 4096;
/// How long a burst may take. A page that is copied by a fault takes 10 us; one that waits for a snapshot on disk, longer.
const BURST: Duration = Duration::from_secs(180);

/// What is watched before a request, and from it on.
pub const WATCH: Duration = Duration::from_millis(300);

/// What the writers do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rate {
    /// They tick, and write nothing.
    Idle,
    /// So many MB (10^6 bytes) of pages a second, in all.
    MbPerSecond(u32),
    /// As fast as they can.
    Max,
    /// Nothing but so many MB before each round, the same pages each time.
    Set(u32),
}

impl std::str::FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "idle" => Ok(Self::Idle),
            "max" => Ok(Self::Max),
            number => match number.parse() {
                Ok(mb) if (1..=10_000).contains(&mb) => Ok(Self::MbPerSecond(mb)),
                _ => Err("a rate is `idle`, `max`, or 1 to 10000 MB/s".to_string()),
            },
        }
    }
}

impl std::fmt::Display for Rate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Idle => f.write_str("idle"),
            Self::MbPerSecond(mb) => write!(f, "{mb} MB/s"),
            Self::Max => f.write_str("max"),
            Self::Set(mb) => write!(f, "{mb} MB each"),
        }
    }
}

impl Rate {
    /// Pages a second of each of `writers`, as the script takes it.
    fn pace(self, writers: u32) -> i64 {
        match self {
            Self::Idle | Self::Set(_) => 0,
            Self::Max => -1,
            Self::MbPerSecond(mb) => {
                let pages = u64::from(mb) * 1_000_000 / PAGE / u64::from(writers.max(1));
                i64::try_from(pages.max(1)).unwrap_or(i64::MAX)
            }
        }
    }
}

/// The code that warms the guest: `writers` processes, with rings of `ring_mib` in all.
pub fn warm_code(writers: u32, ring_mib: u64) -> String {
    format!("{SCRIPT}\nload = Load({writers}, {ring_mib} << 20)\n")
}

/// The load of a VM whose guest was warmed by [`warm_code`].
pub struct Load {
    guest: Guest,
    writers: u32,
}

/// A stretch of the host's CLOCK_MONOTONIC in which no writer ran, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// The last tick before.
    pub from_ns: u64,
    /// The first tick after.
    pub to_ns: u64,
}

impl Gap {
    /// How long.
    pub fn ns(self) -> u64 {
        self.to_ns.saturating_sub(self.from_ns)
    }
}

/// What the writers noted since it was last asked for.
#[derive(Debug, Default)]
pub struct Taken {
    /// The gaps, in the order of time.
    pub gaps: Vec<Gap>,
    /// By how much their times may be wrong, in nanoseconds.
    pub slop_ns: u64,
    /// Gaps that were noted and had no room.
    pub lost: u64,
    /// Pages written since the start.
    pages: u64,
    /// When the question was asked: what comes later is its own doing.
    pub asked_ns: u64,
    busy: bool,
}

/// What the script prints. Times are the guest's.
#[derive(Debug, Deserialize)]
struct Said {
    now: u64,
    tsc: u64,
    lost: u64,
    pages: u64,
    busy: bool,
    gaps: Vec<(u64, u64)>,
}

/// Two clocks of the host at one instant.
#[derive(Debug, Clone, Copy)]
struct Instants {
    ns: u64,
    tsc: u64,
}

impl Instants {
    fn now() -> Self {
        Self { ns: monotonic_ns(), tsc: host_tsc() }
    }
}

impl Load {
    /// The load of a VM, as it was when the VM was forked or saved.
    pub fn of(vm: &VmClient, writers: u32) -> Self {
        Self { guest: Guest::of(vm), writers }
    }

    /// Has the writers begin; they tick, and write nothing yet.
    ///
    /// # Errors
    /// The guest does not answer, or was not warmed for it; so for all below.
    pub fn start(&self) -> Result<()> {
        self.run("load.start()").map(drop)
    }

    fn run(&self, code: &str) -> Result<String> {
        let mut said = String::new();
        let mut sink = |stream, text: &str| {
            if stream == Stream::Stdout {
                said.push_str(text);
            }
            Ok(())
        };
        let done = self.guest.eval(code, Some(WAIT), &mut sink)?;
        match done.error {
            Some(error) => bail!("the load in the guest failed: {}", error.summary()),
            None => Ok(said),
        }
    }

    /// Sets the rate at which they write.
    ///
    /// # Errors
    /// As above.
    pub fn rate(&self, rate: Rate) -> Result<()> {
        self.run(&format!("load.pace({})", rate.pace(self.writers))).map(drop)
    }

    /// Has them read (or write) all their pages once, so that all of them are resident.
    ///
    /// # Errors
    /// As above; it takes too long.
    pub fn touch_all(&self, write: bool) -> Result<()> {
        self.burst(0, write)
    }

    /// Has them write the first `mb` MB of their rings.
    ///
    /// # Errors
    /// As above; it takes too long.
    pub fn write_set(&self, mb: u32) -> Result<()> {
        self.burst(u64::from(mb) * 1_000_000 / PAGE / u64::from(self.writers.max(1)), true)
    }

    fn burst(&self, pages: u64, write: bool) -> Result<()> {
        self.run(&format!("load.burst({pages}, {})", u8::from(write)))?;
        let begun = Instant::now();
        while self.take()?.busy {
            if begun.elapsed() > BURST {
                bail!("the guest's writers did not write their pages in {} s", BURST.as_secs());
            }
        }
        Ok(())
    }

    /// What they noted since this was last called.
    ///
    /// # Errors
    /// As above.
    pub fn take(&self) -> Result<Taken> {
        let asked = Instants::now();
        let said = self.run("load.take()")?;
        let answered = Instants::now();
        let said: Said = serde_json::from_str(&said).context("the load said something odd")?;
        Ok(taken(&said, asked, answered))
    }
}

/// Puts what the guest said into the host's time. On PVM, and wherever the guest's TSC is the host's, its TSC tells at
/// which instant it was said; otherwise that is known only to have been between question and answer.
fn taken(said: &Said, asked: Instants, answered: Instants) -> Taken {
    let (ns, ticks) = (answered.ns - asked.ns, answered.tsc.wrapping_sub(asked.tsc));
    let since = said.tsc.wrapping_sub(asked.tsc);
    let (at_ns, slop_ns) = if since <= ticks && ticks > 0 {
        // The question's round trip is milliseconds at least, so its clocks give the rate to some parts in 10^5.
        (asked.ns + (u128::from(since) * u128::from(ns) / u128::from(ticks)) as u64, ns / 10_000)
    } else {
        (answered.ns, ns)
    };
    let host = |guest: u64| at_ns.saturating_sub(said.now.saturating_sub(guest));
    let gap = |(from, to): &(u64, u64)| Gap { from_ns: host(*from), to_ns: host(*to) };
    let mut gaps: Vec<Gap> = said.gaps.iter().map(gap).collect();
    gaps.sort_by_key(|gap| gap.from_ns);
    let (lost, pages, busy) = (said.lost, said.pages, said.busy);
    Taken { gaps, slop_ns, lost, pages, asked_ns: asked.ns, busy }
}

/// What one round's gaps say.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Seen {
    /// The gap that holds the pause, in nanoseconds; none was noted: 0.
    pub pause_ns: u64,
    /// The longest after it.
    pub after_ns: u64,
    /// The longest in [`WATCH`] before the request.
    pub noise_ns: u64,
}

impl Taken {
    /// Bytes of the pages that were written since `before`.
    pub fn bytes_since(&self, before: &Self) -> u64 {
        self.pages.saturating_sub(before.pages).saturating_mul(PAGE)
    }

    /// Finds the gap of a pause of `pause_ns` between the instants `from_ns` and `to_ns`: the shortest that is long enough
    /// to hold it. If none is, the longest: the VMM's clock runs from the first kick, when the guest runs yet, to
    /// when it looks again after the resume, and on a busy host it may wait for a CPU at both ends.
    pub fn seen(&self, from_ns: u64, to_ns: u64, pause_ns: u64) -> Seen {
        let (from, to) = (from_ns.saturating_sub(self.slop_ns), to_ns + self.slop_ns);
        // The guest ticks once in a microsecond, and its clock and the host's differ by as little.
        let least = pause_ns.saturating_sub(pause_ns / 50 + 20_000);
        let within = || self.gaps.iter().filter(|gap| gap.to_ns > from && gap.from_ns < to);
        let pause = within()
            .filter(|gap| gap.ns() >= least)
            .min_by_key(|gap| gap.ns())
            .or_else(|| within().max_by_key(|gap| gap.ns()));
        let begun = pause.map_or(to, |gap| gap.to_ns);
        let longest = |from: u64, to: u64| {
            let inside = self.gaps.iter().filter(|gap| gap.from_ns >= from && gap.to_ns <= to);
            inside.map(|gap| gap.ns()).max().unwrap_or(0)
        };
        let watch = u64::try_from(WATCH.as_nanos()).unwrap_or(u64::MAX);
        Seen {
            pause_ns: pause.map_or(0, |gap| gap.ns()),
            after_ns: longest(begun, self.asked_ns),
            noise_ns: longest(from.saturating_sub(watch), from),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_words_or_numbers() {
        let rate = |text: &str| text.parse::<Rate>();
        assert_eq!(rate("idle"), Ok(Rate::Idle));
        assert_eq!(rate("max"), Ok(Rate::Max));
        assert_eq!(rate("50"), Ok(Rate::MbPerSecond(50)));
        for bad in ["", "0", "-1", "fast", "50MB", "10001"] {
            assert!(rate(bad).unwrap_err().contains("idle"), "{bad}");
        }
        // 12,207 pages of 4 KiB a second are 50 MB/s.
        assert_eq!(Rate::MbPerSecond(50).pace(4), 3051);
        assert_eq!((Rate::Max.pace(4), Rate::Idle.pace(4)), (-1, 0));
    }

    fn said(now: u64, tsc: u64, gaps: Vec<(u64, u64)>) -> Said {
        Said { now, tsc, lost: 0, pages: 0, busy: false, gaps }
    }

    #[test]
    fn the_guests_time_becomes_the_hosts() {
        let (asked, answered) =
            (Instants { ns: 1_000_000, tsc: 50_000 }, Instants { ns: 2_000_000, tsc: 52_000 });
        // A quarter of the way, so at 1,250,000 ns.
        let taken = super::taken(&said(9_000, 50_500, vec![(8_000, 8_500)]), asked, answered);
        assert_eq!(taken.gaps, [Gap { from_ns: 1_249_000, to_ns: 1_249_500 }]);
        assert_eq!(taken.slop_ns, 100);
        // A TSC that is not the host's: any instant in between.
        let taken = super::taken(&said(9_000, 7, vec![(8_000, 8_500)]), asked, answered);
        assert_eq!(taken.gaps, [Gap { from_ns: 1_999_000, to_ns: 1_999_500 }]);
        assert_eq!(taken.slop_ns, 1_000_000);
    }

    #[test]
    fn the_gap_of_a_pause_is_told_from_others() {
        let ms = 1_000_000;
        let gap = |from: u64, len: u64| Gap { from_ns: from * ms, to_ns: (from + len) * ms };
        let gaps =
            vec![gap(80, 4), gap(101, 1), gap(105, 3), gap(110, 9), gap(150, 2), gap(210, 50)];
        let taken = Taken { gaps, asked_ns: 200 * ms, ..Taken::default() };
        let seen = taken.seen(100 * ms, 120 * ms, 2_900_000);
        assert_eq!(seen, Seen { pause_ns: 3 * ms, after_ns: 9 * ms, noise_ns: 4 * ms });
        // Nothing is as long as that.
        assert_eq!(taken.seen(100 * ms, 120 * ms, 20 * ms).pause_ns, 9 * ms);
        // Nothing at all: the rest is told all the same.
        let seen = taken.seen(130 * ms, 140 * ms, ms);
        assert_eq!((seen.pause_ns, seen.after_ns, seen.noise_ns), (0, 2 * ms, 9 * ms));
        // What was longer ago than that is not looked at.
        assert_eq!(taken.seen(390 * ms, 395 * ms, ms).noise_ns, 50 * ms);
        assert_eq!(taken.seen(512 * ms, 513 * ms, ms).noise_ns, 0);
    }

    #[test]
    fn the_script_is_given_its_numbers() {
        let code = warm_code(4, 300);
        assert!(code.ends_with("load = Load(4, 300 << 20)\n") && code.contains("class Load"));
    }
}
