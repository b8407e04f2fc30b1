//! The device: requests in, statuses out.

use virtio_bindings::virtio_blk as blk;

use crate::virtio::block::disk::SECTOR_SIZE;
use crate::virtio::block::{BLOCK_SIZE, BlockMetrics, BlockState, Disk, DiskError};
use crate::virtio::chain::{AccessError, Buffers, Chain};
use crate::virtio::queue::Served;
use crate::virtio::{
    Counters, DeviceError, DeviceState, Memory, Progress, QueueIo, RestoreError, VirtioDevice, id,
    read_config_bytes,
};

const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: [u16; 1] = [QUEUE_SIZE];

/// Most data buffers of a request: a full queue less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Largest data buffer, in bytes.
const SIZE_MAX: u32 = 64 * 1024;
/// Largest request, by the two limits above: what a driver that keeps them can ask.
const MAX_REQUEST: usize = SEG_MAX as usize * SIZE_MAX as usize;
/// Most sectors of one discard or write-zeroes: 1 GiB. It bounds the work of a request.
const MAX_CLEAR_SECTORS: u32 = 1 << 21;
/// Bytes of one call, after which other devices get their turn.
const BUDGET: u64 = 4 << 20;
/// What a request costs at least, in bytes.
const MIN_COST: u64 = 4096;
/// Bytes that are copied at a time.
const BOUNCE: usize = 64 * 1024;
/// Header of a request: type, reserved, sector (virtio 1.2, section 5.2.6).
const HEADER: usize = 16;

/// A block device's identity.
#[derive(Debug, Clone, Default)]
pub struct BlockConfig {
    /// Answer to GET_ID, at most 20 bytes of it: the guest's `/sys/block/vdX/serial`.
    pub id: String,
}

/// A block device.
#[derive(Debug)]
pub struct Block {
    disk: Disk,
    id: [u8; blk::VIRTIO_BLK_ID_BYTES as usize],
    bounce: Vec<u8>,
    metrics: BlockMetrics,
}

/// Why a request gets an error status.
#[derive(Debug)]
enum RequestError {
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported,
    /// VIRTIO_BLK_S_IOERR.
    Io,
}

impl From<DiskError> for RequestError {
    fn from(_: DiskError) -> Self {
        Self::Io
    }
}

impl From<AccessError> for RequestError {
    fn from(_: AccessError) -> Self {
        Self::Io
    }
}

impl Block {
    /// A device that shows `disk`.
    pub fn new(disk: Disk, config: &BlockConfig) -> Self {
        let mut id = [0; blk::VIRTIO_BLK_ID_BYTES as usize];
        let n = config.id.len().min(id.len());
        id[..n].copy_from_slice(&config.id.as_bytes()[..n]);
        Self { disk, id, bounce: vec![0; BOUNCE], metrics: BlockMetrics::default() }
    }

    /// The disk.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// The disk, to restore its layer.
    pub fn disk_mut(&mut self) -> &mut Disk {
        &mut self.disk
    }

    /// Bytes that the copy-on-write layer holds.
    pub fn dirty_bytes(&self) -> u64 {
        self.disk.dirty_bytes()
    }

    fn serve(&mut self, mem: &Memory, mut chain: Chain) -> Served {
        let Some(mut status_byte) = chain.writable.split_tail(1) else {
            self.metrics.bad_requests += 1;
            return Served { written: 0, cost: MIN_COST };
        };
        let (status, written, moved) =
            match self.execute(mem, &mut chain.readable, &mut chain.writable) {
                Ok((written, moved)) => (blk::VIRTIO_BLK_S_OK, written, moved),
                Err(error) => {
                    self.metrics.errors += 1;
                    let status = match error {
                        RequestError::Unsupported => blk::VIRTIO_BLK_S_UNSUPP,
                        RequestError::Io => blk::VIRTIO_BLK_S_IOERR,
                    };
                    (status, 0, 0)
                }
            };
        if status_byte.write(mem, &[status as u8]).is_err() {
            self.metrics.bad_requests += 1;
            return Served { written: 0, cost: MIN_COST };
        }
        Served { written: written + 1, cost: moved.max(MIN_COST) }
    }

    /// Does one request; returns bytes written into the chain, and bytes moved in all.
    fn execute(
        &mut self,
        mem: &Memory,
        readable: &mut Buffers,
        writable: &mut Buffers,
    ) -> Result<(u32, u64), RequestError> {
        let mut header = [0; HEADER];
        readable.read(mem, &mut header)?;
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([k0, k1, k2, k3]);
        let offset = u64::from_le_bytes(sector).checked_mul(SECTOR_SIZE).ok_or(RequestError::Io)?;
        match kind {
            blk::VIRTIO_BLK_T_IN => self.read(mem, offset, writable),
            blk::VIRTIO_BLK_T_OUT => self.write(mem, offset, readable),
            blk::VIRTIO_BLK_T_FLUSH => {
                self.metrics.flushes += 1;
                Ok((0, 0))
            }
            blk::VIRTIO_BLK_T_GET_ID => {
                let n = writable.remaining().min(self.id.len());
                writable.write(mem, &self.id[..n])?;
                Ok((n as u32, 0))
            }
            blk::VIRTIO_BLK_T_DISCARD | blk::VIRTIO_BLK_T_WRITE_ZEROES => {
                self.clear(mem, kind, readable)
            }
            _ => Err(RequestError::Unsupported),
        }
    }

    fn data_len(&self, offset: u64, buffers: &Buffers) -> Result<usize, RequestError> {
        let len = buffers.remaining();
        let fits = offset.checked_add(len as u64).is_some_and(|end| end <= self.disk.size());
        if len == 0 || len > MAX_REQUEST || !(len as u64).is_multiple_of(SECTOR_SIZE) || !fits {
            return Err(RequestError::Io);
        }
        Ok(len)
    }

    fn read(
        &mut self,
        mem: &Memory,
        offset: u64,
        out: &mut Buffers,
    ) -> Result<(u32, u64), RequestError> {
        let len = self.data_len(offset, out)?;
        let mut done = 0;
        while done < len {
            let n = (len - done).min(BOUNCE);
            self.disk.read(offset + done as u64, &mut self.bounce[..n])?;
            out.write(mem, &self.bounce[..n])?;
            done += n;
        }
        self.metrics.reads += 1;
        self.metrics.read_bytes += len as u64;
        Ok((len as u32, len as u64))
    }

    fn write(
        &mut self,
        mem: &Memory,
        offset: u64,
        data: &mut Buffers,
    ) -> Result<(u32, u64), RequestError> {
        let len = self.data_len(offset, data)?;
        if self.disk.read_only() {
            return Err(RequestError::Io);
        }
        let mut done = 0;
        while done < len {
            let n = (len - done).min(BOUNCE);
            data.read(mem, &mut self.bounce[..n])?;
            self.disk.write(offset + done as u64, &self.bounce[..n])?;
            done += n;
        }
        self.metrics.writes += 1;
        self.metrics.write_bytes += len as u64;
        Ok((0, len as u64))
    }

    /// Discard and write-zeroes: one segment of sector, number of sectors, flags (section 5.2.6.2).
    fn clear(
        &mut self,
        mem: &Memory,
        kind: u32,
        data: &mut Buffers,
    ) -> Result<(u32, u64), RequestError> {
        if self.disk.read_only() {
            return Err(RequestError::Unsupported);
        }
        if data.remaining() != 16 {
            return Err(RequestError::Io);
        }
        let mut segment = [0; 16];
        data.read(mem, &mut segment)?;
        let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = segment;
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let unmap = kind == blk::VIRTIO_BLK_T_WRITE_ZEROES;
        if flags & !(u32::from(unmap) * blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) != 0 {
            return Err(RequestError::Unsupported);
        }
        if sectors > MAX_CLEAR_SECTORS {
            return Err(RequestError::Io);
        }
        let offset = u64::from_le_bytes(sector).checked_mul(SECTOR_SIZE).ok_or(RequestError::Io)?;
        let len = u64::from(sectors) * SECTOR_SIZE;
        if unmap {
            self.disk.write_zeroes(offset, len)?;
        } else {
            self.disk.discard(offset, len)?;
        }
        self.metrics.discards += 1;
        // About a bit of bookkeeping for each block.
        Ok((0, len / 256))
    }

    /// `struct virtio_blk_config` (virtio 1.2, section 5.2.4).
    fn config(&self) -> [u8; 60] {
        let mut c = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| c[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.disk.size() / SECTOR_SIZE).to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR_SIZE as u32).to_le_bytes());
        // Topology: physical blocks are 2^3 sectors, and the least sensible I/O is one of them.
        let block_sectors = (BLOCK_SIZE as u64 / SECTOR_SIZE) as u16;
        put(24, &[block_sectors.trailing_zeros() as u8, 0]);
        put(26, &block_sectors.to_le_bytes());
        put(34, &1u16.to_le_bytes());
        put(36, &MAX_CLEAR_SECTORS.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &u32::from(block_sectors).to_le_bytes());
        put(48, &MAX_CLEAR_SECTORS.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
        c
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        id::BLOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let always = 1 << blk::VIRTIO_BLK_F_SIZE_MAX
            | 1 << blk::VIRTIO_BLK_F_SEG_MAX
            | 1 << blk::VIRTIO_BLK_F_BLK_SIZE
            | 1 << blk::VIRTIO_BLK_F_TOPOLOGY
            | 1 << blk::VIRTIO_BLK_F_FLUSH;
        let writable = 1 << blk::VIRTIO_BLK_F_DISCARD | 1 << blk::VIRTIO_BLK_F_WRITE_ZEROES;
        always | if self.disk.read_only() { 1 << blk::VIRTIO_BLK_F_RO } else { writable }
    }

    fn ack_features(&mut self, _features: u64) {}

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn process_queue(
        &mut self,
        index: usize,
        io: &mut QueueIo<'_>,
    ) -> Result<Progress, DeviceError> {
        let queue = io.queues.get_mut(index).ok_or(DeviceError::NoSuchQueue(index))?;
        queue
            .drain(io.mem, BUDGET, |chain| self.serve(io.mem, chain))
            .map_err(|source| DeviceError::Queue { index, source })
    }

    fn reset(&mut self) {}

    fn save(&self) -> DeviceState {
        DeviceState::Block(BlockState {
            size: self.disk.size(),
            read_only: self.disk.read_only(),
            id: self.id.to_vec(),
        })
    }

    /// The disk must have the size and mode that the guest knows; the layer is restored apart.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Block(state) = state else {
            return Err(RestoreError::WrongDevice { expected: "block", found: state.kind() });
        };
        if (state.size, state.read_only) != (self.disk.size(), self.disk.read_only()) {
            return Err(RestoreError::Invalid(format!(
                "the disk had {} bytes (read-only: {}), it now has {} (read-only: {})",
                state.size,
                state.read_only,
                self.disk.size(),
                self.disk.read_only()
            )));
        }
        self.id = state
            .id
            .as_slice()
            .try_into()
            .map_err(|_| RestoreError::Invalid(format!("id of {} bytes", state.id.len())))?;
        Ok(())
    }

    fn metrics(&self) -> Counters {
        let mut counters = self.metrics.snapshot();
        counters.push(("dirty_bytes".into(), self.dirty_bytes()));
        counters
    }
}
