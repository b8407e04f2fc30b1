//! Counters of an entropy source.

use crate::virtio::Counters;

/// What an entropy source did so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RngMetrics {
    /// Requests that were answered.
    pub requests: u64,
    /// Bytes given to the guest.
    pub bytes: u64,
    /// Requests that got nothing: no usable buffer, or no entropy.
    pub failures: u64,
}

impl RngMetrics {
    /// Name and value of each counter.
    pub fn snapshot(&self) -> Counters {
        vec![
            ("requests".into(), self.requests),
            ("bytes".into(), self.bytes),
            ("failures".into(), self.failures),
        ]
    }
}
