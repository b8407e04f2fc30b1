//! Client of `process.Process`.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use forkd_sys::reactor::wait_readable;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Agent, CALL_TIMEOUT, CONNECT_TIMEOUT, Call, ClientError, Exchange};
use crate::protocol::ENVD_PORT;
use crate::protocol::connect::{self, EndOfStream, FLAG_END, STREAM_TYPE, UNARY_TYPE, write_json};
use crate::protocol::process::{
    DataEvent, Empty, ListResponse, ProcessEvent, ProcessInfo, ProcessInput, ProcessSelector, Pty,
    PtySize, SERVICE, SelectRequest, SendInputRequest, SendSignalRequest, Signal, StartRequest,
    StreamInputData, StreamInputRequest, StreamResponse, UpdateRequest,
};
use crate::protocol::raw::{self, Channel};

/// How a process is started or watched.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CallOptions {
    /// The user to run as; absent: root.
    pub user: Option<String>,
    /// `start`: the process is killed after this. `connect`: the stream ends after this.
    pub timeout: Option<Duration>,
    /// The agent says that it lives when there was nothing to say for this long. Whole seconds.
    pub keepalive: Option<Duration>,
}

/// Starts and handles processes of a guest.
#[derive(Debug, Clone)]
pub struct ProcessClient {
    agent: Agent,
}

impl ProcessClient {
    /// Of this guest.
    pub const fn new(agent: Agent) -> Self {
        Self { agent }
    }

    /// Starts a process; returns once it runs.
    ///
    /// # Errors
    ///
    /// It cannot be started, or the agent not be reached.
    pub fn start(
        &self,
        request: &StartRequest,
        options: &CallOptions,
    ) -> Result<ProcessStream, ClientError> {
        self.stream("Start", request, options)
    }

    /// Watches a process that was started before; also one that has ended not long ago.
    ///
    /// # Errors
    ///
    /// There is none, or the agent cannot be reached.
    pub fn connect(
        &self,
        process: ProcessSelector,
        options: &CallOptions,
    ) -> Result<ProcessStream, ClientError> {
        self.stream("Connect", &SelectRequest { process }, options)
    }

    /// The processes that run.
    ///
    /// # Errors
    ///
    /// The agent cannot be reached.
    pub fn list(&self) -> Result<Vec<ProcessInfo>, ClientError> {
        let answer: ListResponse = self.unary("List", &Empty {})?;
        Ok(answer.processes)
    }

    /// Sends input; returns once the process's pipe or terminal has taken it.
    ///
    /// # Errors
    ///
    /// No such process, or it takes no input.
    pub fn send_input(
        &self,
        process: ProcessSelector,
        input: ProcessInput,
    ) -> Result<(), ClientError> {
        self.unary("SendInput", &SendInputRequest { process, input }).map(|Empty {}| ())
    }

    /// Closes standard input.
    ///
    /// # Errors
    ///
    /// No such process, or it has a terminal.
    pub fn close_stdin(&self, process: ProcessSelector) -> Result<(), ClientError> {
        self.unary("CloseStdin", &SelectRequest { process }).map(|Empty {}| ())
    }

    /// Sends a signal (1 to 64) to a process and its group.
    ///
    /// # Errors
    ///
    /// No such process or signal.
    pub fn send_signal(&self, process: ProcessSelector, signal: i32) -> Result<(), ClientError> {
        let request = SendSignalRequest { process, signal: Some(Signal(signal)) };
        self.unary("SendSignal", &request).map(|Empty {}| ())
    }

    /// Tells a process that its terminal has another size.
    ///
    /// # Errors
    ///
    /// No such process, or it has no terminal.
    pub fn resize(&self, process: ProcessSelector, size: PtySize) -> Result<(), ClientError> {
        let request = UpdateRequest { process, pty: Some(Pty { size: Some(size) }) };
        self.unary("Update", &request).map(|Empty {}| ())
    }

    /// Opens a stream of input to a process: one connection for any number of pieces.
    ///
    /// # Errors
    ///
    /// The agent cannot be reached. That there is no such process is told by [`InputStream::finish`].
    pub fn stream_input(&self, process: ProcessSelector) -> Result<InputStream, ClientError> {
        let stream = self.agent.open(ENVD_PORT, CONNECT_TIMEOUT)?;
        let mut exchange = Exchange::new(stream, None);
        let path = format!("{SERVICE}StreamInput");
        let request = Call::new("POST", &path)
            .header("Content-Type", STREAM_TYPE)
            .header("Transfer-Encoding", "chunked");
        exchange.send(&request, None)?;
        let mut input = InputStream { exchange, buffer: Vec::new() };
        let start = Some(SelectRequest { process });
        input.message(&StreamInputRequest { start, ..Default::default() })?;
        Ok(input)
    }

    fn unary<Q: Serialize, A: DeserializeOwned>(
        &self,
        method: &str,
        request: &Q,
    ) -> Result<A, ClientError> {
        let path = format!("{SERVICE}{method}");
        let call = Call::new("POST", &path).header("Content-Type", UNARY_TYPE);
        let mut body = Vec::new();
        write_json(&mut body, request);
        let answer = self.agent.call(ENVD_PORT, &call, Some(&body))?;
        serde_json::from_slice(&answer).map_err(|e| ClientError::Protocol(e.to_string()))
    }

    fn stream<Q: Serialize>(
        &self,
        method: &str,
        request: &Q,
        options: &CallOptions,
    ) -> Result<ProcessStream, ClientError> {
        let path = format!("{SERVICE}{method}");
        let mut call = Call::new("POST", &path)
            .header("Content-Type", STREAM_TYPE)
            .header(raw::HEADER, raw::VERSION);
        if let Some(user) = &options.user {
            let text = STANDARD.encode(format!("{user}:"));
            call = call.header("Authorization", &format!("Basic {text}"));
        }
        if let Some(timeout) = options.timeout {
            let millis = timeout.as_millis().max(1).to_string();
            call = call.header("Connect-Timeout-Ms", &millis);
        }
        if let Some(keepalive) = options.keepalive {
            let seconds = keepalive.as_secs().max(1).to_string();
            call = call.header("Keepalive-Ping-Interval", &seconds);
        }
        let mut body = Vec::new();
        connect::encode_with(&mut body, 0, |out| write_json(out, request));
        let stream = self.agent.open(ENVD_PORT, CONNECT_TIMEOUT)?;
        let mut exchange = Exchange::new(stream, Some(CALL_TIMEOUT));
        exchange.send(&call, Some(&body))?;
        let head = exchange.head()?;
        let raw = head.headers.get(raw::HEADER) == Some(raw::VERSION);
        let mut events = ProcessStream { exchange, buffer: Vec::new(), pid: 0, raw, done: false };
        match events.next() {
            Some(Ok(ProcessEvent::Start(start))) => events.pid = start.pid,
            Some(Err(error)) => return Err(error),
            _ => return Err(ClientError::Protocol("the first event is no start".into())),
        }
        // From here on the process decides how long it takes.
        events.exchange.clock.limit = None;
        Ok(events)
    }
}

/// The events of a process, the last of which is its end. Dropping it leaves the process running.
pub struct ProcessStream {
    exchange: Exchange,
    buffer: Vec<u8>,
    pid: u32,
    raw: bool,
    done: bool,
}

impl ProcessStream {
    /// The process's id, in the guest.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether the agent takes raw frames: [`InputStream::send_raw`].
    #[must_use]
    pub const fn takes_raw(&self) -> bool {
        self.raw
    }

    /// A handle on the connection: shutting it down ends the iteration from another thread.
    ///
    /// # Errors
    ///
    /// Out of descriptors.
    pub fn connection(&self) -> std::io::Result<UnixStream> {
        self.exchange.stream.try_clone()
    }

    fn advance(&mut self) -> Result<Option<ProcessEvent>, ClientError> {
        loop {
            let frame =
                connect::decode(&self.buffer).map_err(|e| ClientError::Protocol(e.to_string()))?;
            if let Some(frame) = frame {
                let len = frame.encoded_len();
                let malformed = |e: serde_json::Error| ClientError::Protocol(e.to_string());
                if frame.flags & FLAG_END != 0 {
                    let end: EndOfStream =
                        serde_json::from_slice(frame.payload).map_err(malformed)?;
                    return end.error.map_or(Ok(None), |error| Err(error.into()));
                }
                if let Some(split) = raw::split(&frame) {
                    let (channel, data) =
                        split.map_err(|e| ClientError::Protocol(e.to_string()))?;
                    let data = match channel {
                        Channel::Stdout | Channel::Stdin => DataEvent::Stdout(data.to_vec()),
                        Channel::Stderr => DataEvent::Stderr(data.to_vec()),
                        Channel::Terminal => DataEvent::Pty(data.to_vec()),
                    };
                    self.buffer.drain(..len);
                    return Ok(Some(ProcessEvent::Data(data)));
                }
                let message: StreamResponse =
                    serde_json::from_slice(frame.payload).map_err(malformed)?;
                self.buffer.drain(..len);
                return Ok(Some(message.event));
            }
            match self.exchange.piece()? {
                Some(piece) => self.buffer.extend_from_slice(&piece),
                None => return Err(ClientError::Ended),
            }
        }
    }
}

impl Iterator for ProcessStream {
    type Item = Result<ProcessEvent, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let next = self.advance().transpose();
        self.done = !matches!(next, Some(Ok(_)));
        next
    }
}

/// Input on its way to a process.
pub struct InputStream {
    exchange: Exchange,
    /// Where pieces are put together.
    buffer: Vec<u8>,
}

impl InputStream {
    /// Sends a piece. Blocks while the process reads more slowly than this is called.
    ///
    /// # Errors
    ///
    /// The connection broke, or the agent has refused something before.
    pub fn send(&mut self, input: ProcessInput) -> Result<(), ClientError> {
        let data = Some(StreamInputData { input });
        self.message(&StreamInputRequest { data, ..Default::default() })
    }

    /// As [`InputStream::send`], without JSON and base64: to an agent that [takes it](ProcessStream::takes_raw).
    ///
    /// # Errors
    ///
    /// As for [`InputStream::send`].
    pub fn send_raw(&mut self, channel: Channel, data: &[u8]) -> Result<(), ClientError> {
        self.frame(|out| raw::encode(out, channel, data))
    }

    /// Says that there is no more, and waits until all has been taken. Standard input stays open.
    ///
    /// # Errors
    ///
    /// Some of it was not taken.
    pub fn finish(mut self) -> Result<(), ClientError> {
        self.exchange.write(b"0\r\n\r\n")?;
        self.exchange.head()?;
        let body = self.exchange.rest()?;
        let mut rest = body.as_slice();
        loop {
            let frame = connect::decode(rest).map_err(|e| ClientError::Protocol(e.to_string()))?;
            let Some(frame) = frame else { return Err(ClientError::Ended) };
            if frame.is_end() {
                let end: EndOfStream = serde_json::from_slice(frame.payload)
                    .map_err(|e| ClientError::Protocol(e.to_string()))?;
                return end.error.map_or(Ok(()), |error| Err(error.into()));
            }
            rest = &rest[frame.encoded_len()..];
        }
    }

    fn message(&mut self, message: &StreamInputRequest) -> Result<(), ClientError> {
        self.frame(|out| connect::encode_with(out, 0, |out| write_json(out, message)))
    }

    /// Sends one frame as a chunk of its own, unless the agent has answered: before the end that is a refusal.
    fn frame(&mut self, encode: impl FnOnce(&mut Vec<u8>)) -> Result<(), ClientError> {
        if wait_readable(&self.exchange.stream, Some(Duration::ZERO))? {
            return Err(ClientError::Ended);
        }
        self.buffer.clear();
        // The size is known only behind it: leading zeros fill the room kept for it.
        self.buffer.extend_from_slice(b"00000000\r\n");
        encode(&mut self.buffer);
        let size = format!("{:08x}", self.buffer.len() - 10);
        self.buffer[..size.len()].copy_from_slice(size.as_bytes());
        self.buffer.extend_from_slice(b"\r\n");
        self.exchange.write(&self.buffer)
    }
}
