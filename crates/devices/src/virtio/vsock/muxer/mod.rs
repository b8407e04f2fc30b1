//! All connections of a device: who they are, whose turn it is, and what the reactor should watch.
//!
//! The muxer does not see queues. It takes a packet's header and payload ([`Muxer::receive`]) and gives the
//! next packet ([`Muxer::next_packet`]): that is `traffic`. It does not see the reactor either, but while
//! [`Muxer::sync`] runs (`watch`): what changed in between is remembered.

mod traffic;
mod watch;

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use forkd_sys::reactor::{Interest, Token};

use super::MAX_CONNECTIONS;
use super::connection::{Connection, Phase};
use super::lobby::{Gate, Lobby, Outcome, next_id, send_error};
use super::metrics::VsockMetrics;
use super::packet::Ports;

/// Host ports of connections that the host asks for start here, as Firecracker's do, far from those that
/// a guest would connect to.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// Streams that may wait for the VMM to take them.
const MAX_INCOMING: usize = 64;
/// The listener's place among the tokens; clients and connections come after, by their ids.
const LISTENER: u32 = 0;

/// Most ports that are remembered as asked for.
const REACHED_MAX: usize = 64;

#[derive(Debug)]
pub(super) struct Muxer {
    guest_cid: u64,
    connections: HashMap<u32, Connection>,
    /// Connections that the guest knows, by their ports.
    by_ports: HashMap<Ports, u32>,
    lobby: Lobby,
    /// Connections with something to send, in the order of their turns.
    turns: VecDeque<u32>,
    /// Connections that do not exist, to be told to the guest.
    rsts: VecDeque<Ports>,
    last_id: u32,
    pub(super) next_host_port: u32,
    /// Path of the listener: ports of the host are sockets beside it.
    path: Option<PathBuf>,
    internal_ports: HashSet<u32>,
    /// Ports of the guest that clients of the host have asked for: the first [`REACHED_MAX`].
    reached: HashSet<u32>,
    incoming: VecDeque<(u32, UnixStream)>,
    // The reactor's side.
    base: Token,
    listener_registered: bool,
    listener_paused: bool,
    /// Clients and connections whose interest may have changed.
    changed: HashSet<u32>,
    /// Streams that are done with, but that the reactor still knows.
    closed: Vec<UnixStream>,
    pub(super) metrics: VsockMetrics,
}

impl Muxer {
    /// See [`super::VsockEndpoint::has_reached`].
    pub(super) fn has_reached(&self, port: u32) -> bool {
        self.reached.contains(&port)
    }

    pub(super) fn new(guest_cid: u64) -> Self {
        Self {
            guest_cid,
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            lobby: Lobby::new(),
            turns: VecDeque::new(),
            rsts: VecDeque::new(),
            last_id: LISTENER,
            next_host_port: FIRST_HOST_PORT,
            path: None,
            internal_ports: HashSet::new(),
            reached: HashSet::new(),
            incoming: VecDeque::new(),
            base: Token(0),
            listener_registered: false,
            listener_paused: false,
            changed: HashSet::new(),
            closed: Vec::new(),
            metrics: VsockMetrics::default(),
        }
    }

    /// Listens at `path`. The device must not listen anywhere yet.
    pub(super) fn listen(&mut self, listener: UnixListener, path: &Path) {
        self.lobby.listener = Some(listener);
        self.path = Some(path.to_owned());
    }

    pub(super) fn is_listening(&self) -> bool {
        self.lobby.listener.is_some()
    }

    pub(super) fn set_gate(&mut self, gate: Gate) {
        let mut outcome = Outcome::default();
        self.lobby.set_gate(gate, &mut self.metrics, &mut outcome);
        self.apply(outcome);
    }

    /// Connects to `port` of the guest; the returned stream is the VMM's end.
    pub(super) fn connect_internal(&mut self, port: u32) -> io::Result<UnixStream> {
        let (ours, theirs) = pair()?;
        self.metrics.host_connects += 1;
        let ports = self.claim_ports(port).ok_or_else(|| {
            io::Error::other(format!("the guest has {MAX_CONNECTIONS} vsock connections already"))
        })?;
        let id = self.new_id();
        self.insert(id, Connection::to_guest(ports, ours, false));
        Ok(theirs)
    }

    pub(super) fn listen_internal(&mut self, port: u32) {
        self.internal_ports.insert(port);
    }

    pub(super) fn take_incoming(&mut self) -> Vec<(u32, UnixStream)> {
        self.incoming.drain(..).collect()
    }

    /// Ends all connections without a word to either side: the guest's driver starts over.
    pub(super) fn forget_connections(&mut self) {
        let ids: Vec<u32> = self.connections.keys().copied().collect();
        ids.into_iter().for_each(|id| self.remove(id));
        self.turns.clear();
        self.rsts.clear();
        self.incoming.clear();
    }

    /// For the child of a fork: drops all that was inherited. Sockets are closed and nothing more: a
    /// shutdown would be the source's, too. Clients that come later are held.
    /// Connections that were ending anyway are ended by a RST; of others see [`Muxer::has_established`].
    pub(super) fn begin_child(&mut self) {
        let mut rsts = std::mem::take(&mut self.rsts);
        rsts.extend(self.connections.values().filter(|c| c.is_ending()).map(|c| c.ports));
        self.forget_connections();
        self.rsts = rsts;
        self.lobby = Lobby::new();
        self.reached.clear();
        self.closed.clear();
        self.changed.clear();
        self.path = None;
        self.listener_registered = false;
        self.listener_paused = false;
    }

    /// True if there are connections that neither side has ended: a RST would look to the guest as if
    /// they had been closed in good order.
    pub(super) fn has_established(&self) -> bool {
        self.connections.values().any(|c| c.phase == Phase::Established)
    }

    /// True if the guest may know of any connection.
    pub(super) fn has_connections(&self) -> bool {
        !self.connections.is_empty() || !self.rsts.is_empty()
    }

    /// All host sockets but the listener.
    #[cfg(test)]
    pub(super) fn streams(&mut self) -> impl Iterator<Item = &UnixStream> {
        let ids: Vec<u32> = self.lobby.ids().collect();
        let clients = ids.into_iter().filter_map(|id| self.lobby.peek(id));
        self.connections.values().filter_map(Connection::stream).chain(clients)
    }

    // ---- The table ----

    fn new_id(&mut self) -> u32 {
        let (connections, lobby) = (&self.connections, &self.lobby);
        next_id(&mut self.last_id, |id| connections.contains_key(&id) || lobby.contains(id))
    }

    /// Finds a free host port for a connection to `guest`; `None` if the table is full.
    fn claim_ports(&mut self, guest: u32) -> Option<Ports> {
        if !self.has_room() {
            return None;
        }
        // There are more ports than connections, so this ends.
        loop {
            let host = self.next_host_port;
            self.next_host_port = host.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            let ports = Ports { host, guest };
            if !self.by_ports.contains_key(&ports) {
                return Some(ports);
            }
        }
    }

    /// True if there is room for one more connection, after throwing out one that only waits for the
    /// guest's last word, or for a host that does not read what a guest wrote that is gone.
    fn has_room(&mut self) -> bool {
        if self.connections.len() < MAX_CONNECTIONS {
            return true;
        }
        let spare = |c: &Connection| c.phase == Phase::Finished || c.orphan;
        let found = self.connections.iter().find(|(_, c)| spare(c));
        let Some(id) = found.map(|(&id, _)| id) else { return false };
        self.reset(id);
        true
    }

    fn insert(&mut self, id: u32, connection: Connection) {
        self.by_ports.insert(connection.ports, id);
        self.connections.insert(id, connection);
        self.settle(id);
    }

    /// Removes a connection and closes its socket.
    fn remove(&mut self, id: u32) {
        let Some(mut connection) = self.connections.remove(&id) else { return };
        if self.by_ports.get(&connection.ports) == Some(&id) {
            self.by_ports.remove(&connection.ports);
        }
        self.changed.remove(&id);
        if let Some(stream) = connection.take_stream() {
            self.close(stream, connection.registered);
        }
    }

    /// Removes a connection and tells the guest, if the guest knows it.
    fn reset(&mut self, id: u32) {
        if let Some(connection) = self.connections.get(&id) {
            if !connection.orphan {
                self.metrics.resets += 1;
                self.rsts.push_back(connection.ports);
            }
            self.remove(id);
        }
    }

    /// Closes a socket: at once, or after the reactor has forgotten it.
    fn close(&mut self, stream: UnixStream, registered: Option<Interest>) {
        if registered.is_some() {
            self.closed.push(stream);
        }
        // A descriptor is free again.
        self.listener_paused = false;
    }

    /// To be called after anything happened to a connection: removes it if it is over, gives it a turn if
    /// it has something to send, and has its interest looked at.
    fn settle(&mut self, id: u32) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.finish_if_host_shut()
            && let Some(stream) = connection.take_stream()
        {
            let registered = connection.registered.take();
            self.close(stream, registered);
        }
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.is_over() {
            return self.reset(id);
        }
        if connection.has_packet() && !connection.queued {
            connection.queued = true;
            self.turns.push_back(id);
        }
        self.changed.insert(id);
    }

    /// Makes connections of clients that passed the gate, and closes those that left.
    fn apply(&mut self, outcome: Outcome) {
        self.changed.extend(outcome.changed);
        for (stream, registered) in outcome.left {
            self.close(stream, registered);
        }
        for client in outcome.passed {
            self.metrics.host_connects += 1;
            if self.reached.len() < REACHED_MAX {
                self.reached.insert(client.port);
            }
            match self.claim_ports(client.port) {
                Some(ports) => {
                    let mut connection = Connection::to_guest(ports, client.stream, true);
                    connection.registered = client.registered;
                    self.insert(client.id, connection);
                }
                None => {
                    self.metrics.refused += 1;
                    send_error(&client.stream, "too many vsock connections");
                    self.close(client.stream, client.registered);
                }
            }
        }
        self.listener_paused |= outcome.accept_failed;
    }
}

/// A pair of connected streams, neither of which blocks.
fn pair() -> io::Result<(UnixStream, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    theirs.set_nonblocking(true)?;
    Ok((ours, theirs))
}
