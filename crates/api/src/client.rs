//! A blocking client of the per-VM API.
//!
//! One connection, one request at a time, each with a deadline for the whole of it. After an error
//! of the connection it is closed, and later requests say so.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use forkd_sys::{PathError, unix_path};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::http::{
    Headers, HttpError, Limits, Response, ResponseEvent, ResponseHead, ResponseParser,
    encode_request,
};
use crate::types::Fault;

/// Largest answer taken, in bytes.
const MAX_ANSWER: u64 = 64 << 20;
/// Deadline of a request unless another is set.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens, or we may not connect.
    #[error(transparent)]
    Connect(#[from] PathError),
    /// The connection broke.
    #[error("cannot {action} {method} {target}: {source}")]
    Io {
        /// `send` or `read the answer to`.
        action: &'static str,
        /// Method of the request.
        method: String,
        /// Target of the request.
        target: String,
        /// Why.
        source: io::Error,
    },
    /// No whole answer in time.
    #[error("no answer to {method} {target} within {timeout:?}")]
    Timeout {
        /// Method of the request.
        method: String,
        /// Target of the request.
        target: String,
        /// The deadline.
        timeout: Duration,
    },
    /// The answer is not HTTP.
    #[error("the answer to {method} {target} cannot be understood: {source}")]
    Http {
        /// Method of the request.
        method: String,
        /// Target of the request.
        target: String,
        /// Why.
        source: HttpError,
    },
    /// The server says no.
    #[error("{message} (status {status})")]
    Fault {
        /// Status code, 400 to 599.
        status: u16,
        /// What the server says.
        message: String,
    },
    /// The answer's body is not what was expected.
    #[error("the answer to {method} {target} is not as expected: {source}")]
    Decode {
        /// Method of the request.
        method: String,
        /// Target of the request.
        target: String,
        /// Why.
        source: serde_json::Error,
    },
    /// The request's body cannot be put as JSON.
    #[error("the body of {method} {target} cannot be put as JSON: {source}")]
    Encode {
        /// Method of the request.
        method: String,
        /// Target of the request.
        target: String,
        /// Why.
        source: serde_json::Error,
    },
    /// An earlier error has closed the connection, or the server has.
    #[error("the connection is closed")]
    Closed,
}

impl ClientError {
    /// The status of the server's answer, if it gave one.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Fault { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// Whether nobody listens at the path: no such socket, or it is a dead process's.
    pub fn is_nobody_there(&self) -> bool {
        let kind = match self {
            Self::Connect(error) => error.kind(),
            _ => return false,
        };
        matches!(kind, io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
    }
}

/// A connection to a server.
#[derive(Debug)]
pub struct Client {
    stream: Option<UnixStream>,
    parser: ResponseParser,
    timeout: Duration,
}

/// Method and target, for errors.
#[derive(Clone, Copy)]
struct Asked<'a> {
    method: &'a str,
    target: &'a str,
}

impl Client {
    /// Connects to the socket at a path of any length.
    ///
    /// # Errors
    /// [`ClientError::Connect`].
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        Ok(Self::over(unix_path::connect(path)?))
    }

    /// Takes a connected stream; it must be blocking.
    pub fn over(stream: UnixStream) -> Self {
        let parser = ResponseParser::new(Limits::body(MAX_ANSWER));
        Self { stream: Some(stream), parser, timeout: DEFAULT_TIMEOUT }
    }

    /// Sets the deadline of each request, from its begin to the end of its answer.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sends a request and takes the whole answer, whatever its status.
    ///
    /// # Errors
    /// All but [`ClientError::Fault`], [`ClientError::Decode`] and [`ClientError::Encode`].
    pub fn request(
        &mut self,
        method: &str,
        target: &str,
        body: Option<&[u8]>,
    ) -> Result<Response, ClientError> {
        let asked = Asked { method, target };
        // Taken out, and put back only when the answer ended where it should.
        let mut stream = self.stream.take().ok_or(ClientError::Closed)?;
        let deadline = Instant::now().checked_add(self.timeout);
        let mut bytes = Vec::new();
        let headers = match body {
            Some(_) => Headers::new().with("Content-Type", "application/json"),
            None => Headers::new(),
        };
        encode_request(&mut bytes, method, target, &headers, body);
        let fail = |action| move |source| asked.io(action, source);
        self.arm(&stream, deadline, asked)?;
        match stream.write_all(&bytes) {
            Ok(()) => {}
            // The server may have refused by closing; then it may have said why before.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Err(error) if is_timeout(&error) => return Err(self.timed_out(asked)),
            Err(error) => return Err(fail("send")(error)),
        }
        let (head, body) = self.take_answer(&mut stream, deadline, asked)?;
        if head.keep_alive {
            self.stream = Some(stream);
        }
        let close = !head.keep_alive;
        Ok(Response { status: head.status, headers: head.headers, body, close })
    }

    fn take_answer(
        &mut self,
        stream: &mut UnixStream,
        deadline: Option<Instant>,
        asked: Asked<'_>,
    ) -> Result<(ResponseHead, Vec<u8>), ClientError> {
        let (mut head, mut body) = (None, Vec::new());
        let mut buffer = vec![0; 64 << 10];
        loop {
            while let Some(event) = self.parser.next().map_err(|e| asked.http(e))? {
                match event {
                    ResponseEvent::Head(h) => head = Some(h),
                    ResponseEvent::Body(data) => body.extend_from_slice(&data),
                    ResponseEvent::End => {
                        if let Some(head) = head.take() {
                            return Ok((head, body));
                        }
                    }
                }
            }
            self.arm(stream, deadline, asked)?;
            match stream.read(&mut buffer) {
                Ok(0) => {
                    self.parser.finish().map_err(|e| asked.http(e))?;
                    return match head {
                        Some(head) => Ok((head, body)),
                        None => Err(asked.io(
                            "read the answer to",
                            io::Error::new(
                                io::ErrorKind::UnexpectedEof,
                                "the connection was closed",
                            ),
                        )),
                    };
                }
                Ok(count) => self.parser.feed(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_timeout(&error) => return Err(self.timed_out(asked)),
                Err(error) => return Err(asked.io("read the answer to", error)),
            }
        }
    }

    /// Lets the next read or write take no longer than is left.
    fn arm(
        &self,
        stream: &UnixStream,
        deadline: Option<Instant>,
        asked: Asked<'_>,
    ) -> Result<(), ClientError> {
        let left = match deadline {
            None => None,
            Some(at) => match at.saturating_duration_since(Instant::now()) {
                Duration::ZERO => return Err(self.timed_out(asked)),
                left => Some(left),
            },
        };
        stream
            .set_read_timeout(left)
            .and_then(|()| stream.set_write_timeout(left))
            .map_err(|source| asked.io("set a deadline for", source))
    }

    fn timed_out(&self, asked: Asked<'_>) -> ClientError {
        ClientError::Timeout {
            method: asked.method.to_owned(),
            target: asked.target.to_owned(),
            timeout: self.timeout,
        }
    }

    /// Sends a request and takes an answer whose status is 2xx.
    ///
    /// # Errors
    /// As [`Client::request`], and [`ClientError::Fault`] for any other status.
    pub fn request_ok(
        &mut self,
        method: &str,
        target: &str,
        body: Option<&[u8]>,
    ) -> Result<Response, ClientError> {
        let response = self.request(method, target, body)?;
        if (200..300).contains(&response.status) {
            return Ok(response);
        }
        let message = match serde_json::from_slice::<Fault>(&response.body) {
            Ok(fault) => fault.fault_message,
            Err(_) => {
                let text = String::from_utf8_lossy(&response.body);
                let text = text.trim();
                let start: String = text.chars().take(200).collect();
                if start.is_empty() { format!("{method} {target} was refused") } else { start }
            }
        };
        Err(ClientError::Fault { status: response.status, message })
    }

    /// `GET`s a JSON value.
    ///
    /// # Errors
    /// As [`Client::request_ok`], and [`ClientError::Decode`].
    pub fn get_json<T: DeserializeOwned>(&mut self, target: &str) -> Result<T, ClientError> {
        let response = self.request_ok("GET", target, None)?;
        Asked { method: "GET", target }.decode(&response)
    }

    /// `POST`s a JSON value and takes one.
    ///
    /// # Errors
    /// As [`Client::request_ok`], [`ClientError::Encode`] and [`ClientError::Decode`].
    pub fn post_json<B: Serialize + ?Sized, T: DeserializeOwned>(
        &mut self,
        target: &str,
        body: &B,
    ) -> Result<T, ClientError> {
        let response = self.send_json("POST", target, body)?;
        Asked { method: "POST", target }.decode(&response)
    }

    /// Sends a JSON value by any method, and takes an answer with status 2xx.
    ///
    /// # Errors
    /// As [`Client::request_ok`], and [`ClientError::Encode`].
    pub fn send_json<B: Serialize + ?Sized>(
        &mut self,
        method: &str,
        target: &str,
        body: &B,
    ) -> Result<Response, ClientError> {
        let body = serde_json::to_vec(body).map_err(|source| ClientError::Encode {
            method: method.to_owned(),
            target: target.to_owned(),
            source,
        })?;
        self.request_ok(method, target, Some(&body))
    }
}

impl Asked<'_> {
    fn io(self, action: &'static str, source: io::Error) -> ClientError {
        let (method, target) = (self.method.to_owned(), self.target.to_owned());
        ClientError::Io { action, method, target, source }
    }

    fn http(self, source: HttpError) -> ClientError {
        let (method, target) = (self.method.to_owned(), self.target.to_owned());
        ClientError::Http { method, target, source }
    }

    fn decode<T: DeserializeOwned>(self, response: &Response) -> Result<T, ClientError> {
        serde_json::from_slice(&response.body).map_err(|source| ClientError::Decode {
            method: self.method.to_owned(),
            target: self.target.to_owned(),
            source,
        })
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}
