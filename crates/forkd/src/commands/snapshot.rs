//! `forkd snapshot create|ls|rm|info`.

mod create;
mod save;

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Subcommand;
use serde::Serialize;

pub use create::{Created, Plan, Warm, create, where_it_went};

use crate::cli::OutputArgs;
use crate::commands::info::Report;
use crate::paths::Paths;
use crate::process_memory::ProcessMemory;
use crate::{output, parallel, registry};

/// Make, list and remove warm snapshots
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Create(create::Args),
    Save(save::Args),
    Ls(Ls),
    Rm(Rm),
    Info(Info),
}

/// List snapshots
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd snapshot ls
  forkd snapshot ls --json")]
struct Ls {
    #[command(flatten)]
    output: OutputArgs,
}

/// Remove snapshots
///
/// VMs that were forked from them live on.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd snapshot rm py
  forkd snapshot rm --all")]
struct Rm {
    /// Tags
    #[arg(value_name = "TAG", required_unless_present = "all", conflicts_with = "all")]
    tags: Vec<String>,
    /// All snapshots
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// Show all about a snapshot
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd snapshot info py
  forkd snapshot info py --json")]
struct Info {
    /// Tag
    tag: String,
    #[command(flatten)]
    output: OutputArgs,
}

impl Args {
    /// Runs the verb.
    ///
    /// # Errors
    /// What could not be done to which snapshot.
    pub fn run(self, paths: &Paths) -> Result<ExitCode> {
        match self.verb {
            Verb::Create(create) => create.run(paths),
            Verb::Save(save) => save.run(paths),
            Verb::Ls(ls) => ls.run(paths),
            Verb::Rm(rm) => rm.run(paths),
            Verb::Info(info) => {
                Report::of(&registry::snapshot(paths, &info.tag)?)?.print(info.output)?;
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

/// A line of the list.
#[derive(Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    record: forkd_api::types::VmRecord,
    memory: Option<ProcessMemory>,
}

impl Ls {
    fn run(self, paths: &Paths) -> Result<ExitCode> {
        let snapshots = registry::snapshots(paths)?;
        let rows = parallel::map(&snapshots, |live| Row {
            record: live.record.clone(),
            memory: ProcessMemory::of(live.record.pid).ok(),
        });
        if self.output.json {
            output::json(&rows)?;
        } else if rows.is_empty() {
            output::line("no snapshots; `forkd snapshot create TAG` makes one")?;
        } else {
            let header = ["tag", "image", "vcpus", "mem", "age", "pid", "pss"];
            let cells = rows.iter().map(|row| {
                vec![
                    row.record.id.clone(),
                    row.record.image.clone(),
                    row.record.vcpus.to_string(),
                    format!("{} MiB", row.record.mem_mib),
                    output::age(row.record.created_unix_ms),
                    row.record.pid.to_string(),
                    row.memory.as_ref().map_or("-".to_string(), |m| output::bytes(m.pss)),
                ]
            });
            output::line(&output::table(&header, cells))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// What became of one snapshot.
#[derive(Debug, Serialize)]
struct Outcome {
    tag: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl Rm {
    fn run(self, paths: &Paths) -> Result<ExitCode> {
        let mut doomed = if self.all { registry::snapshots(paths)? } else { Vec::new() };
        for tag in &self.tags {
            let live = registry::snapshot(paths, tag)?;
            if doomed.iter().all(|l| l.record.id != live.record.id) {
                doomed.push(live);
            }
        }
        let outcomes = parallel::map(&doomed, |live| Outcome {
            tag: live.record.id.clone(),
            error: live.client.stop(live.record.pid).err().map(|e| output::error_line(&e)),
        });
        if self.output.json {
            output::json(&outcomes)?;
        } else {
            for outcome in outcomes.iter().filter(|o| o.error.is_none()) {
                output::line(&outcome.tag)?;
            }
        }
        let failed: Vec<&str> = outcomes.iter().filter_map(|o| o.error.as_deref()).collect();
        if !failed.is_empty() {
            bail!(
                "{} of {} snapshots could not be removed: {}",
                failed.len(),
                outcomes.len(),
                failed.join("; ")
            );
        }
        Ok(ExitCode::SUCCESS)
    }
}
