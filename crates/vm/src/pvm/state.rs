//! What is saved of a vCPU's assistance.

use serde::{Deserialize, Serialize};

/// Saved assistance of one vCPU. Plain data; the runtime type is [`super::VcpuAssist`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PvmState {
    /// Linear address of the guest's #PF handler, where the breakpoint stands; 0 while not known.
    pub page_fault_handler: u64,
}
