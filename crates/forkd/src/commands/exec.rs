//! `forkd exec`.

mod terminal;

use std::collections::BTreeMap;
use std::io::{IsTerminal, Read};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::cleanup::{self, Guard};
use crate::cli::OutputArgs;
use crate::commands::eval::{TIMED_OUT, seconds};
use crate::guest::{Command, Ended, Event, Guest, Running, Stream};
use crate::paths::Paths;
use crate::{output, registry};

use terminal::RawTerminal;

/// Bytes of standard input that are sent at once.
const CHUNK: usize = 64 << 10;
/// SIGINT: signal(7).
const SIGINT: i32 = 2;

/// Run a command in a VM
///
/// Its output is streamed, and its exit status is passed on; 128 + N if signal N ended it, 124 if it ran out of time.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd exec web -- uname -a
  forkd exec -it web -- bash
  echo hello | forkd exec -i web -- tr a-z A-Z
  forkd exec --env A=1 --cwd /tmp --user nobody --timeout 10 web -- sh -c 'echo $A; pwd; id'")]
pub struct Args {
    /// Id, unique start of an id, or name
    #[arg(value_name = "VM")]
    vm: String,
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Run it on a terminal
    #[arg(short, long, conflicts_with = "json")]
    tty: bool,
    /// Environment variable; may be given more than once
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Working directory; by default the user's home
    #[arg(short = 'w', long, value_name = "DIR")]
    cwd: Option<String>,
    /// User to run it as
    #[arg(short, long, default_value = "root", value_name = "NAME")]
    user: String,
    /// Seconds it may take; by default any time
    #[arg(long, value_name = "S", value_parser = seconds)]
    timeout: Option<Duration>,
    #[command(flatten)]
    output: OutputArgs,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// The answer with --json.
#[derive(Debug, Default, Serialize)]
struct Answer {
    exit_code: u8,
    timed_out: bool,
    stdout: String,
    stderr: String,
}

fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_string(), value.to_string())),
        _ => Err(format!("{text:?} is not of the form NAME=VALUE")),
    }
}

impl Args {
    /// Runs the verb.
    ///
    /// # Errors
    /// No such VM, its agent does not answer, or the command can't be started.
    pub fn run(self, paths: &Paths) -> Result<ExitCode> {
        let live = registry::vm(paths, &self.vm)?;
        if self.tty && !(std::io::stdin().is_terminal() && std::io::stdout().is_terminal()) {
            bail!("-t needs a terminal on standard input and output: leave it out");
        }
        let size = if self.tty { Some(terminal::size()?) } else { None };
        // Before the first thread, see there.
        let windows = if self.tty { Some(terminal::watch_size()?) } else { None };
        cleanup::watch_signals().context("cannot watch signals")?;
        let mut running = Guest::of(&live.client).start(&self.command(size))?;
        let interrupted = self.interrupt(&running);

        let raw = if self.tty { Some(RawTerminal::enter()?) } else { None };
        if let Some(windows) = windows {
            let control = running.control();
            spawn("size", move || terminal::follow_size(&windows, &control))?;
        }
        if self.interactive {
            let control = running.control();
            let tty = self.tty;
            spawn("stdin", move || {
                if let Err(e) = forward_stdin(&control, tty) {
                    output::note(&format!("forkd: {}", output::error_line(&e)));
                }
            })?;
        }
        let mut answer = Answer::default();
        let outcome = stream(&mut running, self.output.json.then_some(&mut answer));
        drop(raw);
        interrupted.disarm();
        let status = match outcome? {
            Ended::Exited(code) => code,
            Ended::Signaled(number) => 128u8.saturating_add(number),
            Ended::TimedOut => TIMED_OUT,
        };
        if self.output.json {
            answer.exit_code = status;
            output::json(&answer)?;
        }
        Ok(ExitCode::from(status))
    }

    fn command(&self, size: Option<(u16, u16)>) -> Command {
        let mut env: BTreeMap<String, String> = self.env.iter().cloned().collect();
        if size.is_some() && !env.contains_key("TERM") {
            let term = std::env::var("TERM").unwrap_or_else(|_| "xterm".to_string());
            env.insert("TERM".to_string(), term);
        }
        Command {
            argv: self.command.clone(),
            env,
            cwd: self.cwd.clone(),
            user: self.user.clone(),
            timeout: self.timeout,
            terminal: size,
            stdin: self.interactive,
        }
    }

    /// When forkd is interrupted, so is the command: without a terminal between them nobody else tells it.
    fn interrupt(&self, running: &Running) -> Guard {
        let control = running.control();
        Guard::new(move || {
            // The command may be gone, or the VM: forkd ends all the same.
            let _ = control.signal(SIGINT);
        })
    }
}

/// Passes output on until the end.
fn stream(running: &mut Running, mut answer: Option<&mut Answer>) -> Result<Ended> {
    loop {
        match running.next()? {
            Event::Output(stream, bytes) => match (&mut answer, stream) {
                (Some(answer), Stream::Stdout) => {
                    answer.stdout.push_str(&String::from_utf8_lossy(&bytes))
                }
                (Some(answer), Stream::Stderr) => {
                    answer.stderr.push_str(&String::from_utf8_lossy(&bytes))
                }
                (None, Stream::Stdout) => output::write_all(&bytes)?,
                (None, Stream::Stderr) => output::write_stderr(&bytes),
            },
            Event::End(ended) => {
                if let Some(answer) = answer {
                    answer.timed_out = matches!(ended, Ended::TimedOut);
                }
                return Ok(ended);
            }
        }
    }
}

fn forward_stdin(control: &crate::guest::Control, tty: bool) -> Result<()> {
    let mut input = control.open_input(tty)?;
    let mut stdin = std::io::stdin().lock();
    let mut chunk = vec![0; CHUNK];
    loop {
        let count = stdin.read(&mut chunk).context("cannot read standard input")?;
        if count == 0 {
            // A command that has ended takes no more input; that is no failure.
            let _ = input.close();
            return Ok(());
        }
        if input.send(&chunk[..count]).is_err() {
            return Ok(());
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    thread::Builder::new().name(name.into()).spawn(work).context("cannot start a thread")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::variable;

    #[test]
    fn variables_have_a_name() {
        assert_eq!(variable("A=b=c").unwrap(), ("A".to_string(), "b=c".to_string()));
        assert_eq!(variable("A=").unwrap().1, "");
        assert!(variable("A").is_err() && variable("=b").is_err());
    }
}
