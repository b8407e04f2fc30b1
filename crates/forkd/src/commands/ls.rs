//! `forkd ls`.

use std::process::ExitCode;

use anyhow::Result;
use forkd_api::types::{VmPhase, VmRecord};
use serde::Serialize;

use crate::cli::OutputArgs;
use crate::paths::Paths;
use crate::process_memory::ProcessMemory;
use crate::registry::Live;
use crate::{output, parallel, registry};

/// List running VMs
#[derive(Debug, clap::Args)]
#[command(
    visible_alias = "ps",
    after_help = "Examples:
  forkd ls
  forkd ls --json | jq -r '.[].id'"
)]
pub struct Args {
    /// Print ids only
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// A line of the list.
#[derive(Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    record: VmRecord,
    /// None if it does not answer.
    phase: Option<VmPhase>,
    memory: Option<ProcessMemory>,
}

impl Args {
    /// Runs the verb.
    ///
    /// # Errors
    /// The run directory can't be read.
    pub fn run(self, paths: &Paths) -> Result<ExitCode> {
        let vms = registry::vms(paths)?;
        if self.quiet {
            for live in &vms {
                output::line(&live.record.id)?;
            }
            return Ok(ExitCode::SUCCESS);
        }
        let rows = parallel::map(&vms, row);
        if self.output.json {
            output::json(&rows)?;
        } else if rows.is_empty() {
            output::line("no VM runs; `forkd fork TAG` forks one from a snapshot")?;
        } else {
            let header = ["id", "name", "phase", "from", "age", "pid", "rss", "uss"];
            output::line(&output::table(&header, rows.iter().map(Row::cells)))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// A VM may end at any time: what can't be had any more is left out.
fn row(live: &Live) -> Row {
    Row {
        record: live.record.clone(),
        phase: live.client.info().ok().map(|info| info.phase),
        memory: ProcessMemory::of(live.record.pid).ok(),
    }
}

impl Row {
    fn cells(&self) -> Vec<String> {
        let record = &self.record;
        let bytes = |of: fn(&ProcessMemory) -> u64| {
            self.memory.as_ref().map_or("-".to_string(), |m| output::bytes(of(m)))
        };
        vec![
            record.id.clone(),
            record.name.clone(),
            self.phase.map_or("no answer", phase_name).to_string(),
            record.parent.clone().unwrap_or_else(|| record.image.clone()),
            output::age(record.created_unix_ms),
            record.pid.to_string(),
            bytes(|m| m.rss),
            bytes(|m| m.uss),
        ]
    }
}

/// A phase in words.
pub fn phase_name(phase: VmPhase) -> &'static str {
    match phase {
        VmPhase::Starting => "starting",
        VmPhase::Ready => "ready",
        VmPhase::Paused => "paused",
        VmPhase::Zygote => "zygote",
        VmPhase::Failed => "failed",
    }
}
