//! Counters of a socket device.

use crate::virtio::Counters;

/// What a socket device did so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VsockMetrics {
    /// Packets from the guest.
    pub guest_packets: u64,
    /// Payload bytes from the guest.
    pub guest_bytes: u64,
    /// Packets to the guest.
    pub host_packets: u64,
    /// Payload bytes to the guest.
    pub host_bytes: u64,
    /// Connections that the host asked for.
    pub host_connects: u64,
    /// Connections that the guest asked for.
    pub guest_connects: u64,
    /// Connections that were refused, by either side or for their number.
    pub refused: u64,
    /// Connections that the device reset.
    pub resets: u64,
    /// Packets that make no sense: dropped.
    pub bad_packets: u64,
    /// Receive buffers too small for a header: given back empty.
    pub bad_buffers: u64,
    /// Times the guest had no receive buffer when one was wanted.
    pub starved: u64,
    /// Clients that were held at the gate.
    pub held: u64,
    /// Clients that left or were dropped before they were a connection.
    pub lobby_dropped: u64,
    /// Failures of the host: accept, epoll.
    pub host_errors: u64,
}

impl VsockMetrics {
    /// Name and value of each counter.
    pub fn snapshot(&self) -> Counters {
        let all = [
            ("guest_packets", self.guest_packets),
            ("guest_bytes", self.guest_bytes),
            ("host_packets", self.host_packets),
            ("host_bytes", self.host_bytes),
            ("host_connects", self.host_connects),
            ("guest_connects", self.guest_connects),
            ("refused", self.refused),
            ("resets", self.resets),
            ("bad_packets", self.bad_packets),
            ("bad_buffers", self.bad_buffers),
            ("starved", self.starved),
            ("held", self.held),
            ("lobby_dropped", self.lobby_dropped),
            ("host_errors", self.host_errors),
        ];
        all.into_iter().map(|(name, value)| (name.into(), value)).collect()
    }
}
