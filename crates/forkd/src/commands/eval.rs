//! `forkd eval`.

use std::io::Read;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::cli::OutputArgs;
use crate::guest::{Guest, Raised, Stream};
use crate::paths::Paths;
use crate::{output, registry};

/// Status of code that ran out of its time, as timeout(1) has it.
pub const TIMED_OUT: u8 = 124;
/// Most bytes of code.
const MAX_CODE: u64 = 16 << 20;

/// Run Python code in a VM's warmed interpreter
///
/// Prints what the code prints, and the value of its last expression. Names stay defined for the next eval. If
/// the code raises, the traceback goes to standard error and the status is 1; if it runs out of time, 124, and
/// the interpreter stays usable.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd eval web 'a.sum() + 1'
  forkd eval web - < script.py
  forkd eval web --timeout 2.5 'while True: pass'
  forkd eval web --json '1/0' | jq .error.name")]
pub struct Args {
    /// Id, unique start of an id, or name
    #[arg(value_name = "VM")]
    vm: String,
    /// Code; - is standard input
    #[arg(allow_hyphen_values = true)]
    code: String,
    /// Seconds it may take; by default any time
    #[arg(long, value_name = "S", value_parser = seconds)]
    timeout: Option<Duration>,
    #[command(flatten)]
    output: OutputArgs,
}

/// The answer with --json.
#[derive(Debug, Default, Serialize)]
struct Answer {
    result: Option<String>,
    stdout: String,
    stderr: String,
    error: Option<Raised>,
}

/// A time in seconds, with fractions: 0.001 to 1,000,000.
///
/// # Errors
/// Not a number, or out of range.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let value: f64 = text.parse().map_err(|_| format!("{text:?} is not a number of seconds"))?;
    if !(0.001..=1e6).contains(&value) {
        return Err(format!("{text} is not within 0.001 and 1000000 seconds"));
    }
    Ok(Duration::from_secs_f64(value))
}

impl Args {
    /// Runs the verb.
    ///
    /// # Errors
    /// No such VM, or its agent does not answer.
    pub fn run(self, paths: &Paths) -> Result<ExitCode> {
        let code = self.code()?;
        let live = registry::vm(paths, &self.vm)?;
        let json = self.output.json;
        let mut answer = Answer::default();
        let outcome =
            Guest::of(&live.client).eval(
                &code,
                self.timeout,
                &mut |stream, text| match stream {
                    Stream::Stdout if json => {
                        answer.stdout.push_str(text);
                        Ok(())
                    }
                    Stream::Stderr if json => {
                        answer.stderr.push_str(text);
                        Ok(())
                    }
                    Stream::Stdout => output::print(text),
                    Stream::Stderr => {
                        output::write_stderr(text.as_bytes());
                        Ok(())
                    }
                },
            )?;
        let status = match &outcome.error {
            None => ExitCode::SUCCESS,
            Some(error) if error.timed_out => ExitCode::from(TIMED_OUT),
            Some(_) => ExitCode::FAILURE,
        };
        if json {
            answer.result = outcome.result;
            answer.error = outcome.error;
            output::json(&answer)?;
            return Ok(status);
        }
        if let Some(result) = &outcome.result {
            output::line(result)?;
        }
        if let Some(error) = &outcome.error {
            output::note(error.traceback_or_summary().trim_end());
        }
        Ok(status)
    }

    fn code(&self) -> Result<String> {
        if self.code != "-" {
            return Ok(self.code.clone());
        }
        let mut code = String::new();
        let stdin = std::io::stdin().take(MAX_CODE + 1);
        std::io::BufReader::new(stdin)
            .read_to_string(&mut code)
            .context("cannot read code from standard input")?;
        if code.len() as u64 > MAX_CODE {
            bail!("the code on standard input is longer than {} MiB", MAX_CODE >> 20);
        }
        Ok(code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_limits_have_bounds() {
        assert_eq!(seconds("2.5").unwrap(), Duration::from_millis(2500));
        for bad in ["0", "-1", "nan", "inf", "1e9", "x", ""] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
