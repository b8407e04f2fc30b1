//! Contexts of the code interpreter: one `python3` process each, running `runner.py`.
//!
//! ```text
//! starting ──(Ready)──> idle ──(request)──> busy ──(Done)──> idle
//!     └──────────────── gone (its process ended) <──┘   started again by the next request
//! ```
//!
//! A context outlives its process: if that ends, its state is lost, the client that waited is told
//! `unexpected_end_of_execution`, and the next request starts a new one. Requests to a busy context
//! wait in its queue. The default context is the one that is warmed.

mod execution;
pub mod routes;
mod text;
mod wire;

use std::collections::{BTreeMap, VecDeque};
use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};

use forkd_agent::protocol::interpreter::{ContextInfo, DEFAULT_CONTEXT, PYTHON};
use forkd_sys::fds::set_nonblocking;
use forkd_sys::reactor::Interest;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

pub use self::execution::Execute;
use self::execution::{Execution, Request};
use self::text::Decoder;
use crate::agent::Agent;
use crate::kill;
use crate::process::start::{DEFAULT_PATH, env_strings, environment};
use crate::slab::{Key, Slab};
use crate::source::Source;
use crate::spawn::{Program, candidates};
use crate::users;

/// Most contexts at once.
const MAX_CONTEXTS: usize = 32;
/// Most requests that wait for one context.
const MAX_QUEUE: usize = 64;
/// The signal that makes a busy interpreter reseed. A real-time signal that no C library keeps for
/// itself; `runner.py` has the same number.
const RESEED_SIGNAL: i32 = 39;
const RUNNER: &str = include_str!("../runner.py");

/// All contexts.
#[derive(Default)]
pub struct Contexts {
    all: Slab<Context>,
    /// Counts contexts, for ids.
    created: u64,
}

/// One context.
struct Context {
    id: String,
    cwd: String,
    python: Option<Python>,
    /// Executions begun since its process was started.
    count: u64,
    /// Names executions, so that a timer of an earlier one does nothing.
    seq: u64,
    current: Option<Execution>,
    queue: VecDeque<Request>,
    /// Connections to be told once it is ready, or cannot be.
    waiters: Vec<Key>,
    /// The version of the agent's environment that its process has.
    env_version: u64,
}

/// The process of a context.
struct Python {
    pid: i32,
    requests: OwnedFd,
    answers: OwnedFd,
    outputs: [Option<OwnedFd>; 2],
    decoders: [Decoder; 2],
    /// Requests not yet written.
    unsent: Vec<u8>,
    /// Answers not yet complete.
    received: Vec<u8>,
    ready: bool,
    /// What it wrote before it was ready.
    early: String,
    /// It has been waited for: its id may be somebody else's.
    exited: bool,
    /// The fork notice waits for it.
    reseeding: bool,
    /// Code of the user's may run in it between requests.
    awake: bool,
    /// It has to reseed before the next request.
    stale: bool,
    /// Outputs are not read, because the client does not keep up.
    paused: bool,
    /// The last turns of the event loop in which it had answers, and output, to read.
    answered_in: u64,
    wrote_in: u64,
}

/// A context cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    /// No such context.
    #[error("context {0:?} not found")]
    Unknown(String),
    /// Its process cannot be started.
    #[error("cannot start python3: {0}")]
    Start(String),
    /// A limit is reached.
    #[error("{0}")]
    Limit(String),
}

impl Contexts {
    fn find(&self, id: &str) -> Option<Key> {
        self.all.iter().find(|(_, context)| context.id == id).map(|(key, _)| key)
    }

    fn list(&self) -> Vec<ContextInfo> {
        self.all.iter().map(|(_, context)| context.info()).collect()
    }
}

impl Context {
    fn info(&self) -> ContextInfo {
        ContextInfo { id: self.id.clone(), language: PYTHON.into(), cwd: self.cwd.clone() }
    }
}

/// What `python3 -c` needs: -B, because writing bytecode into the overlay costs more than it saves.
fn arguments(requests: &OwnedFd, answers: &OwnedFd) -> Result<Vec<CString>, ContextError> {
    let number = |fd: &OwnedFd| crate::spawn::number(fd.as_fd()).to_string();
    ["python3", "-B", "-c", RUNNER, &number(requests), &number(answers)]
        .into_iter()
        .map(|arg| CString::new(arg).map_err(|e| ContextError::Start(e.to_string())))
        .collect()
}

impl Agent {
    /// Makes a context and starts its process. Without an id it gets a new one.
    fn create_context(&mut self, id: Option<&str>, cwd: String) -> Result<Key, ContextError> {
        if self.contexts.all.len() >= MAX_CONTEXTS {
            return Err(ContextError::Limit(format!("{MAX_CONTEXTS} contexts exist already")));
        }
        let python = self.start_python(&cwd)?;
        self.contexts.created += 1;
        let id = id.map_or_else(|| format!("context-{}", self.contexts.created), str::to_owned);
        let key = self.contexts.all.insert(Context {
            id,
            cwd,
            python: Some(python),
            count: 0,
            seq: 0,
            current: None,
            queue: VecDeque::new(),
            waiters: Vec::new(),
            env_version: self.env_version,
        });
        self.watch_context(key);
        Ok(key)
    }

    /// The context that is used when none is named; made if it is not there.
    fn default_context(&mut self) -> Result<Key, ContextError> {
        match self.contexts.find(DEFAULT_CONTEXT) {
            Some(key) => Ok(key),
            None => self.create_context(Some(DEFAULT_CONTEXT), self.system.home()),
        }
    }

    /// Starts a process for a context that has none.
    fn revive_context(&mut self, key: Key) -> Result<(), ContextError> {
        let cwd = match self.contexts.all.get(key) {
            Some(Context { python: None, cwd, .. }) => cwd.clone(),
            _ => return Ok(()),
        };
        let python = self.start_python(&cwd)?;
        if let Some(context) = self.contexts.all.get_mut(key) {
            context.python = Some(python);
            context.count = 0;
            context.env_version = self.env_version;
        }
        self.watch_context(key);
        Ok(())
    }

    fn start_python(&mut self, cwd: &str) -> Result<Python, ContextError> {
        let failed =
            |what: &str, e: &dyn std::fmt::Display| ContextError::Start(format!("{what}: {e}"));
        let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(|e| failed("a pipe", &e));
        let (their_requests, requests) = pipe()?;
        let (answers, their_answers) = pipe()?;
        let (stdout, their_stdout) = pipe()?;
        let (stderr, their_stderr) = pipe()?;
        for fd in [&requests, &answers, &stdout, &stderr] {
            set_nonblocking(fd, true).map_err(|e| failed("a pipe", &e))?;
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let null = rustix::fs::open(c"/dev/null", flags, Mode::empty())
            .map_err(|e| failed("/dev/null", &e))?;
        let user = users::lookup("root").map_err(|e| failed("user", &e))?;
        let env = environment(&user, false, &[&self.env]);
        let path = env.get("PATH").map_or(DEFAULT_PATH, String::as_str);
        let paths = candidates("python3", path).map_err(|e| failed("PATH", &e))?;
        let env = env_strings(&env).map_err(|name| failed("environment", &name))?;
        let cwd = CString::new(cwd).map_err(|e| failed("cwd", &e))?;
        let pid = self
            .spawner
            .spawn(&Program {
                paths: &paths,
                args: &arguments(&their_requests, &their_answers)?,
                env: &env,
                cwd: &cwd,
                cwd_optional: false,
                stdio: [null.as_fd(), their_stdout.as_fd(), their_stderr.as_fd()],
                keep: &[their_requests.as_fd(), their_answers.as_fd()],
                terminal: false,
                credentials: None,
            })
            .map_err(|e| ContextError::Start(e.to_string()))?;
        Ok(Python {
            pid,
            requests,
            answers,
            outputs: [Some(stdout), Some(stderr)],
            decoders: Default::default(),
            unsent: Vec::new(),
            received: Vec::new(),
            ready: false,
            early: String::new(),
            exited: false,
            reseeding: false,
            awake: false,
            stale: false,
            paused: false,
            answered_in: 0,
            wrote_in: 0,
        })
    }

    fn watch_context(&mut self, key: Key) {
        let Some(python) = self.contexts.all.get(key).and_then(|c| c.python.as_ref()) else {
            return;
        };
        let [stdout, stderr] = &python.outputs;
        let watched = [
            (Some(&python.answers), Source::ContextAnswers(key)),
            (stdout.as_ref(), Source::ContextStdout(key)),
            (stderr.as_ref(), Source::ContextStderr(key)),
        ];
        for (fd, source) in watched {
            if let Some(fd) = fd
                && let Err(error) = self.reactor.add(fd, source.token(), Interest::READ)
            {
                self.report(&format_args!("cannot watch an interpreter: {error}"));
            }
        }
    }

    /// Sends a request to a context's process, as far as its pipe takes it.
    fn send_to_python(&mut self, key: Key, frame: Vec<u8>) {
        let Some(python) = self.contexts.all.get_mut(key).and_then(|c| c.python.as_mut()) else {
            return;
        };
        if python.unsent.is_empty() {
            python.unsent = frame;
            self.pump_requests(key, false);
        } else {
            python.unsent.extend_from_slice(&frame);
        }
    }

    /// A context's process takes requests again.
    pub fn context_writable(&mut self, key: Key) {
        self.pump_requests(key, true);
    }

    fn pump_requests(&mut self, key: Key, watched: bool) {
        let Some(python) = self.contexts.all.get_mut(key).and_then(|c| c.python.as_mut()) else {
            return;
        };
        let mut done = 0;
        while done < python.unsent.len() {
            match rustix::io::write(&python.requests, &python.unsent[done..]) {
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => {
                    // It has ended, of which SIGCHLD tells.
                    done = python.unsent.len();
                }
            }
        }
        python.unsent.drain(..done);
        let wanted = !python.unsent.is_empty();
        let result = match (wanted, watched) {
            (true, false) => {
                let token = Source::ContextRequests(key).token();
                self.reactor.add(&python.requests, token, Interest::WRITE)
            }
            (false, true) => self.reactor.remove(&python.requests),
            _ => Ok(()),
        };
        if let Err(error) = result {
            self.report(&format_args!("cannot watch an interpreter: {error}"));
        }
    }

    /// A child has ended that may be an interpreter.
    pub fn context_exited(&mut self, pid: i32) {
        let ended = self.contexts.all.iter().find_map(|(key, context)| {
            context.python.as_ref().is_some_and(|p| p.pid == pid).then_some(key)
        });
        if let Some(key) = ended {
            if let Some(python) = self.contexts.all.get_mut(key).and_then(|c| c.python.as_mut()) {
                python.exited = true;
            }
            // What it said before it ended still counts.
            self.context_answers(key);
            self.python_lost(key, "the interpreter ended");
        }
    }

    /// Gives up a context's process, whatever it does.
    fn kill_python(&mut self, key: Key, why: &str) {
        if let Some(python) = self.contexts.all.get(key).and_then(|c| c.python.as_ref())
            && !python.exited
        {
            // Fails only if it has ended.
            let _ = kill::group(python.pid, libc::SIGKILL);
        }
        self.python_lost(key, why);
    }

    /// The context has no process any more.
    fn python_lost(&mut self, key: Key, why: &str) {
        self.drain_outputs(key);
        let Some(context) = self.contexts.all.get_mut(key) else { return };
        let Some(python) = context.python.take() else { return };
        context.count = 0;
        let current = context.current.take();
        let waiters = std::mem::take(&mut context.waiters);
        if python.reseeding {
            self.init_context_done(key);
        }
        let why = match python.early.trim() {
            "" => why.to_owned(),
            early => format!("{why}: {early}"),
        };
        if let Some(execution) = current {
            self.execution_lost(&execution);
        }
        for waiter in waiters {
            self.context_failed(waiter, &why);
        }
        if !python.ready {
            // It would not start the next time either.
            self.fail_queue(key, &format!("cannot start python3: {why}"));
        }
        self.next_request(key);
    }

    /// Takes the context out, with all that waits for it.
    fn remove_context(&mut self, key: Key) {
        self.fail_queue(key, "the context was removed");
        self.kill_python(key, "the context was removed");
        self.contexts.all.remove(key);
    }

    /// Ends all interpreters, on the way to shutting down.
    pub fn kill_contexts(&self, signal: i32) {
        for (_, context) in self.contexts.all.iter() {
            if let Some(python) = &context.python {
                // Fails only if it has ended.
                let _ = kill::group(python.pid, signal);
            }
        }
    }

    /// Has every interpreter reseed; returns those that will say when they have. A busy one does it
    /// before its next bytecode, one that is starting has no state yet, and one in which nothing runs until the next
    /// request does it then, ahead of it: they hold no one up. (Python touches a thousand pages for it, each of which
    /// is a fault in a VM that was just forked.)
    pub fn reseed_contexts(&mut self) -> Vec<Key> {
        let mut waiting = Vec::new();
        for key in self.contexts.all.keys() {
            let Some(context) = self.contexts.all.get_mut(key) else { continue };
            let Some(python) = &mut context.python else { continue };
            if !python.ready {
                continue;
            }
            if context.current.is_some() {
                // Fails only if it has ended.
                let _ = kill::process(python.pid, RESEED_SIGNAL);
                continue;
            }
            if !python.awake {
                python.stale = true;
                continue;
            }
            python.reseeding = true;
            waiting.push(key);
            let frame = wire::reseed(&lasting_env(&self.env, self.env_version, context));
            self.send_to_python(key, frame);
        }
        waiting
    }
}

/// The agent's environment, if the context's process does not have it yet.
fn lasting_env(env: &BTreeMap<String, String>, version: u64, context: &mut Context) -> Vec<u8> {
    if std::mem::replace(&mut context.env_version, version) == version {
        return Vec::new();
    }
    wire::env_field(env)
}
