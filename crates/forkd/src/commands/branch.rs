//! `forkd branch`.

use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::commands::fork::{ForkArgs, fork};
use crate::paths::Paths;
use crate::{cleanup, registry};

/// Fork a running VM where it stands
///
/// The VM goes on after a pause of a few milliseconds; its branches start from the same instant, with copies of
/// its memory, processes and disks, and an identity of their own.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd branch vm-7k2m9x4qpa
  forkd branch web -n 3 --name try --json")]
pub struct Args {
    /// Id, unique start of an id, or name
    #[arg(value_name = "VM")]
    vm: String,
    #[command(flatten)]
    fork: ForkArgs,
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
        fork(paths, &source, &request)?.print(self.fork.output())
    }
}
