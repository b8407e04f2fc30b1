//! Where clients of the host wait until they are connections: they say which port they want, and the gate
//! says when they may go on.
//!
//! Everything is bounded. Clients that have not said their port yet are at most [`MAX_GREETING`]: a new
//! one pushes out the oldest. Clients that are held are at most [`MAX_HELD`]: a new one is refused.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use forkd_sys::reactor::{Interest, Readiness};
use rustix::net::RecvFlags;

use super::metrics::VsockMetrics;

/// Most clients that have not said their port.
pub(super) const MAX_GREETING: usize = 64;
/// Most clients that wait at the gate.
pub(super) const MAX_HELD: usize = 128;
/// Longest greeting: "CONNECT 4294967295\n", with some slack.
const MAX_LINE: usize = 32;
/// Clients accepted in one turn.
const ACCEPT_BATCH: usize = 16;

/// What becomes of clients of the host that want a port of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gate {
    /// They wait.
    Hold,
    /// They pass.
    Open,
    /// They get a line `ERR` with this reason.
    Refuse(String),
}

/// A client that has not passed the gate.
#[derive(Debug)]
pub(super) struct Client {
    stream: UnixStream,
    /// What it has said so far.
    line: Vec<u8>,
    /// The port, once it has said it.
    port: Option<u32>,
    pub(super) registered: Option<Interest>,
}

impl Client {
    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// A client that is held is watched for leaving only.
    pub(super) fn interest(&self) -> Interest {
        if self.port.is_some() { Interest::NONE } else { Interest::READ }
    }
}

/// A client that may have its connection.
#[derive(Debug)]
pub(super) struct Passed {
    /// The client's id, which its connection takes over: the reactor knows the socket by it.
    pub(super) id: u32,
    pub(super) stream: UnixStream,
    pub(super) port: u32,
    pub(super) registered: Option<Interest>,
}

/// A client that is done with, and whose socket is to be closed.
pub(super) type Left = (UnixStream, Option<Interest>);

#[derive(Debug)]
pub(super) struct Lobby {
    pub(super) listener: Option<UnixListener>,
    gate: Gate,
    clients: BTreeMap<u32, Client>,
    /// Ids of the clients that have not said their port, oldest first. May name some that left.
    greeting: VecDeque<u32>,
    /// Ids of the clients at the gate, oldest first. May name some that left.
    held: VecDeque<u32>,
}

/// What a turn in the lobby brought about.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) passed: Vec<Passed>,
    pub(super) left: Vec<Left>,
    /// Clients whose interest may have changed.
    pub(super) changed: Vec<u32>,
    /// Accepting failed: out of descriptors or memory. Try later.
    pub(super) accept_failed: bool,
}

/// The next id after `last` that is neither 0 nor taken. There are far fewer than 2^32.
pub(super) fn next_id(last: &mut u32, taken: impl Fn(u32) -> bool) -> u32 {
    loop {
        *last = last.wrapping_add(1);
        if *last != 0 && !taken(*last) {
            return *last;
        }
    }
}

/// Sends one line as far as the socket takes it: the client is done with either way.
pub(super) fn send_error(stream: &UnixStream, reason: &str) {
    let clean: String = reason.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let mut writer = stream;
    let _gone = writer.write_all(format!("ERR {clean}\n").as_bytes());
}

fn parse_line(line: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(line).ok()?;
    let port = text.trim_end_matches('\r').strip_prefix("CONNECT ")?;
    // Digits only: `parse` alone would take a sign.
    port.bytes().all(|b| b.is_ascii_digit()).then(|| port.parse().ok())?
}

enum Greeting {
    Partial,
    Port(u32),
    Bad(&'static str),
    Gone,
}

impl Client {
    /// Reads up to the end of the first line and no further: what follows belongs to the guest.
    fn read_line(&mut self) -> Greeting {
        loop {
            let mut peeked = [0; MAX_LINE];
            let room = MAX_LINE - self.line.len();
            let n = match rustix::net::recv(&self.stream, &mut peeked[..room], RecvFlags::PEEK) {
                Ok((_, 0)) => return Greeting::Gone,
                Ok((_, n)) => n,
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => return Greeting::Partial,
                Err(_) => return Greeting::Gone,
            };
            let newline = peeked[..n].iter().position(|&b| b == b'\n');
            let take = newline.map_or(n, |at| at + 1);
            // They are there, and nobody else reads.
            if (&self.stream).read_exact(&mut peeked[..take]).is_err() {
                return Greeting::Gone;
            }
            self.line.extend_from_slice(&peeked[..newline.unwrap_or(n)]);
            if newline.is_some() {
                return parse_line(&self.line)
                    .map_or(Greeting::Bad("expected \"CONNECT <port>\""), Greeting::Port);
            }
            if self.line.len() >= MAX_LINE {
                return Greeting::Bad("line is too long");
            }
        }
    }
}

impl Lobby {
    pub(super) fn new() -> Self {
        Self {
            listener: None,
            gate: Gate::Hold,
            clients: BTreeMap::new(),
            greeting: VecDeque::new(),
            held: VecDeque::new(),
        }
    }

    pub(super) fn contains(&self, id: u32) -> bool {
        self.clients.contains_key(&id)
    }

    #[cfg(test)]
    pub(super) fn peek(&self, id: u32) -> Option<&UnixStream> {
        self.clients.get(&id).map(Client::stream)
    }

    pub(super) fn client(&mut self, id: u32) -> Option<&mut Client> {
        self.clients.get_mut(&id)
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = u32> + '_ {
        self.clients.keys().copied()
    }

    /// Accepts clients. Each gets the next id after `last_id` that is not `taken`.
    pub(super) fn accept(
        &mut self,
        last_id: &mut u32,
        taken: impl Fn(u32) -> bool,
        metrics: &mut VsockMetrics,
        outcome: &mut Outcome,
    ) {
        for _ in 0..ACCEPT_BATCH {
            let Some(listener) = &self.listener else { return };
            let stream = match listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(true)?;
                Ok(stream)
            }) {
                Ok(stream) => stream,
                Err(e) => match e.kind() {
                    io::ErrorKind::WouldBlock => return,
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => continue,
                    _ => {
                        metrics.host_errors += 1;
                        outcome.accept_failed = true;
                        return;
                    }
                },
            };
            self.make_room_for_greeting(metrics, outcome);
            let id = next_id(last_id, |id| taken(id) || self.clients.contains_key(&id));
            let client = Client { stream, line: Vec::new(), port: None, registered: None };
            self.clients.insert(id, client);
            self.greeting.push_back(id);
            // Most clients have sent their line by now.
            self.greet(id, metrics, outcome);
        }
    }

    fn make_room_for_greeting(&mut self, metrics: &mut VsockMetrics, outcome: &mut Outcome) {
        let clients = &self.clients;
        self.greeting.retain(|id| clients.get(id).is_some_and(|c| c.port.is_none()));
        while self.greeting.len() >= MAX_GREETING
            && let Some(oldest) = self.greeting.pop_front()
        {
            self.refuse(oldest, "too many clients have not said a port", metrics, outcome);
        }
    }

    fn refuse(&mut self, id: u32, why: &str, metrics: &mut VsockMetrics, outcome: &mut Outcome) {
        if let Some(client) = self.clients.remove(&id) {
            send_error(&client.stream, why);
            metrics.lobby_dropped += 1;
            outcome.left.push((client.stream, client.registered));
        }
    }

    /// The reactor's news of a client.
    pub(super) fn ready(
        &mut self,
        id: u32,
        readiness: &Readiness,
        metrics: &mut VsockMetrics,
        outcome: &mut Outcome,
    ) {
        let Some(client) = self.clients.get(&id) else { return };
        if client.port.is_none() {
            return self.greet(id, metrics, outcome);
        }
        if (readiness.hangup || readiness.error)
            && let Some(client) = self.clients.remove(&id)
        {
            metrics.lobby_dropped += 1;
            outcome.left.push((client.stream, client.registered));
        }
    }

    fn greet(&mut self, id: u32, metrics: &mut VsockMetrics, outcome: &mut Outcome) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        outcome.changed.push(id);
        match client.read_line() {
            Greeting::Partial => {}
            Greeting::Bad(why) => self.refuse(id, why, metrics, outcome),
            Greeting::Gone => {
                if let Some(client) = self.clients.remove(&id) {
                    metrics.lobby_dropped += 1;
                    outcome.left.push((client.stream, client.registered));
                }
            }
            Greeting::Port(port) => {
                client.port = Some(port);
                let clients = &self.clients;
                self.held.retain(|id| clients.contains_key(id));
                if self.gate == Gate::Hold && self.held.len() >= MAX_HELD {
                    return self.refuse(id, "too many clients are held", metrics, outcome);
                }
                metrics.held += u64::from(self.gate == Gate::Hold);
                self.held.push_back(id);
                self.let_through(metrics, outcome);
            }
        }
    }

    pub(super) fn set_gate(
        &mut self,
        gate: Gate,
        metrics: &mut VsockMetrics,
        outcome: &mut Outcome,
    ) {
        self.gate = gate;
        self.let_through(metrics, outcome);
    }

    /// Deals with all clients at the gate, as it stands.
    fn let_through(&mut self, metrics: &mut VsockMetrics, outcome: &mut Outcome) {
        if self.gate == Gate::Hold {
            return;
        }
        while let Some(id) = self.held.pop_front() {
            if let Gate::Refuse(why) = &self.gate {
                let why = why.clone();
                metrics.refused += 1;
                self.refuse(id, &why, metrics, outcome);
            } else if let Some(client) = self.clients.remove(&id)
                && let Some(port) = client.port
            {
                let (stream, registered) = (client.stream, client.registered);
                outcome.passed.push(Passed { id, stream, port, registered });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_greeting_is_understood() {
        assert_eq!(parse_line(b"CONNECT 52"), Some(52));
        assert_eq!(parse_line(b"CONNECT 4294967295\r"), Some(u32::MAX));
        for bad in [
            &b"CONNECT"[..],
            b"CONNECT ",
            b"CONNECT +1",
            b"CONNECT 4294967296",
            b"connect 1",
            b"\xff",
            b"",
        ] {
            assert_eq!(parse_line(bad), None, "{bad:?}");
        }
    }
}
