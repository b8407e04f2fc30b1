//! `forkd kill`.

use std::process::ExitCode;

use anyhow::{Result, bail};
use serde::Serialize;

use crate::cli::OutputArgs;
use crate::paths::Paths;
use crate::registry::Live;
use crate::{output, parallel, registry};

/// End VMs and remove what they had
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd kill vm-7k2m9x4qpa web
  forkd kill --all

Snapshots stay; `forkd snapshot rm` removes those.")]
pub struct Args {
    /// Ids, unique starts of ids, or names
    #[arg(value_name = "VM", required_unless_present = "all", conflicts_with = "all")]
    vms: Vec<String>,
    /// All running VMs
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// What became of one VM.
#[derive(Debug, Serialize)]
struct Outcome {
    id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl Args {
    /// Runs the verb.
    ///
    /// # Errors
    /// A VM is not there (then none is ended), or can't be ended.
    pub fn run(self, paths: &Paths) -> Result<ExitCode> {
        let mut doomed: Vec<Live> = Vec::new();
        if self.all {
            doomed = registry::vms(paths)?;
        }
        for reference in &self.vms {
            let live = registry::vm(paths, reference)?;
            if doomed.iter().all(|l| l.record.id != live.record.id) {
                doomed.push(live);
            }
        }
        let outcomes = end_all(&doomed);
        if self.output.json {
            output::json(&outcomes)?;
        } else {
            for outcome in outcomes.iter().filter(|o| o.error.is_none()) {
                output::line(&outcome.id)?;
            }
        }
        let failed: Vec<&str> = outcomes.iter().filter_map(|o| o.error.as_deref()).collect();
        if !failed.is_empty() {
            bail!(
                "{} of {} VMs could not be ended: {}",
                failed.len(),
                outcomes.len(),
                failed.join("; ")
            );
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn end_all(doomed: &[Live]) -> Vec<Outcome> {
    parallel::map(doomed, |live| Outcome {
        id: live.record.id.clone(),
        error: live.client.stop(live.record.pid).err().map(|e| output::error_line(&e)),
    })
}
