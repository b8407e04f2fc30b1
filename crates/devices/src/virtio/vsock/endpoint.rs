//! What the VMM's event loop and fork use of a socket device.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use forkd_sys::PathError;
use forkd_sys::reactor::{Reactor, Readiness, Token};
use forkd_sys::unix_path::bind_listener;

use super::{Gate, Vsock};
use crate::virtio::Progress;
use crate::virtio::mmio::{MmioTransport, Transport};

/// Number of tokens that a device may use, from the base that it was given.
pub const TOKEN_SPAN: u64 = 1 << 32;

/// A socket device as an event-loop subscriber.
///
/// The loop calls [`VsockEndpoint::process`] after it was woken, and [`VsockEndpoint::handle`] for readiness of
/// tokens that are [owned](VsockEndpoint::owns). Interrupts for the guest are raised by the transport while
/// these run; nothing else needs to be injected. All other calls ring the transport's doorbell if they
/// leave work for the loop.
#[derive(Debug)]
pub struct VsockEndpoint {
    transport: Arc<MmioTransport<Vsock>>,
    base: AtomicU64,
}

impl VsockEndpoint {
    /// A subscriber for the device behind `transport`.
    pub fn new(transport: Arc<MmioTransport<Vsock>>) -> Self {
        // No token is owned before `register`.
        Self { transport, base: AtomicU64::new(u64::MAX) }
    }

    /// The transport.
    pub fn transport(&self) -> &Arc<MmioTransport<Vsock>> {
        &self.transport
    }

    /// Listens for clients of the host at `path`, which must not exist. They are held until
    /// [`VsockEndpoint::set_gate`].
    ///
    /// # Errors
    /// The device listens already (`AlreadyExists`), or that of binding.
    pub fn listen(&self, path: &Path) -> Result<(), PathError> {
        self.transport.with_device(|vsock| {
            if vsock.muxer.is_listening() {
                let error = io::Error::from(io::ErrorKind::AlreadyExists);
                return Err(PathError::new("listen twice: also at", path, error));
            }
            let listener = bind_listener(path)?;
            listener
                .set_nonblocking(true)
                .map_err(|e| PathError::new("set up the socket at", path, e))?;
            vsock.muxer.listen(listener, path);
            Ok(())
        })?;
        self.transport.ring();
        Ok(())
    }

    /// Registers all sockets with `reactor`, as tokens `base` to `base + TOKEN_SPAN`. The reactor must not
    /// know any of them: it is new, at the start or in the child of a fork.
    pub fn register(&self, reactor: &Reactor, base: Token) {
        self.base.store(base.0, Ordering::Relaxed);
        self.transport.with_device(|vsock| {
            vsock.muxer.register(base);
            vsock.muxer.sync(reactor);
        });
    }

    /// True if `token` is one of this device's.
    pub fn owns(&self, token: Token) -> bool {
        let base = self.base.load(Ordering::Relaxed);
        base != u64::MAX && token.0.checked_sub(base).is_some_and(|n| n < TOKEN_SPAN)
    }

    /// A socket is ready: moves data between it and the guest.
    pub fn handle(&self, reactor: &Reactor, readiness: &Readiness) {
        self.work(|vsock| vsock.muxer.ready(readiness));
        self.sync(reactor);
    }

    /// The loop was woken: works on queues that the guest has notified.
    pub fn process(&self, reactor: &Reactor) {
        self.transport.process_pending();
        self.sync(reactor);
    }

    fn sync(&self, reactor: &Reactor) {
        self.transport.with_device(|vsock| vsock.muxer.sync(reactor));
    }

    /// Changes something of the device, then does what can be done for the guest.
    fn work<T>(&self, f: impl FnOnce(&mut Vsock) -> T) -> T {
        self.transport.with_io(super::device::RX, |vsock, io| {
            let value = f(vsock);
            (value, io.map_or(Ok(Progress::Done), |io| vsock.work(io)))
        })
    }

    /// Says what becomes of clients of the host, those that are held included.
    pub fn set_gate(&self, gate: Gate) {
        self.work(|vsock| vsock.muxer.set_gate(gate));
        self.transport.ring();
    }

    /// Connects to `port` of the guest, past the gate. The returned stream does not block. There is no "OK"
    /// line: what is written is delivered once the guest accepts; if it refuses, reading gives the end of
    /// file at once, and writing fails.
    ///
    /// # Errors
    /// Out of descriptors, or too many connections.
    pub fn connect_internal(&self, port: u32) -> io::Result<UnixStream> {
        let stream = self.work(|vsock| vsock.muxer.connect_internal(port));
        self.transport.ring();
        stream
    }

    /// From now on, connections of the guest to `port` of the host come out of
    /// [`VsockEndpoint::take_internal_incoming`], and not at a socket.
    pub fn listen_internal(&self, port: u32) {
        self.transport.with_device(|vsock| vsock.muxer.listen_internal(port));
    }

    /// Whether a client of the host has been let through to `port` of the guest, since the start or the fork. Of clients
    /// that ask for dozens of ports, the later ones are not told.
    pub fn has_reached(&self, port: u32) -> bool {
        self.transport.with_device(|vsock| vsock.muxer.has_reached(port))
    }

    /// The connections that the guest made to internal ports since this was asked last: port and stream,
    /// which does not block. Ask after [`VsockEndpoint::process`].
    pub fn take_internal_incoming(&self) -> Vec<(u32, UnixStream)> {
        self.transport.with_device(|vsock| vsock.muxer.take_incoming())
    }

    /// In the child of a fork, before its vCPUs run: drops every socket that was inherited, and listens
    /// at `path` (a zygote nowhere). Clients are held until [`VsockEndpoint::set_gate`]. If there were
    /// connections, the guest is told that they are gone; what is sent to it waits until it has handled
    /// that. Internal ports stay. [`VsockEndpoint::register`] must follow, with the child's reactor.
    ///
    /// # Errors
    /// That of binding; the rest is done even so.
    pub fn begin_child(&self, path: Option<&Path>) -> Result<(), PathError> {
        self.base.store(u64::MAX, Ordering::Relaxed);
        self.work(Vsock::begin_child);
        path.map_or(Ok(()), |path| self.listen(path))
    }
}
