//! `forkd branch`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};

use forkd_api::types::{SnapshotMode, SnapshotReceipt, SourcePause};
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
  forkd branch web --snapshot before-upgrade && forkd fork before-upgrade
  forkd branch web --snapshot hourly --mode live --no-wait")]
pub struct Args {
    /// Id, unique start of an id, or name
    #[arg(value_name = "VM")]
    vm: String,
    /// Keep the instant as a snapshot of this tag, written to disk, instead of running a branch
    #[arg(long, value_name = "TAG", conflicts_with_all = ["count", "name"])]
    snapshot: Option<String>,
    /// How the snapshot is taken: `fork` forks it off, and it writes itself while it can be forked already; `diff` forks
    /// a process that writes only what changed since the durable snapshot that the VM was forked from; `live`
    /// write-protects memory and copies it while the VM runs (for VMs of `forkd fork --memory memfd-shared`);
    /// `full` keeps the VM paused while all of its memory is copied
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
    /// By write protection.
    Live,
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
        BranchMode::Full | BranchMode::Live => {
            let mode =
                if mode == BranchMode::Full { SnapshotMode::Full } else { SnapshotMode::Live };
            let receipt = source.client.snapshot(&store, &tag, mode, wait);
            let receipt = receipt.with_context(|| format!("no snapshot {tag} was taken"))?;
            let durable = wait || mode == SnapshotMode::Full;
            let status = if durable { "durable" } else { "writing" };
            Ok(Kept { tag, status, receipt: Some(receipt), source: None })
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
            output::line(&format!("snapshot {} is {}", self.tag, self.status))?;
            if let Some(receipt) = &self.receipt {
                output::line(&told(receipt))?;
            }
            if let Some(pause) = &self.source {
                output::line(&format!("the VM stood still for {} us", pause.pause_us))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// What a snapshot cost, in a line.
fn told(receipt: &SnapshotReceipt) -> String {
    let us = |n: u64| output::duration(Duration::from_micros(n));
    let pause = &receipt.source;
    let mut text = format!("VM paused {} (quiesce {}", us(pause.pause_us), us(pause.quiesce_us));
    if pause.arm_us > 0 {
        text += &format!(
            ", save {}, fork {}, arm {})",
            us(pause.save_us),
            us(pause.fork_us),
            us(pause.arm_us)
        );
    } else {
        text += &format!(", save and copy {})", us(pause.save_us + pause.fork_us));
    }
    if receipt.bytes > 0 {
        text += &format!(
            ", {} copied, {} pages as they were written to, longest stall {}",
            output::bytes(receipt.bytes),
            receipt.pages_by_handler,
            us(receipt.longest_stall_us)
        );
    }
    if receipt.ready_us > 0 {
        text += &format!(", durable after {}", us(receipt.ready_us));
    }
    text
}
