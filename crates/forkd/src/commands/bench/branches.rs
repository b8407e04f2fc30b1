//! `forkd bench branch`: what keeping a running VM on disk costs, and loading it again.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use forkd_api::types::SnapshotMode;
use forkd_memory::MemoryBackend;
use forkd_snapshot::{Removal, Store};
use serde::Serialize;

use super::measure::{Brood, WAIT, mib};
use super::stats::{Samples, Summary};
use crate::cleanup::{self, Guard};
use crate::cli::OutputArgs;
use crate::commands::fork::{self, Request};
use crate::commands::snapshot::{Plan, Warm, create};
use crate::guest::Guest;
use crate::paths::Paths;
use crate::progress::Step;
use crate::registry::Live;
use crate::{id, output, persist, registry};

/// What the guest does meanwhile: nothing, or writing as fast as it can.
const LOADS: [(&str, &str); 2] = [
    ("idle", "pass"),
    (
        "writing",
        "import threading\nroom = bytearray(32 << 20)\ndef write():\n    n = 0\n    while True:\n        n += 1\n        \
         for at in range(0, len(room), 4096):\n            room[at] = n & 255\n\
         threading.Thread(target=write, daemon=True).start()",
    ),
];
/// Deepest chain that is loaded.
const DEPTH: usize = 8;

/// Measure what durable snapshots cost on this host
///
/// Boots and warms a VM, saves it, loads it, and takes snapshots of it in the modes `full`, `diff` and `live`, beside
/// plain branches; then loads chains of diffs.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd bench branch
  forkd bench branch --mem 1536 --rounds 30 --json > branch.json")]
pub struct Args {
    /// RAM of the guest in MiB
    #[arg(long, default_value_t = 512, value_name = "MIB")]
    mem: u64,
    /// How often each thing is measured
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    unit: &'static str,
    #[serde(flatten)]
    summary: Summary,
}

struct Bench<'a> {
    paths: &'a Paths,
    rounds: u32,
    rows: Vec<Row>,
    store: Store,
}

impl Args {
    /// Runs the verb.
    ///
    /// # Errors
    /// Something could not be measured. What was made for it is gone.
    pub fn run(self, paths: &Paths) -> Result<ExitCode> {
        cleanup::watch_signals().context("cannot watch signals")?;
        let quiet = self.output.json;
        let tag = format!("bench-{}", id::new()?.trim_start_matches("vm-"));
        let store = Store::open(&persist::store_dir(paths)?)?;
        let cleaner = clean(paths, &store, &tag);
        let plan = Plan {
            tag: tag.clone(),
            image: crate::commands::image::PYTHON.to_string(),
            vcpus: 1,
            mem_mib: self.mem,
            warm: Some(Warm { name: "<bench>".to_string(), code: super::WARM.to_string() }),
            disks: Vec::new(),
            kernel: None,
            cmdline: String::new(),
            boot_timeout_s: None,
            quiet,
        };
        create(paths, &plan)?;
        let mut bench = Bench { paths, rounds: self.rounds, rows: Vec::new(), store };
        let mut step = Step::begin("save and load", quiet);
        bench.save(&tag)?;
        bench.load("load, depth 0", &tag)?;
        step.done("");
        for (load, code) in LOADS {
            step = Step::begin(&format!("snapshots of a VM, {load}"), quiet);
            bench.modes(&tag, load, code)?;
            bench.live(&tag, load, code)?;
            step.done("");
        }
        step = Step::begin("chains of diffs", quiet);
        bench.chain(&tag)?;
        step.done("");
        drop(cleaner);
        if quiet {
            output::json(&bench.rows)?;
        } else {
            bench.print()?;
        }
        Ok(ExitCode::SUCCESS)
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
        match store.remove(&tag, Removal::Cascade) {
            Ok(_) | Err(forkd_snapshot::SnapshotError::NotFound(_)) => {}
            Err(e) => output::note(&format!("forkd: {e}")),
        }
    })
}

impl Bench<'_> {
    fn add(&mut self, name: impl Into<String>, unit: &'static str, samples: &Samples) {
        if let Some(summary) = samples.summary() {
            self.rows.push(Row { name: name.into(), unit, summary });
        }
    }

    fn stop_zygote(&self, tag: &str) -> Result<()> {
        let live = registry::snapshot(self.paths, tag)?;
        live.client.stop(live.record.pid)
    }

    fn save(&mut self, tag: &str) -> Result<()> {
        let live = registry::snapshot(self.paths, tag)?;
        let begun = Instant::now();
        persist::save(self.paths, &live, true)?;
        self.add("save a zygote", "ms", &[ms(begun)].into_iter().collect());
        Ok(())
    }

    /// Loads a snapshot from the page cache, and forks a child of it.
    fn load(&mut self, name: &str, tag: &str) -> Result<()> {
        let (mut loaded, mut running) = (Samples::default(), Samples::default());
        for _ in 0..self.rounds {
            if registry::snapshot(self.paths, tag).is_ok() {
                self.stop_zygote(tag)?;
            }
            let begun = Instant::now();
            let zygote = persist::find(self.paths, tag)?;
            let took = ms(begun);
            let brood = Brood::fork(self.paths, &zygote, 1, None)?;
            if let Some(time) = brood.first()?.to_running() {
                running.push(took + time.as_secs_f64() * 1e3);
            }
            loaded.push(took);
            brood.end()?;
        }
        self.add(format!("{name}: to zygote"), "ms", &loaded);
        self.add(format!("{name}: to a child's vCPUs running"), "ms", &running);
        Ok(())
    }

    fn source(&self, tag: &str, code: &str) -> Result<(Brood, Live)> {
        let zygote = persist::find(self.paths, tag)?;
        self.busy(Brood::fork(self.paths, &zygote, 1, Some(WAIT))?, code)
    }

    /// Lets a VM run `code`.
    fn busy(&self, brood: Brood, code: &str) -> Result<(Brood, Live)> {
        let live = brood.live(self.paths, brood.first()?)?;
        let run = Guest::of(&live.client).eval(code, Some(WAIT), &mut |_, _| Ok(()))?;
        if let Some(error) = run.error {
            anyhow::bail!("the guest can't be kept busy: {}", error.summary());
        }
        Ok((brood, live))
    }

    fn modes(&mut self, tag: &str, load: &str, code: &str) -> Result<()> {
        let (brood, live) = self.source(tag, code)?;
        let taken = format!("{tag}.s");
        let store = self.store.dir().to_path_buf();
        let mut forks = Samples::default();
        let [mut full, mut full_ready, mut diff, mut diff_ready, mut size] =
            std::array::from_fn(|_| Samples::default());
        for _ in 0..self.rounds {
            let branch = Brood::fork(self.paths, &live, 1, None)?;
            if let Some(pause) = &branch.forked.pause {
                forks.push(pause.pause_us as f64 / 1e3);
            }
            branch.end()?;
            let begun = Instant::now();
            let receipt = live.client.snapshot(&store, &taken, SnapshotMode::Full, true)?;
            full.push(receipt.source.pause_us as f64 / 1e3);
            full_ready.push(ms(begun));
            self.store.remove(&taken, Removal::Plain)?;
            let begun = Instant::now();
            if let Some(pause) = live.client.diff(&store, &taken, true)? {
                diff.push(pause.pause_us as f64 / 1e3);
            }
            diff_ready.push(ms(begun));
            size.push(mib(self.store.info(&taken)?.disk_bytes));
            self.store.remove(&taken, Removal::Plain)?;
        }
        self.add(format!("{load}: fork, pause"), "ms", &forks);
        self.add(format!("{load}: full, pause"), "ms", &full);
        self.add(format!("{load}: full, durable"), "ms", &full_ready);
        self.add(format!("{load}: diff, pause"), "ms", &diff);
        self.add(format!("{load}: diff, durable"), "ms", &diff_ready);
        self.add(format!("{load}: diff, on disk"), "MiB", &size);
        brood.end()
    }

    /// Mode `live`, of a VM whose RAM is a memfd.
    fn live(&mut self, tag: &str, load: &str, code: &str) -> Result<()> {
        let request = Request { count: 1, name: None, wait: Some(WAIT) };
        let forked = fork::load(self.paths, tag, &request, MemoryBackend::MemfdShared)?;
        let (brood, vm) = self.busy(Brood::adopt(self.paths, forked)?, code)?;
        let taken = format!("{tag}.s");
        let store = self.store.dir().to_path_buf();
        let [mut pause, mut arm, mut stall, mut ready] =
            std::array::from_fn(|_| Samples::default());
        for _ in 0..self.rounds {
            let begun = Instant::now();
            let receipt = vm.client.snapshot(&store, &taken, SnapshotMode::Live, true)?;
            ready.push(ms(begun));
            pause.push(receipt.source.pause_us as f64 / 1e3);
            arm.push(receipt.source.arm_us as f64 / 1e3);
            stall.push(receipt.longest_stall_us as f64 / 1e3);
            self.store.remove(&taken, Removal::Plain)?;
        }
        self.add(format!("{load}: live, pause"), "ms", &pause);
        self.add(format!("{load}: live, of which arming"), "ms", &arm);
        self.add(format!("{load}: live, longest stall"), "ms", &stall);
        self.add(format!("{load}: live, durable"), "ms", &ready);
        brood.end()
    }

    fn chain(&mut self, tag: &str) -> Result<()> {
        let store = self.store.dir().to_path_buf();
        let mut parent = tag.to_string();
        for depth in 1..=DEPTH {
            let (brood, live) = self.source(&parent, "data += 1")?;
            let child = format!("{tag}.{depth}");
            live.client.diff(&store, &child, true)?;
            brood.end()?;
            if depth == 1 || depth == DEPTH / 2 || depth == DEPTH {
                self.load(&format!("load, depth {depth}"), &child)?;
            }
            parent = child;
        }
        Ok(())
    }

    fn print(&self) -> Result<()> {
        let header = ["measure", "unit", "samples", "p50", "p99", "max"];
        let cells = self.rows.iter().map(|row| {
            let number = |value: f64| format!("{value:.2}");
            vec![
                row.name.clone(),
                row.unit.to_string(),
                row.summary.count.to_string(),
                number(row.summary.p50),
                number(row.summary.p99),
                number(row.summary.max),
            ]
        });
        output::line(&output::table(&header, cells))
    }
}

fn ms(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1e3
}
