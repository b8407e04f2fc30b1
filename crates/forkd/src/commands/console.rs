//! `forkd console`.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use forkd_sys::fork::PidFd;

use crate::paths::Paths;
use crate::{output, registry};

/// How often the log is looked at while following. A log file has no readiness to wait for; the wait itself is
/// on the VM's process, so its end is seen at once.
const POLL: Duration = Duration::from_millis(100);
const CHUNK: usize = 64 << 10;

/// Show what a VM wrote to its serial console
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd console vm-7k2m9x4qpa
  forkd console web -f
  forkd console --snapshot py")]
pub struct Args {
    /// Id, unique start of an id, or name
    #[arg(value_name = "VM")]
    vm: String,
    /// Go on with what it writes, until it ends
    #[arg(short, long)]
    follow: bool,
    /// VM is the tag of a snapshot
    #[arg(long)]
    snapshot: bool,
}

impl Args {
    /// Runs the verb.
    ///
    /// # Errors
    /// No such VM, or its log can't be read.
    pub fn run(self, paths: &Paths) -> Result<ExitCode> {
        let live = if self.snapshot {
            registry::snapshot(paths, &self.vm)?
        } else {
            registry::vm(paths, &self.vm)?
        };
        let path = live.client.console();
        let failed = || format!("cannot read {}", path.display());
        let mut log = File::open(&path).with_context(failed)?;
        let process = PidFd::open(live.record.pid).ok();
        loop {
            copy(&mut log).with_context(failed)?;
            let Some(process) = process.as_ref().filter(|_| self.follow) else { break };
            let ended = process.wait(Some(POLL)).context("cannot wait for the VM")?;
            // Shortened: the VM has dropped the older part of its bounded log.
            let shrunk = log.metadata().with_context(failed)?.size() < log.stream_position()?;
            if shrunk {
                log.seek(SeekFrom::Start(0)).with_context(failed)?;
            }
            if ended {
                copy(&mut log).with_context(failed)?;
                break;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn copy(log: &mut File) -> Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        match log.read(&mut chunk)? {
            0 => return Ok(()),
            count => output::write_all(&chunk[..count])?,
        }
    }
}
