//! The device: one queue of buffers to fill.

use crate::virtio::chain::Chain;
use crate::virtio::queue::Served;
use crate::virtio::rng::{RngMetrics, RngState};
use crate::virtio::{
    Counters, DeviceError, DeviceState, Memory, Progress, QueueIo, RestoreError, VirtioDevice, id,
};

const QUEUE_SIZES: [u16; 1] = [64];
/// Most bytes of one request; the rest of a larger buffer stays as it is, which the guest is told.
const MAX_REQUEST: usize = 4096;
/// Bytes of one call.
const BUDGET: u64 = 64 * 1024;

/// An entropy source.
#[derive(Debug, Default)]
pub struct Rng {
    metrics: RngMetrics,
}

impl Rng {
    /// A new one.
    pub fn new() -> Self {
        Self::default()
    }

    fn serve(metrics: &mut RngMetrics, mem: &Memory, mut chain: Chain) -> Served {
        let n = chain.writable.remaining().min(MAX_REQUEST);
        let mut bytes = [0; MAX_REQUEST];
        let filled = n > 0
            && forkd_sys::random::fill(&mut bytes[..n]).is_ok()
            && chain.writable.write(mem, &bytes[..n]).is_ok();
        let written = if filled { n as u32 } else { 0 };
        metrics.requests += u64::from(filled);
        metrics.failures += u64::from(!filled);
        metrics.bytes += u64::from(written);
        // A failed request costs something as well.
        Served { written, cost: u64::from(written).max(64) }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        id::RNG
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn ack_features(&mut self, _features: u64) {}

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn process_queue(
        &mut self,
        index: usize,
        io: &mut QueueIo<'_>,
    ) -> Result<Progress, DeviceError> {
        let queue = io.queues.get_mut(index).ok_or(DeviceError::NoSuchQueue(index))?;
        let metrics = &mut self.metrics;
        queue
            .drain(io.mem, BUDGET, |chain| Self::serve(metrics, io.mem, chain))
            .map_err(|source| DeviceError::Queue { index, source })
    }

    fn reset(&mut self) {}

    fn save(&self) -> DeviceState {
        DeviceState::Rng(RngState {})
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Rng(RngState {}) => Ok(()),
            _ => Err(RestoreError::WrongDevice { expected: "rng", found: state.kind() }),
        }
    }

    fn metrics(&self) -> Counters {
        self.metrics.snapshot()
    }
}
