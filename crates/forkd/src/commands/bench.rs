//! `forkd bench`: what forks cost on this host.

mod branch;
mod floor;
mod measure;
mod stats;

use std::process::ExitCode;

use anyhow::{Context, Result};
use forkd_api::types::{KernelMode, Timing};
use forkd_vm::Host;
use serde::Serialize;

use crate::cleanup::{self, Guard};
use crate::cli::OutputArgs;
use crate::commands::bench_floor::{Floor, Kind};
use crate::commands::image::{self, PYTHON};
use crate::commands::info::kernel_mode_name;
use crate::commands::snapshot::{Created, Plan, Warm, create, where_it_went};
use crate::paths::Paths;
use crate::process_memory::Anonymous;
use crate::progress::Step;
use crate::registry::{self, Live};
use crate::{id, output};

use measure::Measures;
use stats::{Samples, Summary};

/// numpy in use, as the measures want it: an array of 8 MiB that children inherit.
const WARM: &str = "import numpy as np\ndata = np.arange(1 << 20, dtype=np.float64)\ndata.sum()\n";

/// Measure what forks cost on this host
///
/// Boots and warms a VM, forks and branches it in many ways, and prints medians and 99th percentiles beside the
/// floor: fork(2) of a process with as much resident memory, and making a KVM VM.
#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:
  forkd bench
  forkd bench branch
  forkd bench --rounds 100 --json > bench.json
  forkd bench --snapshot py --children 20"
)]
pub struct Args {
    #[command(subcommand)]
    verb: Option<Verb>,
    /// Snapshot to fork; by default one is made for this, and removed
    #[arg(long, value_name = "TAG")]
    snapshot: Option<String>,
    /// Image of the snapshot that is made
    #[arg(long, default_value = PYTHON, conflicts_with = "snapshot")]
    image: String,
    /// Its RAM in MiB
    #[arg(long, default_value_t = 512, value_name = "MIB", conflicts_with = "snapshot")]
    mem: u64,
    /// Its vCPUs
    #[arg(long, default_value_t = 1, value_name = "N", conflicts_with = "snapshot")]
    vcpus: u64,
    /// How often each thing is measured
    #[arg(long, default_value_t = 50, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rounds: u32,
    /// Children of the measure of many at once
    #[arg(long, default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    children: u32,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    Branch(branch::Args),
}

/// One measure, as told.
#[derive(Debug, Serialize)]
pub struct Row {
    name: String,
    unit: &'static str,
    #[serde(flatten)]
    summary: Summary,
    /// p50 over the floor's p50.
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio_to_floor: Option<f64>,
    /// What p50 must reach on the PVM hosts that forkd is developed on.
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<&'static str>,
}

#[derive(Debug, Serialize)]
struct Report {
    kvm: &'static str,
    /// How the guests' kernel mode runs.
    kernel_mode: Option<KernelMode>,
    kernel: String,
    cpus: usize,
    vcpus: u8,
    mem_mib: u32,
    resident: Anonymous,
    rounds: u32,
    /// Time marks of the cold boot, if there was one.
    boot: Option<Timing>,
    measures: Vec<Row>,
}

impl Args {
    /// Runs the verb.
    ///
    /// # Errors
    /// Something could not be measured. What was made for it is gone.
    pub fn run(self, paths: &Paths) -> Result<ExitCode> {
        if let Some(Verb::Branch(branch)) = self.verb {
            return branch.run(paths);
        }
        let quiet = self.output.json;
        if self.snapshot.is_none() && self.image == PYTHON {
            image::build(paths, &forkd_image::Recipe::python()?, Some(PYTHON), quiet)?;
        }
        cleanup::watch_signals().context("cannot watch signals")?;
        let made = match &self.snapshot {
            Some(_) => None,
            None => Some(self.make_snapshot(paths)?),
        };
        let created = made.as_ref().map(|(created, _)| created);
        let tag = self.snapshot.as_deref().or(created.map(|c| c.tag.as_str())).unwrap_or_default();
        let source = registry::snapshot(paths, tag)?;
        let report = self.measure(paths, &source, created)?;
        drop(made);
        if quiet {
            output::json(&report)?;
        } else {
            report.print()?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Makes a snapshot that is removed with the guard.
    fn make_snapshot(&self, paths: &Paths) -> Result<(Created, Guard)> {
        let tag = format!("bench-{}", id::new()?.trim_start_matches("vm-"));
        let created = create(
            paths,
            &Plan {
                tag: tag.clone(),
                image: self.image.clone(),
                vcpus: self.vcpus,
                mem_mib: self.mem,
                warm: Some(Warm { name: "<bench>".to_string(), code: WARM.to_string() }),
                disks: Vec::new(),
                kernel: None,
                cmdline: String::new(),
                boot_timeout_s: None,
                quiet: self.output.json,
            },
        )?;
        let live = registry::snapshot(paths, &tag)?;
        let guard = Guard::new(move || {
            if let Err(e) = live.client.stop(live.record.pid) {
                output::note(&format!("forkd: {}", output::error_line(&e)));
            }
        });
        Ok((created, guard))
    }

    fn measure(&self, paths: &Paths, source: &Live, created: Option<&Created>) -> Result<Report> {
        let record = &source.record;
        let resident = Anonymous::of(record.pid)?;
        let step = Step::begin("floor: fork(2) and a bare KVM VM", self.output.json);
        let floor = floor::of(Kind::Child, record, resident, self.rounds)?;
        step.done("");
        let measures =
            Measures::take(paths, source, self.rounds, self.children as usize, self.output.json)?;
        let mode = source.client.info()?.kernel_mode;
        let emulated = mode == Some(KernelMode::PvmEmulated);
        Ok(Report {
            kvm: Host::open()?.flavour().name(),
            kernel_mode: mode,
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            vcpus: record.vcpus,
            mem_mib: record.mem_mib,
            resident,
            rounds: self.rounds,
            boot: created.map(|c| c.boot),
            measures: rows(&floor, &measures, created, emulated),
        })
    }
}

/// What each measure must reach: where guests' kernel mode is emulated, and where it runs on the CPU. From the issues that
/// asked for it, for two-core hosts and 512 MiB.
const BARS: &[(&str, &str, &str)] = &[
    ("cold boot to agent", "20 s", "1.5 s"),
    ("boot and warm", "50 s", "3 s"),
    ("source pause", "2 ms, p99 6 ms", "0.9 ms, p99 1.1 ms"),
    ("fork to vCPUs running", "2 x floor", "1.7 x floor"),
    ("fork to agent answering", "-", "8 ms"),
    ("fork to eval answering", "-", "12 ms"),
    ("100 children to all agents answering", "-", "1 s"),
    ("100 children to all evaluated", "8 s", "-"),
    ("sustained with an eval", "-", "150"),
    ("USS before first eval", "2 MiB", "1.5 MiB"),
    ("USS after first eval", "6 MiB", "1.9 MiB"),
];

fn rows(floor: &Floor, measures: &Measures, created: Option<&Created>, emulated: bool) -> Vec<Row> {
    let ms = |ns: &[u64]| ns.iter().map(|n| *n as f64 / 1e6).collect::<Samples>();
    let total = ms(&floor.total_ns);
    let floor_p50 = total.summary().map(|s| s.p50);
    let mut rows = Vec::new();
    let mut add = |name: &str, unit, samples: &Samples, to_floor: bool| {
        if let Some(summary) = samples.summary() {
            let ratio_to_floor =
                floor_p50.filter(|f| to_floor && *f > 0.0).map(|f| summary.p50 / f);
            let bar = BARS.iter().find(|(of, ..)| *of == name);
            let target = bar.map(|(_, slow, quick)| if emulated { *slow } else { *quick });
            rows.push(Row { name: name.to_string(), unit, summary, ratio_to_floor, target });
        }
    };
    let boot = created.map(|c| c.boot_ms as f64 / 1e3).into_iter().collect();
    add("cold boot to agent", "s", &boot, false);
    let warm = created.map(|c| (c.boot_ms + c.warm_ms) as f64 / 1e3).into_iter().collect();
    add("boot and warm", "s", &warm, false);
    add("floor: fork(2)", "ms", &ms(&floor.fork_ns), false);
    add("floor: KVM VM", "ms", &ms(&floor.kvm_ns), false);
    add("floor: both", "ms", &total, true);
    add("source pause", "ms", &measures.pause_ms, true);
    add("fork to vCPUs running", "ms", &measures.running_ms, true);
    add("fork to agent answering", "ms", &measures.ready_ms, true);
    add("fork to eval answering", "ms", &measures.answer_ms, true);
    add("branch to vCPUs running", "ms", &measures.branch_ms, true);
    let many = measures.many;
    add(&format!("{many} children to all agents answering"), "s", &measures.many_ready_s, false);
    add(&format!("{many} children to all evaluated"), "s", &measures.many_s, false);
    add("sustained", "children/s", &measures.per_second, false);
    add("sustained with an eval", "children/s", &measures.evaluated_per_second, false);
    add("PSS before first eval", "MiB", &measures.pss_before, false);
    add("PSS after first eval", "MiB", &measures.pss_after, false);
    add("USS before first eval", "MiB", &measures.uss_before, false);
    add("USS after first eval", "MiB", &measures.uss_after, false);
    rows
}

impl Report {
    fn print(&self) -> Result<()> {
        output::line(&format!(
            "{}, kernel mode {}, Linux {}, {} CPUs; guest: {} vCPU, {} MiB, resident {} in huge and {} in small pages",
            self.kvm,
            self.kernel_mode.map_or("unknown", kernel_mode_name),
            self.kernel,
            self.cpus,
            self.vcpus,
            self.mem_mib,
            output::bytes(self.resident.huge),
            output::bytes(self.resident.small)
        ))?;
        if let Some(boot) = &self.boot {
            output::line(&format!("the cold boot's time went into: {}", where_it_went(boot)))?;
        }
        let header = ["measure", "unit", "samples", "p50", "p99", "max", "x floor", "must reach"];
        let cells = self.measures.iter().map(|row| {
            vec![
                row.name.clone(),
                row.unit.to_string(),
                row.summary.count.to_string(),
                format!("{:.2}", row.summary.p50),
                format!("{:.2}", row.summary.p99),
                format!("{:.2}", row.summary.max),
                row.ratio_to_floor.map_or("-".to_string(), |r| format!("{r:.2}")),
                row.target.unwrap_or("-").to_string(),
            ]
        });
        output::line(&output::table(&header, cells))
    }
}
