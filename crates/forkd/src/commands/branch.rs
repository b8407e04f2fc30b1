//! `forkd branch`.

use std::process::ExitCode;

use anyhow::{Context, Result};

use forkd_api::types::{SnapshotReceipt, SourcePause};
use serde::Serialize;

use crate::cli::OutputArgs;
use crate::commands::fork::{ForkArgs, fork};
use crate::paths::Paths;
use crate::registry::Live;
use crate::{cleanup, output, persist, registry};

/// Fork a running VM where it stands
///
/// The VM goes on after a pause of a few milliseconds; its branches start from the same instant, with copies of
/// its memory, processes and disks, and an identity of their own.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd branch vm-7k2m9x4qpa
  forkd branch web -n 3 --name try --json
  forkd branch web --snapshot before-upgrade && forkd fork before-upgrade")]
pub struct Args {
    /// Id, unique start of an id, or name
    #[arg(value_name = "VM")]
    vm: String,
    /// Keep the instant as a snapshot of this tag, written to disk, instead of running a branch
    #[arg(long, value_name = "TAG", conflicts_with_all = ["count", "name"])]
    snapshot: Option<String>,
    /// How the snapshot is taken: `fork` forks it off, and it writes itself while it can be forked already; `full`
    /// keeps the VM paused while all of its memory is copied; `diff` forks
    /// a process that writes only what changed since the durable snapshot that the VM was forked from
    #[arg(long, value_name = "MODE", default_value = "fork", requires = "snapshot")]
    mode: BranchMode,
    #[command(flatten)]
    fork: ForkArgs,
}

/// How a snapshot of a running VM is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum BranchMode {
    /// By fork(2).
    Fork,
    /// By copying.
    Full,
    /// By fork(2), of what changed since the durable snapshot that the VM came from.
    Diff,
}

impl Args {
    /// Runs the verb.
    ///
    /// # Errors
    /// The request as a whole failed; branches that failed are told one by one.
    pub fn run(self, paths: &Paths) -> Result<ExitCode> {
        let request = self.fork.request()?;
        cleanup::watch_signals().context("cannot watch signals")?;
        let source = registry::vm(paths, &self.vm)?;
        if let Some(tag) = &self.snapshot {
            let wait = self.fork.waits();
            let kept = keep(paths, &source, tag, self.mode, wait)?;
            return kept.print(self.fork.output());
        }
        fork(paths, &source, &request)?.print(self.fork.output())
    }
}

/// What came of `--snapshot`.
#[derive(Debug, Serialize)]
struct Kept {
    tag: String,
    status: &'static str,
    /// What it cost the source, where that is measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    receipt: Option<SnapshotReceipt>,
    /// The same of mode `diff`.
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<SourcePause>,
}

fn keep(paths: &Paths, source: &Live, tag: &str, mode: BranchMode, wait: bool) -> Result<Kept> {
    persist::require_free_tag(paths, tag)?;
    let store = persist::store_dir(paths)?;
    let tag = tag.to_string();
    match mode {
        BranchMode::Full => {
            let receipt = source.client.snapshot(&store, &tag);
            let receipt = receipt.with_context(|| format!("no snapshot {tag} was taken"))?;
            Ok(Kept { tag, status: "durable", receipt: Some(receipt), source: None })
        }
        BranchMode::Diff => {
            let source = source.client.diff(&store, &tag, wait);
            let source = source.with_context(|| format!("no snapshot {tag} was taken"))?;
            let status = if wait { "durable" } else { "writing" };
            Ok(Kept { tag, status, receipt: None, source })
        }
        BranchMode::Fork => {
            source.client.zygote(&tag, &paths.snapshot(&tag), false)?;
            let live = registry::snapshot(paths, &tag)?;
            persist::save(paths, &live, wait)?;
            let status = if wait { "durable" } else { "writing" };
            Ok(Kept { tag, status, receipt: None, source: None })
        }
    }
}

impl Kept {
    fn print(&self, output: OutputArgs) -> Result<ExitCode> {
        if output.json {
            output::json(self)?;
        } else {
            let pause = self
                .receipt
                .map(|r| r.source)
                .or(self.source)
                .map(|s| format!(", the VM stood still for {} us", s.pause_us));
            output::line(&format!(
                "snapshot {} is {}{}",
                self.tag,
                self.status,
                pause.unwrap_or_default()
            ))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
