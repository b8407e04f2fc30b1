//! The guest's hello: one line of JSON to the host's vsock port 49982 once both ports are open.

use serde::{Deserialize, Serialize};

/// Longest hello a host needs to read, in bytes, with its newline.
pub const MAX_HELLO: usize = 4096;

/// "The agent listens." Sent once, after a boot; never after a fork.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Version of forkd-agent.
    pub agent_version: String,
    /// Where the guest's share of the boot went.
    pub boot: BootTimings,
}

/// Marks of the boot, in microseconds of the guest's CLOCK_BOOTTIME (0: the kernel's start).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BootTimings {
    /// PID 1 runs.
    pub start_us: u64,
    /// /proc and /dev are mounted.
    pub pseudo_us: u64,
    /// The root device is there.
    pub root_found_us: u64,
    /// The root and its overlay are mounted and entered.
    pub root_us: u64,
    /// Loopback, host name and files of /etc are set.
    pub setup_us: u64,
    /// Both ports are open.
    pub listening_us: u64,
}
