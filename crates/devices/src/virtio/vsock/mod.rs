//! Socket device (virtio 1.2, section 5.10): the guest's vsock ports as Unix sockets of the host.
//!
//! ```text
//!   host client ──"CONNECT 52\n"──> vsock.sock ──> lobby ──gate──┐
//!   VMM's agent link ──connect_internal(52)─────────────────────┤
//!                                                               ├──> muxer: connections ──> RX queue
//!   vsock.sock_52 <──connect── guest connects to (2, 52) <───────┤            │
//!   VMM <──take_internal_incoming── ... if listen_internal(52) <─┘            └──────────< TX queue
//! ```
//!
//! Parts: [`VsockEndpoint`] is what the VMM's event loop uses. The device works on the queues. The muxer knows
//! all connections, and decides whose turn it is. A connection is one socket, its credit and its buffer.
//! The lobby is where clients of the host wait before they are connections.
//!
//! **Flow.** Nothing blocks and nothing grows without bound. From the guest: it may send as much as the
//! credit allows that a connection gives (`BUFFER` bytes that the host has not taken). To the guest: a
//! host socket is read only when the guest has both credit and receive buffers; otherwise the socket
//! is taken out of the reactor, and its sender feels it. Connections take turns, a packet each.
//!
//! **Gate.** Until a VM has its identity, clients of the host are held; if it does not get one, they are
//! refused with a line `ERR reason`. Internal connections pass.
//!
//! **Fork.** A child drops all sockets that it inherited, by closing them only: a shutdown would reach the
//! source's. If there were established connections, it tells the guest by a TRANSPORT_RESET event,
//! which ends them with an error (a RST would look like an end in good order). Linux resets whatever is
//! connected when it handles that event, so nothing new is sent to the guest before the guest has given
//! the event's buffer back. Without established connections there is no event, and nothing to wait for.
//!
//! Packets are parsed here and not with rust-vmm's virtio-vsock: that takes a payload in one piece only,
//! while drivers may spread it over any number of buffers, and newer Linux does.
//!
//! Known holes: stream sockets only; a guest cannot connect to itself through the device.

mod connection;
mod device;
mod endpoint;
mod host;
mod lobby;
mod metrics;
mod muxer;
mod packet;
mod state;
#[cfg(test)]
mod tests;

pub use connection::BUFFER;
pub use device::Vsock;
pub use endpoint::{TOKEN_SPAN, VsockEndpoint};
pub use lobby::Gate;
pub use metrics::VsockMetrics;
pub use state::{ResetPhase, VsockState};

/// The host's context id (virtio 1.2, section 5.10.4).
pub const HOST_CID: u64 = 2;
/// The guest's context id: the first that is free for guests. It need not be unique on a host, as no
/// host kernel is involved.
pub const GUEST_CID: u64 = 3;
/// Most connections of one guest.
pub const MAX_CONNECTIONS: usize = 512;
