//! `forkd doctor`: checks this host, with a fix for each finding.

mod checks;

use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;

use crate::cli::OutputArgs;
use crate::paths::Paths;
use crate::{host, output};

/// Check this host
///
/// Prints what forkd needs of the host, what it found, and how to fix what is amiss. The status is 1 if something
/// that is needed is missing.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd doctor
  forkd doctor --json | jq '.checks[] | select(.verdict != \"ok\")'")]
pub struct Args {
    /// Print only which flavour of the guest kernel this host runs: stock or pvm
    #[arg(long)]
    kernel_flavour: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// forkd works, but slower or with less.
    Warn,
    /// forkd does not work.
    Fail,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    name: &'static str,
    verdict: Verdict,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

#[derive(Debug, Serialize)]
struct Report {
    verdict: Verdict,
    checks: Vec<Check>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Ok, found: found.into(), fix: None }
    }

    fn warn(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Warn, found: found.into(), fix: Some(fix.into()) }
    }

    fn fail(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Fail, found: found.into(), fix: Some(fix.into()) }
    }
}

impl Args {
    /// Runs the verb.
    ///
    /// # Errors
    /// Standard output can't be written. Findings are no errors but decide the status.
    pub fn run(self, paths: &Paths) -> Result<ExitCode> {
        if self.kernel_flavour {
            let native = host::open(paths)?.native_pvm().is_ok();
            output::line(if native { "pvm" } else { "stock" })?;
            return Ok(ExitCode::SUCCESS);
        }
        let checks = checks::all(paths);
        let has = |verdict| checks.iter().any(|c| c.verdict == verdict);
        let verdict = match (has(Verdict::Fail), has(Verdict::Warn)) {
            (true, _) => Verdict::Fail,
            (false, true) => Verdict::Warn,
            (false, false) => Verdict::Ok,
        };
        let report = Report { verdict, checks };
        if self.output.json {
            output::json(&report)?;
        } else {
            report.print()?;
        }
        Ok(if verdict == Verdict::Fail { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

impl Report {
    fn print(&self) -> Result<()> {
        for check in &self.checks {
            let mark = match check.verdict {
                Verdict::Ok => "ok  ",
                Verdict::Warn => "warn",
                Verdict::Fail => "FAIL",
            };
            output::line(&format!("{mark}  {:<18} {}", check.name, check.found))?;
            if let Some(fix) = &check.fix {
                output::line(&format!("      {:<18} -> {fix}", ""))?;
            }
        }
        output::line(match self.verdict {
            Verdict::Ok => "all is well: try `forkd quickstart`",
            Verdict::Warn => "forkd works here, with the limits above: try `forkd quickstart`",
            Verdict::Fail => "forkd can't work here until what FAILs is fixed",
        })
    }
}
