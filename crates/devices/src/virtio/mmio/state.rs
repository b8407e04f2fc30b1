//! The saved form of a transport.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK};

use super::{Core, Shared};
use crate::virtio::queue::{QueueState, VirtQueue};
use crate::virtio::{DeviceState, RestoreError, VirtioDevice};

/// Everything that a driver can see of a device, and the device's own state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// Device status register.
    pub status: u32,
    /// DeviceFeaturesSel.
    pub device_features_sel: u32,
    /// DriverFeaturesSel.
    pub driver_features_sel: u32,
    /// Features that the driver has written.
    pub driver_features: u64,
    /// QueueSel.
    pub queue_sel: u32,
    /// InterruptStatus.
    pub interrupt_status: u32,
    /// ConfigGeneration.
    pub config_generation: u32,
    /// Notified queues that were not processed, one bit each.
    pub pending: u64,
    /// All queues, in order.
    pub queues: Vec<QueueState>,
    /// The device.
    pub device: DeviceState,
}

impl<D: VirtioDevice> Core<D> {
    pub(super) fn save(&self, shared: &Shared) -> TransportState {
        TransportState {
            status: self.status,
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            interrupt_status: shared.interrupt_status.load(Ordering::Acquire),
            config_generation: self.config_generation,
            pending: shared.pending.load(Ordering::Acquire),
            queues: self.queues.iter().map(VirtQueue::save).collect(),
            device: self.device.save(),
        }
    }

    /// All checks come first, so that an invalid state leaves the transport reset and nothing worse.
    pub(super) fn restore(
        &mut self,
        shared: &Shared,
        state: &TransportState,
    ) -> Result<(), RestoreError> {
        self.reset(shared);
        let result = self.try_restore(shared, state);
        if result.is_err() {
            self.reset(shared);
        }
        result
    }

    fn try_restore(&mut self, shared: &Shared, state: &TransportState) -> Result<(), RestoreError> {
        let invalid = |what: String| Err(RestoreError::Invalid(what));
        if state.queues.len() != self.queues.len() {
            return invalid(format!(
                "{} queues saved, the device has {}",
                state.queues.len(),
                self.queues.len()
            ));
        }
        let settled = state.status & VIRTIO_CONFIG_S_FEATURES_OK != 0;
        if settled && !self.features_are_valid(state.driver_features) {
            return invalid(format!("features {:#x} are not offered", state.driver_features));
        }
        if !settled
            && (state.status & VIRTIO_CONFIG_S_DRIVER_OK != 0
                || state.queues.iter().any(|q| q.ready))
        {
            return invalid(format!("status {:#x} with a running device", state.status));
        }
        self.driver_features = state.driver_features;
        for (index, (queue, saved)) in self.queues.iter_mut().zip(&state.queues).enumerate() {
            queue
                .restore(&self.mem, saved)
                .map_err(|e| RestoreError::Invalid(format!("queue {index}: {e}")))?;
        }
        if settled {
            self.device.ack_features(state.driver_features);
        }
        self.device.restore(&state.device)?;
        self.status = state.status;
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.queue_sel = state.queue_sel;
        self.config_generation = state.config_generation;
        if self.running() {
            self.device.activate();
        }
        shared.interrupt_status.store(state.interrupt_status, Ordering::Release);
        shared.pending.store(state.pending, Ordering::Release);
        Ok(())
    }
}
