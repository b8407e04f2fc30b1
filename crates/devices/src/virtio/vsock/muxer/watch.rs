//! The muxer's side towards the reactor.

use std::io;
use std::os::fd::AsFd;

use forkd_sys::reactor::{Interest, Reactor, Readiness, Token};

use super::{LISTENER, Muxer};
use crate::virtio::vsock::connection::Phase;
use crate::virtio::vsock::lobby::Outcome;

impl Muxer {
    /// Starts over with a reactor that knows none of the sockets; tokens are `base` and those after.
    pub(in crate::virtio::vsock) fn register(&mut self, base: Token) {
        self.base = base;
        self.listener_registered = false;
        self.closed.clear();
        for (&id, connection) in &mut self.connections {
            connection.registered = None;
            self.changed.insert(id);
        }
        let clients: Vec<u32> = self.lobby.ids().collect();
        for id in clients {
            if let Some(client) = self.lobby.client(id) {
                client.registered = None;
            }
            self.changed.insert(id);
        }
    }

    fn token(&self, id: u32) -> Token {
        Token(self.base.0.saturating_add(u64::from(id)))
    }

    /// The reactor's news of a socket. A token that is not known any more is no news.
    pub(in crate::virtio::vsock) fn ready(&mut self, readiness: &Readiness) {
        let id = readiness.token.0.checked_sub(self.base.0).and_then(|n| u32::try_from(n).ok());
        let Some(id) = id else { return };
        if id == LISTENER || self.lobby.contains(id) {
            return self.lobby_ready(id, readiness);
        }
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let hangup = readiness.hangup || readiness.error;
        match connection.phase {
            // The client left. A guest that was not asked need not be told.
            Phase::Requested { sent: false } if hangup => self.remove(id),
            Phase::Requested { sent: true } if hangup => self.reset(id),
            Phase::Requested { .. } => {}
            _ => {
                connection.note_ready(readiness.readable, readiness.writable, hangup);
                self.settle(id);
            }
        }
    }

    fn lobby_ready(&mut self, id: u32, readiness: &Readiness) {
        let mut outcome = Outcome::default();
        if id == LISTENER {
            let connections = &self.connections;
            let taken = |id| connections.contains_key(&id);
            self.lobby.accept(&mut self.last_id, taken, &mut self.metrics, &mut outcome);
        } else {
            self.lobby.ready(id, readiness, &mut self.metrics, &mut outcome);
        }
        self.apply(outcome);
    }

    /// Tells the reactor what changed. A socket that it does not take is reset.
    pub(in crate::virtio::vsock) fn sync(&mut self, reactor: &Reactor) {
        for stream in self.closed.drain(..) {
            if reactor.remove(&stream).is_err() {
                self.metrics.host_errors += 1;
            }
        }
        self.sync_listener(reactor);
        let changed: Vec<u32> = self.changed.drain().collect();
        for id in changed {
            let token = self.token(id);
            if let Some(client) = self.lobby.client(id) {
                let (wanted, known) = (Some(client.interest()), client.registered);
                match watch(reactor, client.stream(), token, known, wanted) {
                    Ok(()) => client.registered = wanted,
                    Err(_) => self.metrics.host_errors += 1,
                }
            } else if let Some(connection) = self.connections.get_mut(&id) {
                let wanted = connection.interest();
                let Some(stream) = connection.stream() else { continue };
                match watch(reactor, stream, token, connection.registered, wanted) {
                    Ok(()) => connection.registered = wanted,
                    Err(_) => {
                        self.metrics.host_errors += 1;
                        self.reset(id);
                    }
                }
            }
        }
    }

    fn sync_listener(&mut self, reactor: &Reactor) {
        let Some(listener) = &self.lobby.listener else { return };
        let token = Token(self.base.0.saturating_add(u64::from(LISTENER)));
        let known = self.listener_registered.then_some(Interest::READ);
        let wanted = (!self.listener_paused).then_some(Interest::READ);
        match watch(reactor, listener, token, known, wanted) {
            Ok(()) => self.listener_registered = wanted.is_some(),
            Err(_) => self.metrics.host_errors += 1,
        }
        // A failed accept is tried again once the loop has done something else.
        self.listener_paused = false;
    }
}

fn watch(
    reactor: &Reactor,
    fd: impl AsFd,
    token: Token,
    known: Option<Interest>,
    wanted: Option<Interest>,
) -> io::Result<()> {
    match (known, wanted) {
        (known, wanted) if known == wanted => Ok(()),
        (None, Some(interest)) => reactor.add(fd, token, interest),
        (Some(_), Some(interest)) => reactor.modify(fd, token, interest),
        (_, None) => reactor.remove(fd),
    }
}
