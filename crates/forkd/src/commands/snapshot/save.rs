//! `forkd snapshot save`.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::cli::OutputArgs;
use crate::paths::Paths;
use crate::{cleanup, output, persist, registry};

/// Make a live snapshot durable
///
/// The snapshot writes itself to disk, in the background of what it does: it can be forked meanwhile. From then on
/// it outlives a restart of the host, and `forkd fork` loads it when it is not in memory.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd snapshot save py
  forkd snapshot save py --no-wait")]
pub struct Args {
    /// Tag
    tag: String,
    /// Return once the writing has begun: `forkd snapshot ls` tells when it is durable, or why it failed
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Serialize)]
struct Saved {
    tag: String,
    status: &'static str,
    elapsed_us: u64,
}

impl Args {
    /// Runs the verb.
    ///
    /// # Errors
    /// There is no such live snapshot, it is durable already, or writing failed.
    pub fn run(self, paths: &Paths) -> Result<ExitCode> {
        cleanup::watch_signals().context("cannot watch signals")?;
        let live = match registry::snapshot(paths, &self.tag) {
            Err(_) if persist::is_durable(paths, &self.tag)? => {
                bail!("snapshot {} is on the disk already, and not in memory", self.tag)
            }
            live => live?,
        };
        let begun = Instant::now();
        persist::save(paths, &live, !self.no_wait)?;
        let status = if self.no_wait { "writing" } else { "durable" };
        if self.output.json {
            let elapsed_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
            output::json(&Saved { tag: self.tag, status, elapsed_us })?;
        } else {
            output::line(&format!("snapshot {} is {status}", self.tag))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
