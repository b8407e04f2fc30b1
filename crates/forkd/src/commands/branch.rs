//! `forkd branch`.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use forkd_api::types::{SnapshotMode, SnapshotReceipt, SourcePause};
use serde::Serialize;

use crate::cli::OutputArgs;
use crate::commands::fork::{ForkArgs, collapsed, fork};
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
  forkd branch web --snapshot hourly --mode live --no-wait
  forkd branch web --snapshot hourly --mode live --max-pause 3ms")]
pub struct Args {
    /// Id, unique start of an id, or name
    #[arg(value_name = "VM")]
    vm: String,
    /// Keep the instant as a snapshot of this tag, written to disk, instead of running a branch
    #[arg(long, value_name = "TAG", conflicts_with_all = ["count", "name"])]
    snapshot: Option<String>,
    /// How the snapshot is taken: `fork` forks it off, and it writes itself while it can be forked already; `diff` forks
    /// a process that writes only what changed since the last durable snapshot of the VM, or of what it was forked from;
    /// `live` write-protects memory and copies it while the VM runs (for VMs of `forkd fork --memory memfd-shared`);
    /// `full` keeps the VM paused while all of its memory is copied
    #[arg(long, value_name = "MODE", default_value = "fork", requires = "snapshot")]
    mode: BranchMode,
    /// How long the VM may stand still, as 800us, 2ms or 1.5s. If it would be longer by what is known of this VM, it is
    /// not paused at all, and the command fails with the estimate; mode `live` first does more ahead of the pause.
    /// A pause that turns out longer all the same (a busy host) is told on standard error, and is no failure
    #[arg(long, value_name = "TIME", value_parser = time)]
    max_pause: Option<Duration>,
    #[command(flatten)]
    fork: ForkArgs,
}

/// A time with its unit.
fn time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time: give a number and us, ms or s, as in 2ms");
    let at = text.find(|c: char| c.is_ascii_alphabetic()).ok_or_else(wrong)?;
    let (number, unit) = text.split_at(at);
    let seconds = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        _ => return Err(wrong()),
    };
    let number: f64 = number.trim().parse().map_err(|_| wrong())?;
    // A pause is counted in microseconds, and a VM that stands still for an hour has no limit.
    let time = Duration::try_from_secs_f64(number * seconds).map_err(|_| wrong())?;
    if (Duration::from_micros(1)..=Duration::from_secs(3600)).contains(&time) {
        Ok(time)
    } else {
        Err(format!("{text:?} is out of range: 1us to 3600s"))
    }
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
        let Live { record, client } = registry::vm(paths, &self.vm)?;
        let source = Live { record, client: client.within(self.max_pause) };
        if let Some(tag) = &self.snapshot {
            let wait = self.fork.waits();
            let kept = keep(paths, &source, tag, self.mode, wait)?;
            return kept.print(self.fork.output());
        }
        let forked = fork(paths, &source, &request)?;
        if let Some(pause) = &forked.pause {
            warn_if_exceeded(pause);
        }
        forked.print(self.fork.output())
    }
}

/// Tells that a pause was longer than it should have been. What was asked for is there, so it is no failure.
fn warn_if_exceeded(pause: &SourcePause) {
    if let Some(limit) = pause.max_pause_us.filter(|_| pause.exceeded) {
        let us = |n: u64| output::duration(Duration::from_micros(n));
        let (was, limit) = (us(pause.pause_us), us(limit));
        output::note(&format!(
            "forkd: the VM was paused for {was}, longer than --max-pause {limit}"
        ));
    }
}

/// What came of `--snapshot`.
#[derive(Debug, Serialize)]
struct Kept {
    tag: String,
    status: &'static str,
    /// What it cost the source. What a mode does not have is 0.
    receipt: SnapshotReceipt,
}

fn keep(paths: &Paths, source: &Live, tag: &str, mode: BranchMode, wait: bool) -> Result<Kept> {
    persist::require_free_tag(paths, tag)?;
    let store = persist::store_dir(paths)?;
    let begun = Instant::now();
    let of_fork = |source: SourcePause| {
        let ready_us = if wait { begun.elapsed().as_micros() as u64 } else { 0 };
        SnapshotReceipt { source, ready_us, ..SnapshotReceipt::default() }
    };
    let client = &source.client;
    let not_taken = || format!("no snapshot {tag} was taken");
    let receipt = match mode {
        BranchMode::Full => {
            client.snapshot(&store, tag, SnapshotMode::Full, wait).with_context(not_taken)?
        }
        BranchMode::Live => {
            client.snapshot(&store, tag, SnapshotMode::Live, wait).with_context(not_taken)?
        }
        BranchMode::Diff => {
            client.snapshot(&store, tag, SnapshotMode::Diff, wait).with_context(not_taken)?
        }
        BranchMode::Fork => {
            let answer = client.zygote(tag, &paths.snapshot(tag), false)?;
            let live = registry::snapshot(paths, tag)?;
            persist::save(paths, &live, wait)?;
            of_fork(answer.source.unwrap_or_default())
        }
    };
    let durable = wait || mode == BranchMode::Full;
    let status = if durable { "durable" } else { "writing" };
    Ok(Kept { tag: tag.to_string(), status, receipt })
}

impl Kept {
    fn print(&self, output: OutputArgs) -> Result<ExitCode> {
        if output.json {
            output::json(self)?;
        } else {
            output::line(&format!("snapshot {} is {}", self.tag, self.status))?;
            output::line(&told(&self.receipt))?;
        }
        warn_if_exceeded(&self.receipt.source);
        Ok(ExitCode::SUCCESS)
    }
}

/// What a snapshot cost, in a line.
fn told(receipt: &SnapshotReceipt) -> String {
    let us = |n: u64| output::duration(Duration::from_micros(n));
    let pause = &receipt.source;
    let mut text = format!("VM paused {} (quiesce {}", us(pause.pause_us), us(pause.quiesce_us));
    text += &format!(", save {}", us(pause.save_us));
    if pause.arm_us > 0 {
        text += &format!(", arm {}", us(pause.arm_us));
    }
    text += &format!(", fork or copy {})", us(pause.fork_us));
    text += &collapsed(pause);
    if receipt.prearm_us > 0 {
        let (ahead, again) = (us(receipt.prearm_us), receipt.pages_rearmed);
        text += &format!(", memory protected ahead in {ahead} and {again} pages of it again");
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        for (text, us) in [("2ms", 2000), ("800us", 800), ("1.5s", 1_500_000), ("0.25ms", 250)] {
            assert_eq!(time(text), Ok(Duration::from_micros(us)), "{text}");
        }
        for bad in
            ["", "2", "ms", "2m", "-2ms", "2 parsecs", "1e400s", "NaNs", "0ms", "0.1us", "2h"]
        {
            let error = time(bad).expect_err(bad);
            assert!(error.contains(&format!("{bad:?}")), "{error}");
        }
        assert!(time("3601s").expect_err("too long").contains("out of range"));
    }
}
