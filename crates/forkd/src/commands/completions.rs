//! `forkd completions`.

use std::process::ExitCode;

use anyhow::Result;
use clap_complete::Shell;

use crate::output;

/// Print shell completions
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd completions bash > /etc/bash_completion.d/forkd
  forkd completions zsh > \"${fpath[1]}/_forkd\"")]
pub struct Args {
    /// The shell
    shell: Shell,
}

impl Args {
    /// Runs the verb on the definition of the command line.
    ///
    /// # Errors
    /// Standard output can't be written.
    pub fn run(self, command: &mut clap::Command) -> Result<ExitCode> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, command, "forkd", &mut script);
        output::write_all(&script)?;
        Ok(ExitCode::SUCCESS)
    }
}
