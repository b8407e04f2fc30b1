//! Parts of a machine: the root image, virtio slots, disks.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forkd_api::types::DriveConfig;
use forkd_devices::bus::Bus;
use forkd_devices::virtio::block::{Disk, DiskConfig};
use forkd_devices::virtio::mmio::{MmioTransport, Transport};
use forkd_memory::GuestRam;
use forkd_sys::mmap::{AnonymousOptions, Mapping};
use forkd_vm::layout;

use super::MachineError;
use super::wiring::Wiring;

/// Linux takes a pmem region in units of 2 MiB (a subsection of ZONE_DEVICE memory).
const PMEM_UNIT: u64 = 2 << 20;

const PAGE: u64 = 4096;

/// The root image in guest-physical memory: the file, and zeroes up to the next unit.
#[derive(Debug)]
pub(super) struct Root {
    pub(super) gpa: u64,
    pub(super) file: Mapping,
    pub(super) tail: Option<Mapping>,
}

/// A virtio device at its slot, as the event loop sees it.
pub(super) struct Slotted {
    pub(super) slot: u8,
    pub(super) name: String,
    pub(super) transport: Arc<dyn Transport>,
}

impl Root {
    pub(super) fn map(path: &Path, ram: &GuestRam) -> Result<Self, MachineError> {
        let fail =
            |source| MachineError::File { what: "root image", path: path.to_path_buf(), source };
        let file = File::open(path).map_err(fail)?;
        let len = file.metadata().map_err(fail)?.len().next_multiple_of(PAGE);
        let mapping = Mapping::file_shared_readonly(&file, 0, len as usize).map_err(fail)?;
        let gap = len.next_multiple_of(PMEM_UNIT) - len;
        let tail = match gap {
            0 => None,
            _ => Some(Mapping::anonymous(gap as usize, AnonymousOptions::default()).map_err(fail)?),
        };
        let gpa = ram.free_gpa_above(layout::PMEM_ALIGN);
        Ok(Self { gpa, file: mapping, tail })
    }

    pub(super) fn len(&self) -> u64 {
        (self.file.len() + self.tail.as_ref().map_or(0, Mapping::len)) as u64
    }
}

/// Hands out virtio-mmio slots.
pub(super) struct Slots<'a> {
    pub(super) ram: &'a GuestRam,
    pub(super) wiring: &'a Wiring,
    pub(super) mmio: &'a mut Bus,
    pub(super) taken: Vec<Slotted>,
}

impl Slots<'_> {
    pub(super) fn add<D: forkd_devices::virtio::VirtioDevice + 'static>(
        &mut self,
        name: &str,
        device: D,
    ) -> Result<Arc<MmioTransport<D>>, MachineError> {
        let slot = self.taken.len() as u8;
        let full = || MachineError::Io("no virtio slot is left", io::ErrorKind::OutOfMemory.into());
        let (gpa, gsi) =
            layout::virtio_mmio_addr(slot).zip(layout::virtio_mmio_gsi(slot)).ok_or_else(full)?;
        let transport = Arc::new(MmioTransport::new(
            device,
            self.ram.guest().clone(),
            self.wiring.interrupt(gsi),
            self.wiring.doorbell(),
        ));
        self.mmio.insert(gpa, layout::VIRTIO_MMIO_STRIDE, transport.front())?;
        let name = name.to_owned();
        self.taken.push(Slotted { slot, name, transport: transport.clone() });
        Ok(transport)
    }
}

/// A disk, and the fd that it keeps open for its base image.
pub(super) fn open_disk(
    index: usize,
    drive: &DriveConfig,
) -> Result<(Disk, Option<RawFd>), MachineError> {
    let open = |path: &PathBuf| {
        File::open(path).map_err(|source| MachineError::File {
            what: "disk image",
            path: path.clone(),
            source,
        })
    };
    let base = drive.path.as_ref().map(open).transpose()?;
    let fd = base.as_ref().map(AsRawFd::as_raw_fd);
    let size = drive.size_mib.map(|mib| u64::from(mib) << 20);
    let config = DiskConfig { base, size, read_only: drive.read_only, layer_quota: u64::MAX };
    let disk = Disk::new(config).map_err(|source| MachineError::Disk { index, source })?;
    Ok((disk, fd))
}
