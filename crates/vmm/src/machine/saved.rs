//! The saved form of a machine's devices and disks, for durable snapshots. RAM and what KVM holds are saved apart.

use std::sync::Arc;

use forkd_devices::i8042::I8042State;
use forkd_devices::serial::SerialState;
use forkd_devices::virtio::block::{Block, Disk, Extent, ExtentKind, LayerState};
use forkd_devices::virtio::mmio::{MmioTransport, TransportState};
use serde::{Deserialize, Serialize};

use super::{Machine, lock};

/// Why devices can't be put back.
#[derive(Debug, thiserror::Error)]
pub enum DevicesError {
    /// Another set of devices was saved.
    #[error("devices {saved:?} were saved, this machine has {here:?}")]
    Other {
        /// Names of those that were saved.
        saved: Vec<String>,
        /// Names of those that are here.
        here: Vec<String>,
    },
    /// A virtio device does not take its state.
    #[error("{name}: {source}")]
    Virtio {
        /// The device.
        name: String,
        /// Why.
        source: forkd_devices::virtio::RestoreError,
    },
    /// The serial port does not.
    #[error("serial port: {0}")]
    Serial(#[from] forkd_devices::serial::SerialRestoreError),
    /// A disk's layer is not valid, or can't be read.
    #[error("drive {index}: {source}")]
    Disk {
        /// Number of the drive.
        index: usize,
        /// Why.
        source: forkd_devices::virtio::block::DiskError,
    },
}

/// Devices, as they are saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevicesState {
    /// The serial port.
    pub serial: SerialState,
    /// The keyboard controller.
    pub i8042: I8042State,
    /// virtio devices with their names, in the order of their slots.
    pub virtio: Vec<(String, TransportState)>,
}

/// A machine's disks, to be read. They are the machine's own: it must stand still meanwhile, or this be a forked copy.
#[derive(Clone)]
pub struct Disks(Vec<Arc<MmioTransport<Block>>>);

impl Disks {
    /// Calls `f` with each disk, in order.
    ///
    /// # Errors
    /// The first of `f`.
    pub fn each<E>(&self, mut f: impl FnMut(&Disk) -> Result<(), E>) -> Result<(), E> {
        self.0.iter().try_for_each(|block| block.with_device(|device| f(device.disk())))
    }
}

impl Machine {
    /// Saves the devices. The VM must stand still.
    pub fn save_devices(&self) -> DevicesState {
        let virtio = self.virtio.iter().map(|d| (d.name.clone(), d.transport.save())).collect();
        DevicesState { serial: lock(&self.serial).save(), i8042: lock(&self.i8042).save(), virtio }
    }

    /// Puts saved devices back into a machine that was just assembled.
    ///
    /// # Errors
    /// [`DevicesError`]; the machine is then of no use.
    pub fn restore_devices(&self, state: &DevicesState) -> Result<(), DevicesError> {
        if !self.virtio.iter().map(|d| &d.name).eq(state.virtio.iter().map(|(name, _)| name)) {
            return Err(DevicesError::Other {
                saved: state.virtio.iter().map(|(name, _)| name.clone()).collect(),
                here: self.virtio.iter().map(|d| d.name.clone()).collect(),
            });
        }
        lock(&self.serial).restore(&state.serial)?;
        lock(&self.i8042).restore(&state.i8042);
        for (device, (name, saved)) in self.virtio.iter().zip(&state.virtio) {
            device
                .transport
                .restore(saved)
                .map_err(|source| DevicesError::Virtio { name: name.clone(), source })?;
        }
        Ok(())
    }

    /// The disks, in order.
    pub fn disks(&self) -> Disks {
        Disks(self.blocks.clone())
    }

    /// Fills the layer of disk `index`, which must be empty: `extents` are byte ranges, ascending; `data` gives the
    /// content of those that are not zeroes, one after the other.
    ///
    /// # Errors
    /// [`DevicesError::Disk`].
    pub fn fill_disk(
        &self,
        index: usize,
        extents: &[(std::ops::Range<u64>, ExtentKind)],
        data: &mut dyn std::io::Read,
    ) -> Result<(), DevicesError> {
        let unit = forkd_snapshot::PAGE_SIZE;
        let extents = extents.iter().map(|(range, kind)| Extent {
            first: range.start / unit,
            count: (range.end - range.start).div_ceil(unit),
            kind: *kind,
        });
        let layer = LayerState { extents: extents.collect() };
        let Some(block) = self.blocks.get(index) else { return Ok(()) };
        block
            .with_device(|device| device.disk_mut().read_layer(&layer, data))
            .map_err(|source| DevicesError::Disk { index, source })
    }
}
