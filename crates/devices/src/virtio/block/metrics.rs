//! Counters of a block device.

use crate::virtio::Counters;

/// What a block device did so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockMetrics {
    /// Read requests done.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Write requests done.
    pub writes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Flush requests done.
    pub flushes: u64,
    /// Discard and write-zeroes requests done.
    pub discards: u64,
    /// Requests that got an error status.
    pub errors: u64,
    /// Requests without room for a status.
    pub bad_requests: u64,
}

impl BlockMetrics {
    /// Name and value of each counter.
    pub fn snapshot(&self) -> Counters {
        vec![
            ("reads".into(), self.reads),
            ("read_bytes".into(), self.read_bytes),
            ("writes".into(), self.writes),
            ("write_bytes".into(), self.write_bytes),
            ("flushes".into(), self.flushes),
            ("discards".into(), self.discards),
            ("errors".into(), self.errors),
            ("bad_requests".into(), self.bad_requests),
        ]
    }
}
