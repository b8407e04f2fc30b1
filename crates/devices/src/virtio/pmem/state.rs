//! The saved form of a pmem device.

use serde::{Deserialize, Serialize};

/// Where the region lay: a restored guest has it mapped there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmemState {
    /// Guest-physical address of the region.
    pub start: u64,
    /// Its size in bytes.
    pub size: u64,
}
