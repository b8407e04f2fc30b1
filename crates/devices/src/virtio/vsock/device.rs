//! The device: receive, transmit and event queue.

use super::metrics::VsockMetrics;
use super::muxer::Muxer;
use super::packet::{EVENT_TRANSPORT_RESET, HEADER_LEN, Header, MAX_PAYLOAD};
use super::state::{ResetPhase, VsockState};
use super::{GUEST_CID, HOST_CID};
use crate::virtio::chain::Chain;
use crate::virtio::queue::{QueueError, VirtQueue};
use crate::virtio::{
    Counters, DeviceError, DeviceState, Memory, Progress, QueueIo, RestoreError, VirtioDevice, id,
    read_config_bytes,
};

const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// The queues, by number.
pub(super) const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;

/// Packets of one call, each way.
const PACKET_BUDGET: usize = 256;
/// Payload bytes of one call, each way.
const BYTE_BUDGET: usize = 1 << 20;

/// A socket device.
#[derive(Debug)]
pub struct Vsock {
    pub(super) muxer: Muxer,
    reset: ResetPhase,
    /// Packets of the guest wait until some answers have gone out.
    tx_blocked: bool,
    payload: Vec<u8>,
}

impl Vsock {
    /// A device that listens nowhere yet, and holds clients of the host once it does.
    pub fn new() -> Self {
        Self {
            muxer: Muxer::new(GUEST_CID),
            reset: ResetPhase::None,
            tx_blocked: false,
            payload: vec![0; MAX_PAYLOAD],
        }
    }

    /// The device's counters.
    pub fn counters(&self) -> VsockMetrics {
        self.muxer.metrics
    }

    /// For the child of a fork: if connections were lost, the guest is to be told.
    pub(super) fn begin_child(&mut self) {
        self.reset = self.reset_if_lost(self.muxer.has_established());
        self.muxer.begin_child();
        self.tx_blocked = false;
    }

    /// The phase after connections were lost. An event that was delivered and is not handled yet will do:
    /// nothing was connected since.
    fn reset_if_lost(&self, lost: bool) -> ResetPhase {
        match self.reset {
            ResetPhase::None if lost => ResetPhase::Pending,
            phase => phase,
        }
    }

    /// Does all that can be done now: events first, then packets for the guest, and packets of the guest
    /// that waited for room.
    ///
    /// # Errors
    /// The guest broke the rules of a queue.
    pub(super) fn work(&mut self, io: &mut QueueIo<'_>) -> Result<Progress, DeviceError> {
        self.deliver_reset(io).map_err(|source| DeviceError::Queue { index: EVENT, source })?;
        let mut progress = self.fill_rx(io)?;
        if self.tx_blocked && !self.muxer.is_congested() {
            self.tx_blocked = false;
            progress = self.drain_tx(io)?;
            if self.fill_rx(io)? == Progress::More {
                progress = Progress::More;
            }
        }
        Ok(progress)
    }

    /// Tells the guest that its connections are gone, and finds out that it knows.
    fn deliver_reset(&mut self, io: &mut QueueIo<'_>) -> Result<(), QueueError> {
        let Some(queue) = io.queues.get_mut(EVENT).filter(|q| q.ready()) else { return Ok(()) };
        if self.reset == ResetPhase::Pending {
            // Before the event is given: the guest may be quick.
            let offered = queue.offered(io.mem)?;
            while self.reset == ResetPhase::Pending {
                let Some(mut chain) = queue.pop(io.mem)? else {
                    if queue.rearm(io.mem)? {
                        continue;
                    }
                    return Ok(());
                };
                let written = chain.writable.write(io.mem, &EVENT_TRANSPORT_RESET).is_ok();
                let len = if written { EVENT_TRANSPORT_RESET.len() as u32 } else { 0 };
                queue.push_used(io.mem, chain.head, len)?;
                if written {
                    self.reset = ResetPhase::Delivered { offered };
                }
            }
        }
        if let ResetPhase::Delivered { offered } = self.reset {
            queue.notify_after(io.mem, offered)?;
            if queue.offered(io.mem)? != offered {
                self.reset = ResetPhase::None;
            }
        }
        Ok(())
    }

    /// Puts packets into the guest's receive buffers, while there are both.
    fn fill_rx(&mut self, io: &mut QueueIo<'_>) -> Result<Progress, DeviceError> {
        let failed = |source| DeviceError::Queue { index: RX, source };
        let Some(queue) = io.queues.get_mut(RX).filter(|q| q.ready()) else {
            return Ok(Progress::Done);
        };
        if self.reset != ResetPhase::None {
            return Ok(Progress::Done);
        }
        let (mut packets, mut bytes) = (0, 0);
        while self.muxer.has_packets() {
            if packets >= PACKET_BUDGET || bytes >= BYTE_BUDGET {
                return Ok(Progress::More);
            }
            let Some(chain) = queue.pop(io.mem).map_err(failed)? else {
                if queue.rearm(io.mem).map_err(failed)? {
                    continue;
                }
                self.muxer.metrics.starved += 1;
                return Ok(Progress::Done);
            };
            packets += 1;
            match self.fill_one(queue, io.mem, chain).map_err(failed)? {
                Some(len) => bytes += len,
                None => break,
            }
        }
        queue.quiet(io.mem).map_err(failed)?;
        Ok(Progress::Done)
    }

    /// Fills one receive buffer. Returns the bytes of payload; `None` if there was no packet after all.
    fn fill_one(
        &mut self,
        queue: &mut VirtQueue,
        mem: &Memory,
        mut chain: Chain,
    ) -> Result<Option<usize>, QueueError> {
        let Some(room) = chain.writable.remaining().checked_sub(HEADER_LEN) else {
            self.muxer.metrics.bad_buffers += 1;
            queue.push_used(mem, chain.head, 0)?;
            return Ok(Some(0));
        };
        // Checked before anything is read from a socket: data must not get lost.
        if !chain.writable.are_ram(mem) {
            self.muxer.metrics.bad_buffers += 1;
            queue.push_used(mem, chain.head, 0)?;
            return Ok(Some(0));
        }
        let Some(header) = self.muxer.next_packet(room, &mut self.payload) else {
            queue.undo_pop();
            return Ok(None);
        };
        let len = header.len as usize;
        let whole = chain
            .writable
            .write(mem, &header.to_bytes())
            .and_then(|()| chain.writable.write(mem, &self.payload[..len]));
        let used = if whole.is_ok() { HEADER_LEN + len } else { 0 };
        queue.push_used(mem, chain.head, used as u32)?;
        Ok(Some(len))
    }

    /// Takes packets from the guest.
    fn drain_tx(&mut self, io: &mut QueueIo<'_>) -> Result<Progress, DeviceError> {
        let failed = |source| DeviceError::Queue { index: TX, source };
        let Some(queue) = io.queues.get_mut(TX).filter(|q| q.ready()) else {
            return Ok(Progress::Done);
        };
        queue.quiet(io.mem).map_err(failed)?;
        let (mut packets, mut bytes) = (0, 0);
        loop {
            if self.muxer.is_congested() {
                self.tx_blocked = true;
                return Ok(Progress::Done);
            }
            if packets >= PACKET_BUDGET || bytes >= BYTE_BUDGET {
                return Ok(Progress::More);
            }
            let Some(chain) = queue.pop(io.mem).map_err(failed)? else {
                if queue.rearm(io.mem).map_err(failed)? {
                    continue;
                }
                return Ok(Progress::Done);
            };
            let head = chain.head;
            packets += 1;
            bytes += self.take_one(io.mem, chain);
            queue.push_used(io.mem, head, 0).map_err(failed)?;
        }
    }

    /// Takes one packet; returns the bytes of payload. What is no packet is dropped.
    fn take_one(&mut self, mem: &Memory, mut chain: Chain) -> usize {
        let mut bytes = [0; HEADER_LEN];
        if chain.readable.read(mem, &mut bytes).is_err() {
            self.muxer.metrics.bad_packets += 1;
            return 0;
        }
        let header = Header::from_bytes(&bytes);
        let len = header.len as usize;
        let Some(payload) = self.payload.get_mut(..len) else {
            self.muxer.metrics.bad_packets += 1;
            return 0;
        };
        if chain.readable.read(mem, payload).is_err() {
            self.muxer.metrics.bad_packets += 1;
            return 0;
        }
        self.muxer.receive(&header, payload);
        len
    }
}

impl Default for Vsock {
    fn default() -> Self {
        Self::new()
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        id::VSOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn ack_features(&mut self, _features: u64) {}

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&GUEST_CID.to_le_bytes(), offset, data);
    }

    fn process_queue(
        &mut self,
        index: usize,
        io: &mut QueueIo<'_>,
    ) -> Result<Progress, DeviceError> {
        let taken = match index {
            TX if !self.tx_blocked => self.drain_tx(io)?,
            RX | TX | EVENT => Progress::Done,
            _ => return Err(DeviceError::NoSuchQueue(index)),
        };
        let worked = self.work(io)?;
        let more = taken == Progress::More || worked == Progress::More;
        Ok(if more { Progress::More } else { Progress::Done })
    }

    /// The driver starts over: its connections are gone, and it knows.
    fn reset(&mut self) {
        self.muxer.forget_connections();
        self.reset = ResetPhase::None;
        self.tx_blocked = false;
    }

    fn save(&self) -> DeviceState {
        DeviceState::Vsock(VsockState {
            guest_cid: GUEST_CID,
            next_host_port: self.muxer.next_host_port,
            reset: self.reset_if_lost(self.muxer.has_connections()),
        })
    }

    /// Connections are not restored: the guest is told that they are gone, if there were any.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Vsock(state) = state else {
            return Err(RestoreError::WrongDevice { expected: "vsock", found: state.kind() });
        };
        if state.guest_cid != GUEST_CID {
            return Err(RestoreError::Invalid(format!(
                "guest cid {} where this device has {GUEST_CID}",
                state.guest_cid
            )));
        }
        self.muxer.next_host_port = state.next_host_port;
        self.reset = state.reset;
        Ok(())
    }

    fn metrics(&self) -> Counters {
        self.muxer.metrics.snapshot()
    }
}

const _: () = assert!(HOST_CID != GUEST_CID);
