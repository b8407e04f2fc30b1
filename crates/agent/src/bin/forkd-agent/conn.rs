//! Client connections: bytes in, requests out; answers in, bytes out.
//!
//! A connection serves one request at a time. While it is busy its [`Task`] says with what; then what
//! it receives is only kept, within a bound, for the next turn. A connection that carries an
//! execution or the events of a process is not put into the epoll set until it has lived through one
//! turn of the event loop: most answers are sent by then, and the system call is saved.

use std::io;
use std::os::fd::OwnedFd;

use forkd_api::http::{CONTINUE, ChunkedEncoder, Headers, HttpError, Limits};
use forkd_api::http::{RequestDecoder, RequestEvent, RequestHead, Response};
use forkd_sys::reactor::{Interest, Readiness};
use rustix::io::Errno;

use crate::agent::Agent;
use crate::interpreter::Execute;
use crate::outbox::{Flushed, LOW, Outbox};
use crate::process::input::Input;
use crate::process::rpc::Stream;
use crate::slab::Key;
use crate::source::Source;

/// Longest body of a request that is taken as a whole, in bytes.
pub const MAX_BODY: usize = 5 << 20;
/// Bytes received at once. What they become on their way is small enough for the allocator to keep its memory.
const RECEIVE: usize = 64 << 10;
/// Most bytes kept of a request that comes while another is served.
const MAX_PIPELINED: usize = 64 << 10;

/// Which protocol a connection speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// envd's.
    Envd,
    /// The code interpreter's.
    Interpreter,
}

/// What a connection is busy with.
#[derive(Default)]
pub enum Task {
    /// With nothing: it waits for a request, or for the rest of one.
    #[default]
    Idle,
    /// It is sent the events of a process.
    Stream(Stream),
    /// It sends input to a process, message by message.
    Input(Input),
    /// Its one input waits for the process to read.
    SendInput,
    /// Code runs for it.
    Execute(Execute),
    /// An interpreter starts for it.
    StartContext(Key),
    /// The fork notice waits for interpreters.
    Init,
}

/// Why a connection is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    /// The answer is sent and the connection not to be used again.
    Served,
    /// The client closed it.
    Eof,
    /// It broke. A fork breaks all connections, so this does not say that the client gave up.
    Broken,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Closing {
    No,
    /// Once all is sent.
    Flushed,
    /// Once all is sent and the client has closed: it may still be sending what we do not read.
    Drained,
}

/// A connection.
pub struct Conn {
    fd: OwnedFd,
    /// Protocol.
    pub service: Service,
    decoder: RequestDecoder,
    head: Option<RequestHead>,
    body: Vec<u8>,
    /// What is to be sent.
    pub out: Outbox,
    /// What it is busy with.
    pub task: Task,
    keep_alive: bool,
    closing: Closing,
    /// Its input is not read for now, by its task's wish.
    pub paused: bool,
    interest: Option<Interest>,
    blocked: bool,
    dirty: bool,
}

impl Conn {
    /// A connection just accepted.
    pub fn new(fd: OwnedFd, service: Service) -> Self {
        Self {
            fd,
            service,
            decoder: RequestDecoder::new(Limits::STREAMING),
            head: None,
            body: Vec::new(),
            out: Outbox::default(),
            task: Task::Idle,
            keep_alive: true,
            closing: Closing::No,
            paused: false,
            interest: None,
            blocked: false,
            dirty: false,
        }
    }

    fn is_idle(&self) -> bool {
        matches!(self.task, Task::Idle) && self.closing == Closing::No
    }

    fn wanted(&self) -> Interest {
        let full = !matches!(self.task, Task::Idle | Task::Input(_))
            && self.decoder.buffered() > MAX_PIPELINED;
        Interest { read: !self.paused && !full, write: self.blocked }
    }
}

impl Agent {
    /// Readiness of a connection.
    pub fn conn_ready(&mut self, key: Key, ready: Readiness) {
        if ready.writable && self.conns.get(key).is_some_and(|conn| conn.blocked) {
            self.mark_dirty(key);
        }
        if ready.error {
            self.close_conn(key, Gone::Broken);
        } else if ready.readable {
            self.conn_read(key);
        }
    }

    /// Reads once.
    pub fn conn_read(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        match rustix::io::read(&conn.fd, &mut self.scratch[..RECEIVE]) {
            Ok(0) => self.close_conn(key, Gone::Eof),
            Ok(n) if conn.closing == Closing::No => {
                conn.decoder.feed(&self.scratch[..n]);
                self.conn_advance(key);
            }
            Ok(_) => {}
            Err(Errno::AGAIN | Errno::INTR) => self.update_interest(key),
            Err(_) => self.close_conn(key, Gone::Broken),
        }
    }

    /// Takes requests out of what was received, until the connection is busy or more is needed.
    pub fn conn_advance(&mut self, key: Key) {
        loop {
            let Some(conn) = self.conns.get_mut(key) else { return };
            let streaming = matches!(conn.task, Task::Input(_));
            if (!conn.is_idle() && !streaming) || conn.paused {
                break;
            }
            match conn.decoder.next() {
                Err(error) => {
                    self.refuse(key, &error);
                    return;
                }
                Ok(None) => break,
                Ok(Some(RequestEvent::Head(head))) => {
                    conn.keep_alive = head.keep_alive;
                    if head.expects_continue {
                        conn.out.raw(|out| out.extend_from_slice(CONTINUE));
                        self.mark_dirty(key);
                    }
                    self.request_begins(key, head);
                }
                Ok(Some(RequestEvent::Body(data))) if streaming => self.input_data(key, &data),
                Ok(Some(RequestEvent::End)) if streaming => self.input_ends(key),
                Ok(Some(RequestEvent::Body(data))) => {
                    if conn.body.len() + data.len() > MAX_BODY {
                        let limit = MAX_BODY as u64;
                        self.refuse(key, &HttpError::BodyTooLarge { limit });
                        return;
                    }
                    if conn.body.is_empty() {
                        conn.body = data;
                    } else {
                        conn.body.extend_from_slice(&data);
                    }
                }
                Ok(Some(RequestEvent::End)) => {
                    let body = std::mem::take(&mut conn.body);
                    if let Some(head) = conn.head.take() {
                        self.request(key, &head, &body);
                    }
                }
            }
        }
        self.settle(key);
    }

    /// Keeps the head until the body is there.
    pub fn keep_head(&mut self, key: Key, head: RequestHead) {
        if let Some(conn) = self.conns.get_mut(key) {
            conn.head = Some(head);
        }
    }

    /// Has the connection's descriptor watched as its state wants, now or after the next turn.
    fn settle(&mut self, key: Key) {
        let Some(conn) = self.conns.get(key) else { return };
        let waits_for_us = matches!(
            conn.task,
            Task::Stream(_) | Task::Execute(_) | Task::Init | Task::StartContext(_)
        );
        if waits_for_us && (conn.interest.is_none() || conn.out.len() > 0) && !conn.blocked {
            self.deferred.push(key);
        } else if !conn.dirty {
            self.update_interest(key);
        }
    }

    /// Brings the epoll set in line with what the connection waits for.
    pub fn update_interest(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        let wanted = conn.wanted();
        if conn.interest == Some(wanted) {
            return;
        }
        let token = Source::Conn(key).token();
        let result = match conn.interest {
            None => self.reactor.add(&conn.fd, token, wanted),
            Some(_) => self.reactor.modify(&conn.fd, token, wanted),
        };
        match result {
            Ok(()) => conn.interest = Some(wanted),
            Err(error) => {
                self.report(&format_args!("cannot watch a connection: {error}"));
                self.close_conn(key, Gone::Broken);
            }
        }
    }

    /// Answers with an error and closes: where the next request begins is not known.
    fn refuse(&mut self, key: Key, error: &HttpError) {
        let response = Response::json(
            error.status(),
            &forkd_agent::protocol::interpreter::Fault {
                code: error.status(),
                message: error.to_string(),
            },
        );
        self.respond(key, response.closing());
        if let Some(conn) = self.conns.get_mut(key) {
            conn.closing = Closing::Drained;
        }
    }

    /// Answers the request as a whole.
    pub fn respond(&mut self, key: Key, mut response: Response) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        conn.keep_alive &= !response.close;
        response.close = !conn.keep_alive;
        conn.out.raw(|out| response.encode(out));
        self.request_done(key);
    }

    /// Begins an answer whose body comes piece by piece.
    pub fn begin_stream(&mut self, key: Key, content_type: &str) {
        self.begin_stream_with(key, content_type, &[]);
    }

    /// As [`Agent::begin_stream`], with more headers.
    pub fn begin_stream_with(&mut self, key: Key, content_type: &str, more: &[(&str, &str)]) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        let mut headers = Headers::new().with("Content-Type", content_type);
        for (name, value) in more {
            headers.push(name, value);
        }
        if !conn.keep_alive {
            headers.push("Connection", "close");
        }
        // The outbox goes on from here: it gathers pieces into chunks.
        conn.out.raw(|out| drop(ChunkedEncoder::head(out, 200, &headers)));
    }

    /// Ends an answer begun by [`Agent::begin_stream`].
    pub fn end_stream(&mut self, key: Key) {
        if let Some(conn) = self.conns.get_mut(key) {
            conn.out.end();
            self.request_done(key);
        }
    }

    fn request_done(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        conn.task = Task::Idle;
        conn.paused = false;
        if !conn.keep_alive && conn.closing == Closing::No {
            conn.closing = Closing::Flushed;
        }
        self.mark_dirty(key);
        self.again.push(key);
    }

    /// Has the connection flushed at the end of this turn.
    pub fn mark_dirty(&mut self, key: Key) {
        if let Some(conn) = self.conns.get_mut(key)
            && !conn.dirty
        {
            conn.dirty = true;
            self.dirty.push(key);
        }
    }

    /// Sends what there is, and closes if that was the last.
    pub fn conn_flush(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        conn.dirty = false;
        match conn.out.flush(&conn.fd) {
            Err(error) => {
                let reset = error.kind() == io::ErrorKind::BrokenPipe;
                self.close_conn(key, if reset { Gone::Eof } else { Gone::Broken });
                return;
            }
            Ok(flushed) => conn.blocked = flushed == Flushed::Blocked,
        }
        match conn.closing {
            Closing::Flushed if !conn.blocked => {
                self.close_conn(key, Gone::Served);
                return;
            }
            Closing::Drained if !conn.blocked => {
                // Fails only if the client has gone, which reading tells as well.
                let _ = rustix::net::shutdown(&conn.fd, rustix::net::Shutdown::Write);
                self.close_soon(key);
            }
            _ => {}
        }
        let roomy = conn_is_roomy(self.conns.get(key));
        if roomy {
            self.resume_producer(key);
        }
        self.settle(key);
    }

    /// Lets whoever feeds the connection go on, if it had paused for it.
    fn resume_producer(&mut self, key: Key) {
        match self.conns.get(key).map(|conn| &conn.task) {
            Some(Task::Stream(stream)) => {
                let process = stream.process;
                self.process_resume(process);
            }
            Some(Task::Execute(execute)) => {
                let context = execute.context;
                self.context_resume(context);
            }
            _ => {}
        }
    }

    /// Gives a connection up.
    pub fn close_conn(&mut self, key: Key, gone: Gone) {
        let Some(conn) = self.conns.remove(key) else { return };
        // Closing takes the descriptor out of the epoll set: it has no duplicate.
        drop(conn.fd);
        match conn.task {
            Task::Idle | Task::Init | Task::Input(_) | Task::SendInput => {}
            Task::Stream(stream) => self.stream_gone(key, &stream),
            Task::Execute(execute) => self.execute_gone(key, &execute, gone),
            Task::StartContext(context) => self.context_waiter_gone(key, context),
        }
        self.accept_again();
    }
}

fn conn_is_roomy(conn: Option<&Conn>) -> bool {
    conn.is_some_and(|conn| conn.out.len() <= LOW)
}
