//! The saved form of a socket device.

use serde::{Deserialize, Serialize};

/// What outlives the process: connections do not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's context id.
    pub guest_cid: u64,
    /// Where the search for a free host port goes on.
    pub next_host_port: u32,
    /// The guest has still to be told that its connections are gone.
    pub reset_pending: bool,
}
