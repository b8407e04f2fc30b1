//! One execution: its request, its answers on the way to the client, its limits.

use std::time::Duration;

use forkd_agent::protocol::connect::write_json;
use forkd_agent::protocol::interpreter::{Event, ExecutionError, TIMEOUT_ERROR, Text};
use forkd_sys::clock;
use forkd_sys::reactor::{Interest, Readiness};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::wire::{self, Answer};
use super::{Context, ContextError, MAX_QUEUE, lasting_env};
use crate::agent::{Agent, Timer};
use crate::conn::{Gone, Task};
use crate::kill;
use crate::outbox::{HIGH, LOW};
use crate::slab::Key;
use crate::source::Source;
use crate::timers::TimerId;

/// Content type of the answer: E2B's own.
const LINES_TYPE: &str = "application/json";
/// How long an interrupted execution may take to end before it is interrupted again: a program that
/// was waiting in `os.system` for another one does not notice the first time. Doubles each time.
const GRACE: Duration = Duration::from_secs(1);
/// How often it is interrupted before its interpreter is killed: after 15 s.
const INTERRUPTS: u32 = 4;

/// Most bytes kept of what an interpreter writes before it is ready, to say why it never was.
const MAX_EARLY: usize = 2048;

/// A connection waits for an execution.
pub struct Execute {
    /// In which context.
    pub context: Key,
}

/// An execution to be done.
pub struct Request {
    conn: Key,
    warm: bool,
    name: String,
    code: String,
    env: Vec<u8>,
    limit: Option<Duration>,
}

/// An execution that runs.
pub struct Execution {
    /// Who is told; nobody if the client has gone.
    conn: Option<Key>,
    deadline: Option<TimerId>,
    grace: Option<TimerId>,
    limit: Option<Duration>,
    /// How often it was interrupted.
    interrupts: u32,
}

impl Request {
    /// Code to run for a connection.
    pub fn new(conn: Key, warm: bool, name: String, code: String) -> Self {
        Self { conn, warm, name, code, env: Vec::new(), limit: None }
    }

    /// With variables for this execution alone.
    pub fn with_env(mut self, env: Vec<u8>) -> Self {
        self.env = env;
        self
    }

    /// With a time limit.
    pub fn with_limit(mut self, limit: Option<Duration>) -> Self {
        self.limit = limit;
        self
    }
}

impl Agent {
    /// Runs a request, or queues it if the context is busy.
    pub fn execute(&mut self, key: Key, request: Request) -> Result<(), ContextError> {
        self.revive_context(key)?;
        let conn = request.conn;
        let Some(context) = self.contexts.all.get_mut(key) else { return Ok(()) };
        if context.queue.len() >= MAX_QUEUE {
            let text = format!("{MAX_QUEUE} executions wait for context {:?} already", context.id);
            return Err(ContextError::Limit(text));
        }
        context.queue.push_back(request);
        self.begin_stream(conn, LINES_TYPE);
        if let Some(conn) = self.conns.get_mut(conn) {
            conn.task = Task::Execute(Execute { context: key });
        }
        self.next_request(key);
        Ok(())
    }

    /// Begins the next request of the queue, if the context is free; starts it if it is not there.
    pub fn next_request(&mut self, key: Key) {
        loop {
            let Some(context) = self.contexts.all.get_mut(key) else { return };
            if context.current.is_some() || context.queue.is_empty() {
                return;
            }
            match &context.python {
                Some(python) if !python.ready => return,
                Some(_) => {
                    if let Some(request) = context.queue.pop_front() {
                        self.begin_request(key, request);
                    }
                    return;
                }
                None => {}
            }
            if let Err(error) = self.revive_context(key) {
                self.fail_queue(key, &error.to_string());
            }
        }
    }

    fn begin_request(&mut self, key: Key, request: Request) {
        let Some(context) = self.contexts.all.get_mut(key) else { return };
        context.count += 1;
        context.seq += 1;
        let seq = context.seq;
        let lasting = lasting_env(&self.env, self.env_version, context);
        let stale = context.python.as_mut().is_some_and(|p| std::mem::take(&mut p.stale));
        let mut frame = if stale { wire::reseed(&[]) } else { Vec::new() };
        frame.extend(wire::execute(
            request.warm,
            &lasting,
            &request.env,
            &request.name,
            &request.code,
        ));
        let count = context.count;
        let deadline = request
            .limit
            .and_then(|limit| self.timers.after(limit, Timer::ExecutionDeadline(key, seq)));
        context.current = Some(Execution {
            conn: Some(request.conn),
            deadline,
            grace: None,
            limit: request.limit,
            interrupts: 0,
        });
        self.tell(Some(request.conn), &Event::NumberOfExecutions { execution_count: count });
        self.send_to_python(key, frame);
    }

    /// Sends one line to a client. It is flushed with the next, or when the turn ends.
    fn tell(&mut self, conn: Option<Key>, event: &Event) {
        if let Some(conn) = conn.and_then(|key| self.conns.get_mut(key)) {
            conn.out.piece(|out| {
                write_json(out, event);
                out.push(b'\n');
            });
        }
    }

    fn tell_now(&mut self, conn: Option<Key>, event: &Event) {
        self.tell(conn, event);
        if let Some(key) = conn {
            self.mark_dirty(key);
        }
    }

    fn client_of(&self, key: Key) -> Option<Key> {
        self.contexts.all.get(key)?.current.as_ref()?.conn
    }

    /// An interpreter's output is ready in this turn.
    pub fn context_has_output(&mut self, key: Key) {
        if let Some(python) = self.contexts.all.get_mut(key).and_then(|c| c.python.as_mut()) {
            python.wrote_in = self.turn_count;
        }
    }

    /// An interpreter has written an answer.
    ///
    /// Its output has to be read before the end of an execution is told. Mostly there is none, and
    /// then even asking costs a system call, so it is not asked where epoll has answered already: if
    /// what was received is the one last write of an execution, then all output was written before
    /// it; and if the answers were not ready in the turn before, then it was this write that made
    /// them ready, and outputs, made ready earlier, would have been told in the same turn.
    pub fn context_answers(&mut self, key: Key) {
        loop {
            let Some(python) = self.contexts.all.get_mut(key).and_then(|c| c.python.as_mut())
            else {
                return;
            };
            let n = match rustix::io::read(&python.answers, &mut *self.scratch) {
                Ok(0) => {
                    // It has closed its end. Its exit is told by SIGCHLD, or it is unusable.
                    self.kill_python(key, "the interpreter closed its answers");
                    return;
                }
                Ok(n) => n,
                Err(_) => return,
            };
            let fresh = self.all_told
                && !python.paused
                && python.received.is_empty()
                && python.answered_in + 1 < self.turn_count
                && python.wrote_in != self.turn_count;
            python.answered_in = self.turn_count;
            python.received.extend_from_slice(&self.scratch[..n]);
            let silent = fresh && wire::is_last_write(&python.received);
            if python.received.len() > wire::MAX_FRAME + self.scratch.len() {
                self.kill_python(key, "the interpreter's answer is too long");
                return;
            }
            let full = n == self.scratch.len();
            // What was written before these answers comes before them.
            if !silent && self.contexts.all.get(key).is_some_and(|c| c.current.is_some()) {
                self.drain_outputs(key);
            }
            if !self.take_answers(key) || !full {
                return;
            }
        }
    }

    /// Takes complete answers; false if the interpreter is gone.
    fn take_answers(&mut self, key: Key) -> bool {
        loop {
            let Some(python) = self.contexts.all.get_mut(key).and_then(|c| c.python.as_mut())
            else {
                return false;
            };
            match wire::decode(&python.received) {
                Ok(None) => return true,
                Ok(Some((answer, len))) => {
                    python.received.drain(..len);
                    self.answer(key, answer);
                }
                Err(error) => {
                    self.kill_python(key, &error.to_string());
                    return false;
                }
            }
        }
    }

    fn answer(&mut self, key: Key, answer: Answer) {
        let Some(context) = self.contexts.all.get_mut(key) else { return };
        match answer {
            Answer::Ready => {
                let waiters = std::mem::take(&mut context.waiters);
                let info = context.info();
                if let Some(python) = &mut context.python {
                    python.ready = true;
                    python.early = String::new();
                }
                for waiter in waiters {
                    self.context_ready(waiter, &info);
                }
                self.next_request(key);
            }
            Answer::Seeded => {
                if let Some(python) = &mut context.python
                    && std::mem::take(&mut python.reseeding)
                {
                    self.init_context_done(key);
                }
            }
            Answer::Value(value) => {
                self.tell_now(self.client_of(key), &Event::Result(value));
            }
            Answer::Raised(mut error) => {
                let current = self.contexts.all.get(key).and_then(|c| c.current.as_ref());
                let expired = current.filter(|e| e.interrupts > 0).and_then(|e| e.limit);
                if let Some(limit) = expired
                    && error.name == "KeyboardInterrupt"
                {
                    error.name = TIMEOUT_ERROR.into();
                    error.value = format!("the time limit of {} s has passed", limit.as_secs_f64());
                }
                self.tell_now(self.client_of(key), &Event::Error(error));
            }
            Answer::Done { awake } => {
                if let Some(python) = &mut context.python {
                    python.awake = awake;
                }
                self.execution_done(key);
            }
        }
    }

    fn execution_done(&mut self, key: Key) {
        self.flush_decoders(key);
        let Some(context) = self.contexts.all.get_mut(key) else { return };
        if let Some(execution) = context.current.take() {
            self.execution_over(&execution, &Event::EndOfExecution);
        }
        self.next_request(key);
    }

    fn execution_over(&mut self, execution: &Execution, last: &Event) {
        self.timers.cancel(execution.deadline);
        self.timers.cancel(execution.grace);
        self.tell(execution.conn, last);
        if let Some(conn) = execution.conn {
            self.end_stream(conn);
        }
    }

    /// The interpreter of an execution is gone.
    pub fn execution_lost(&mut self, execution: &Execution) {
        self.execution_over(execution, &Event::UnexpectedEndOfExecution);
    }

    /// The requests that wait will not be done.
    pub fn fail_queue(&mut self, key: Key, why: &str) {
        let Some(context) = self.contexts.all.get_mut(key) else { return };
        let error = ExecutionError {
            name: "InterpreterError".into(),
            value: why.into(),
            traceback: format!("{why}\n"),
        };
        for request in std::mem::take(&mut context.queue) {
            self.tell(Some(request.conn), &Event::Error(error.clone()));
            self.tell(Some(request.conn), &Event::UnexpectedEndOfExecution);
            self.end_stream(request.conn);
        }
    }

    /// Readiness of an interpreter's output.
    pub fn context_output(&mut self, key: Key, index: usize, ready: Readiness) {
        if ready.readable {
            self.read_context_output(key, index);
        }
    }

    fn read_context_output(&mut self, key: Key, index: usize) {
        let Some(context) = self.contexts.all.get_mut(key) else { return };
        let Some(python) = &mut context.python else { return };
        let Some(fd) = &python.outputs[index] else { return };
        let text = match rustix::io::read(fd, &mut *self.scratch) {
            Ok(0) => {
                // Closing takes it out of the epoll set.
                python.outputs[index] = None;
                return;
            }
            Ok(n) => python.decoders[index].push(&self.scratch[..n]),
            Err(_) => return,
        };
        if !python.ready && python.early.len() < MAX_EARLY {
            python.early += &text;
        }
        if !text.is_empty() {
            self.tell_output(key, index, text);
        }
    }

    fn tell_output(&mut self, key: Key, index: usize, text: String) {
        let Some(conn) = self.client_of(key) else { return };
        let text = Text { text, timestamp: clock::realtime_ns() };
        let event = if index == 0 { Event::Stdout(text) } else { Event::Stderr(text) };
        self.tell_now(Some(conn), &event);
        if self.conns.get(conn).is_some_and(|conn| conn.out.len() > HIGH) {
            self.pause_context(key);
        }
    }

    /// Reads what an execution has written so far: it has said that there is no more.
    pub fn drain_outputs(&mut self, key: Key) {
        // As much as pipes can hold; a thread of the program may go on writing.
        for _ in 0..64 {
            let Some(python) = self.contexts.all.get(key).and_then(|c| c.python.as_ref()) else {
                return;
            };
            let open: Vec<(usize, _)> = (0..)
                .zip(&python.outputs)
                .filter_map(|(index, fd)| Some((index, fd.as_ref()?)))
                .collect();
            let mut polled: Vec<_> =
                open.iter().map(|(_, fd)| PollFd::new(*fd, PollFlags::IN)).collect();
            let none = Timespec { tv_sec: 0, tv_nsec: 0 };
            if !matches!(poll(&mut polled, Some(&none)), Ok(n) if n > 0) {
                return;
            }
            let ready: Vec<usize> = open
                .iter()
                .zip(&polled)
                .filter(|(_, polled)| !polled.revents().is_empty())
                .map(|((index, _), _)| *index)
                .collect();
            for index in ready {
                self.read_context_output(key, index);
            }
        }
    }

    fn flush_decoders(&mut self, key: Key) {
        for index in 0..2 {
            let python = self.contexts.all.get_mut(key).and_then(|c| c.python.as_mut());
            let text = python.map(|p| p.decoders[index].finish()).unwrap_or_default();
            if !text.is_empty() {
                self.tell_output(key, index, text);
            }
        }
    }

    fn pause_context(&mut self, key: Key) {
        let Some(context) = self.contexts.all.get_mut(key) else { return };
        let Some(python) = &mut context.python else { return };
        if python.paused {
            return;
        }
        python.paused = true;
        for fd in python.outputs.iter().flatten() {
            // Not in the set only if it was just closed.
            let _ = self.reactor.remove(fd);
        }
    }

    /// Reads an interpreter's output again, if it was paused and its client has room.
    pub fn context_resume(&mut self, key: Key) {
        let roomy = self
            .client_of(key)
            .and_then(|conn| self.conns.get(conn))
            .is_none_or(|conn| conn.out.len() <= LOW);
        let Some(Context { python: Some(python), .. }) = self.contexts.all.get_mut(key) else {
            return;
        };
        if !python.paused || !roomy {
            return;
        }
        python.paused = false;
        let sources = [Source::ContextStdout(key), Source::ContextStderr(key)];
        let mut failed = None;
        for (fd, source) in python.outputs.iter().zip(sources) {
            if let Some(fd) = fd {
                failed = self.reactor.add(fd, source.token(), Interest::READ).err().or(failed);
            }
        }
        if let Some(error) = failed {
            self.report(&format_args!("cannot resume an interpreter's output: {error}"));
        }
    }

    /// An execution has run for as long as it may.
    pub fn execution_deadline(&mut self, key: Key, seq: u64) {
        if self.contexts.all.get(key).is_some_and(|context| context.seq == seq) {
            self.interrupt(key);
        }
    }

    /// Interrupts what runs, as Ctrl+C would: the program and those it has started.
    fn interrupt(&mut self, key: Key) {
        let Some(context) = self.contexts.all.get_mut(key) else { return };
        let (Some(execution), Some(python)) = (&mut context.current, &context.python) else {
            return;
        };
        let grace = GRACE * (1 << execution.interrupts.min(INTERRUPTS));
        execution.interrupts += 1;
        self.timers.cancel(execution.grace);
        execution.grace = self.timers.after(grace, Timer::ExecutionGrace(key, context.seq));
        // Fails only if it has ended.
        let _ = kill::group(python.pid, libc::SIGINT);
    }

    /// An interrupted execution goes on.
    pub fn execution_grace(&mut self, key: Key, seq: u64) {
        let Some(context) = self.contexts.all.get(key).filter(|context| context.seq == seq) else {
            return;
        };
        match &context.current {
            Some(execution) if execution.interrupts < INTERRUPTS => self.interrupt(key),
            Some(_) => self.kill_python(key, "it did not stop when interrupted"),
            None => {}
        }
    }

    /// The client of an execution has gone. If it closed the connection it wants no more of it; if
    /// the connection broke this may be a fork, over which programs go on.
    pub fn execute_gone(&mut self, conn: Key, execute: &Execute, gone: Gone) {
        let key = execute.context;
        let Some(context) = self.contexts.all.get_mut(key) else { return };
        context.queue.retain(|request| request.conn != conn);
        let Some(execution) = &mut context.current else { return };
        if execution.conn != Some(conn) {
            return;
        }
        execution.conn = None;
        self.context_resume(key);
        if gone == Gone::Eof {
            self.interrupt(key);
        }
    }
}
