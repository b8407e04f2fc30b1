//! What is saved of a vCPU's assistance.

use serde::{Deserialize, Serialize};

/// Saved assistance of one vCPU. Plain data; the runtime type is [`super::VcpuAssist`]. The trampoline is guest RAM,
/// and is found there again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PvmState {
    /// Linear address of the guest's #PF handler, where the breakpoint stands; 0 if there is none.
    pub breakpoint: u64,
}
