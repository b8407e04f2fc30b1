//! The command line as a whole.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::commands::{
    bench, bench_floor, branch, completions, console, doctor, eval, exec, fork, image, info, kill,
    ls, quickstart, snapshot, vm,
};
use crate::paths::Paths;

/// fork() for microVMs: boot and warm a virtual machine once, then fork it in milliseconds.
#[derive(Debug, Parser)]
#[command(
    name = "forkd",
    version,
    propagate_version = true,
    disable_help_subcommand = true,
    after_help = "Start here:\n  forkd doctor        check this host\n  forkd quickstart    see it all, step by step"
)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Quickstart(quickstart::Args),
    Doctor(doctor::Args),
    Image(image::Args),
    Snapshot(snapshot::Args),
    Fork(fork::Args),
    Branch(branch::Args),
    Ls(ls::Args),
    Info(info::Args),
    Exec(exec::Args),
    Eval(eval::Args),
    Console(console::Args),
    Kill(kill::Args),
    Bench(bench::Args),
    Completions(completions::Args),
    Vm(vm::Args),
    BenchFloor(bench_floor::Args),
}

/// How a verb prints.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct OutputArgs {
    /// Print JSON instead of text
    #[arg(long)]
    pub json: bool,
}

impl Cli {
    /// Runs the verb.
    ///
    /// # Errors
    /// What the verb could not do, for `forkd: ...`.
    pub fn run(self) -> Result<ExitCode> {
        match self.verb {
            Verb::Completions(args) => args.run(&mut Self::command()),
            Verb::BenchFloor(args) => args.run(),
            Verb::Vm(_) => Ok(vm::run()),
            verb => verb.run(&Paths::find()?),
        }
    }
}

impl Verb {
    fn run(self, paths: &Paths) -> Result<ExitCode> {
        match self {
            Self::Quickstart(args) => args.run(paths),
            Self::Doctor(args) => args.run(paths),
            Self::Image(args) => args.run(paths),
            Self::Snapshot(args) => args.run(paths),
            Self::Fork(args) => args.run(paths),
            Self::Branch(args) => args.run(paths),
            Self::Ls(args) => args.run(paths),
            Self::Info(args) => args.run(paths),
            Self::Exec(args) => args.run(paths),
            Self::Eval(args) => args.run(paths),
            Self::Console(args) => args.run(paths),
            Self::Kill(args) => args.run(paths),
            Self::Bench(args) => args.run(paths),
            Self::Completions(_) | Self::BenchFloor(_) | Self::Vm(_) => Ok(ExitCode::SUCCESS),
        }
    }
}

/// A clap error as one line: the message, and where to read more.
pub fn one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let message = text.split("\n\nUsage:").next().unwrap_or(&text);
    let message = message.split("\n\nFor more").next().unwrap_or(message);
    let words: Vec<&str> = message.split_whitespace().collect();
    let message = words.join(" ");
    format!("{} (see --help)", message.strip_prefix("error: ").unwrap_or(&message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_visible_verb_has_examples() {
        fn check(command: &clap::Command, path: &str) {
            for verb in command.get_subcommands().filter(|c| !c.is_hide_set()) {
                let path = format!("{path} {}", verb.get_name());
                let help = verb.get_after_help().map(ToString::to_string).unwrap_or_default();
                assert!(
                    verb.has_subcommands() || help.contains(&path),
                    "{path} has no example of its use"
                );
                check(verb, &path);
            }
        }
        check(&Cli::command(), "forkd");
    }

    #[test]
    fn errors_are_one_line() {
        let error = Cli::try_parse_from(["forkd", "fork"]).unwrap_err();
        let line = one_line(&error);
        assert!(!line.contains('\n') && line.contains("<TAG>"), "{line}");
        let error = Cli::try_parse_from(["forkd", "fork", "t", "-n", "many"]).unwrap_err();
        assert!(one_line(&error).contains("many"));
    }
}
