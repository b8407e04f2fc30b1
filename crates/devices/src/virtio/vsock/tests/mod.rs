//! End to end: a driver that plays the guest, real Unix sockets, a real reactor.

mod flow;
mod fork;
mod host;

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use forkd_sys::reactor::{Reactor, Readiness, Token};
use tempfile::TempDir;

use super::packet::{HEADER_LEN, Header, TYPE_STREAM, op};
use super::{GUEST_CID, Gate, HOST_CID, Vsock, VsockEndpoint};
use crate::virtio::mmio::{MmioTransport, Transport};
use crate::virtio::testing::{Counter, Guest, memory};

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
const BASE: Token = Token(1000);
/// Features of the transport that a test may negotiate.
const EVENT_IDX: u64 = 1 << 29;

/// A packet as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Packet {
    header: Header,
    payload: Vec<u8>,
}

struct Rig {
    endpoint: VsockEndpoint,
    transport: Arc<MmioTransport<Vsock>>,
    reactor: Reactor,
    guest: Guest,
    interrupt: Arc<Counter>,
    event_idx: bool,
    inbox: VecDeque<Packet>,
    /// Receive buffers that the guest keeps posted, and their size.
    rx_buffers: usize,
    rx_size: usize,
    events: usize,
    event_buffers: usize,
    dir: TempDir,
}

impl Rig {
    fn new() -> Self {
        Self::with(0, 64)
    }

    /// A device whose driver takes `features` and keeps `rx_buffers` posted.
    fn with(features: u64, rx_buffers: usize) -> Self {
        let mem = memory();
        let interrupt = Arc::new(Counter::default());
        let transport = Arc::new(MmioTransport::new(
            Vsock::new(),
            mem.clone(),
            interrupt.clone(),
            Arc::new(Counter::default()),
        ));
        let endpoint = VsockEndpoint::new(Arc::clone(&transport));
        let dir = tempfile::tempdir().unwrap();
        endpoint.listen(&dir.path().join("vsock.sock")).unwrap();
        endpoint.set_gate(Gate::Open);
        let reactor = Reactor::new().unwrap();
        endpoint.register(&reactor, BASE);
        let mut guest = Guest::new(mem, transport.front());
        let taken = guest.start(features);
        let mut rig = Self {
            endpoint,
            transport,
            reactor,
            guest,
            interrupt,
            event_idx: taken & EVENT_IDX != 0,
            inbox: VecDeque::new(),
            rx_buffers,
            rx_size: 4096,
            events: 0,
            event_buffers: 8,
            dir,
        };
        rig.post_buffers();
        rig.pump();
        rig
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("vsock.sock")
    }

    fn post_buffers(&mut self) {
        let capacity = 128;
        for (queue, count, size) in
            [(RX, self.rx_buffers, self.rx_size), (EVENT, self.event_buffers, 4)]
        {
            let capacity = if queue == EVENT { 16 } else { capacity };
            let mut added = 0;
            while capacity - self.guest.free(queue) < count {
                self.guest.submit(queue, &[], &[size]).unwrap();
                added += 1;
            }
            if added > 0 {
                self.guest.notify_if_wanted(queue, added, self.event_idx);
            }
        }
    }

    /// What the guest's interrupt handler does. Returns true if there was anything.
    fn guest_turn(&mut self) -> bool {
        let mut any = false;
        while self.guest.take_used(TX).is_some() {
            any = true;
        }
        while let Some(used) = self.guest.take_used(RX) {
            any = true;
            let bytes: [u8; HEADER_LEN] = used.written[..HEADER_LEN].try_into().unwrap();
            let header = Header::from_bytes(&bytes);
            assert_eq!(used.len as usize, HEADER_LEN + header.len as usize);
            let payload = used.written[HEADER_LEN..used.len as usize].to_vec();
            self.inbox.push_back(Packet { header, payload });
        }
        while let Some(used) = self.guest.take_used(EVENT) {
            any = true;
            assert_eq!((used.len, used.written), (4, vec![0; 4]));
            self.events += 1;
        }
        self.post_buffers();
        any
    }

    /// Runs guest and event loop until neither has anything to do.
    fn pump(&mut self) {
        let mut ready: Vec<Readiness> = Vec::new();
        for _ in 0..20_000 {
            self.endpoint.process(&self.reactor);
            self.reactor.wait(&mut ready, Some(Duration::ZERO)).unwrap();
            for readiness in &ready {
                assert!(self.endpoint.owns(readiness.token));
                self.endpoint.handle(&self.reactor, readiness);
            }
            let busy = self.guest_turn();
            if !busy && ready.is_empty() && !self.transport.has_pending() {
                assert_eq!(self.transport.fault(), None);
                return;
            }
        }
        panic!("the event loop spins");
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        let header = Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            kind: TYPE_STREAM,
            len: payload.len() as u32,
            ..header
        };
        self.send_raw(header, &[payload]);
    }

    fn send_raw(&mut self, header: Header, payload: &[&[u8]]) {
        let bytes = header.to_bytes();
        let mut buffers: Vec<&[u8]> = vec![&bytes];
        buffers.extend(payload.iter().filter(|p| !p.is_empty()));
        while self.guest.submit(TX, &buffers, &[]).is_none() {
            let before = self.guest.free(TX);
            self.pump();
            assert!(self.guest.free(TX) > before, "the device does not take packets");
        }
        self.guest.notify_if_wanted(TX, 1, self.event_idx);
    }

    fn recv(&mut self) -> Packet {
        self.pump();
        self.inbox.pop_front().expect("a packet for the guest")
    }

    fn recv_op(&mut self, op: u16) -> Packet {
        let packet = self.recv();
        assert_eq!(packet.header.op, op, "{packet:?}");
        packet
    }

    fn assert_silent(&mut self) {
        self.pump();
        assert_eq!(self.inbox, VecDeque::new());
    }

    /// A client of the host that has said its port.
    fn client(&self, port: u32) -> UnixStream {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }

    /// A client whose connection to guest port `port` is established.
    fn connect(&mut self, port: u32) -> (UnixStream, Conn) {
        let mut client = self.client(port);
        let request = self.recv_op(op::REQUEST);
        assert_eq!(request.header.dst_port, port);
        let conn = Conn::new(&request.header);
        self.send(conn.header(op::RESPONSE), &[]);
        self.pump();
        assert_eq!(read_some(&mut client), format!("OK {}\n", conn.host_port).into_bytes());
        (client, conn)
    }
}

/// The guest's end of a connection.
#[derive(Debug, Clone, Copy)]
struct Conn {
    guest_port: u32,
    host_port: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
    flags: u32,
}

impl Conn {
    fn new(from_host: &Header) -> Self {
        Self {
            guest_port: from_host.dst_port,
            host_port: from_host.src_port,
            buf_alloc: 256 * 1024,
            fwd_cnt: 0,
            flags: 0,
        }
    }

    fn header(&self, op: u16) -> Header {
        Header {
            src_port: self.guest_port,
            dst_port: self.host_port,
            op,
            flags: self.flags,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
            ..Header::default()
        }
    }
}

/// Reads what there is now.
fn read_some(stream: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return all,
            Ok(n) => all.extend(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return all,
            Err(e) => panic!("{e}"),
        }
    }
}

/// True if the peer has closed or shut down its sending side, and all was read.
fn at_eof(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0; 1]), Ok(0))
}
