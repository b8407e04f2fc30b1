//! The agent and its event loop.
//!
//! One thread, one epoll set, one owner of all state. A turn: wait; handle what is ready; fire timers;
//! send what connections have to send, one write each. Signals are handled last, so that what a
//! process wrote before it ended is read before its end is told.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use forkd_sys::reactor::{Interest, Reactor, Readiness};
use forkd_sys::signal::{SignalFd, SignalSet};
use rustix::io::Errno;
use rustix::net::SocketFlags;

use crate::conn::{Conn, Gone, Service};
use crate::identity::PendingInit;
use crate::interpreter::Contexts;
use crate::process::Processes;
use crate::slab::{Key, Slab};
use crate::source::Source;
use crate::spawn::Spawner;
use crate::system::System;
use crate::timers::Timers;

/// Most connections at once; more wait in the listening sockets' queues.
const MAX_CONNS: usize = 1024;
/// Bytes read at once: what a pipe to or from a process holds.
const SCRATCH: usize = crate::process::start::PIPE;
/// Fewer events than this at once are all that there are: what the reactor takes in one wait.
const BATCH: usize = 64;
/// How long a connection may be kept out of the epoll set (see `conn.rs`).
const DEFER: Duration = Duration::from_millis(20);
/// How long a client may go on sending after it was told of an error.
const DRAIN: Duration = Duration::from_secs(1);

/// What a timer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timer {
    /// A process has run for as long as it may.
    ProcessDeadline(Key),
    /// A stream has been silent.
    Keepalive(Key),
    /// A stream has lasted as long as its client wanted.
    StreamDeadline(Key),
    /// An execution has run for as long as it may.
    ExecutionDeadline(Key, u64),
    /// An interrupted execution has not ended.
    ExecutionGrace(Key, u64),
    /// Interpreters have not acknowledged the fork notice.
    InitDeadline(Key),
    /// A connection is closed though its client has not closed it.
    Close(Key),
}

/// Why the event loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// SIGTERM: power off.
    PowerOff,
    /// SIGINT (Ctrl+Alt+Del): restart, which ends a microVM as well.
    Restart,
}

/// A listening socket.
pub struct Listener {
    /// The socket, non-blocking.
    pub fd: OwnedFd,
    /// What is spoken on its connections.
    pub service: Service,
}

/// All state of the agent.
pub struct Agent {
    /// Epoll set.
    pub reactor: Reactor,
    /// Connections.
    pub conns: Slab<Conn>,
    /// Processes started for clients.
    pub processes: Processes,
    /// Contexts of the interpreter.
    pub contexts: Contexts,
    /// Deadlines.
    pub timers: Timers<Timer>,
    /// Starts programs.
    pub spawner: Spawner,
    /// The machine around us, or what stands for it in tests.
    pub system: System,
    /// Environment of all processes, set by `/init`.
    pub env: BTreeMap<String, String>,
    /// Counts changes of `env`.
    pub env_version: u64,
    /// A fork notice that waits for interpreters.
    pub pending_init: Option<PendingInit>,
    /// Counts waits of the event loop.
    pub turn_count: u64,
    /// What was ready in this turn fitted one batch, so that all that was ready is known.
    pub all_told: bool,
    /// Where everything is read to.
    pub scratch: Box<[u8]>,
    /// Connections to flush at the end of this turn.
    pub dirty: Vec<Key>,
    /// Connections that are not in the epoll set yet.
    pub deferred: Vec<Key>,
    /// Connections that have become idle in this turn, and may have received another request.
    pub again: Vec<Key>,
    listeners: Vec<Listener>,
    accepting: bool,
    signals: SignalFd,
    stop: Option<Stop>,
}

impl Agent {
    /// An agent that listens. Blocks the signals that it takes by descriptor.
    ///
    /// # Errors
    ///
    /// The kernel gives no descriptors.
    pub fn new(system: System, listeners: Vec<Listener>) -> io::Result<Self> {
        let set = SignalSet::of(&[libc::SIGCHLD, libc::SIGTERM, libc::SIGINT])?;
        set.block()?;
        let signals = SignalFd::new(&set)?;
        let reactor = Reactor::new()?;
        reactor.add(&signals, Source::Signals.token(), Interest::READ)?;
        let mut agent = Self {
            reactor,
            conns: Slab::default(),
            processes: Processes::default(),
            contexts: Contexts::default(),
            timers: Timers::new(),
            spawner: Spawner::new(),
            system,
            env: BTreeMap::new(),
            env_version: 0,
            pending_init: None,
            turn_count: 0,
            all_told: false,
            scratch: vec![0; SCRATCH].into_boxed_slice(),
            dirty: Vec::new(),
            deferred: Vec::new(),
            again: Vec::new(),
            listeners,
            accepting: false,
            signals,
            stop: None,
        };
        agent.accept_again();
        Ok(agent)
    }

    /// Serves until told to stop.
    ///
    /// # Errors
    ///
    /// The event loop itself fails; nothing a client does leads there.
    pub fn run(&mut self) -> io::Result<Stop> {
        let mut ready = Vec::new();
        loop {
            let deferred = std::mem::take(&mut self.deferred);
            let next = self.timers.next();
            let timeout = if deferred.is_empty() {
                next
            } else {
                Some(next.map_or(DEFER, |next| next.min(DEFER)))
            };
            self.reactor.wait(&mut ready, timeout)?;
            self.turn(&ready);
            for key in deferred {
                self.conn_flush(key);
                self.update_interest(key);
            }
            if let Some(stop) = self.stop {
                return Ok(stop);
            }
        }
    }

    fn turn(&mut self, ready: &[Readiness]) {
        self.turn_count += 1;
        self.all_told = ready.len() < BATCH;
        let mut signalled = false;
        for ready in ready {
            if let Some(Source::ContextStdout(key) | Source::ContextStderr(key)) =
                Source::of(ready.token)
            {
                self.context_has_output(key);
            }
        }
        for ready in ready {
            match Source::of(ready.token) {
                Some(Source::Listener(index)) => self.accept(index),
                Some(Source::Signals) => signalled = true,
                Some(Source::Conn(key)) => self.conn_ready(key, *ready),
                Some(Source::Stdin(key)) => self.stdin_ready(key),
                Some(Source::Stdout(key)) => self.output_ready(key, 0, *ready),
                Some(Source::Stderr(key)) => self.output_ready(key, 1, *ready),
                Some(Source::ContextRequests(key)) => self.context_writable(key),
                Some(Source::ContextAnswers(key)) => self.context_answers(key),
                Some(Source::ContextStdout(key)) => self.context_output(key, 0, *ready),
                Some(Source::ContextStderr(key)) => self.context_output(key, 1, *ready),
                None => {}
            }
        }
        if signalled {
            self.take_signals();
        }
        while let Some(timer) = self.timers.pop() {
            self.fire(timer);
        }
        while !self.dirty.is_empty() || !self.again.is_empty() {
            for key in std::mem::take(&mut self.dirty) {
                self.conn_flush(key);
            }
            for key in std::mem::take(&mut self.again) {
                self.conn_advance(key);
            }
        }
    }

    fn fire(&mut self, timer: Timer) {
        match timer {
            Timer::ProcessDeadline(key) => self.process_deadline(key),
            Timer::Keepalive(key) => self.stream_keepalive(key),
            Timer::StreamDeadline(key) => self.stream_deadline(key),
            Timer::ExecutionDeadline(key, seq) => self.execution_deadline(key, seq),
            Timer::ExecutionGrace(key, seq) => self.execution_grace(key, seq),
            Timer::InitDeadline(key) => self.init_deadline(key),
            Timer::Close(key) => self.close_conn(key, Gone::Served),
        }
    }

    /// Closes the connection after a while.
    pub fn close_soon(&mut self, key: Key) {
        self.timers.after(DRAIN, Timer::Close(key));
    }

    fn accept(&mut self, index: u8) {
        let Some(listener) = self.listeners.get(usize::from(index)) else { return };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let service = listener.service;
        match rustix::net::accept_with(&listener.fd, flags) {
            Ok(fd) => {
                let key = self.conns.insert(Conn::new(fd, service));
                self.conn_read(key);
                if self.conns.len() >= MAX_CONNS {
                    self.accept_no_more();
                }
            }
            Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                self.accept_no_more();
            }
            // The client went away while it waited.
            Err(_) => {}
        }
    }

    fn accept_no_more(&mut self) {
        if self.accepting {
            self.accepting = false;
            for listener in &self.listeners {
                if let Err(error) = self.reactor.remove(&listener.fd) {
                    self.report(&format_args!("cannot pause a listener: {error}"));
                }
            }
        }
    }

    /// Accepts connections, if that had been stopped for want of room.
    pub fn accept_again(&mut self) {
        if self.accepting || self.conns.len() >= MAX_CONNS {
            return;
        }
        self.accepting = true;
        for (index, listener) in (0..).zip(&self.listeners) {
            let token = Source::Listener(index).token();
            if let Err(error) = self.reactor.add(&listener.fd, token, Interest::READ) {
                self.report(&format_args!("cannot watch a listener: {error}"));
            }
        }
    }

    /// Takes one signal; epoll tells of the next.
    fn take_signals(&mut self) {
        match self.signals.read() {
            Ok(Some(received)) if received.signal == libc::SIGCHLD => self.reap(),
            Ok(Some(received)) if received.signal == libc::SIGINT => {
                self.stop = Some(Stop::Restart);
            }
            Ok(Some(_)) => self.stop = Some(Stop::PowerOff),
            Ok(None) => {}
            Err(error) => self.report(&format_args!("cannot read signals: {error}")),
        }
    }

    /// Takes the exit status of every child that has ended: ours, and orphans that we inherited.
    fn reap(&mut self) {
        use rustix::process::{WaitOptions, wait};
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    let pid = pid.as_raw_nonzero().get();
                    if !self.process_exited(pid, status) {
                        self.context_exited(pid);
                    }
                }
                Err(Errno::INTR) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// Tells the console. Never on a path that clients wait for.
    pub fn report(&self, what: &dyn Display) {
        crate::system::console(what);
    }
}
