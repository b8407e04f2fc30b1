//! The registers that a driver reads and writes (virtio 1.2, section 4.2.2).

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::{Core, Shared, all_queues, lock};
use crate::bus::BusDevice;
use crate::virtio::VirtioDevice;
use crate::virtio::queue::RingPart;

/// "virt" (virtio 1.2, table 4.1).
const MAGIC: u32 = 0x7472_6976;
/// The version of the register layout that is not legacy.
const VERSION: u32 = 2;
/// Vendor id, free to choose: "FRKD".
const VENDOR: u32 = 0x444b_5246;
/// Length of a shared memory region that does not exist (virtio 1.2, section 4.2.2).
const NO_SHM: u32 = u32::MAX;

/// Features of the transport itself.
pub(super) const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// The status bits that a driver may set.
const DRIVER_STATUS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FAILED;

/// A transport's register window, as it is put on the MMIO bus.
pub struct Front<D> {
    shared: Arc<Shared>,
    core: Arc<Mutex<Core<D>>>,
}

impl<D> Front<D> {
    pub(super) fn new(shared: Arc<Shared>, core: Arc<Mutex<Core<D>>>) -> Self {
        Self { shared, core }
    }
}

impl<D> std::fmt::Debug for Front<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Front")
    }
}

impl<D: VirtioDevice> BusDevice for Front<D> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(config) = offset.checked_sub(u64::from(reg::VIRTIO_MMIO_CONFIG)) {
            return lock(&self.core).device.read_config(config, data);
        }
        data.fill(0);
        // Registers are 32 bits wide and accessed as such (section 4.2.2.2).
        let (Ok(out), Ok(offset)) = (<&mut [u8; 4]>::try_from(data), u32::try_from(offset)) else {
            lock(&self.core).bad_accesses += 1;
            return;
        };
        let value = match offset {
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => {
                self.shared.interrupt_status.load(Ordering::Acquire)
            }
            _ => lock(&self.core).read_register(offset),
        };
        *out = value.to_le_bytes();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(config) = offset.checked_sub(u64::from(reg::VIRTIO_MMIO_CONFIG)) {
            return lock(&self.core).device.write_config(config, data);
        }
        let (Ok(&bytes), Ok(offset)) = (<&[u8; 4]>::try_from(data), u32::try_from(offset)) else {
            lock(&self.core).bad_accesses += 1;
            return;
        };
        let value = u32::from_le_bytes(bytes);
        match offset {
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => {
                self.shared.notifications.fetch_add(1, Ordering::Relaxed);
                // A number without a queue has no effect: its bit is ignored or out of the word.
                self.shared.mark_pending(1u64.checked_shl(value).unwrap_or(0));
            }
            reg::VIRTIO_MMIO_INTERRUPT_ACK => {
                self.shared.interrupt_status.fetch_and(!value, Ordering::AcqRel);
            }
            _ => lock(&self.core).write_register(&self.shared, offset, value),
        }
    }
}

impl<D: VirtioDevice> Core<D> {
    fn offered_features(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    fn read_register(&mut self, offset: u32) -> u32 {
        let selected = self.queues.get(self.queue_sel as usize);
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => self.device.device_type(),
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_sel {
                0 => self.offered_features() as u32,
                1 => (self.offered_features() >> 32) as u32,
                _ => 0,
            },
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => selected.map_or(0, |q| u32::from(q.max_size())),
            reg::VIRTIO_MMIO_QUEUE_READY => u32::from(selected.is_some_and(|q| q.ready())),
            reg::VIRTIO_MMIO_STATUS => self.status,
            reg::VIRTIO_MMIO_CONFIG_GENERATION => self.config_generation,
            reg::VIRTIO_MMIO_SHM_LEN_LOW
            | reg::VIRTIO_MMIO_SHM_LEN_HIGH
            | reg::VIRTIO_MMIO_SHM_BASE_LOW
            | reg::VIRTIO_MMIO_SHM_BASE_HIGH => NO_SHM,
            _ => {
                self.bad_accesses += 1;
                0
            }
        }
    }

    fn write_register(&mut self, shared: &Shared, offset: u32, value: u32) {
        match offset {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => self.write_features(value),
            reg::VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            reg::VIRTIO_MMIO_STATUS => self.write_status(shared, value),
            reg::VIRTIO_MMIO_QUEUE_READY => self.write_queue_ready(shared, value),
            // There are no shared memory regions to choose from.
            reg::VIRTIO_MMIO_SHM_SEL => {}
            reg::VIRTIO_MMIO_QUEUE_NUM => self.configure_queue(|q| q.set_size(value)),
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => self.write_address(RingPart::Desc, false, value),
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => self.write_address(RingPart::Desc, true, value),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => self.write_address(RingPart::Avail, false, value),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => self.write_address(RingPart::Avail, true, value),
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => self.write_address(RingPart::Used, false, value),
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => self.write_address(RingPart::Used, true, value),
            _ => self.bad_accesses += 1,
        }
    }

    fn write_features(&mut self, value: u32) {
        let (shift, keep) = match self.driver_features_sel {
            0 => (0, 0xffff_ffff_0000_0000),
            1 => (32, 0xffff_ffff),
            _ => {
                self.bad_accesses += u64::from(value != 0);
                return;
            }
        };
        if self.status & VIRTIO_CONFIG_S_DRIVER == 0
            || self.status & VIRTIO_CONFIG_S_FEATURES_OK != 0
        {
            self.bad_accesses += 1;
            return;
        }
        self.driver_features = (self.driver_features & keep) | (u64::from(value) << shift);
    }

    fn write_status(&mut self, shared: &Shared, value: u32) {
        if value == 0 {
            return self.reset(shared);
        }
        let added = value & !self.status & DRIVER_STATUS;
        // Each step needs those before it; one write may take several.
        if added & VIRTIO_CONFIG_S_FAILED != 0 {
            self.status |= VIRTIO_CONFIG_S_FAILED;
        }
        if added & VIRTIO_CONFIG_S_ACKNOWLEDGE != 0 {
            self.status |= VIRTIO_CONFIG_S_ACKNOWLEDGE;
        }
        if added & VIRTIO_CONFIG_S_DRIVER != 0 && self.has(VIRTIO_CONFIG_S_ACKNOWLEDGE) {
            self.status |= VIRTIO_CONFIG_S_DRIVER;
        }
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0
            && self.has(VIRTIO_CONFIG_S_DRIVER)
            && self.features_are_valid(self.driver_features)
        {
            self.status |= VIRTIO_CONFIG_S_FEATURES_OK;
            self.device.ack_features(self.driver_features);
        }
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 && self.has(VIRTIO_CONFIG_S_FEATURES_OK) {
            self.status |= VIRTIO_CONFIG_S_DRIVER_OK;
            self.device.activate();
            // Notifications that came before were not acted upon.
            shared.mark_pending(all_queues(self.queues.len()));
        }
        if added & !self.status != 0 {
            self.bad_accesses += 1;
        }
    }

    fn has(&self, status: u32) -> bool {
        self.status & status != 0
    }

    /// A driver must take VERSION_1 and nothing that is not offered.
    pub(super) fn features_are_valid(&self, features: u64) -> bool {
        features & !self.offered_features() == 0 && features & (1 << VIRTIO_F_VERSION_1) != 0
    }

    pub(super) fn event_idx(&self) -> bool {
        self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0
    }

    /// Queues are set up after the features are settled, and not while they are enabled.
    fn configure_queue(&mut self, f: impl FnOnce(&mut crate::virtio::queue::VirtQueue)) {
        let allowed = self.has(VIRTIO_CONFIG_S_FEATURES_OK);
        match self.queues.get_mut(self.queue_sel as usize).filter(|q| allowed && !q.ready()) {
            Some(queue) => f(queue),
            None => self.bad_accesses += 1,
        }
    }

    fn write_address(&mut self, part: RingPart, high: bool, value: u32) {
        self.configure_queue(|q| q.set_address(part, high, value));
    }

    fn write_queue_ready(&mut self, shared: &Shared, value: u32) {
        let event_idx = self.event_idx();
        let allowed = self.has(VIRTIO_CONFIG_S_FEATURES_OK);
        let index = self.queue_sel as usize;
        let Some(queue) = self.queues.get_mut(index) else {
            self.bad_accesses += 1;
            return;
        };
        if value != 1 {
            queue.disable();
        } else if !allowed {
            self.bad_accesses += 1;
        } else if !queue.ready()
            && let Err(source) = queue.enable(&self.mem, event_idx)
        {
            let error = crate::virtio::DeviceError::Queue { index, source };
            self.stop(shared, &error.to_string());
        }
    }
}
