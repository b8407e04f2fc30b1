//! `forkd bench branch`: what it costs a VM to be branched or saved while it runs, and to load it again.
//!
//! | to see | read |
//! |---|---|
//! | what runs in the guest, and how its gaps are told from each other | [`load`], load.py |
//! | how each mode is measured | [`modes`] |
//! | loading, and chains of diffs | [`chain`] |
//! | what must be reached, the table and the JSON | [`report`] |

mod chain;
mod load;
mod modes;
mod report;

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use forkd_snapshot::{Removal, SnapshotError, Store};

use self::load::Rate;
use self::modes::Mode;
use self::report::{Failure, Report};
use crate::cleanup::{self, Guard};
use crate::cli::OutputArgs;
use crate::commands::image::{self, PYTHON};
use crate::commands::snapshot::{Plan, Warm, create};
use crate::paths::Paths;
use crate::progress::Step;
use crate::{id, output, persist, registry};

/// Least RAM, in MiB: the guest has 90 MiB in use without a ring.
const MIN_MEM: u64 = 192;
/// Part of RAM that the rings are by default, in percent, and the most of it in MiB: where the guest's kernel is
/// emulated, it needs 0.09 s to clear one.
const RING_PERCENT: u64 = 60;
const MAX_RING: u64 = 1536;
/// RAM for which the measure of loading is meant.
const CHAIN_MEM: u64 = 512;

/// No chain at all.
#[expect(clippy::reversed_empty_ranges, reason = "it is meant to be empty")]
const NO_DEPTH: RangeInclusive<u32> = 1..=0;

/// Measure what branches and snapshots of a running VM cost on this host
///
/// For each RAM size a VM is booted whose guest has writers with rings of memory. It is branched and saved in each mode,
/// with the writers at each rate. The pause is told by the VMM and, beside it, as the guest saw it; the floor is
/// a process with as much memory resident that only forks, or only write-protects, beside a bare KVM VM.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd bench branch
  forkd bench branch --mem 1536 --rates 50,max --modes fork,live --rounds 50
  forkd bench branch --save branch.json && bench/plot.py branch.json .")]
pub struct Args {
    /// RAM sizes of the guest in MiB
    #[arg(long, value_name = "MIB,...", value_delimiter = ',', default_value = "256,512,1024,1536,4096",
        value_parser = clap::value_parser!(u64).range(MIN_MEM..=65_536))]
    mem: Vec<u64>,
    /// Rates at which memory is written to: `idle`, MB/s of all writers, or `max`
    #[arg(long, value_name = "RATE,...", value_delimiter = ',', default_value = "idle,50,max")]
    rates: Vec<Rate>,
    /// Modes; `diff` is also measured with 30 MB written before each
    #[arg(
        long,
        value_name = "MODE,...",
        value_delimiter = ',',
        default_value = "fork,diff,live,full"
    )]
    modes: Vec<Mode>,
    /// Lengths of the chains of diffs that are loaded, as N, N..M or `none`; they are made of the guest with 512 MiB, or of the
    /// first if there is none of that size
    #[arg(long, value_name = "N..M", default_value = "0..8", value_parser = depths)]
    depths: RangeInclusive<u32>,
    /// How often each thing is measured; less often where that takes more than a minute
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// vCPUs of the guest
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=16))]
    vcpus: u64,
    /// Writers in the guest
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
    writers: u32,
    /// Memory of all writers in MiB; by default 60 % of RAM, and 1536 at most
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(32..=65_536))]
    ring: Option<u64>,
    /// Write the result to this file as well, as JSON, after each size
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
}

/// `3`, `0..8` with both ends, or `none`.
fn depths(text: &str) -> Result<RangeInclusive<u32>, String> {
    if text == "none" {
        return Ok(NO_DEPTH);
    }
    let number = |text: &str| text.parse::<u32>().ok().filter(|n| *n <= 64);
    let (from, to) = text.split_once("..").unwrap_or((text, text));
    match (number(from), number(to)) {
        (Some(from), Some(to)) if from <= to => Ok(from..=to),
        _ => Err("depths are N or N..M, of 0 to 64, or `none`".to_string()),
    }
}

/// A guest that is measured.
struct Subject<'a> {
    paths: &'a Paths,
    store: Store,
    args: &'a Args,
    /// Tag of its snapshot, live and durable.
    tag: String,
    mem_mib: u64,
    report: &'a mut Report,
}

impl Args {
    /// Runs the verb.
    ///
    /// # Errors
    /// Something could not be measured; what could be is told first. What was made for it is gone.
    pub fn run(self, paths: &Paths) -> Result<ExitCode> {
        for mem in &self.mem {
            let ring = self.ring_of(*mem);
            if ring + 128 > *mem {
                bail!("--ring {ring}: a guest of {mem} MiB has room for {} MiB", mem - 128);
            }
        }
        let quiet = self.output.json;
        image::build(paths, &forkd_image::Recipe::python()?, Some(PYTHON), quiet)?;
        cleanup::watch_signals().context("cannot watch signals")?;
        let mut report = Report::of(&self)?;
        let chain_mem =
            self.mem.iter().find(|mem| **mem == CHAIN_MEM).or(self.mem.first()).copied();
        for mem in &self.mem {
            if let Err(error) = self.size(paths, *mem, chain_mem == Some(*mem), &mut report) {
                let error = output::error_line(&error);
                output::note(&format!("forkd: {mem} MiB: {error}"));
                report.failures.push(Failure { mem_mib: *mem, error });
            }
            report.complete();
            if let Some(file) = &self.save {
                report.save(file)?;
            }
        }
        if quiet {
            output::json(&report)?;
        } else {
            report.print()?;
        }
        if let Some(failure) = report.failures.first() {
            bail!("{} MiB could not be measured: {}", failure.mem_mib, failure.error);
        }
        Ok(ExitCode::SUCCESS)
    }

    fn ring_of(&self, mem: u64) -> u64 {
        self.ring.unwrap_or((mem * RING_PERCENT / 100).min(MAX_RING).min(mem - 128))
    }

    /// Measures one size. Nothing of it stays.
    fn size(&self, paths: &Paths, mem: u64, with_chain: bool, report: &mut Report) -> Result<()> {
        let tag = format!("bench-{}", id::new()?.trim_start_matches("vm-"));
        let store = Store::open(&persist::store_dir(paths)?)?;
        let cleaner = clean(paths, &store, &tag);
        let quiet = self.output.json;
        create(
            paths,
            &Plan {
                tag: tag.clone(),
                image: PYTHON.to_string(),
                vcpus: self.vcpus,
                mem_mib: mem,
                warm: Some(Warm {
                    name: "<bench>".to_string(),
                    code: load::warm_code(self.writers, self.ring_of(mem)),
                }),
                disks: Vec::new(),
                kernel: None,
                cmdline: String::new(),
                boot_timeout_s: None,
                quiet,
            },
        )?;
        let mut subject = Subject { paths, store, args: self, tag, mem_mib: mem, report };
        subject.save()?;
        let measured = subject.modes();
        if with_chain && !self.depths.is_empty() {
            let step = Step::begin(&format!("{mem} MiB: load, and chains of diffs"), quiet);
            subject.chain(&self.depths)?;
            step.done("");
        }
        drop(cleaner);
        measured
    }
}

/// Removes all that has the bench's tag.
fn clean(paths: &Paths, store: &Store, tag: &str) -> Guard {
    let (paths, store, tag) = (paths.clone(), store.clone(), tag.to_string());
    Guard::new(move || {
        for live in registry::snapshots(&paths).unwrap_or_default() {
            if live.record.id.starts_with(&tag)
                && let Err(e) = live.client.stop(live.record.pid)
            {
                output::note(&format!("forkd: {}", output::error_line(&e)));
            }
        }
        // What was being written when this was interrupted has a tag of its own, and may have no parent.
        let listed = store.list().unwrap_or_default();
        let ours = listed.into_iter().map(|entry| entry.tag).filter(|t| t.starts_with(&tag));
        for tag in ours.collect::<Vec<_>>() {
            match store.remove(&tag, Removal::Cascade) {
                Ok(_) | Err(SnapshotError::NotFound(_)) => {}
                Err(e) => output::note(&format!("forkd: {e}")),
            }
        }
    })
}

impl Subject<'_> {
    fn stop_zygote(&self, tag: &str) -> Result<()> {
        let live = registry::snapshot(self.paths, tag)?;
        live.client.stop(live.record.pid)
    }

    /// Writes the guest's snapshot to the disk.
    fn save(&self) -> Result<()> {
        let step = Step::begin("write it to disk", self.args.output.json);
        persist::save(self.paths, &registry::snapshot(self.paths, &self.tag)?, true)?;
        step.done("");
        Ok(())
    }

    /// All modes at all rates.
    fn modes(&mut self) -> Result<()> {
        for mode in self.args.modes.clone() {
            let what = format!("{} MiB: {mode}", self.mem_mib);
            let mut step = Step::begin(&what, self.args.output.json);
            self.mode(mode, &mut step).with_context(|| format!("mode {mode}"))?;
            step.done("");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn parsed(words: &[&str]) -> Result<Args, String> {
        let line = Line::try_parse_from([&["bench"], words].concat());
        line.map(|line| line.args).map_err(|e| e.to_string())
    }

    #[test]
    fn lists_are_separated_by_commas() {
        let args =
            parsed(&["--mem", "256,512", "--rates", "idle,50,max", "--depths", "1..3"]).unwrap();
        assert_eq!(args.mem, [256, 512]);
        assert_eq!(args.rates, [Rate::Idle, Rate::MbPerSecond(50), Rate::Max]);
        assert_eq!((args.depths, args.rounds), (1..=3, 20));
        assert_eq!(args.modes.len(), 4);
        assert!(parsed(&["--depths", "none"]).unwrap().depths.is_empty());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (words, word) in [
            (["--mem", "64"], "64"),
            (["--mem", "256,lots"], "lots"),
            (["--rates", "quick"], "quick"),
            (["--modes", "forks"], "forks"),
            (["--depths", "3..1"], "3..1"),
            (["--depths", "65"], "65"),
            (["--rounds", "0"], "0"),
        ] {
            assert!(parsed(&words).unwrap_err().contains(word), "{words:?}");
        }
    }

    #[test]
    fn the_ring_is_a_part_of_ram() {
        let args = parsed(&[]).unwrap();
        assert_eq!(
            [192, 256, 512, 1536, 4096].map(|mem| args.ring_of(mem)),
            [64, 128, 307, 921, 1536]
        );
        assert_eq!(parsed(&["--ring", "64"]).unwrap().ring_of(4096), 64);
    }
}
