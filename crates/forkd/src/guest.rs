//! Talking to the agent in a guest: exec, eval, warm. The protocol is `forkd_agent`'s; here it is put into the
//! terms of the command line.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use forkd_agent::client::process::{CallOptions, InputStream, ProcessClient, ProcessStream};
use forkd_agent::client::{Agent, ClientError, interpreter};
use forkd_agent::protocol::connect::Code;
use forkd_agent::protocol::interpreter as protocol;
use forkd_agent::protocol::process::{
    DataEvent, EndEvent, ProcessConfig, ProcessEvent, ProcessInput, ProcessSelector, Pty, PtySize,
    StartRequest,
};
use forkd_agent::protocol::raw::Channel;
use serde::Serialize;

use crate::vm_client::VmClient;

/// SIGKILL: signal(7).
const SIGKILL: u8 = 9;

/// Which stream of a process or interpreter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, or a terminal's.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Takes output as it comes.
pub type Sink<'a> = &'a mut dyn FnMut(Stream, &str) -> Result<()>;

/// What code raised.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Raised {
    /// Name of the exception's type.
    pub name: String,
    /// Its text.
    pub value: String,
    /// As Python prints it.
    pub traceback: String,
    /// The code ran out of its time.
    pub timed_out: bool,
}

impl Raised {
    /// `NameError: name 'x' is not defined`.
    pub fn summary(&self) -> String {
        if self.value.is_empty() {
            self.name.clone()
        } else {
            format!("{}: {}", self.name, self.value)
        }
    }

    /// The traceback, or the summary if there is none.
    pub fn traceback_or_summary(&self) -> String {
        if self.traceback.trim().is_empty() { self.summary() } else { self.traceback.clone() }
    }
}

/// What became of code.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Evaluation {
    /// Value of the last expression, as repr() puts it.
    pub result: Option<String>,
    /// What it raised.
    pub error: Option<Raised>,
}

/// The agent of a guest.
#[derive(Debug, Clone)]
pub struct Guest {
    agent: Agent,
    who: String,
}

impl Guest {
    /// The agent of a VM.
    pub fn of(vm: &VmClient) -> Self {
        Self { agent: Agent::over_vsock(vm.vsock()), who: vm.who().to_string() }
    }

    /// Runs code in the default interpreter; output goes to `sink` as it comes.
    ///
    /// # Errors
    /// The agent does not answer, or the interpreter was lost. What the code raises is no error.
    pub fn eval(
        &self,
        code: &str,
        timeout: Option<Duration>,
        sink: Sink<'_>,
    ) -> Result<Evaluation> {
        let request = protocol::ExecuteRequest {
            code: code.to_string(),
            timeout: timeout.map(|t| t.as_secs_f64()),
            ..Default::default()
        };
        let begun = Instant::now();
        let mut evaluation =
            self.run(sink, |interpreter, on_event| interpreter.execute(&request, on_event))?;
        // Code may raise an error of that name itself.
        let expired = timeout.is_some_and(|limit| begun.elapsed() >= limit);
        if let Some(error) = &mut evaluation.error {
            error.timed_out = expired && error.name == protocol::TIMEOUT_ERROR;
        }
        Ok(evaluation)
    }

    /// Runs warm-up code in the default interpreter, and settles its memory for forks.
    ///
    /// # Errors
    /// As for [`Guest::eval`].
    pub fn warm(&self, code: &str, name: &str, sink: Sink<'_>) -> Result<Evaluation> {
        let request =
            protocol::WarmRequest { code: code.to_string(), name: Some(name.to_string()) };
        self.run(sink, |interpreter, on_event| interpreter.warm(&request, on_event))
    }

    fn run(
        &self,
        sink: Sink<'_>,
        call: impl FnOnce(
            &interpreter::Interpreter,
            &mut dyn FnMut(&protocol::Event),
        ) -> Result<interpreter::Execution, ClientError>,
    ) -> Result<Evaluation> {
        let mut sunk = Ok(());
        let mut on_event = |event: &protocol::Event| {
            let (stream, text) = match event {
                protocol::Event::Stdout(text) => (Stream::Stdout, &text.text),
                protocol::Event::Stderr(text) => (Stream::Stderr, &text.text),
                _ => return,
            };
            if sunk.is_ok() {
                sunk = sink(stream, text);
            }
        };
        let interpreter = interpreter::Interpreter::new(self.agent.clone());
        let execution = call(&interpreter, &mut on_event).with_context(|| self.who.clone())?;
        sunk?;
        if execution.lost && execution.error.is_none() {
            bail!(
                "{}: the interpreter ended while it ran the code; a new one takes its place",
                self.who
            );
        }
        Ok(Evaluation {
            result: execution.text().map(str::to_string),
            error: execution.error.map(|e| Raised {
                name: e.name,
                value: e.value,
                traceback: e.traceback,
                timed_out: false,
            }),
        })
    }

    /// Starts a command.
    ///
    /// # Errors
    /// The agent does not answer, or can't start it.
    pub fn start(&self, command: &Command) -> Result<Running> {
        let (program, args) = command.argv.split_first().context("the command is empty")?;
        let size = |(cols, rows): (u16, u16)| PtySize { cols: cols.into(), rows: rows.into() };
        let request = StartRequest {
            process: ProcessConfig {
                cmd: program.clone(),
                args: args.to_vec(),
                envs: command.env.clone(),
                cwd: command.cwd.clone(),
            },
            pty: command.terminal.map(|s| Pty { size: Some(size(s)) }),
            tag: None,
            stdin: Some(command.stdin),
        };
        let options = CallOptions {
            user: Some(command.user.clone()),
            timeout: command.timeout,
            keepalive: None,
        };
        let client = ProcessClient::new(self.agent.clone());
        let deadline = command.timeout.and_then(|limit| Instant::now().checked_add(limit));
        let stream = client.start(&request, &options).with_context(|| self.who.clone())?;
        let process = ProcessSelector::pid(stream.pid());
        let control = Control { client, process, raw: stream.takes_raw() };
        Ok(Running { stream, control, deadline, who: self.who.clone() })
    }
}

/// A command to be run.
#[derive(Debug, Clone)]
pub struct Command {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Environment beside the guest's own.
    pub env: BTreeMap<String, String>,
    /// Working directory.
    pub cwd: Option<String>,
    /// User.
    pub user: String,
    /// How long it may take.
    pub timeout: Option<Duration>,
    /// Columns and rows of the terminal it gets; none: pipes.
    pub terminal: Option<(u16, u16)>,
    /// Whether it has a standard input.
    pub stdin: bool,
}

/// What a command did.
#[derive(Debug)]
pub enum Event {
    /// It wrote.
    Output(Stream, Vec<u8>),
    /// It ended.
    End(Ended),
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// With this status.
    Exited(u8),
    /// By this signal.
    Signaled(u8),
    /// It ran out of its time, and was killed.
    TimedOut,
}

/// A command that runs.
pub struct Running {
    stream: ProcessStream,
    control: Control,
    deadline: Option<Instant>,
    who: String,
}

/// Speaks to a command that runs; clones do as well, from other threads.
#[derive(Debug, Clone)]
pub struct Control {
    client: ProcessClient,
    process: ProcessSelector,
    /// The agent takes raw frames.
    raw: bool,
}

/// The way to a command's standard input or terminal.
pub struct Input {
    control: Control,
    terminal: bool,
    /// None: a request for each piece, which is what older agents understand best.
    stream: Option<InputStream>,
}

impl Input {
    /// Sends a piece. Blocks while the command reads more slowly than this is called.
    ///
    /// # Errors
    /// The command takes none any more.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(stream) = &mut self.stream else {
            return self.control.input(bytes, self.terminal);
        };
        let channel = if self.terminal { Channel::Terminal } else { Channel::Stdin };
        Ok(stream.send_raw(channel, bytes)?)
    }

    /// Says that there is no more.
    ///
    /// # Errors
    /// The command has ended, or did not take all.
    pub fn close(self) -> Result<()> {
        if let Some(stream) = self.stream {
            stream.finish()?;
        }
        self.control.close_input()
    }
}

impl Running {
    /// The way to speak to it.
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// Waits for the next thing that it does; [`Event::End`] is the last.
    ///
    /// # Errors
    /// The VM was ended or forked, or its agent does not answer any more.
    pub fn next(&mut self) -> Result<Event> {
        loop {
            match self.stream.next() {
                Some(Ok(ProcessEvent::Data(data))) => {
                    return Ok(match data {
                        DataEvent::Stdout(bytes) | DataEvent::Pty(bytes) => {
                            Event::Output(Stream::Stdout, bytes)
                        }
                        DataEvent::Stderr(bytes) => Event::Output(Stream::Stderr, bytes),
                    });
                }
                Some(Ok(ProcessEvent::End(end))) => {
                    // The agent kills at the deadline, and tells of that as of any other end.
                    let expired = self.deadline.is_some_and(|at| Instant::now() >= at);
                    return Ok(Event::End(match ended(&end) {
                        Ended::Signaled(SIGKILL) if expired => Ended::TimedOut,
                        other => other,
                    }));
                }
                Some(Ok(ProcessEvent::Start(_) | ProcessEvent::Keepalive(_))) => {}
                Some(Err(ClientError::Rpc(error))) if error.code == Code::DeadlineExceeded => {
                    return Ok(Event::End(Ended::TimedOut));
                }
                Some(Err(error)) => return Err(error).with_context(|| self.who.clone()),
                None => bail!("{}: the agent did not say how the command ended", self.who),
            }
        }
    }
}

impl Control {
    /// Opens the way to its standard input, or to its terminal.
    ///
    /// # Errors
    /// The agent does not answer.
    pub fn open_input(&self, terminal: bool) -> Result<Input> {
        let stream =
            if self.raw { Some(self.client.stream_input(self.process.clone())?) } else { None };
        Ok(Input { control: self.clone(), terminal, stream })
    }

    fn input(&self, bytes: &[u8], terminal: bool) -> Result<()> {
        let bytes = Some(bytes.to_vec());
        let input = if terminal {
            ProcessInput { stdin: None, pty: bytes }
        } else {
            ProcessInput { stdin: bytes, pty: None }
        };
        Ok(self.client.send_input(self.process.clone(), input)?)
    }

    fn close_input(&self) -> Result<()> {
        Ok(self.client.close_stdin(self.process.clone())?)
    }

    /// Changes the size of its terminal.
    ///
    /// # Errors
    /// The command has ended.
    pub fn resize(&self, cols: u16, rows: u16) -> Result<()> {
        let size = PtySize { cols: cols.into(), rows: rows.into() };
        Ok(self.client.resize(self.process.clone(), size)?)
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// The command has ended.
    pub fn signal(&self, number: i32) -> Result<()> {
        Ok(self.client.send_signal(self.process.clone(), number)?)
    }
}

fn ended(end: &EndEvent) -> Ended {
    if let (true, Ok(code)) = (end.exited, u8::try_from(end.exit_code)) {
        return Ended::Exited(code);
    }
    match end.status.strip_prefix("signal: ").and_then(signal_number) {
        Some(number) => Ended::Signaled(number),
        None => Ended::Exited(1),
    }
}

/// The number of a signal by the words of Go's `syscall.Signal` on Linux, which envd uses.
fn signal_number(words: &str) -> Option<u8> {
    // A shell may have dumped core as well.
    let words = words.trim_end_matches(" (core dumped)");
    Some(match words {
        "hangup" => 1,
        "interrupt" => 2,
        "quit" => 3,
        "illegal instruction" => 4,
        "trace/breakpoint trap" => 5,
        "aborted" => 6,
        "bus error" => 7,
        "floating point exception" => 8,
        "killed" => 9,
        "user defined signal 1" => 10,
        "segmentation fault" => 11,
        "user defined signal 2" => 12,
        "broken pipe" => 13,
        "alarm clock" => 14,
        "terminated" => 15,
        other => return other.strip_prefix("signal ")?.parse().ok(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(exited: bool, exit_code: i32, status: &str) -> Ended {
        ended(&EndEvent { exit_code, exited, status: status.to_string(), error: None })
    }

    #[test]
    fn statuses_are_those_of_a_shell() {
        assert_eq!(end(true, 3, "exit status 3"), Ended::Exited(3));
        assert_eq!(end(false, -1, "signal: killed"), Ended::Signaled(9));
        assert_eq!(end(false, -1, "signal: segmentation fault (core dumped)"), Ended::Signaled(11));
        assert_eq!(end(false, -1, "signal: signal 34"), Ended::Signaled(34));
        assert_eq!(end(false, -1, "unknown"), Ended::Exited(1));
    }
}
