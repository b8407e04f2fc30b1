//! The saved form of a socket device.

use serde::{Deserialize, Serialize};

/// How far the guest has been told that its connections are gone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ResetPhase {
    /// There is nothing to tell.
    #[default]
    None,
    /// The event waits for a buffer of the event queue.
    Pending,
    /// The guest has the event, and has handled it once its event queue has been offered more buffers
    /// than this (modulo 2^16).
    Delivered {
        /// Buffers offered when the event was delivered.
        offered: u16,
    },
}

/// What outlives the process: connections do not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's context id.
    pub guest_cid: u64,
    /// Where the search for a free host port goes on. A port that an old connection of the guest used
    /// should not come again soon.
    pub next_host_port: u32,
    /// Transport reset: pending, if there were connections.
    pub reset: ResetPhase,
}
