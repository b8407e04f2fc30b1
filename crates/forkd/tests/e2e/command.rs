//! Programs under a deadline: run to their end, or watched while they run.
//!
//! All output is kept. A program that is not done at the deadline is killed and the test fails; one that is dropped while
//! it runs is killed as well.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use forkd_sys::fork::PidFd;
use rustix::process::Signal;
use serde::de::DeserializeOwned;

/// A program to be run.
pub struct Run {
    command: Command,
    shown: String,
    stdin: Option<Vec<u8>>,
    deadline: Instant,
}

/// What came of a program that has ended.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
    /// From its start to its end.
    pub took: Duration,
    shown: String,
}

impl Run {
    /// A program; it is killed at the deadline.
    pub fn new(program: &Path, deadline: Instant) -> Self {
        let shown = program
            .file_name()
            .map_or_else(|| program.display().to_string(), |n| n.to_string_lossy().into_owned());
        Self { command: Command::new(program), shown, stdin: None, deadline }
    }

    /// Adds one argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        let arg = arg.as_ref();
        let text: String = arg.to_string_lossy().chars().take(60).collect();
        self.shown.push_str(&format!(" {text:?}"));
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    pub fn args<A: AsRef<OsStr>>(self, args: impl IntoIterator<Item = A>) -> Self {
        args.into_iter().fold(self, Self::arg)
    }

    /// Sets a variable of its environment.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Leaves a variable out of its environment.
    pub fn without_env(mut self, name: &str) -> Self {
        self.command.env_remove(name);
        self
    }

    /// Gives it something to read; without this its standard input is empty.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }

    /// Runs it to its end, whatever its status.
    pub fn output(mut self) -> Result<Output> {
        let input = self.stdin.take();
        let mut watched = self.spawn()?;
        let stdin = watched.stdin.take();
        let writer = thread::spawn(move || {
            if let (Some(bytes), Some(mut pipe)) = (input, stdin) {
                // A program that does not read all of it is no failure of its own.
                let _ = pipe.write_all(&bytes);
            }
        });
        let output = watched.wait();
        // Its other end is closed by now.
        let _ = writer.join();
        output
    }

    /// Runs it to its end, which must be a success.
    pub fn ok(self) -> Result<Output> {
        self.output()?.success()
    }

    /// Starts it; its standard input stays open.
    pub fn spawn(self) -> Result<Watched> {
        let Self { mut command, shown, deadline, .. } = self;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let begun = Instant::now();
        let mut child = command.spawn().with_context(|| format!("cannot start {shown}"))?;
        let process = PidFd::open(child.id()).with_context(|| format!("cannot watch {shown}"))?;
        let stdout = Arc::new(Stream::default());
        let stderr = Arc::new(Stream::default());
        let readers = vec![read(child.stdout.take(), &stdout), read(child.stderr.take(), &stderr)];
        let stdin = child.stdin.take();
        Ok(Watched { child, process, stdin, stdout, stderr, readers, begun, deadline, shown })
    }
}

/// Output as it comes.
#[derive(Default)]
struct Stream {
    state: Mutex<StreamState>,
    changed: Condvar,
}

#[derive(Default)]
struct StreamState {
    bytes: Vec<u8>,
    ended: bool,
}

impl Stream {
    fn lock(&self) -> MutexGuard<'_, StreamState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read(pipe: Option<impl Read + Send + 'static>, stream: &Arc<Stream>) -> JoinHandle<()> {
    let stream = Arc::clone(stream);
    thread::spawn(move || {
        let mut chunk = vec![0; 64 << 10];
        let mut pipe = pipe;
        while let Some(Ok(count @ 1..)) = pipe.as_mut().map(|p| p.read(&mut chunk)) {
            stream.lock().bytes.extend_from_slice(&chunk[..count]);
            stream.changed.notify_all();
        }
        stream.lock().ended = true;
        stream.changed.notify_all();
    })
}

/// A program that runs.
pub struct Watched {
    child: Child,
    process: PidFd,
    /// Its standard input; dropping it closes it.
    pub stdin: Option<ChildStdin>,
    stdout: Arc<Stream>,
    stderr: Arc<Stream>,
    readers: Vec<JoinHandle<()>>,
    begun: Instant,
    deadline: Instant,
    shown: String,
}

impl Watched {
    /// Waits until its standard output so far is as asked; gives the output.
    pub fn wait_stdout(&self, what: &str, good: impl Fn(&[u8]) -> bool) -> Result<Vec<u8>> {
        let mut state = self.stdout.lock();
        while !good(&state.bytes) {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                let stderr = String::from_utf8_lossy(&self.stderr.lock().bytes).into_owned();
                bail!(
                    "{} gives no {what}: {} bytes of output, ended: {}, stderr: {stderr}",
                    self.shown,
                    state.bytes.len(),
                    state.ended
                );
            }
            let waited = self.stdout.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(state.bytes.clone())
    }

    /// Bytes of standard output so far.
    pub fn stdout_len(&self) -> usize {
        self.stdout.lock().bytes.len()
    }

    /// Its standard error so far.
    pub fn stderr_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr.lock().bytes).into_owned()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.send_signal(signal).with_context(|| format!("cannot signal {}", self.shown))
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> Result<bool> {
        Ok(self.process.wait(Some(Duration::ZERO))?)
    }

    /// Waits for its end; closes its standard input first.
    pub fn wait(mut self) -> Result<Output> {
        self.stdin = None;
        let left = self.deadline.saturating_duration_since(Instant::now());
        if !self.process.wait(Some(left)).context("cannot wait")? {
            let stderr = String::from_utf8_lossy(&self.stderr.lock().bytes).into_owned();
            let waited = self.begun.elapsed();
            bail!("{} was not done after {waited:.1?}: {}", self.shown, stderr.trim());
        }
        let status = self.child.wait().context("cannot reap")?;
        let took = self.begun.elapsed();
        // What holds its pipes open beside it (a VM process) would be a bug: reading must end.
        for stream in [&self.stdout, &self.stderr] {
            let grace = Instant::now() + Duration::from_secs(5);
            let mut state = stream.lock();
            while !state.ended {
                let left = grace.saturating_duration_since(Instant::now());
                ensure!(!left.is_zero(), "{}: something keeps its output open", self.shown);
                let waited = stream.changed.wait_timeout(state, left);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        self.readers.drain(..).try_for_each(|r| r.join().map_err(|_| ())).ok();
        let stdout = std::mem::take(&mut self.stdout.lock().bytes);
        let stderr = std::mem::take(&mut self.stderr.lock().bytes);
        Ok(Output { status, stdout, stderr, took, shown: self.shown.clone() })
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // Both fail only if it has been reaped already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Output {
    /// It must have succeeded.
    pub fn success(self) -> Result<Self> {
        ensure!(self.status.success(), "{}: {}\n{}", self.shown, self.status, self.stderr_text());
        Ok(self)
    }

    /// Its status must be this one.
    pub fn status_is(self, code: i32) -> Result<Self> {
        ensure!(
            self.status.code() == Some(code),
            "{}: {}, not status {code}\n{}",
            self.shown,
            self.status,
            self.stderr_text()
        );
        Ok(self)
    }

    /// It must have failed with exactly one line on standard error, which holds all these words; gives the line.
    pub fn one_line(self, words: &[&str]) -> Result<String> {
        let text = self.stderr_text();
        ensure!(
            matches!(self.status.code(), Some(1..)),
            "{}: {} where it must fail\n{text}",
            self.shown,
            self.status
        );
        let lines: Vec<&str> = text.lines().collect();
        let [line] = lines[..] else { bail!("{}: not one line but {lines:#?}", self.shown) };
        ensure!(line.starts_with("forkd: "), "{}: not forkd's own line: {line}", self.shown);
        for word in words {
            ensure!(line.contains(word), "{}: {word:?} is not in: {line}", self.shown);
        }
        Ok(line.to_string())
    }

    /// Its standard output as JSON.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.stdout)
            .with_context(|| format!("{}: no such JSON: {}", self.shown, self.text()))
    }

    /// Its standard output as text, without the last line's end.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_string()
    }

    /// Its standard error as text.
    pub fn stderr_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim_end().to_string()
    }
}
