//! fork() for microVMs: the command line, and the part of it that is a library.
//!
//! One file per verb under `commands`. Verbs share: [`paths`] (where things are), `registry` (what
//! lives), `durable` (what is on the disk), `vm_client` (talk to a VM process), `guest` (talk to the
//! agent in it), `boot` (start one), `cleanup` (leave nothing behind), `output` and `progress`.
//!
//! Programs that start VMs of their own use [`restore`]: [`Snapshot::open`], [`Snapshot::restore_many_with`].
//!
//! `forkd vm` is the VM process itself. It is dispatched before anything else happens here: it forks, so it
//! must not inherit a thread.

mod assets;
mod boot;
mod cleanup;
mod cli;
mod commands;
mod durable;
mod guest;
mod host;
mod id;
mod output;
mod parallel;
pub mod paths;
mod persist;
mod process_memory;
mod progress;
mod registry;
pub mod restore;
mod vm_client;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

pub use paths::Paths;
pub use restore::{ForkOptions, Limits, RestoreError, Restored, Snapshot};

/// Status for a command line that can't be understood, as the shell's builtins have it.
const USAGE: u8 = 2;

/// The program: acts on the command line of this process.
pub fn run() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|verb| verb == "vm") {
        return commands::vm::run();
    }
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            return finish(
                output::print(&e.render().ansi().to_string()).map(|()| ExitCode::SUCCESS),
            );
        }
        Err(e) if e.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            output::write_stderr(e.render().ansi().to_string().as_bytes());
            return ExitCode::from(USAGE);
        }
        Err(e) => {
            output::note(&format!("forkd: {}", cli::one_line(&e)));
            return ExitCode::from(USAGE);
        }
    };
    finish(cli.run())
}

fn finish(result: anyhow::Result<ExitCode>) -> ExitCode {
    cleanup::yield_to_signal();
    match result {
        Ok(code) => code,
        Err(error) if error.is::<output::ReaderGone>() => ExitCode::SUCCESS,
        Err(error) => {
            output::note(&format!("forkd: {}", output::error_line(&error)));
            ExitCode::FAILURE
        }
    }
}
