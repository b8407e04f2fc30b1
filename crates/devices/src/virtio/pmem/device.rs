//! The device: a config space with two numbers, and a queue of flush requests.

use crate::virtio::chain::Chain;
use crate::virtio::pmem::{PmemMetrics, PmemState};
use crate::virtio::queue::Served;
use crate::virtio::{
    Counters, DeviceError, DeviceState, Memory, Progress, QueueIo, RestoreError, VirtioDevice, id,
    read_config_bytes,
};

const QUEUE_SIZES: [u16; 1] = [64];

/// VIRTIO_PMEM_REQ_TYPE_FLUSH (virtio 1.2, section 5.19.6).
const FLUSH: u32 = 0;
/// Answer for a request that was done; the driver takes anything else as an I/O error.
const OK: u32 = 0;
/// Answer for a request that is no flush.
const FAILED: u32 = 1;
/// Requests of one call.
const BUDGET: u64 = 64;

/// Where the region is mapped in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PmemConfig {
    /// Guest-physical address; Linux wants a multiple of 2 MiB for DAX.
    pub start: u64,
    /// Size in bytes.
    pub size: u64,
}

/// A read-only pmem device.
#[derive(Debug)]
pub struct Pmem {
    config: PmemConfig,
    metrics: PmemMetrics,
}

impl Pmem {
    /// A device that tells of the region of `config`.
    pub fn new(config: PmemConfig) -> Self {
        Self { config, metrics: PmemMetrics::default() }
    }

    fn serve(metrics: &mut PmemMetrics, mem: &Memory, mut chain: Chain) -> Served {
        let mut kind = [0; 4];
        let known =
            chain.readable.read(mem, &mut kind).is_ok() && u32::from_le_bytes(kind) == FLUSH;
        let answer: u32 = if known { OK } else { FAILED };
        let written = match chain.writable.write(mem, &answer.to_le_bytes()) {
            Ok(()) => 4,
            Err(_) => 0,
        };
        if known && written == 4 {
            metrics.flushes += 1;
        } else {
            metrics.bad_requests += 1;
        }
        Served { written, cost: 1 }
    }
}

impl VirtioDevice for Pmem {
    fn device_type(&self) -> u32 {
        id::PMEM
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn ack_features(&mut self, _features: u64) {}

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 16];
        config[..8].copy_from_slice(&self.config.start.to_le_bytes());
        config[8..].copy_from_slice(&self.config.size.to_le_bytes());
        read_config_bytes(&config, offset, data);
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
        DeviceState::Pmem(PmemState { start: self.config.start, size: self.config.size })
    }

    /// The region must be where it was: the guest has it mapped.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Pmem(state) = state else {
            return Err(RestoreError::WrongDevice { expected: "pmem", found: state.kind() });
        };
        if (state.start, state.size) != (self.config.start, self.config.size) {
            return Err(RestoreError::Invalid(format!(
                "the region was {:#x}+{:#x}, it is now {:#x}+{:#x}",
                state.start, state.size, self.config.start, self.config.size
            )));
        }
        Ok(())
    }

    fn metrics(&self) -> Counters {
        self.metrics.snapshot()
    }
}
