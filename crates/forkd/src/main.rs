//! fork() for microVMs: the command line.
//!
//! One file per verb under [`commands`]. Verbs share: [`paths`] (where things are), [`registry`] (what
//! lives), [`vm_client`] (talk to a VM process), [`guest`] (talk to the agent in it), [`boot`] (start one),
//! [`cleanup`] (leave nothing behind), [`output`] and [`progress`].
//!
//! `forkd vm` is the VM process itself. It is dispatched before anything else happens here: it forks, so it
//! must not inherit a thread.

mod assets;
mod boot;
mod cleanup;
mod cli;
mod commands;
mod guest;
mod host;
mod id;
mod output;
mod parallel;
mod paths;
mod process_memory;
mod progress;
mod registry;
mod vm_client;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

/// Status for a command line that can't be understood, as the shell's builtins have it.
const USAGE: u8 = 2;

fn main() -> ExitCode {
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
    match result {
        Ok(code) => code,
        Err(error) if error.is::<output::ReaderGone>() => ExitCode::SUCCESS,
        Err(error) => {
            cleanup::yield_to_signal();
            output::note(&format!("forkd: {}", message(&error)));
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes, in one line. A cause that the text before it ends with is not told twice.
fn message(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    let line: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    line.join(" ")
}

#[cfg(test)]
mod tests {
    use super::message;

    #[test]
    fn messages_are_one_line_and_tell_no_cause_twice() {
        let error =
            anyhow::anyhow!("no such\n  file").context("cannot open a").context("cannot boot");
        assert_eq!(message(&error), "cannot boot: cannot open a: no such file");
        let error = anyhow::anyhow!("busy").context("cannot open a: busy");
        assert_eq!(message(&error), "cannot open a: busy");
    }
}
