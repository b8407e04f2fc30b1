//! One connection: a host socket, a pair of ports, and credit in both directions.
//!
//! ```text
//!   host asks:  Requested ──RESPONSE──> Established ──┬── guest shuts both ──> Closing ──flushed──> gone (RST)
//!   guest asks: ──RESPONSE sent──────────────^        └── host shut both ──> Finished ──guest's RST──> gone
//! ```
//!
//! Half-closes pass through: the end of the host's data is SHUTDOWN(SEND) to the guest, a host that does
//! not read any more SHUTDOWN(RCV); the guest's flags become shutdown(2) of the host socket, for sending
//! after what was sent before has been written.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use forkd_sys::reactor::Interest;

use super::packet::{Header, MAX_PAYLOAD, Ports, op, shut};

/// Bytes from the guest that a connection holds for the host at most: the credit it gives.
pub const BUFFER: u32 = 256 * 1024;
/// Bytes taken by the host after which the guest is told, if no packet does it in passing. It still has as much to go on with;
/// each telling costs it an interrupt.
const CREDIT_STEP: u32 = BUFFER / 2;

/// Where a connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Asked the guest, or about to.
    Requested { sent: bool },
    /// Both sides may talk.
    Established,
    /// The guest has closed; what it sent before is still being written.
    Closing,
    /// The host has closed; the guest was told, or is about to be, and has still to reset.
    Finished,
}

/// The guest sent more than it had credit for, or what its phase does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Violation;

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) ports: Ports,
    pub(super) phase: Phase,
    /// The client is told "OK" when the guest accepts.
    pub(super) announce: bool,
    /// Absent once closed.
    stream: Option<UnixStream>,
    /// What the reactor knows of the stream.
    pub(super) registered: Option<Interest>,
    /// In the muxer's queue of connections with something to send.
    pub(super) queued: bool,
    /// The guest is gone from this connection: its ports are free, the rest is written and that is all.
    pub(super) orphan: bool,
    respond: bool,
    credit_due: bool,
    credit_wanted: bool,
    credit_asked: bool,
    /// The stream had something to read when last heard of.
    readable: bool,
    /// What the host does not do any more, and what of it the guest was told: shutdown flags.
    host_shut: u32,
    told_shut: u32,
    guest_shut: u32,
    /// The stream's sending side was shut down.
    write_shut: bool,
    // Sent to the guest, and what it said of its side.
    sent: u32,
    guest_buf_alloc: u32,
    guest_fwd_cnt: u32,
    // From the guest: received, written to the host, and of that told.
    received: u32,
    forwarded: u32,
    told_forwarded: u32,
    to_host: VecDeque<u8>,
}

/// A packet that a connection wants to send. The payload lies in the buffer that was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Outgoing {
    pub op: u16,
    pub flags: u32,
    pub len: usize,
}

impl Connection {
    fn new(ports: Ports, stream: UnixStream, phase: Phase) -> Self {
        Self {
            ports,
            phase,
            announce: false,
            stream: Some(stream),
            registered: None,
            queued: false,
            orphan: false,
            respond: false,
            credit_due: false,
            credit_wanted: false,
            credit_asked: false,
            readable: false,
            host_shut: 0,
            told_shut: 0,
            guest_shut: 0,
            write_shut: false,
            sent: 0,
            guest_buf_alloc: 0,
            guest_fwd_cnt: 0,
            received: 0,
            forwarded: 0,
            told_forwarded: 0,
            to_host: VecDeque::new(),
        }
    }

    /// A connection that the host asks for.
    pub(super) fn to_guest(ports: Ports, stream: UnixStream, announce: bool) -> Self {
        Self { announce, ..Self::new(ports, stream, Phase::Requested { sent: false }) }
    }

    /// A connection that the guest has asked for by `request`, and that the host accepts.
    pub(super) fn from_guest(stream: UnixStream, request: &Header) -> Self {
        let mut connection = Self::new(request.ports_from_guest(), stream, Phase::Established);
        connection.respond = true;
        connection.note_credit(request);
        connection
    }

    pub(super) fn stream(&self) -> Option<&UnixStream> {
        self.stream.as_ref()
    }

    pub(super) fn take_stream(&mut self) -> Option<UnixStream> {
        self.readable = false;
        self.stream.take()
    }

    /// What the guest says of its side in every packet.
    pub(super) fn note_credit(&mut self, header: &Header) {
        self.guest_buf_alloc = header.buf_alloc;
        self.guest_fwd_cnt = header.fwd_cnt;
        if self.credit() > 0 {
            self.credit_wanted = false;
            self.credit_asked = false;
        }
    }

    /// Bytes that the guest has room for. Nonsense from the guest is no room.
    fn credit(&self) -> u32 {
        self.guest_buf_alloc.saturating_sub(self.sent.wrapping_sub(self.guest_fwd_cnt))
    }

    fn may_read(&self) -> bool {
        self.phase == Phase::Established
            && self.host_shut & shut::SEND == 0
            && self.guest_shut & shut::RCV == 0
            && self.stream.is_some()
    }

    /// What the reactor should watch for; `None` if nothing, not even a hang-up, which would be told over
    /// and over while nobody can act upon it.
    pub(super) fn interest(&self) -> Option<Interest> {
        self.stream.as_ref()?;
        let write = !self.to_host.is_empty();
        match self.phase {
            Phase::Requested { .. } => Some(Interest::NONE),
            Phase::Established => {
                let read = self.may_read() && !self.readable && self.credit() > 0;
                // After the end of its data, only the hang-up tells that the host has gone.
                let watch = read || write || self.host_shut & shut::SEND != 0;
                watch.then_some(Interest { read, write })
            }
            Phase::Closing => write.then_some(Interest::WRITE),
            Phase::Finished => None,
        }
    }

    /// True if there is a packet to send, as far as one can tell without reading the stream.
    pub(super) fn has_packet(&self) -> bool {
        match self.phase {
            Phase::Requested { sent } => !sent,
            _ if self.orphan => false,
            Phase::Established | Phase::Finished => {
                self.respond
                    || self.host_shut != self.told_shut
                    || self.credit_due
                    || self.credit_wanted && !self.credit_asked
                    || self.readable && self.may_read() && self.credit() > 0
            }
            Phase::Closing => self.credit_due,
        }
    }

    /// Makes the next packet, with at most `room` bytes of payload put into `payload`.
    pub(super) fn next_packet(&mut self, room: usize, payload: &mut [u8]) -> Option<Outgoing> {
        let plain = |op| Some(Outgoing { op, flags: 0, len: 0 });
        if let Phase::Requested { sent } = &mut self.phase {
            return if std::mem::replace(sent, true) { None } else { plain(op::REQUEST) };
        }
        if self.orphan {
            return None;
        }
        if std::mem::take(&mut self.respond) {
            return plain(op::RESPONSE);
        }
        if room > 0
            && let Some(len) = self.read_stream(room, payload)
        {
            return Some(Outgoing { op: op::RW, flags: 0, len });
        }
        if self.host_shut != self.told_shut {
            self.told_shut = self.host_shut;
            return Some(Outgoing { op: op::SHUTDOWN, flags: self.host_shut, len: 0 });
        }
        if self.credit_wanted && !self.credit_asked {
            self.credit_asked = true;
            return plain(op::CREDIT_REQUEST);
        }
        if self.credit_due {
            return plain(op::CREDIT_UPDATE);
        }
        None
    }

    /// The header's fields about credit, for a packet that is sent now.
    pub(super) fn tell_credit(&mut self, header: &mut Header) {
        header.buf_alloc = BUFFER;
        header.fwd_cnt = self.forwarded;
        self.told_forwarded = self.forwarded;
        self.credit_due = false;
    }

    /// Reads what the guest has room for; `None` if there is nothing to send as data.
    fn read_stream(&mut self, room: usize, payload: &mut [u8]) -> Option<usize> {
        if !self.readable || !self.may_read() {
            return None;
        }
        let n = room.min(self.credit() as usize).min(payload.len()).min(MAX_PAYLOAD);
        if n == 0 {
            return None;
        }
        let mut stream = self.stream.as_ref()?;
        loop {
            match stream.read(&mut payload[..n]) {
                Ok(0) => {
                    self.readable = false;
                    self.host_shut |= shut::SEND;
                    return None;
                }
                Ok(n) => {
                    // At most MAX_PAYLOAD.
                    self.sent = self.sent.wrapping_add(n as u32);
                    self.credit_wanted = self.credit() == 0;
                    return Some(n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    return None;
                }
                // The host closed without reading what it was sent.
                Err(_) => {
                    self.readable = false;
                    self.host_is_gone();
                    return None;
                }
            }
        }
    }

    /// Neither side of the host goes on.
    fn host_is_gone(&mut self) {
        self.host_shut = shut::BOTH;
        self.discard_to_host();
    }

    fn discard_to_host(&mut self) {
        self.forwarded = self.received;
        self.to_host.clear();
    }

    /// The reactor's news of the stream, in an established connection or later.
    pub(super) fn note_ready(&mut self, readable: bool, writable: bool, hangup: bool) {
        if readable && self.may_read() {
            self.readable = true;
        }
        if (writable || hangup) && !self.to_host.is_empty() {
            self.flush();
        }
        if hangup && self.host_shut & shut::SEND != 0 {
            // A hang-up without read interest is that of both directions.
            self.host_is_gone();
        }
    }

    /// The guest accepts.
    pub(super) fn accepted(&mut self) -> Result<(), Violation> {
        if self.phase != (Phase::Requested { sent: true }) {
            return Err(Violation);
        }
        self.phase = Phase::Established;
        if self.announce {
            let line = format!("OK {}\n", self.ports.host);
            let written = self.stream.as_ref().map(|mut s| s.write(line.as_bytes()));
            // Nothing was written before: a line that does not fit into an empty socket buffer is the
            // client's own doing, and so is having gone.
            if !matches!(written, Some(Ok(n)) if n == line.len()) {
                self.host_is_gone();
            }
        }
        Ok(())
    }

    /// Data from the guest.
    pub(super) fn receive(&mut self, data: &[u8]) -> Result<(), Violation> {
        if self.phase == Phase::Finished {
            // Sent before the guest heard.
            return Ok(());
        }
        let held = self.to_host.len();
        let over_credit = held + data.len() > BUFFER as usize;
        if self.phase != Phase::Established || self.guest_shut & shut::SEND != 0 || over_credit {
            return Err(Violation);
        }
        self.received = self.received.wrapping_add(data.len() as u32);
        if self.host_shut & shut::RCV != 0 {
            self.discard_to_host();
            return Ok(());
        }
        let mut rest = data;
        if self.to_host.is_empty() {
            rest = &data[self.write_stream(data)..];
        }
        if self.host_shut & shut::RCV == 0 {
            self.to_host.extend(rest);
        }
        self.update_credit_due();
        Ok(())
    }

    /// Writes what the stream takes of `data`; returns how much. If the host does not read any more,
    /// everything is discarded.
    fn write_stream(&mut self, data: &[u8]) -> usize {
        let Some(mut stream) = self.stream.as_ref() else { return data.len() };
        let mut done = 0;
        while done < data.len() {
            match stream.write(&data[done..]) {
                Ok(0) => break,
                Ok(n) => {
                    done += n;
                    self.forwarded = self.forwarded.wrapping_add(n as u32);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.host_shut |= shut::RCV;
                    self.discard_to_host();
                    return data.len();
                }
            }
        }
        done
    }

    /// Writes what is held for the host, as far as it takes it.
    pub(super) fn flush(&mut self) {
        while !self.to_host.is_empty() {
            let buffer = std::mem::take(&mut self.to_host);
            let front = buffer.as_slices().0;
            let len = front.len();
            let written = self.write_stream(front);
            if self.host_shut & shut::RCV != 0 {
                break;
            }
            self.to_host = buffer;
            self.to_host.drain(..written);
            if written < len {
                break;
            }
        }
        self.update_credit_due();
        self.shut_write_if_flushed();
    }

    fn update_credit_due(&mut self) {
        if self.forwarded.wrapping_sub(self.told_forwarded) >= CREDIT_STEP {
            self.credit_due = true;
        }
    }

    /// The guest asks what room it has.
    pub(super) fn credit_requested(&mut self) {
        self.credit_due = true;
    }

    /// The guest shuts down one or both directions.
    pub(super) fn shut_by_guest(&mut self, flags: u32) -> Result<(), Violation> {
        if matches!(self.phase, Phase::Requested { .. }) {
            return Err(Violation);
        }
        let new = flags & shut::BOTH & !self.guest_shut;
        self.guest_shut |= new;
        if new & shut::RCV != 0
            && let Some(stream) = &self.stream
        {
            self.readable = false;
            // Fails only for a stream that has gone, which shows on the next write.
            let _gone = stream.shutdown(Shutdown::Read);
        }
        if self.guest_shut == shut::BOTH && self.phase == Phase::Established {
            self.phase = Phase::Closing;
        }
        self.shut_write_if_flushed();
        Ok(())
    }

    fn shut_write_if_flushed(&mut self) {
        if self.guest_shut & shut::SEND != 0
            && self.to_host.is_empty()
            && !self.write_shut
            && let Some(stream) = &self.stream
        {
            self.write_shut = true;
            let _gone = stream.shutdown(Shutdown::Write);
        }
    }

    /// True if the connection is over and the guest needs to be told by a RST (unless it is an orphan).
    pub(super) fn is_over(&self) -> bool {
        match self.phase {
            Phase::Closing => self.to_host.is_empty(),
            Phase::Finished => self.guest_shut == shut::BOTH,
            _ => false,
        }
    }

    /// True if the guest knows of the connection, but does not, or not any more, count on it: it was only
    /// asked, or one side has closed.
    pub(super) fn is_ending(&self) -> bool {
        match self.phase {
            Phase::Requested { sent } => sent,
            Phase::Established => false,
            Phase::Closing | Phase::Finished => !self.orphan,
        }
    }

    /// Enters `Finished` if the host has shut both directions. Returns true if it did just now: the
    /// stream is of no more use.
    pub(super) fn finish_if_host_shut(&mut self) -> bool {
        let finish = self.phase == Phase::Established && self.host_shut == shut::BOTH;
        if finish {
            self.phase = Phase::Finished;
        }
        finish
    }

    /// True if bytes wait to be written to the host.
    pub(super) fn has_unwritten(&self) -> bool {
        !self.to_host.is_empty()
    }
}
