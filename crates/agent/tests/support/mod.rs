//! An agent in test mode, on Unix sockets in a directory of its own.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use forkd_agent::client::Agent;
use forkd_agent::client::interpreter::Interpreter;
use forkd_agent::client::process::{CallOptions, ProcessClient, ProcessStream};
use forkd_agent::protocol::process::{
    DataEvent, EndEvent, ProcessConfig, ProcessEvent, StartRequest,
};

/// A running agent; ended when dropped.
pub struct TestAgent {
    pub dir: tempfile::TempDir,
    pub child: Child,
}

impl TestAgent {
    pub fn start() -> Self {
        Self::start_with(|_| ())
    }

    pub fn start_with(change: impl FnOnce(&mut Command)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_forkd-agent"));
        command.arg("--listen-unix").arg(dir.path()).stdout(Stdio::piped());
        change(&mut command);
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Self { dir, child }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn agent(&self) -> Agent {
        Agent::in_directory(self.path())
    }

    pub fn processes(&self) -> ProcessClient {
        ProcessClient::new(self.agent())
    }

    pub fn interpreter(&self) -> Interpreter {
        Interpreter::new(self.agent())
    }

    /// Starts `script` in bash.
    pub fn bash(&self, script: &str) -> ProcessStream {
        self.processes().start(&bash(script), &CallOptions::default()).unwrap()
    }

    /// Children of the agent, by /proc, zombies included.
    pub fn children(&self) -> Vec<i32> {
        let pid = self.child.id();
        let path = format!("/proc/{pid}/task/{pid}/children");
        let text = std::fs::read_to_string(path).unwrap();
        text.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
    }
}

impl Drop for TestAgent {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.child.wait().unwrap();
    }
}

pub fn bash(script: &str) -> StartRequest {
    StartRequest {
        process: ProcessConfig {
            cmd: "/bin/bash".into(),
            args: vec!["-c".into(), script.into()],
            ..Default::default()
        },
        stdin: Some(false),
        ..Default::default()
    }
}

/// All that a process wrote, and its end.
#[derive(Debug, Default)]
pub struct Outcome {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub pty: Vec<u8>,
    pub end: Option<EndEvent>,
    pub keepalives: usize,
}

impl Outcome {
    pub fn stdout(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }

    pub fn code(&self) -> i32 {
        self.end.as_ref().unwrap().exit_code
    }

    pub fn take(&mut self, event: ProcessEvent) {
        match event {
            ProcessEvent::Start(_) => panic!("a second start"),
            ProcessEvent::Data(DataEvent::Stdout(data)) => self.stdout.extend(data),
            ProcessEvent::Data(DataEvent::Stderr(data)) => self.stderr.extend(data),
            ProcessEvent::Data(DataEvent::Pty(data)) => self.pty.extend(data),
            ProcessEvent::End(end) => {
                assert!(self.end.replace(end).is_none(), "a second end");
            }
            ProcessEvent::Keepalive(_) => self.keepalives += 1,
        }
    }
}

/// Follows a process to its end.
pub fn follow(stream: ProcessStream) -> Outcome {
    let mut outcome = Outcome::default();
    for event in stream {
        outcome.take(event.unwrap());
    }
    outcome
}

/// Reads events until what was written to `pick` ends with `mark`.
pub fn read_until(
    stream: &mut ProcessStream,
    outcome: &mut Outcome,
    mark: &[u8],
    pick: fn(&Outcome) -> &Vec<u8>,
) {
    while !pick(outcome).ends_with(mark) {
        outcome.take(stream.next().unwrap().unwrap());
    }
}
