//! An HTTP server that is one subscriber of an event loop.
//!
//! The loop hands it the readiness of its tokens; it hands back whole requests, each with an id.
//! The answer may come at any later time ([`Server::respond`]), as a fork's does. A connection has
//! at most one request out; what its client pipelines waits in the socket.
//!
//! ```text
//!            whole request                  respond()             flushed
//! READING ------------------> ANSWERING ----------------> WRITING --------> READING
//!    | malformed                  | client gone               | closing
//!    v                            v                           v
//! WRITING --> DRAINING         closed                       closed
//! ```
//!
//! No client can hold up another or the loop: sockets do not block, one readiness reads at most one
//! buffer, and messages are bounded. When all places for connections are taken, a new client takes
//! the place of the one that has gone longest without finishing a request or its answer, if that is
//! longer than the server's patience; until then it waits in the listener's queue. Those with a
//! request out keep their places. Closing with unread input would reset the connection and lose the
//! answer, so where a request is refused midway, what is left of it is drained first, up to a bound.
//!
//! **Fork**: a child must drop an inherited server, or its parent's clients would never see their
//! connections end. Dropping closes descriptors only: it touches no path and no epoll set.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use forkd_sys::reactor::{Interest, Reactor, Readiness, Token};
use forkd_sys::timer::TimerFd;

use crate::http::{CONTINUE, Limits, Request, RequestParser, Response};

/// Most connections at a time.
pub const MAX_CONNECTIONS: usize = 64;
/// Most bytes of input read for one readiness.
const READ_SIZE: usize = 64 << 10;
/// Most connections accepted for one readiness.
const ACCEPT_BATCH: usize = 16;
/// How long a client may be idle, or take for a request, before a new one may take its place.
pub const DEFAULT_PATIENCE: Duration = Duration::from_secs(2);
/// Most input discarded before a close, in bytes.
const MAX_DRAIN: usize = 4 << 20;

/// Tokens from the base on: the listener, the timer, and one for each place.
const LISTENER: u64 = 0;
const TIMER: u64 = 1;
const FIRST_SLOT: u64 = 2;

/// A request that waits for its answer. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RequestId {
    slot: usize,
    serial: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Reading,
    Answering(RequestId),
    Writing,
    Draining { left: usize },
}

#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    parser: RequestParser,
    phase: Phase,
    /// What is to be written, from `written` on.
    output: Vec<u8>,
    written: usize,
    /// Close when the output is written.
    closing: bool,
    /// The client may be sending still.
    unread: bool,
    /// The interest that the reactor knows.
    interest: Interest,
    /// When it was accepted, or last finished a request or an answer.
    progress: Instant,
}

/// What to do with a connection after it was worked on.
#[derive(Debug)]
enum Outcome {
    Keep,
    Close,
    Request(Request),
}

/// The server.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    /// Given up for a moment when no descriptor is left, to accept and refuse a client.
    reserve: Option<std::fs::File>,
    base: u64,
    limits: Limits,
    connections: Vec<Option<Connection>>,
    patience: Duration,
    /// Expires when a place may have become free by the clock alone.
    timer: TimerFd,
    listening: bool,
    serial: u64,
}

impl Server {
    /// How many tokens a server uses, from its base on.
    pub const TOKENS: u64 = FIRST_SLOT + MAX_CONNECTIONS as u64;

    /// Serves the listener's clients, with the tokens `base` to `base + Server::TOKENS - 1`.
    ///
    /// # Errors
    /// The listener cannot be made non-blocking, or there is no descriptor for a timer.
    pub fn new(listener: UnixListener, base: u64) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let mut connections = Vec::new();
        connections.resize_with(MAX_CONNECTIONS, || None);
        Ok(Self {
            listener,
            reserve: open_reserve(),
            base,
            limits: Limits::default(),
            connections,
            patience: DEFAULT_PATIENCE,
            timer: TimerFd::new()?,
            listening: true,
            serial: 0,
        })
    }

    /// Sets the limits of requests on connections made from now on.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Sets how long a client may be idle, or take for a request, before a new one may take its
    /// place when there is no other.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Adds the listener to the loop. To be called once, before anything else.
    ///
    /// # Errors
    /// That of `epoll_ctl(2)`.
    pub fn register(&mut self, reactor: &mut Reactor) -> io::Result<()> {
        self.listening = true;
        reactor.add(&self.timer, Token(self.base + TIMER), Interest::READ)?;
        reactor.add(&self.listener, Token(self.base + LISTENER), Interest::READ)
    }

    /// Whether a token is one of this server's.
    pub fn owns(&self, token: Token) -> bool {
        token.0.checked_sub(self.base).is_some_and(|index| index < Self::TOKENS)
    }

    /// Number of open connections.
    pub fn connections(&self) -> usize {
        self.connections.iter().flatten().count()
    }

    /// Does what a readiness calls for, and returns the requests that are now whole.
    ///
    /// # Errors
    /// Only what concerns the whole server: the reactor or the listener fails. What befalls one
    /// connection closes it.
    pub fn handle(
        &mut self,
        reactor: &mut Reactor,
        readiness: Readiness,
    ) -> io::Result<Vec<(RequestId, Request)>> {
        match readiness.token.0.checked_sub(self.base) {
            Some(LISTENER) => self.accept(reactor).map(|()| Vec::new()),
            Some(TIMER) => {
                self.timer.drain()?;
                self.listen(reactor).map(|()| Vec::new())
            }
            Some(index @ FIRST_SLOT..Self::TOKENS) => {
                // Below TOKENS, so it fits.
                self.serve(reactor, (index - FIRST_SLOT) as usize, readiness)
            }
            _ => Ok(Vec::new()),
        }
    }

    /// Answers a request. False if its client has gone.
    ///
    /// # Errors
    /// That of `epoll_ctl(2)`.
    pub fn respond(
        &mut self,
        reactor: &mut Reactor,
        id: RequestId,
        response: Response,
    ) -> io::Result<bool> {
        let Some(connection) = self.connections.get_mut(id.slot).and_then(Option::as_mut) else {
            return Ok(false);
        };
        if connection.phase != Phase::Answering(id) {
            return Ok(false);
        }
        connection.answer(response);
        if matches!(connection.write(), Outcome::Close) {
            self.close(reactor, id.slot)?;
            return Ok(false);
        }
        self.update_interest(reactor, id.slot)?;
        Ok(true)
    }

    fn serve(
        &mut self,
        reactor: &mut Reactor,
        slot: usize,
        readiness: Readiness,
    ) -> io::Result<Vec<(RequestId, Request)>> {
        let Some(connection) = self.connections.get_mut(slot).and_then(Option::as_mut) else {
            return Ok(Vec::new());
        };
        let outcome = connection.work(readiness);
        let mut requests = Vec::new();
        match outcome {
            Outcome::Close => self.close(reactor, slot)?,
            Outcome::Keep => self.update_interest(reactor, slot)?,
            Outcome::Request(request) => {
                self.serial += 1;
                let id = RequestId { slot, serial: self.serial };
                connection.phase = Phase::Answering(id);
                connection.progress = Instant::now();
                connection.closing = !request.keep_alive;
                self.update_interest(reactor, slot)?;
                // Not if it had to be closed: nobody would hear what came of the request.
                if self.connections.get(slot).is_some_and(Option::is_some) {
                    requests.push((id, request));
                }
            }
        }
        Ok(requests)
    }

    fn accept(&mut self, reactor: &mut Reactor) -> io::Result<()> {
        for _ in 0..ACCEPT_BATCH {
            let Some(place) = self.place_for_one_more() else {
                // The next client waits until a connection closes or the timer says to look again.
                reactor.modify(&self.listener, Token(self.base + LISTENER), Interest::NONE)?;
                self.listening = false;
                return self.timer.arm(self.patience);
            };
            match self.listener.accept() {
                Ok((stream, _)) => {
                    if let Place::TakenBy(slot) = place {
                        self.close(reactor, slot)?;
                    }
                    // One that can't be served is closed, as others may be served still.
                    drop(self.admit(reactor, place.slot(), stream));
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc_errno::EMFILE | libc_errno::ENFILE) => {
                        self.refuse_one();
                        return Ok(());
                    }
                    _ if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                    // The client has gone again, or a signal came.
                    _ if matches!(
                        error.kind(),
                        io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted
                    ) => {}
                    _ => return Err(error),
                },
            }
        }
        Ok(())
    }

    fn admit(&mut self, reactor: &mut Reactor, slot: usize, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        let interest = Interest::READ;
        reactor.add(&stream, self.token(slot), interest)?;
        let connection = Connection {
            stream,
            parser: RequestParser::new(self.limits),
            phase: Phase::Reading,
            output: Vec::new(),
            written: 0,
            closing: false,
            unread: false,
            interest,
            progress: Instant::now(),
        };
        if let Some(place) = self.connections.get_mut(slot) {
            *place = Some(connection);
        }
        Ok(())
    }

    /// Where a new connection may go: a free place, or that of the connection that has made no
    /// progress for longest, if that tries the server's patience.
    fn place_for_one_more(&self) -> Option<Place> {
        if let Some(slot) = self.connections.iter().position(Option::is_none) {
            return Some(Place::Free(slot));
        }
        self.connections
            .iter()
            .enumerate()
            .filter_map(|(slot, connection)| Some((slot, connection.as_ref()?)))
            .filter(|(_, connection)| !matches!(connection.phase, Phase::Answering(_)))
            .min_by_key(|(_, connection)| connection.progress)
            .filter(|(_, connection)| connection.progress.elapsed() >= self.patience)
            .map(|(slot, _)| Place::TakenBy(slot))
    }

    /// Out of descriptors: takes a client and closes it, so that the listener is not ready for ever.
    fn refuse_one(&mut self) {
        self.reserve = None;
        // Whatever comes of it, the connection (if any) is closed here, as is meant.
        drop(self.listener.accept());
        self.reserve = open_reserve();
    }

    fn token(&self, slot: usize) -> Token {
        Token(self.base + FIRST_SLOT + slot as u64)
    }

    fn update_interest(&mut self, reactor: &mut Reactor, slot: usize) -> io::Result<()> {
        let token = self.token(slot);
        let Some(connection) = self.connections.get_mut(slot).and_then(Option::as_mut) else {
            return Ok(());
        };
        let interest = connection.wanted();
        if interest == connection.interest {
            return Ok(());
        }
        if reactor.modify(&connection.stream, token, interest).is_err() {
            return self.close(reactor, slot);
        }
        connection.interest = interest;
        Ok(())
    }

    fn close(&mut self, reactor: &mut Reactor, slot: usize) -> io::Result<()> {
        if let Some(connection) = self.connections.get_mut(slot).and_then(Option::take) {
            reactor.remove(&connection.stream)?;
        }
        self.listen(reactor)
    }

    /// Accepts again, if it had been given up for lack of a place.
    fn listen(&mut self, reactor: &mut Reactor) -> io::Result<()> {
        if !self.listening {
            reactor.modify(&self.listener, Token(self.base + LISTENER), Interest::READ)?;
            self.listening = true;
            self.timer.disarm()?;
        }
        Ok(())
    }
}

/// Where a new connection may go.
#[derive(Debug, Clone, Copy)]
enum Place {
    Free(usize),
    /// Its connection has to be closed first.
    TakenBy(usize),
}

impl Place {
    fn slot(self) -> usize {
        match self {
            Self::Free(slot) | Self::TakenBy(slot) => slot,
        }
    }
}

impl Connection {
    /// What the loop should tell about this connection.
    fn wanted(&self) -> Interest {
        match self.phase {
            Phase::Reading if self.written < self.output.len() => Interest::BOTH,
            Phase::Reading | Phase::Draining { .. } => Interest::READ,
            // Only whether the client is still there.
            Phase::Answering(_) => Interest::NONE,
            Phase::Writing => Interest::WRITE,
        }
    }

    fn work(&mut self, readiness: Readiness) -> Outcome {
        match self.phase {
            // Nothing is read in this phase, so hang-up means that both directions are closed.
            Phase::Answering(_) if readiness.hangup || readiness.error => Outcome::Close,
            Phase::Answering(_) => Outcome::Keep,
            // All is written, and the next request may have been read already.
            Phase::Writing if self.output.is_empty() => {
                self.phase = Phase::Reading;
                self.next_request()
            }
            Phase::Writing if readiness.writable || readiness.hangup => self.write(),
            Phase::Writing => Outcome::Keep,
            Phase::Reading => {
                if readiness.writable && matches!(self.write(), Outcome::Close) {
                    return Outcome::Close;
                }
                if readiness.readable { self.read() } else { Outcome::Keep }
            }
            Phase::Draining { left } => self.drain(left),
        }
    }

    fn read(&mut self) -> Outcome {
        let mut buffer = vec![0; READ_SIZE];
        match self.stream.read(&mut buffer) {
            Ok(0) => Outcome::Close,
            Ok(count) => {
                self.parser.feed(&buffer[..count]);
                self.next_request()
            }
            Err(error) if is_transient(&error) => Outcome::Keep,
            Err(_) => Outcome::Close,
        }
    }

    fn next_request(&mut self) -> Outcome {
        match self.parser.next() {
            Ok(Some(request)) => Outcome::Request(request),
            Ok(None) if self.parser.take_continue() => {
                self.output.extend_from_slice(CONTINUE);
                self.write()
            }
            Ok(None) => Outcome::Keep,
            Err(error) => {
                self.closing = true;
                self.unread = true;
                self.answer(Response::fault(error.status(), &error.to_string()));
                self.write()
            }
        }
    }

    /// Queues an answer.
    fn answer(&mut self, mut response: Response) {
        self.closing |= response.close;
        response.close = self.closing;
        response.encode(&mut self.output);
        self.phase = Phase::Writing;
    }

    /// Writes what the socket takes.
    fn write(&mut self) -> Outcome {
        while self.written < self.output.len() {
            match self.stream.write(&self.output[self.written..]) {
                Ok(0) => return Outcome::Close,
                Ok(count) => self.written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Outcome::Keep,
                Err(_) => return Outcome::Close,
            }
        }
        self.output = Vec::new();
        self.written = 0;
        self.progress = Instant::now();
        if self.phase != Phase::Writing {
            return Outcome::Keep;
        }
        if !self.closing {
            // If there is more input at hand, the loop must come back without the socket's saying
            // so: it is writable at once.
            self.phase = if self.parser.buffered() > 0 { Phase::Writing } else { Phase::Reading };
            return Outcome::Keep;
        }
        if !self.unread || self.stream.shutdown(std::net::Shutdown::Write).is_err() {
            return Outcome::Close;
        }
        self.phase = Phase::Draining { left: MAX_DRAIN };
        Outcome::Keep
    }

    fn drain(&mut self, left: usize) -> Outcome {
        let mut buffer = vec![0; READ_SIZE];
        match self.stream.read(&mut buffer) {
            Ok(0) => Outcome::Close,
            Ok(count) if count < left => {
                self.phase = Phase::Draining { left: left - count };
                Outcome::Keep
            }
            Err(error) if is_transient(&error) => Outcome::Keep,
            Ok(_) | Err(_) => Outcome::Close,
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// A descriptor that may be spared. Without one, a server out of descriptors is busier, no more.
fn open_reserve() -> Option<std::fs::File> {
    std::fs::File::open("/dev/null").ok()
}

/// Numbers of include/uapi/asm-generic/errno-base.h that `io::ErrorKind` has no name for.
mod libc_errno {
    pub(super) const ENFILE: i32 = 23;
    pub(super) const EMFILE: i32 = 24;
}

#[cfg(test)]
mod tests;
