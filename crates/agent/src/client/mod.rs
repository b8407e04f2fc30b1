//! The host's side: blocking clients of the agent, over the VM's vsock socket.
//!
//! Each call opens a connection of its own, so that clients share nothing and a stream that is read
//! slowly holds up nobody. [`Agent`] says how to reach a guest; [`process`] and [`interpreter`] are the
//! two services.

pub mod interpreter;
pub mod process;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use forkd_api::http::{
    Headers, HttpError, Limits, ResponseEvent, ResponseHead, ResponseParser, encode_request,
};
use serde::Deserialize;

use crate::protocol::connect::RpcError;

/// How long the VM process may take to open a port of the guest. It holds connections while the guest
/// does not serve yet, so this spans a fork under load.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a call may take that only asks or tells something.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes read at once.
const READ: usize = 64 << 10;
/// Longest line of a vsock handshake.
const MAX_HANDSHAKE: usize = 512;
/// Longest whole answer that is kept, in bytes.
const MAX_ANSWER: usize = 64 << 20;

/// A call to the agent failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The VM's socket cannot be connected to.
    #[error("cannot connect to {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The VM process opens no connection to the guest.
    #[error("port {port} of the guest is not open: {reason}")]
    Refused {
        /// The guest's port.
        port: u32,
        /// As the VM process says it.
        reason: String,
    },
    /// The connection broke.
    #[error("the connection to the guest agent failed: {0}")]
    Io(#[from] io::Error),
    /// Nothing came in time.
    #[error("the guest agent did not answer within {0:?}")]
    TimedOut(Duration),
    /// The connection ended in the middle of an answer.
    #[error(
        "the guest agent closed the connection before it had answered: the VM was stopped or forked"
    )]
    Ended,
    /// The answer is no HTTP.
    #[error("the guest agent's answer is malformed: {0}")]
    Http(#[from] HttpError),
    /// The answer is not what the protocol says.
    #[error("the guest agent's answer is not understood: {0}")]
    Protocol(String),
    /// The agent refuses the request.
    #[error("the guest agent answered {status}: {message}")]
    Status {
        /// HTTP status.
        status: u16,
        /// What the agent says.
        message: String,
    },
    /// An RPC failed.
    #[error("{0}")]
    Rpc(#[from] RpcError),
}

/// How to reach a guest's agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agent {
    route: Route,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Route {
    /// Through a vsock multiplexer: `CONNECT port`, then `OK`.
    Vsock(PathBuf),
    /// A directory with a socket per port: an agent in test mode.
    Directory(PathBuf),
}

impl Agent {
    /// The agent of the VM with this vsock socket.
    pub fn over_vsock(socket: impl Into<PathBuf>) -> Self {
        Self { route: Route::Vsock(socket.into()) }
    }

    /// An agent that was started with `--listen-unix DIR`.
    pub fn in_directory(dir: impl Into<PathBuf>) -> Self {
        Self { route: Route::Directory(dir.into()) }
    }

    /// Opens a connection to a port of the guest.
    ///
    /// # Errors
    ///
    /// The VM is not there, or refuses, or takes longer than `timeout`.
    pub fn open(&self, port: u32, timeout: Duration) -> Result<UnixStream, ClientError> {
        match &self.route {
            Route::Vsock(path) => open_vsock(path, port, timeout),
            Route::Directory(dir) => connect(&dir.join(port.to_string())),
        }
    }

    /// Whether the agent answers on envd's port.
    ///
    /// # Errors
    ///
    /// Why it does not.
    pub fn health(&self) -> Result<(), ClientError> {
        let request = Call::new("GET", "/health");
        self.call(crate::protocol::ENVD_PORT, &request, None).map(|_| ())
    }

    /// A request whose answer is read as a whole, and must have a good status.
    fn call(
        &self,
        port: u32,
        request: &Call<'_>,
        body: Option<&[u8]>,
    ) -> Result<Vec<u8>, ClientError> {
        let stream = self.open(port, CONNECT_TIMEOUT)?;
        let mut exchange = Exchange::new(stream, Some(CALL_TIMEOUT));
        exchange.send(request, body)?;
        exchange.head()?;
        exchange.rest()
    }
}

fn connect(path: &Path) -> Result<UnixStream, ClientError> {
    forkd_sys::unix_path::connect(path)
        .map_err(|e| ClientError::Connect { path: path.to_owned(), source: e.source })
}

/// Opens a connection to a port of a guest through its VM's vsock socket, as Firecracker's is used.
///
/// # Errors
///
/// The VM is not there, or refuses, or takes longer than `timeout`.
pub fn open_vsock(path: &Path, port: u32, timeout: Duration) -> Result<UnixStream, ClientError> {
    let mut stream = connect(path)?;
    let mut clock = Clock::new(Some(timeout));
    clock.arm(&stream)?;
    let lost = |error| clock.explain(error);
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).map_err(lost)?;
    let mut line = Vec::new();
    // Byte by byte: what follows the line is the guest's.
    loop {
        let mut byte = [0];
        match stream.read(&mut byte).map_err(lost)? {
            0 if line.is_empty() => {
                let reason = "the VM process closed the connection".to_owned();
                return Err(ClientError::Refused { port, reason });
            }
            0 => break,
            _ if byte == *b"\n" => break,
            _ => line.push(byte[0]),
        }
        if line.len() > MAX_HANDSHAKE {
            break;
        }
    }
    let line = String::from_utf8_lossy(&line);
    if line.starts_with("OK ") {
        return Ok(stream);
    }
    let reason = line.strip_prefix("ERR ").unwrap_or(&line).to_owned();
    Err(ClientError::Refused { port, reason })
}

/// The time that a call has left.
#[derive(Debug, Clone, Copy)]
struct Clock {
    limit: Option<(Duration, Instant)>,
}

impl Clock {
    fn new(limit: Option<Duration>) -> Self {
        let at = |limit| Some((limit, Instant::now().checked_add(limit)?));
        Self { limit: limit.and_then(at) }
    }

    /// Lets the next read or write wait for no longer than is left.
    fn arm(&mut self, stream: &UnixStream) -> Result<(), ClientError> {
        let left = match self.limit {
            None => None,
            Some((limit, at)) => match at.checked_duration_since(Instant::now()) {
                Some(left) if !left.is_zero() => Some(left),
                _ => return Err(ClientError::TimedOut(limit)),
            },
        };
        stream.set_read_timeout(left)?;
        stream.set_write_timeout(left)?;
        Ok(())
    }

    fn explain(&self, error: io::Error) -> ClientError {
        match (error.kind(), self.limit) {
            (io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut, Some((limit, _))) => {
                ClientError::TimedOut(limit)
            }
            (io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe, _) => ClientError::Ended,
            _ => ClientError::Io(error),
        }
    }
}

/// A request's head.
struct Call<'a> {
    method: &'a str,
    path: &'a str,
    headers: Headers,
}

impl<'a> Call<'a> {
    fn new(method: &'a str, path: &'a str) -> Self {
        Self { method, path, headers: Headers::new().with("Connection", "close") }
    }

    fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push(name, value);
        self
    }
}

/// One request and its answer.
struct Exchange {
    stream: UnixStream,
    parser: ResponseParser,
    clock: Clock,
    /// Where the stream is read to.
    buffer: Vec<u8>,
    ended: bool,
}

impl Exchange {
    fn new(stream: UnixStream, limit: Option<Duration>) -> Self {
        let parser = ResponseParser::new(Limits::STREAMING);
        let buffer = vec![0; READ];
        Self { stream, parser, clock: Clock::new(limit), buffer, ended: false }
    }

    fn send(&mut self, request: &Call<'_>, body: Option<&[u8]>) -> Result<(), ClientError> {
        let mut out = Vec::with_capacity(512 + body.map_or(0, <[u8]>::len));
        encode_request(&mut out, request.method, request.path, &request.headers, body);
        self.write(&out)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), ClientError> {
        self.clock.arm(&self.stream)?;
        self.stream.write_all(bytes).map_err(|e| self.clock.explain(e))
    }

    fn event(&mut self) -> Result<Option<ResponseEvent>, ClientError> {
        loop {
            if let Some(event) = self.parser.next()? {
                return Ok(Some(event));
            }
            self.clock.arm(&self.stream)?;
            match self.stream.read(&mut self.buffer) {
                Ok(0) => match self.parser.finish() {
                    Err(HttpError::Truncated) => return Err(ClientError::Ended),
                    other => return Ok(other?),
                },
                Ok(n) => self.parser.feed(&self.buffer[..n]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.clock.explain(error)),
            }
        }
    }

    /// The answer's head. A bad status is an error, with what the body says.
    fn head(&mut self) -> Result<ResponseHead, ClientError> {
        #[derive(Deserialize)]
        struct Message {
            message: String,
        }
        match self.event()? {
            Some(ResponseEvent::Head(head)) if (200..300).contains(&head.status) => Ok(head),
            Some(ResponseEvent::Head(head)) => {
                let body = self.rest()?;
                if let Ok(error) = serde_json::from_slice::<RpcError>(&body) {
                    return Err(error.into());
                }
                let message = serde_json::from_slice::<Message>(&body).map_or_else(
                    |_| String::from_utf8_lossy(&body).trim().to_owned(),
                    |body| body.message,
                );
                Err(ClientError::Status { status: head.status, message })
            }
            _ => Err(ClientError::Ended),
        }
    }

    /// The next piece of the body; `None` at its end.
    fn piece(&mut self) -> Result<Option<Vec<u8>>, ClientError> {
        if self.ended {
            return Ok(None);
        }
        match self.event()? {
            Some(ResponseEvent::Body(data)) => Ok(Some(data)),
            Some(ResponseEvent::End) => {
                self.ended = true;
                Ok(None)
            }
            Some(ResponseEvent::Head(_)) | None => Err(ClientError::Ended),
        }
    }

    /// The rest of the body.
    fn rest(&mut self) -> Result<Vec<u8>, ClientError> {
        let mut body = Vec::new();
        while let Some(piece) = self.piece()? {
            body.extend_from_slice(&piece);
            if body.len() > MAX_ANSWER {
                return Err(ClientError::Protocol(format!("it has more than {MAX_ANSWER} bytes")));
            }
        }
        Ok(body)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A multiplexer that answers one handshake.
    fn answering(answer: &'static [u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 14];
            stream.read_exact(&mut request).unwrap();
            assert_eq!(&request, b"CONNECT 49983\n");
            stream.write_all(answer).unwrap();
            std::thread::sleep(Duration::from_millis(300));
        });
        (dir, path)
    }

    #[test]
    fn a_handshake_takes_no_more_than_its_line() {
        let (_dir, path) = answering(b"OK 1073741824\nhello");
        let mut stream = open_vsock(&path, 49983, CONNECT_TIMEOUT).unwrap();
        let mut text = [0; 5];
        stream.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hello");
    }

    #[test]
    fn a_refusal_says_why() {
        let (_dir, path) = answering(b"ERR the guest agent did not acknowledge\n");
        let error = open_vsock(&path, 49983, CONNECT_TIMEOUT).unwrap_err();
        assert_eq!(
            error.to_string(),
            "port 49983 of the guest is not open: the guest agent did not acknowledge"
        );
    }

    #[test]
    fn silence_ends_at_the_time_limit() {
        let (_dir, path) = answering(b"");
        let error = open_vsock(&path, 49983, Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, ClientError::TimedOut(_)), "{error}");
        let error = open_vsock(Path::new("/nonexistent/x"), 1, CONNECT_TIMEOUT).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/x"), "{error}");
    }
}
