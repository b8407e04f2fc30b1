//! `forkd snapshot verify`.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use forkd_snapshot::Verified;
use serde::Serialize;

use crate::cli::OutputArgs;
use crate::paths::Paths;
use crate::{durable, output};

/// Read all of a durable snapshot and compare it with its hashes
///
/// Its parents are read as well. If something is damaged, the status is 1 and the message names the file and the
/// block.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd snapshot verify py
  forkd snapshot verify py --json")]
pub struct Args {
    /// Tag
    tag: String,
    #[command(flatten)]
    output: OutputArgs,
}

/// The answer.
#[derive(Debug, Serialize)]
struct Answer {
    tag: String,
    #[serde(flatten)]
    verified: Verified,
    took_us: u64,
}

impl Args {
    /// Runs the verb.
    ///
    /// # Errors
    /// No such snapshot, or it is damaged: names the file and the block.
    pub fn run(self, paths: &Paths) -> Result<ExitCode> {
        let store = durable::store_for(paths, &self.tag)?;
        let begun = Instant::now();
        let verified = store.verify(&self.tag).map_err(|e| durable::explain(paths, e))?;
        let took = begun.elapsed();
        if self.output.json {
            let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
            output::json(&Answer { tag: self.tag, verified, took_us })?;
        } else {
            let Verified { layers, blocks, bytes } = verified;
            output::line(&format!(
                "snapshot {} is intact: {layers} {}, {blocks} blocks, {} checked in {}",
                self.tag,
                if layers == 1 { "layer" } else { "layers" },
                output::bytes(bytes),
                output::duration(took)
            ))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
