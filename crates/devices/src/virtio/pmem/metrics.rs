//! Counters of a pmem device.

use crate::virtio::Counters;

/// What a pmem device did so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PmemMetrics {
    /// Flush requests that were answered.
    pub flushes: u64,
    /// Requests of another type, or without room for an answer.
    pub bad_requests: u64,
}

impl PmemMetrics {
    /// Name and value of each counter.
    pub fn snapshot(&self) -> Counters {
        vec![("flushes".into(), self.flushes), ("bad_requests".into(), self.bad_requests)]
    }
}
