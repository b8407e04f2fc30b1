//! The VM process's own conversation with the guest agent: hello, identity, acknowledgement.
//!
//! ```text
//!   boot:  AwaitHello --hello--> Notice --204--> Ready
//!   fork:                        Notice --204--> Ready
//!   any:   deadline, refusal, or a broken answer --> Failed
//! ```
//!
//! A guest that was forked still believes it is its source: same random numbers, same name, an old
//! clock. So nothing is served before the agent has acknowledged the notice that makes it someone else
//! (`POST /init`). Until then the vsock gate holds the host's connections; on failure it refuses them.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use forkd_agent::protocol::hello::{Hello, MAX_HELLO};
use forkd_agent::protocol::init::{self, Identity, InitFault, InitRequest, Reason};
use forkd_api::http::{Headers, Limits, ResponseEvent, ResponseParser, encode_request};
use forkd_sys::reactor::{Interest, Reactor, Readiness, Token};
use forkd_sys::timer::TimerFd;

/// How long a forked guest has to acknowledge. It takes milliseconds; a hundred forked at once on two
/// cores of emulated kernel mode take seconds.
const ACK_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest answer that is read, in bytes.
const ANSWER_MAX: u64 = 16 * 1024;

/// The guest's port of the notice: envd's.
pub const NOTICE_PORT: u32 = 49983;
/// The host's port of the hello.
pub const HELLO_PORT: u32 = 49982;

/// What the link tells the loop.
#[derive(Debug)]
pub enum LinkEvent {
    /// The agent is up after a boot: send it the notice.
    Hello(Box<Hello>),
    /// The agent has acknowledged.
    Ready,
    /// It did not: nothing may be served.
    Failed(String),
}

#[derive(Debug)]
enum State {
    Idle,
    AwaitHello,
    Hello { stream: UnixStream, text: Vec<u8> },
    Notice(Notice),
    Ready,
    Failed,
}

/// A notice under way.
#[derive(Debug)]
struct Notice {
    stream: UnixStream,
    out: Vec<u8>,
    sent: usize,
    parser: ResponseParser,
    status: u16,
    body: Vec<u8>,
}

/// The link's side of the conversation; the vsock device carries the bytes.
#[derive(Debug)]
pub struct AgentLink {
    state: State,
    timer: TimerFd,
    stream_token: Token,
}

impl AgentLink {
    /// A link that does nothing yet; `first` and the token after it are its own.
    ///
    /// # Errors
    /// No fd to be had, or the reactor fails.
    pub fn new(reactor: &Reactor, first: Token) -> io::Result<Self> {
        let timer = TimerFd::new()?;
        reactor.add(&timer, first, Interest::READ)?;
        Ok(Self { state: State::Idle, timer, stream_token: Token(first.0 + 1) })
    }

    /// Waits for the hello of a booting guest.
    ///
    /// # Errors
    /// The timer fails.
    pub fn await_hello(&mut self, timeout: Duration) -> io::Result<()> {
        self.state = State::AwaitHello;
        self.timer.arm(timeout)
    }

    /// The guest has connected to [`HELLO_PORT`].
    ///
    /// # Errors
    /// The reactor fails.
    pub fn accept_hello(&mut self, reactor: &Reactor, stream: UnixStream) -> io::Result<()> {
        if !matches!(self.state, State::AwaitHello) {
            // A guest that says hello again gets its connection closed.
            return Ok(());
        }
        stream.set_nonblocking(true)?;
        reactor.add(&stream, self.stream_token, Interest::READ)?;
        self.state = State::Hello { stream, text: Vec::new() };
        Ok(())
    }

    /// Sends the notice on `stream`, which leads to [`NOTICE_PORT`].
    ///
    /// # Errors
    /// The reactor, the timer or the host's random numbers fail.
    pub fn send_notice(
        &mut self,
        reactor: &Reactor,
        stream: UnixStream,
        identity: Identity,
        reason: Reason,
    ) -> io::Result<()> {
        let out = encode_notice(identity, reason)?;
        stream.set_nonblocking(true)?;
        reactor.add(&stream, self.stream_token, Interest::BOTH)?;
        self.timer.arm(ACK_TIMEOUT)?;
        let parser = ResponseParser::new(Limits::body(ANSWER_MAX));
        let body = Vec::new();
        self.state = State::Notice(Notice { stream, out, sent: 0, parser, status: 0, body });
        Ok(())
    }

    /// Whether a conversation is under way.
    pub fn is_busy(&self) -> bool {
        !matches!(self.state, State::Idle | State::Ready | State::Failed)
    }

    /// Whether `token` is one of the link's.
    pub fn owns(&self, token: Token) -> bool {
        token == self.stream_token || token.0 + 1 == self.stream_token.0
    }

    /// Handles an event on one of its tokens.
    ///
    /// # Errors
    /// The reactor or the timer fails. What the guest does wrong is [`LinkEvent::Failed`].
    pub fn handle(
        &mut self,
        reactor: &Reactor,
        readiness: Readiness,
    ) -> io::Result<Option<LinkEvent>> {
        if readiness.token != self.stream_token {
            if !self.timer.drain()? {
                return Ok(None);
            }
            let what = match self.state {
                State::AwaitHello | State::Hello { .. } => "the guest agent never said hello",
                State::Notice(_) => "the guest agent did not acknowledge its identity in time",
                _ => return Ok(None),
            };
            return self.fail(reactor, what.to_owned()).map(Some);
        }
        match &mut self.state {
            State::Hello { .. } => self.read_hello(reactor),
            State::Notice(_) => match self.exchange(reactor) {
                Ok(false) => Ok(None),
                Ok(true) => {
                    self.finish(reactor, State::Ready)?;
                    Ok(Some(LinkEvent::Ready))
                }
                Err(why) => self.fail(reactor, why).map(Some),
            },
            _ => Ok(None),
        }
    }

    fn finish(&mut self, reactor: &Reactor, next: State) -> io::Result<()> {
        match std::mem::replace(&mut self.state, next) {
            State::Hello { stream, .. } | State::Notice(Notice { stream, .. }) => {
                reactor.remove(&stream)?;
            }
            _ => {}
        }
        self.timer.disarm()
    }

    fn fail(&mut self, reactor: &Reactor, why: String) -> io::Result<LinkEvent> {
        self.finish(reactor, State::Failed)?;
        Ok(LinkEvent::Failed(why))
    }

    fn read_hello(&mut self, reactor: &Reactor) -> io::Result<Option<LinkEvent>> {
        let State::Hello { stream, text } = &mut self.state else { return Ok(None) };
        let mut chunk = [0; 1024];
        let ended = match stream.read(&mut chunk) {
            Ok(0) => true,
            Ok(n) => {
                text.extend_from_slice(&chunk[..n]);
                false
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(_) => true,
        };
        if !ended && !text.contains(&b'\n') && text.len() <= MAX_HELLO {
            return Ok(None);
        }
        let line = text.split(|b| *b == b'\n').next().unwrap_or_default();
        match serde_json::from_slice::<Hello>(line) {
            Ok(hello) => {
                self.finish(reactor, State::Idle)?;
                Ok(Some(LinkEvent::Hello(Box::new(hello))))
            }
            Err(e) => {
                self.fail(reactor, format!("the guest agent's hello is malformed: {e}")).map(Some)
            }
        }
    }

    /// Writes what is left of the notice, reads what there is of the answer. True when acknowledged; an
    /// error is why it never will be.
    fn exchange(&mut self, reactor: &Reactor) -> Result<bool, String> {
        let State::Notice(notice) = &mut self.state else { return Ok(false) };
        if notice.sent < notice.out.len() {
            notice.send()?;
            if notice.sent == notice.out.len() {
                reactor
                    .modify(&notice.stream, self.stream_token, Interest::READ)
                    .map_err(|e| format!("cannot watch the guest agent: {e}"))?;
            }
        }
        notice.receive()
    }
}

impl Notice {
    fn send(&mut self) -> Result<(), String> {
        while self.sent < self.out.len() {
            match self.stream.write(&self.out[self.sent..]) {
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(format!("the fork notice could not be sent: {e}")),
            }
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<bool, String> {
        let mut chunk = [0; 2048];
        match self.stream.read(&mut chunk) {
            Ok(0) => return Err("the guest agent closed the connection unanswered".to_owned()),
            Ok(n) => self.parser.feed(&chunk[..n]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(e) => return Err(format!("the guest agent cannot be read: {e}")),
        }
        loop {
            match self.parser.next() {
                Ok(None) => return Ok(false),
                Ok(Some(ResponseEvent::Head(head))) => self.status = head.status,
                Ok(Some(ResponseEvent::Body(data))) => self.body.extend_from_slice(&data),
                Ok(Some(ResponseEvent::End)) => return self.verdict(),
                Err(e) => return Err(format!("the guest agent's answer is malformed: {e}")),
            }
        }
    }

    fn verdict(&self) -> Result<bool, String> {
        if self.status == 204 {
            return Ok(true);
        }
        Err(serde_json::from_slice::<InitFault>(&self.body).map_or_else(
            |_| format!("the guest agent answered the fork notice with {}", self.status),
            |fault| format!("the guest agent refused its identity: {}", fault.message),
        ))
    }
}

/// The notice as bytes of an HTTP request.
fn encode_notice(identity: Identity, reason: Reason) -> io::Result<Vec<u8>> {
    let mut entropy = vec![0; init::MAX_ENTROPY];
    forkd_sys::random::fill(&mut entropy)?;
    let request = InitRequest {
        identity: Some(identity),
        entropy,
        realtime_unix_ns: Some(forkd_sys::clock::realtime_ns()),
        reason,
        ..InitRequest::default()
    };
    let body = serde_json::to_vec(&request)?;
    let headers = Headers::new().with("Content-Type", "application/json");
    let mut out = Vec::with_capacity(body.len() + 256);
    encode_request(&mut out, "POST", init::PATH, &headers, Some(&body));
    Ok(out)
}
