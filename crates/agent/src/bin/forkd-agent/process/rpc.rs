//! The methods of `process.Process`.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use forkd_agent::protocol::base64_bytes;
use forkd_agent::protocol::connect::{self, Code, RpcError, STREAM_TYPE, UNARY_TYPE, write_json};
use forkd_agent::protocol::process::{
    Empty, EndEvent, ListResponse, ProcessEvent, ProcessInfo, ProcessInput, ProcessSelector,
    SelectRequest, SendInputRequest, SendSignalRequest, StartEvent, StartRequest, StreamResponse,
    UpdateRequest,
};
use forkd_agent::protocol::raw::{self, Channel};
use forkd_api::http::{RequestHead, Response};
use rustix::termios::tcsetwinsize;
use serde::de::DeserializeOwned;

use super::start::winsize;
use super::stdin::Sent;
use super::{Ended, Processes};
use crate::agent::{Agent, Timer};
use crate::conn::{Conn, Task};
use crate::kill;
use crate::outbox::Outbox;
use crate::slab::Key;
use crate::timers::TimerId;

/// A connection is sent the events of a process.
pub struct Stream {
    /// Which.
    pub process: Key,
    keepalive: Option<(Duration, TimerId)>,
    deadline: Option<TimerId>,
    /// Something was sent since the last keepalive was due.
    active: bool,
    /// Its client takes data in raw frames.
    raw: bool,
}

/// Most bytes of a process in one JSON event, however many were read at once.
const EVENT: usize = 64 << 10;

/// Sends data of a process to one that listens.
pub fn send_data(conn: &mut Conn, channel: Channel, data: &[u8]) {
    let Task::Stream(stream) = &mut conn.task else { return };
    stream.active = true;
    if stream.raw {
        conn.out.piece(|out| raw::encode(out, channel, data));
        return;
    }
    for data in data.chunks(EVENT) {
        write_data(&mut conn.out, channel, data);
    }
}

/// Writes a data event as a frame.
fn write_data(out: &mut Outbox, channel: Channel, data: &[u8]) {
    let kind = match channel {
        Channel::Terminal => "pty",
        Channel::Stderr => "stderr",
        Channel::Stdin | Channel::Stdout => "stdout",
    };
    out.piece(|out| {
        connect::encode_with(out, 0, |out| {
            out.extend_from_slice(b"{\"event\":{\"data\":{\"");
            out.extend_from_slice(kind.as_bytes());
            out.extend_from_slice(b"\":\"");
            base64_bytes::encode_into(data, out);
            out.extend_from_slice(b"\"}}}");
        });
    });
}

fn write_event(out: &mut Outbox, event: ProcessEvent) {
    out.piece(|out| connect::encode_with(out, 0, |out| write_json(out, &StreamResponse { event })));
}

pub(super) fn parse<T: DeserializeOwned>(json: &[u8]) -> Result<T, RpcError> {
    serde_json::from_slice(json).map_err(|e| RpcError::new(Code::InvalidArgument, e.to_string()))
}

/// The one message of a request that is a stream by its content type only.
fn parse_framed<T: DeserializeOwned>(body: &[u8]) -> Result<T, RpcError> {
    let invalid = |text: String| RpcError::new(Code::InvalidArgument, text);
    let frame = connect::decode(body).map_err(|e| invalid(e.to_string()))?;
    let frame = frame.ok_or_else(|| invalid("the request's frame is not complete".into()))?;
    parse(frame.payload)
}

/// The user in `Authorization: Basic`; nobody's password is looked at: the host has let them in.
fn basic_user(head: &RequestHead) -> Result<Option<String>, RpcError> {
    let Some(value) = head.headers.get("authorization") else { return Ok(None) };
    let user = value
        .split_once(' ')
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("basic"))
        .and_then(|(_, text)| STANDARD.decode(text.trim()).ok())
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .map(|text| text.split(':').next().unwrap_or("").to_owned());
    match user {
        Some(user) => Ok(Some(user).filter(|user| !user.is_empty())),
        None => Err(RpcError::new(Code::Unauthenticated, "malformed Authorization header")),
    }
}

/// Whether the client of a stream takes raw frames.
fn takes_raw(head: &RequestHead) -> bool {
    head.headers.get(raw::HEADER).is_some_and(|version| version.trim() == raw::VERSION)
}

fn millis(head: &RequestHead, name: &str) -> Result<Option<u64>, RpcError> {
    let Some(text) = head.headers.get(name) else { return Ok(None) };
    let number = text.trim().parse::<u64>().map_err(|_| {
        RpcError::new(Code::InvalidArgument, format!("header {name}: {text:?} is no number"))
    })?;
    Ok(Some(number).filter(|n| *n > 0))
}

impl Processes {
    pub(super) fn find(&self, selector: &ProcessSelector) -> Result<Key, RpcError> {
        let key = match (selector.pid, &selector.tag) {
            (Some(pid), _) => {
                i32::try_from(pid).ok().and_then(|pid| self.by_pid.get(&pid).copied())
            }
            (None, Some(tag)) => {
                let tagged = self.all.iter().find(|(_, p)| p.tag.as_ref() == Some(tag));
                tagged.map(|(key, _)| key)
            }
            (None, None) => {
                return Err(RpcError::new(Code::InvalidArgument, "no process is selected"));
            }
        };
        key.ok_or_else(|| {
            let what = match (selector.pid, &selector.tag) {
                (Some(pid), _) => format!("process with pid {pid} not found"),
                (None, tag) => format!("process with tag {:?} not found", tag.as_deref()),
            };
            RpcError::new(Code::NotFound, what)
        })
    }

    fn find_ended(&self, selector: &ProcessSelector) -> Option<&Ended> {
        self.ended.iter().rev().find(|ended| match (selector.pid, &selector.tag) {
            (Some(pid), _) => u32::try_from(ended.pid) == Ok(pid),
            (None, Some(tag)) => ended.tag.as_ref() == Some(tag),
            (None, None) => false,
        })
    }
}

impl Agent {
    /// A method's request whose body is there as a whole. `method` is the path's last part.
    pub fn process_rpc(&mut self, key: Key, method: &str, head: &RequestHead, body: &[u8]) {
        let streaming = matches!(method, "Start" | "Connect");
        let wanted = if streaming { STREAM_TYPE } else { UNARY_TYPE };
        let given = head.headers.get("content-type").unwrap_or("");
        let given = given.split(';').next().unwrap_or("").trim();
        if !given.eq_ignore_ascii_case(wanted) {
            let text = format!("content type {given:?} is not {wanted:?}");
            let body = RpcError::new(Code::InvalidArgument, text);
            self.respond(key, Response::json(415, &body));
            return;
        }
        let result = match method {
            "Start" => self.start(key, head, body),
            "Connect" => self.connect(key, head, body),
            "List" => Ok(self.list()),
            "Update" => self.update(body),
            "SendInput" => self.send_input(key, body),
            "SendSignal" => self.send_signal(body),
            "CloseStdin" => self.close_stdin(body),
            other => Err(RpcError::new(
                Code::Unimplemented,
                format!("process.Process has no method {other:?}"),
            )),
        };
        match result {
            Ok(Some(json)) => self.respond(key, Response::bytes(200, UNARY_TYPE, json)),
            Ok(None) => {}
            Err(error) if streaming => {
                self.begin_stream(key, STREAM_TYPE);
                if let Some(conn) = self.conns.get_mut(key) {
                    conn.out.piece(|out| connect::encode_end(out, Some(&error)));
                }
                self.end_stream(key);
            }
            Err(error) => self.respond(key, rpc_failure(&error)),
        }
    }

    fn list(&self) -> Option<Vec<u8>> {
        let running = self.processes.all.iter().filter(|(_, p)| p.end.is_none());
        let processes = running.map(|(_, p)| ProcessInfo {
            config: p.config.clone(),
            pid: p.pid.unsigned_abs(),
            tag: p.tag.clone(),
        });
        let mut out = Vec::new();
        write_json(&mut out, &ListResponse { processes: processes.collect() });
        Some(out)
    }

    fn start(
        &mut self,
        key: Key,
        head: &RequestHead,
        body: &[u8],
    ) -> Result<Option<Vec<u8>>, RpcError> {
        let request: StartRequest = parse_framed(body)?;
        let user = basic_user(head)?;
        let limit = millis(head, "connect-timeout-ms")?;
        let keepalive = millis(head, "keepalive-ping-interval")?;
        let (process, pid) = self.start_process(request, user.as_deref())?;
        if let Some(limit) = limit {
            let timer = Timer::ProcessDeadline(process);
            let deadline = self.timers.after(Duration::from_millis(limit), timer);
            if let Some(process) = self.processes.all.get_mut(process) {
                process.deadline = deadline;
            }
        }
        self.subscribe(key, process, pid, keepalive, None, takes_raw(head));
        Ok(None)
    }

    fn connect(
        &mut self,
        key: Key,
        head: &RequestHead,
        body: &[u8],
    ) -> Result<Option<Vec<u8>>, RpcError> {
        let request: SelectRequest = parse_framed(body)?;
        let limit = millis(head, "connect-timeout-ms")?;
        let keepalive = millis(head, "keepalive-ping-interval")?;
        match self.processes.find(&request.process) {
            Ok(process) => {
                let pid = self.processes.all.get(process).map_or(0, |p| p.pid);
                self.subscribe(key, process, pid, keepalive, limit, takes_raw(head));
            }
            Err(error) => {
                let ended = self.processes.find_ended(&request.process).ok_or(error)?;
                let (pid, end) = (ended.pid, ended.end.clone());
                self.begin_stream(key, STREAM_TYPE);
                if let Some(conn) = self.conns.get_mut(key) {
                    let start = StartEvent { pid: pid.unsigned_abs() };
                    write_event(&mut conn.out, ProcessEvent::Start(start));
                }
                self.stream_ends(key, &end, false);
            }
        }
        Ok(None)
    }

    /// Makes the connection a subscriber, and tells it that the process runs.
    fn subscribe(
        &mut self,
        key: Key,
        process: Key,
        pid: i32,
        keepalive_s: Option<u64>,
        limit_ms: Option<u64>,
        raw: bool,
    ) {
        if raw {
            self.begin_stream_with(key, STREAM_TYPE, &[(raw::HEADER, raw::VERSION)]);
        } else {
            self.begin_stream(key, STREAM_TYPE);
        }
        let keepalive = keepalive_s.and_then(|seconds| {
            let interval = Duration::from_secs(seconds);
            Some((interval, self.timers.after(interval, Timer::Keepalive(key))?))
        });
        let deadline = limit_ms.and_then(|limit| {
            self.timers.after(Duration::from_millis(limit), Timer::StreamDeadline(key))
        });
        if let Some(conn) = self.conns.get_mut(key) {
            conn.task = Task::Stream(Stream { process, keepalive, deadline, active: true, raw });
            write_event(&mut conn.out, ProcessEvent::Start(StartEvent { pid: pid.unsigned_abs() }));
        }
        if let Some(process) = self.processes.all.get_mut(process) {
            process.subscribers.push(key);
        }
        self.mark_dirty(key);
    }

    /// The process has ended: so does the stream.
    pub fn stream_ends(&mut self, key: Key, end: &EndEvent, timed_out: bool) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        write_event(&mut conn.out, ProcessEvent::End(end.clone()));
        let error = timed_out.then(|| {
            RpcError::new(Code::DeadlineExceeded, "the process was killed at its time limit")
        });
        conn.out.piece(|out| connect::encode_end(out, error.as_ref()));
        self.cancel_stream_timers(key);
        self.end_stream(key);
    }

    fn cancel_stream_timers(&mut self, key: Key) {
        if let Some(Task::Stream(stream)) = self.conns.get(key).map(|conn| &conn.task) {
            self.timers.cancel(stream.keepalive.map(|(_, timer)| timer));
            self.timers.cancel(stream.deadline);
        }
    }

    /// The client of a stream has gone; the process goes on.
    pub fn stream_gone(&mut self, key: Key, stream: &Stream) {
        self.timers.cancel(stream.keepalive.map(|(_, timer)| timer));
        self.timers.cancel(stream.deadline);
        if let Some(process) = self.processes.all.get_mut(stream.process) {
            process.subscribers.retain(|subscriber| *subscriber != key);
        }
        self.process_resume(stream.process);
    }

    /// A keepalive is due: sent unless something else was.
    pub fn stream_keepalive(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        let Task::Stream(stream) = &mut conn.task else { return };
        let Some((interval, _)) = stream.keepalive else { return };
        let silent = !std::mem::take(&mut stream.active);
        let timer = self.timers.after(interval, Timer::Keepalive(key));
        stream.keepalive = timer.map(|timer| (interval, timer));
        if silent {
            write_event(&mut conn.out, ProcessEvent::Keepalive(Empty {}));
            self.mark_dirty(key);
        }
    }

    /// A client wanted to watch for no longer than this.
    pub fn stream_deadline(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        let Task::Stream(stream) = std::mem::take(&mut conn.task) else { return };
        let error = RpcError::new(Code::DeadlineExceeded, "the stream's time limit has passed");
        conn.out.piece(|out| connect::encode_end(out, Some(&error)));
        self.stream_gone(key, &stream);
        self.end_stream(key);
    }

    fn update(&mut self, body: &[u8]) -> Result<Option<Vec<u8>>, RpcError> {
        let request: UpdateRequest = parse(body)?;
        let key = self.processes.find(&request.process)?;
        let Some(process) = self.processes.all.get(key) else { return Ok(empty()) };
        let Some(size) = request.pty.and_then(|pty| pty.size) else { return Ok(empty()) };
        let fd = process.stdin.fd().filter(|_| process.terminal).ok_or_else(|| {
            let text = format!("process {} has no terminal", process.pid);
            RpcError::new(Code::FailedPrecondition, text)
        })?;
        tcsetwinsize(fd, winsize(size)).map_err(|e| {
            RpcError::new(Code::Internal, format!("cannot resize the terminal: {e}"))
        })?;
        Ok(empty())
    }

    fn send_signal(&mut self, body: &[u8]) -> Result<Option<Vec<u8>>, RpcError> {
        let request: SendSignalRequest = parse(body)?;
        let signal = request.signal.map_or(0, |signal| signal.0);
        if !(1..=64).contains(&signal) {
            let text = format!("signal {signal} is none that can be sent");
            return Err(RpcError::new(Code::InvalidArgument, text));
        }
        let key = self.processes.find(&request.process)?;
        if let Some(process) = self.processes.all.get(key)
            && process.end.is_none()
        {
            kill::group(process.pid, signal).map_err(|e| {
                let text = format!("cannot signal process {}: {e}", process.pid);
                RpcError::new(Code::Internal, text)
            })?;
        }
        Ok(empty())
    }

    fn close_stdin(&mut self, body: &[u8]) -> Result<Option<Vec<u8>>, RpcError> {
        let request: SelectRequest = parse(body)?;
        let key = self.processes.find(&request.process)?;
        let Some(process) = self.processes.all.get_mut(key) else { return Ok(empty()) };
        if process.terminal {
            let text = "a terminal's input cannot be closed: send Ctrl+D (0x04) instead";
            return Err(RpcError::new(Code::FailedPrecondition, text));
        }
        process.stdin.close_after_queue();
        self.watch_stdin(key);
        Ok(empty())
    }

    /// Queues input; true if it waits for the process to read.
    pub(super) fn queue_input(
        &mut self,
        key: Key,
        channel: Channel,
        data: &[u8],
    ) -> Result<Sent, RpcError> {
        let Some(process) = self.processes.all.get_mut(key) else {
            return Err(RpcError::new(Code::NotFound, "the process has ended"));
        };
        let pid = process.pid;
        let wrong = |text: &str| {
            Err(RpcError::new(Code::FailedPrecondition, format!("process {pid} {text}")))
        };
        match (channel, process.terminal) {
            (Channel::Stdin, false) | (Channel::Terminal, true) => {}
            (Channel::Stdin, true) => return wrong("has a terminal: send to pty, not to stdin"),
            (Channel::Terminal, false) => {
                return wrong("has no terminal: send to stdin, not to pty");
            }
            (Channel::Stdout | Channel::Stderr, _) => return wrong("takes no input there"),
        }
        let result = process.stdin.send(data);
        self.watch_stdin(key);
        result.map_err(|error| {
            let code = match error {
                super::stdin::StdinError::Full => Code::ResourceExhausted,
                _ => Code::FailedPrecondition,
            };
            RpcError::new(code, format!("process {pid}: {error}"))
        })
    }

    fn send_input(&mut self, conn: Key, body: &[u8]) -> Result<Option<Vec<u8>>, RpcError> {
        let request: SendInputRequest = parse(body)?;
        let key = self.processes.find(&request.process)?;
        let sent = match piece(&request.input) {
            Some((channel, data)) => self.queue_input(key, channel, data)?,
            None => Sent::Written,
        };
        if sent == Sent::Written {
            return Ok(empty());
        }
        self.wait_for_input(conn, key);
        if let Some(conn) = self.conns.get_mut(conn) {
            conn.task = Task::SendInput;
        }
        Ok(None)
    }

    pub(super) fn wait_for_input(&mut self, conn: Key, process: Key) {
        if let Some(process) = self.processes.all.get_mut(process) {
            process.stdin.wait(conn);
        }
    }

    /// What this connection's client sent has been written.
    pub fn input_written(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        match &mut conn.task {
            Task::SendInput => {
                self.respond(key, Response::bytes(200, UNARY_TYPE, b"{}".to_vec()));
            }
            Task::Input(_) => {
                conn.paused = false;
                self.again.push(key);
                self.mark_dirty(key);
            }
            _ => {}
        }
    }

    /// The process will not read what this connection's client sent.
    pub fn input_failed(&mut self, key: Key, pid: i32) {
        let error = RpcError::new(
            Code::FailedPrecondition,
            format!("process {pid} closed its input before it had read all"),
        );
        match self.conns.get(key).map(|conn| &conn.task) {
            Some(Task::SendInput) => self.respond(key, rpc_failure(&error)),
            Some(Task::Input(_)) => self.answer_input(key, Some(&error), false),
            _ => {}
        }
    }
}

/// What a message brings, and for whom.
pub(super) fn piece(input: &ProcessInput) -> Option<(Channel, &[u8])> {
    let stdin = input.stdin.as_ref().map(|data| (Channel::Stdin, data.as_slice()));
    stdin.or_else(|| input.pty.as_ref().map(|data| (Channel::Terminal, data.as_slice())))
}

fn empty() -> Option<Vec<u8>> {
    Some(b"{}".to_vec())
}

/// A unary call's error.
pub fn rpc_failure(error: &RpcError) -> Response {
    Response::json(error.code.http_status(), error)
}

#[cfg(test)]
mod tests {
    use forkd_api::http::Headers;

    use super::*;

    fn head(name: &str, value: &str) -> RequestHead {
        RequestHead {
            method: "POST".into(),
            target: "/".into(),
            headers: Headers::new().with(name, value),
            keep_alive: true,
            expects_continue: false,
        }
    }

    #[test]
    fn user_of_basic_authorization() {
        let user = |value: &str| basic_user(&head("Authorization", value));
        assert_eq!(user("Basic dXNlcjo=").unwrap().as_deref(), Some("user"));
        assert_eq!(user("basic Og==").unwrap(), None);
        assert_eq!(user("Bearer x").unwrap_err().code, Code::Unauthenticated);
        assert_eq!(user("Basic !").unwrap_err().code, Code::Unauthenticated);
        assert_eq!(basic_user(&head("x", "y")).unwrap(), None);
    }

    #[test]
    fn limits_are_numbers_or_absent() {
        let limit = |value: &str| millis(&head("Connect-Timeout-Ms", value), "connect-timeout-ms");
        assert_eq!(limit("60000").unwrap(), Some(60_000));
        assert_eq!(limit("0").unwrap(), None);
        assert_eq!(limit("-1").unwrap_err().code, Code::InvalidArgument);
    }
}
