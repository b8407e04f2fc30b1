//! One system call of one thread of a process, made to fail from outside, by strace.
//!
//! Only the thread whose id is the process's is traced: that of the event loop. vCPU threads run on untraced, and so do
//! children.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use crate::command::Watched;
use crate::fixture::{Suite, eventually};

/// A system call that was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Its name.
    pub name: String,
    /// The how-many-th of that name it is since strace is there, from 1 on.
    pub nth: usize,
    /// What it works on: a request of ioctl(2) or epoll_ctl(2), or a file.
    pub on: String,
}

/// A thread under strace.
pub struct Traced {
    strace: Watched,
    output: PathBuf,
}

impl Traced {
    /// Attaches to the first thread of process `pid`.
    pub fn attach(suite: &Suite, pid: u32, options: &[String]) -> Result<Self> {
        let output = suite.scratch("strace")?.join(pid.to_string());
        let run = suite.program("/usr/bin/strace").args(["-q", "-y", "-s", "200", "-o"]);
        let run = run.arg(&output).args(options).arg("-p").arg(pid.to_string());
        let strace =
            run.spawn().context("strace: packaging/debian-packages.sh test installs it")?;
        let traced = Self { strace, output };
        eventually(suite.deadline(), "strace is attached", || {
            ensure!(!traced.strace.has_ended()?, "strace has ended");
            let status = fs::read_to_string(format!("/proc/{pid}/task/{pid}/status"))?;
            let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
            Ok(tracer.is_some_and(|pid| pid.trim() != "0"))
        })?;
        Ok(traced)
    }

    /// Detaches; what it has seen, a line for each call.
    pub fn detach(self) -> Result<Vec<String>> {
        // SIGINT and SIGTERM are blocked in this process, and so in what it starts.
        self.strace.signal(Signal::QUIT)?;
        self.strace.wait()?;
        let text = fs::read(&self.output)?;
        Ok(String::from_utf8_lossy(&text).lines().map(str::to_string).collect())
    }
}

/// Options that make one call fail.
pub fn failing(call: &Call, errno: &str) -> Vec<String> {
    let Call { name, nth, .. } = call;
    vec![
        "-e".into(),
        format!("trace={name}"),
        "-e".into(),
        format!("inject={name}:error={errno}:when={nth}"),
    ]
}

/// Options that hold one call up before it is made.
pub fn delaying(call: &Call, microseconds: u32) -> Vec<String> {
    let Call { name, nth, .. } = call;
    let delay = format!("inject={name}:delay_enter={microseconds}:when={nth}");
    vec!["-e".into(), format!("trace={name}"), "-e".into(), delay]
}

/// The call of a line of strace's, but for its number.
pub fn call_of(line: &str, tag: &str) -> Option<Call> {
    let (name, arguments) = line.split_once('(')?;
    let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    if name.is_empty() || !name.chars().all(is_name) {
        return None;
    }
    // What it gives, if it does: a call that failed has nothing to show of it.
    let gives = ["pipe2", "pidfd_open", "userfaultfd", "getrandom", "memfd_create"].contains(&name);
    let arguments =
        if gives { "" } else { arguments.rsplit_once(" = ").map_or(arguments, |(a, _)| a) };
    let on = if name == "ioctl" || name == "epoll_ctl" {
        arguments.split([',', ')']).nth(1).unwrap_or_default().trim().to_string()
    } else {
        let path = arguments.split_once("\"/").or_else(|| arguments.split_once('<'));
        let path = path.map_or("", |(_, rest)| rest.split(['"', '>', ':']).next().unwrap_or(""));
        let file = path.rsplit('/').next().unwrap_or_default().replace(tag, "TAG");
        let file = if file.starts_with(".staging") { ".staging" } else { &file };
        file.chars().filter(|c| !c.is_ascii_digit()).collect()
    };
    Some(Call { name: name.to_string(), nth: 0, on })
}

/// What a thread calls from its first request of an API by POST until it waits for events again, after it has made a call
/// that works on `mark`.
pub fn of_first_request(lines: &[String], tag: &str, mark: &str) -> Vec<Call> {
    let mut seen = std::collections::BTreeMap::<String, usize>::new();
    let mut found = Vec::new();
    let mut serving = false;
    for line in lines {
        let Some(mut call) = call_of(line, tag) else { continue };
        let count = seen.entry(call.name.clone()).or_default();
        *count += 1;
        call.nth = *count;
        let waits = call.name.starts_with("epoll_") && call.name.contains("wait");
        if waits && found.iter().any(|call: &Call| call.on == mark) {
            break;
        }
        if serving {
            found.push(call);
        } else if call.name == "recvfrom" && line.contains("\"POST /") {
            serving = true;
        }
    }
    found
}
