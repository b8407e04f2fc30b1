//! `forkd snapshot create|save|ls|rm|info|verify|compact`.

mod compact;
mod create;
mod info;
mod ls;
mod rm;
mod save;
mod trial;
mod verify;

use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;

pub use create::{Created, Plan, Warm, create, where_it_went};

use crate::paths::Paths;

/// Make, list, check and remove warm snapshots
///
/// A live snapshot is a process that holds its memory: forks of it take milliseconds. A durable one is on the
/// disk and outlives the host's restart. The same tag may be both.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Create(create::Args),
    Save(save::Args),
    Ls(ls::Args),
    Rm(rm::Args),
    Info(info::Args),
    Verify(verify::Args),
    Compact(compact::Args),
}

impl Args {
    /// Runs the verb.
    ///
    /// # Errors
    /// What could not be done to which snapshot.
    pub fn run(self, paths: &Paths) -> Result<ExitCode> {
        match self.verb {
            Verb::Create(args) => args.run(paths),
            Verb::Save(args) => args.run(paths),
            Verb::Ls(args) => args.run(paths),
            Verb::Rm(args) => args.run(paths),
            Verb::Info(args) => args.run(paths),
            Verb::Verify(args) => args.run(paths),
            Verb::Compact(args) => args.run(paths),
        }
    }
}
