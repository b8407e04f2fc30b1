//! The muxer's side towards the guest: packets in, packets out.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::{MAX_INCOMING, Muxer, pair};
use crate::virtio::vsock::HOST_CID;
use crate::virtio::vsock::connection::{Connection, Outgoing, Phase};
use crate::virtio::vsock::host::connect_nonblocking;
use crate::virtio::vsock::lobby::send_error;
use crate::virtio::vsock::packet::{Header, Ports, TYPE_STREAM, op};

/// RSTs that may wait for receive buffers before the guest's packets are left waiting.
const MAX_RSTS: usize = 256;

impl Muxer {
    /// True while so many answers wait that no packet should be taken from the guest.
    pub(in crate::virtio::vsock) fn is_congested(&self) -> bool {
        self.rsts.len() >= MAX_RSTS
    }

    /// True if there may be a packet for the guest.
    pub(in crate::virtio::vsock) fn has_packets(&self) -> bool {
        !self.rsts.is_empty() || !self.turns.is_empty()
    }

    fn header(&self, ports: Ports, outgoing: Outgoing) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            // At most MAX_PAYLOAD.
            len: outgoing.len as u32,
            kind: TYPE_STREAM,
            op: outgoing.op,
            flags: outgoing.flags,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }

    /// The next packet for a guest buffer with `room` bytes for payload, which is put into `payload`.
    pub(in crate::virtio::vsock) fn next_packet(
        &mut self,
        room: usize,
        payload: &mut [u8],
    ) -> Option<Header> {
        if let Some(ports) = self.rsts.pop_front() {
            self.metrics.host_packets += 1;
            return Some(self.header(ports, Outgoing { op: op::RST, flags: 0, len: 0 }));
        }
        // Each at most once: one that cannot use this buffer must not be asked for ever.
        for _ in 0..self.turns.len() {
            let Some(id) = self.turns.pop_front() else { break };
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            connection.queued = false;
            let outgoing = connection.next_packet(room, payload);
            let ports = connection.ports;
            let header = outgoing.map(|outgoing| {
                let mut header = self.header(ports, outgoing);
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.tell_credit(&mut header);
                }
                self.metrics.host_packets += 1;
                self.metrics.host_bytes += outgoing.len as u64;
                header
            });
            // Behind the others, if it has more.
            self.settle(id);
            if header.is_some() {
                return header;
            }
        }
        None
    }

    /// Takes a packet from the guest.
    pub(in crate::virtio::vsock) fn receive(&mut self, header: &Header, payload: &[u8]) {
        self.metrics.guest_packets += 1;
        self.metrics.guest_bytes += payload.len() as u64;
        let ports = header.ports_from_guest();
        if header.src_cid != self.guest_cid {
            self.metrics.bad_packets += 1;
            return;
        }
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            self.metrics.bad_packets += 1;
            return self.refuse(header);
        }
        match (self.by_ports.get(&ports).copied(), header.op) {
            (None, op::REQUEST) => self.requested(header),
            (None, _) => self.refuse(header),
            (Some(id), op::RST) => self.reset_by_guest(id),
            (Some(id), _) => self.receive_for(id, header, payload),
        }
    }

    /// Answers a packet that leads nowhere, unless it is a RST itself.
    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            self.metrics.refused += u64::from(header.op == op::REQUEST);
            self.rsts.push_back(header.ports_from_guest());
        }
    }

    fn receive_for(&mut self, id: u32, header: &Header, payload: &[u8]) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.note_credit(header);
        let result = match header.op {
            op::RESPONSE => connection.accepted(),
            op::RW => connection.receive(payload),
            op::SHUTDOWN => connection.shut_by_guest(header.flags),
            op::CREDIT_UPDATE => Ok(()),
            op::CREDIT_REQUEST => {
                connection.credit_requested();
                Ok(())
            }
            // A REQUEST for a connection that exists, or no operation at all.
            _ => Err(crate::virtio::vsock::connection::Violation),
        };
        match result {
            Ok(()) => self.settle(id),
            Err(_) => {
                self.metrics.bad_packets += 1;
                self.reset(id);
            }
        }
    }

    fn reset_by_guest(&mut self, id: u32) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match connection.phase {
            Phase::Requested { .. } => {
                self.metrics.refused += 1;
                if connection.announce
                    && let Some(stream) = connection.stream()
                {
                    let port = connection.ports.guest;
                    send_error(stream, &format!("connection to guest port {port} refused"));
                }
                self.remove(id);
            }
            // The guest closed in good order and does not want to wait. What it sent is still due.
            Phase::Closing if connection.has_unwritten() => {
                connection.orphan = true;
                let ports = connection.ports;
                self.by_ports.remove(&ports);
                self.settle(id);
            }
            _ => self.remove(id),
        }
    }

    /// The guest asks for a connection to a port of the host.
    fn requested(&mut self, header: &Header) {
        self.metrics.guest_connects += 1;
        let port = header.dst_port;
        let stream = if !self.has_room() {
            None
        } else if self.internal_ports.contains(&port) {
            self.offer_incoming(port)
        } else {
            // Nobody listening is an answer, not an error of ours.
            self.path.as_deref().and_then(|p| connect_nonblocking(&port_path(p, port)).ok())
        };
        match stream {
            Some(stream) => {
                let id = self.new_id();
                self.insert(id, Connection::from_guest(stream, header));
            }
            None => self.refuse(header),
        }
    }

    fn offer_incoming(&mut self, port: u32) -> Option<UnixStream> {
        if self.incoming.len() >= MAX_INCOMING {
            return None;
        }
        match pair() {
            Ok((ours, theirs)) => {
                self.incoming.push_back((port, theirs));
                Some(ours)
            }
            Err(_) => {
                self.metrics.host_errors += 1;
                None
            }
        }
    }
}

/// The socket of host port `port`: the device's path, an underscore and the number.
fn port_path(path: &Path, port: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!("_{port}"));
    PathBuf::from(name)
}
