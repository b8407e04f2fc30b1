//! Each mode, at each rate: rounds of one request to a VM whose writers run.
//!
//! A round is: quiet, the request, as much time again, and the question what the writers noted. Nothing else
//! talks to the guest meanwhile, as answering costs it milliseconds.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use forkd_api::types::{SnapshotMode, SourcePause};
use forkd_memory::MemoryBackend;
use forkd_snapshot::Removal;
use forkd_sys::clock::monotonic_ns;
use serde::Serialize;

use super::super::floor;
use super::super::measure::{Brood, WAIT, mib};
use super::super::stats::Samples;
use super::Subject;
use super::load::{Load, Rate, Taken, WATCH};
use super::report::{Cell, Place};
use crate::commands::bench_floor::Kind;
use crate::commands::fork::{self, Request};
use crate::process_memory::Anonymous;
use crate::progress::Step;
use crate::registry::Live;
use crate::{persist, registry};

/// How long a guest is left alone after a question: it goes on answering for 60 ms where its kernel is emulated.
const SETTLE: Duration = Duration::from_millis(200);
/// How long the rounds of a cell may take, and how many there are all the same.
const CELL: Duration = Duration::from_secs(60);
const LEAST_ROUNDS: u32 = 3;
/// Snapshots of mode `fork` that are written to disk, beside the branches.
const KEPT: u32 = 3;
/// What mode `diff` is to save.
const SET_MB: u32 = 30;
/// Rounds of a floor.
const FLOOR_ROUNDS: u32 = 25;

/// How a VM is branched or saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// `forkd branch`.
    Fork,
    /// `forkd branch --snapshot --mode diff`.
    Diff,
    /// `forkd branch --snapshot --mode live`.
    Live,
    /// `forkd branch --snapshot --mode full`.
    Full,
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Fork => "fork",
            Self::Diff => "diff",
            Self::Live => "live",
            Self::Full => "full",
        })
    }
}

impl Mode {
    /// What the RAM of its VM is.
    pub fn memory(self) -> &'static str {
        match self {
            Self::Fork => "anonymous",
            Self::Diff | Self::Full => "file",
            Self::Live => "memfd-shared",
        }
    }

    fn floor(self) -> Option<Kind> {
        match self {
            Self::Fork | Self::Diff => Some(Kind::Fork),
            Self::Live => Some(Kind::Arm),
            Self::Full => None,
        }
    }
}

/// What came of one request.
struct Took {
    pause: SourcePause,
    /// When the source ran again at the latest, as far as the answer tells.
    by_ns: u64,
    ready_ms: f64,
    /// The longest wait for a page, of mode `live`.
    stall_ms: Option<f64>,
    disk_mib: Option<f64>,
}

/// Samples of a cell.
#[derive(Default)]
pub(super) struct CellSamples {
    pub pause: Samples,
    pub quiesce: Samples,
    pub save: Samples,
    pub fork: Samples,
    pub arm: Samples,
    pub gap: Samples,
    pub after: Samples,
    pub noise: Samples,
    pub stall: Samples,
    pub ready: Samples,
    pub disk: Samples,
    pub durable: Samples,
    /// Pauses for which the writers noted no gap.
    pub unseen: usize,
    /// Gaps for which there was no room.
    pub lost: u64,
    /// Bytes that were written while they were watched, and for how long that was, in ns.
    pub written: (u64, u64),
}

impl CellSamples {
    pub(super) fn written_mb_s(&self) -> f64 {
        let (bytes, ns) = self.written;
        if ns == 0 { 0.0 } else { bytes as f64 * 1e3 / ns as f64 }
    }
}

/// A VM with its load.
struct Source {
    brood: Brood,
    vm: Live,
    load: Load,
}

impl Subject<'_> {
    /// One mode at all rates.
    pub(super) fn mode(&mut self, mode: Mode, step: &mut Step) -> Result<()> {
        let source = self.source(mode)?;
        // A diff saves what is written, so its rings are only read before.
        source.load.touch_all(mode != Mode::Diff)?;
        let set = (mode == Mode::Diff).then_some(Rate::Set(SET_MB));
        for rate in set.into_iter().chain(self.args.rates.clone()) {
            step.at(&rate.to_string());
            source.load.rate(rate)?;
            let cell = self.cell(mode, rate, &source, step).with_context(|| rate.to_string())?;
            self.report.cells.push(cell);
        }
        source.brood.end()
    }

    /// A VM to be measured: of `fork` a child of the zygote in memory, otherwise one that was loaded from disk.
    fn source(&self, mode: Mode) -> Result<Source> {
        let brood = if mode == Mode::Live {
            let request = Request { count: 1, name: None, wait: Some(WAIT) };
            let memory = MemoryBackend::MemfdShared;
            Brood::adopt(self.paths, fork::load(self.paths, &self.tag, &request, memory)?)?
        } else {
            // Only what was loaded from files knows what it has written since.
            if mode != Mode::Fork && registry::snapshot(self.paths, &self.tag).is_ok() {
                self.stop_zygote(&self.tag)?;
            }
            let zygote = persist::find(self.paths, &self.tag)?;
            Brood::fork(self.paths, &zygote, 1, Some(WAIT))?
        };
        let vm = brood.live(self.paths, brood.first()?)?;
        let load = Load::of(&vm.client, self.args.writers);
        load.start()?;
        Ok(Source { brood, vm, load })
    }

    fn cell(&self, mode: Mode, rate: Rate, source: &Source, step: &mut Step) -> Result<Cell> {
        let mut samples = CellSamples::default();
        let begun = Instant::now();
        for round in 0..self.args.rounds {
            if round >= LEAST_ROUNDS && begun.elapsed() > CELL {
                break;
            }
            step.at(&format!("{rate}, {} of {}", round + 1, self.args.rounds));
            self.round(mode, rate, source, &mut samples)?;
        }
        if mode == Mode::Fork {
            for _ in 0..KEPT.min(self.args.rounds) {
                self.keep(&source.vm, &mut samples)?;
            }
        }
        let resident = Anonymous::with_mapped_ram(source.vm.record.pid)?;
        let kind = mode.floor();
        let floor = kind.map(|kind| floor::of(kind, &source.vm.record, resident, FLOOR_ROUNDS));
        let floor: Option<Samples> =
            floor.transpose()?.map(|floor| floor.total_ns.iter().map(|ns| ms(*ns)).collect());
        let at = Place { mem_mib: self.mem_mib, mode, rate, resident };
        Cell::of(at, &samples, floor.as_ref()).context("no round was measured")
    }

    fn round(&self, mode: Mode, rate: Rate, source: &Source, to: &mut CellSamples) -> Result<()> {
        if let Rate::Set(mb) = rate {
            source.load.write_set(mb)?;
        }
        let load = &source.load;
        let before = load.take()?;
        thread::sleep(SETTLE + WATCH);
        let from_ns = monotonic_ns();
        let (took, taken) = self.request(mode, source, from_ns)?;
        let seen = taken.seen(from_ns, took.by_ns, took.pause.pause_us * 1000);
        let pause = &took.pause;
        let us = |us: u64| us as f64 / 1e3;
        to.pause.push(us(pause.pause_us));
        to.quiesce.push(us(pause.quiesce_us));
        to.save.push(us(pause.save_us));
        to.fork.push(us(pause.fork_us));
        if mode == Mode::Live {
            to.arm.push(us(pause.arm_us));
        }
        if seen.pause_ns > 0 {
            to.gap.push(ms(seen.pause_ns));
        } else {
            to.unseen += 1;
        }
        to.after.push(ms(seen.after_ns));
        to.noise.push(ms(seen.noise_ns));
        to.lost += before.lost + taken.lost;
        to.written.0 += taken.bytes_since(&before);
        to.written.1 += taken.asked_ns.saturating_sub(before.asked_ns);
        to.ready.push(took.ready_ms);
        took.stall_ms.into_iter().for_each(|stall| to.stall.push(stall));
        took.disk_mib.into_iter().for_each(|size| to.disk.push(size));
        Ok(())
    }

    /// Makes one request, and asks the writers once it has been watched for long enough.
    fn request(&self, mode: Mode, source: &Source, from_ns: u64) -> Result<(Took, Taken)> {
        if mode == Mode::Fork {
            let branch = Brood::fork(self.paths, &source.vm, 1, None)?;
            let by_ns = monotonic_ns();
            thread::sleep(WATCH);
            let taken = source.load.take()?;
            let pause = branch.forked.pause.context("a branch without a pause")?;
            let ready = branch.first()?.to_running().context("a branch that does not run")?;
            branch.end()?;
            let ready_ms = ready.as_secs_f64() * 1e3;
            return Ok((Took { pause, by_ns, ready_ms, stall_ms: None, disk_mib: None }, taken));
        }
        // The answer comes when the snapshot is durable; the writers are asked before, if that is late.
        thread::scope(|scope| {
            let answer = scope.spawn(|| {
                let took = self.snapshot(mode, &source.vm);
                (took, monotonic_ns())
            });
            thread::sleep(WATCH);
            let taken = source.load.take();
            let (took, by_ns) = answer.join().ok().context("the request's thread panicked")?;
            let (taken, mut took) = (taken?, took?);
            took.ready_ms = ms(by_ns.saturating_sub(from_ns));
            took.by_ns = by_ns.min(taken.asked_ns);
            took.disk_mib = Some(self.size_and_remove()?);
            Ok((took, taken))
        })
    }

    /// Tag of what is saved and removed again.
    fn taken_tag(&self) -> String {
        format!("{}.s", self.tag)
    }

    fn snapshot(&self, mode: Mode, vm: &Live) -> Result<Took> {
        let (store, tag) = (self.store.dir(), self.taken_tag());
        let how = match mode {
            Mode::Diff => SnapshotMode::Diff,
            Mode::Live => SnapshotMode::Live,
            Mode::Full | Mode::Fork => SnapshotMode::Full,
        };
        let receipt = vm.client.snapshot(store, &tag, how, true)?;
        let stall_ms = (mode == Mode::Live).then_some(receipt.longest_stall_us as f64 / 1e3);
        Ok(Took { pause: receipt.source, by_ns: 0, ready_ms: 0.0, stall_ms, disk_mib: None })
    }

    /// Bytes on disk of what was saved, in MiB, before it goes.
    fn size_and_remove(&self) -> Result<f64> {
        let tag = self.taken_tag();
        let size = self.store.info(&tag)?.disk_bytes;
        self.store.remove(&tag, Removal::Plain)?;
        Ok(mib(size))
    }

    /// `forkd branch --snapshot` in mode `fork`: how long it takes until it is durable.
    fn keep(&self, vm: &Live, to: &mut CellSamples) -> Result<()> {
        let tag = self.taken_tag();
        let begun = Instant::now();
        vm.client.zygote(&tag, &self.paths.snapshot(&tag), false)?;
        let zygote = registry::snapshot(self.paths, &tag)?;
        let saved = persist::save(self.paths, &zygote, true);
        to.durable.push(begun.elapsed().as_secs_f64() * 1e3);
        zygote.client.stop(zygote.record.pid)?;
        saved?;
        to.disk.push(self.size_and_remove()?);
        Ok(())
    }
}

fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}
