//! `forkd snapshot compact`.

use std::process::ExitCode;

use anyhow::Result;
use forkd_snapshot::{Digest, Info};
use serde::Serialize;

use crate::cli::OutputArgs;
use crate::paths::Paths;
use crate::progress::Step;
use crate::{durable, output};

/// Write a flat snapshot in the place of a diff
///
/// It needs no parents afterwards, and takes one mapping to run. Its content stays the same, and what are diffs over
/// it go on. The chain is verified on the way. One that is flat is left as it is.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd snapshot compact py-2
  forkd snapshot compact py-2 --json")]
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
    /// False if it was flat.
    compacted: bool,
    root: Digest,
    /// The parents that it does not need any more, the nearest first.
    freed_of: Vec<String>,
    disk_bytes_before: u64,
    disk_bytes: u64,
}

impl Args {
    /// Runs the verb.
    ///
    /// # Errors
    /// No such snapshot, its chain is damaged, or the disk is full. Then it is as it was.
    pub fn run(self, paths: &Paths) -> Result<ExitCode> {
        let store = durable::store_for(paths, &self.tag)?;
        let info = || store.info(&self.tag).map_err(|e| durable::explain(paths, e));
        let before = info()?;
        if before.parents.is_empty() {
            return self.done(&before, before.clone());
        }
        let depth = before.parents.len() + 1;
        let step = Step::begin(&format!("compact {}, {depth} layers", self.tag), self.output.json);
        store.compact(&self.tag).map_err(|e| durable::explain(paths, e))?;
        step.done("");
        self.done(&before, info()?)
    }

    fn done(&self, before: &Info, after: Info) -> Result<ExitCode> {
        let answer = Answer {
            tag: self.tag.clone(),
            compacted: !before.parents.is_empty(),
            root: after.manifest.root,
            freed_of: before.parents.clone(),
            disk_bytes_before: before.disk_bytes,
            disk_bytes: after.disk_bytes,
        };
        if self.output.json {
            output::json(&answer)?;
        } else if answer.compacted {
            output::line(&format!(
                "snapshot {} is flat: {} on disk, {} before; it does not need {} any more",
                answer.tag,
                output::bytes(answer.disk_bytes),
                output::bytes(answer.disk_bytes_before),
                answer.freed_of.join(", ")
            ))?;
        } else {
            output::line(&format!("snapshot {} was flat already", answer.tag))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
