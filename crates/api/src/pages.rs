//! Pages of guest RAM, as the per-VM API tells them.

use serde::{Deserialize, Serialize};

/// Ranges of guest RAM, in whole pages.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PageRanges {
    /// Guest-physical address and length in bytes of each.
    pub ranges: Vec<(u64, u64)>,
}

/// `PUT /hot`: pages that children of a zygote write, of which each gets a copy ahead of its writes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HotPages {
    /// Until the agent has acknowledged the fork.
    pub answer: PageRanges,
    /// Besides, until the first evaluation is done.
    pub eval: PageRanges,
}
