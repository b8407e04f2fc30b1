//! The state file: everything of a VM but the bytes of its RAM and disks.
//!
//! | section | version | what |
//! |---|---|---|
//! | `MACH` | 1 | [`MachineState`] |
//! | `DEVS` | 1 | [`DevicesState`] |
//! | `KVM ` | 1 | [`VmState`]: IOAPIC, clock |
//! | `CPU` and index | 1 | [`VcpuState`] of one vCPU |
//! | `MODE` | 1 | [`ModeState`]; where it is missing, the vCPUs tell whether kernel mode was emulated |
//!
//! `MODE` came later, and only a guest whose kernel mode ran natively on PVM has it: the others' files are as they were.
//!
//! Files of each version are in `crates/vmm/tests/golden`, and load for ever.

use std::path::PathBuf;

use forkd_api::types::DriveConfig;
use forkd_state::{Reader, StateError, Tag, Writer};
use forkd_vm::{GuestMode, VcpuState, VmState};
use serde::{Deserialize, Serialize};

use crate::fork::SavedKvm;
use crate::machine::Machine;
use crate::machine::saved::DevicesState;

const MACHINE: Tag = Tag::new(b"MACH");
const DEVICES: Tag = Tag::new(b"DEVS");
const KVM: Tag = Tag::new(b"KVM ");
const MODE: Tag = Tag::new(b"MODE");
const VERSION: u16 = 1;

/// How the machine is built, besides what the manifest says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    /// The VM's id, which its disks tell the guest.
    pub id: String,
    /// Block devices.
    pub drives: Vec<DriveState>,
    /// Number of vCPUs, 1 to 16.
    pub vcpus: u8,
    /// Forks between the cold boot and the snapshot.
    pub generation: u32,
}

/// How the guest ran kernel mode. The order is part of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ModeState {
    /// By VT-x or SVM.
    Hardware,
    /// Emulated, on PVM.
    PvmEmulated,
    /// Natively, on PVM.
    PvmNative,
}

impl From<GuestMode> for ModeState {
    fn from(mode: GuestMode) -> Self {
        match mode {
            GuestMode::Hardware => Self::Hardware,
            GuestMode::PvmEmulated => Self::PvmEmulated,
            GuestMode::PvmNative => Self::PvmNative,
        }
    }
}

impl From<ModeState> for GuestMode {
    fn from(mode: ModeState) -> Self {
        match mode {
            ModeState::Hardware => Self::Hardware,
            ModeState::PvmEmulated => Self::PvmEmulated,
            ModeState::PvmNative => Self::PvmNative,
        }
    }
}

/// One block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriveState {
    /// Base image.
    pub path: Option<PathBuf>,
    /// Size in MiB, if it was given.
    pub size_mib: Option<u32>,
    /// Without a writable layer.
    pub read_only: bool,
}

impl From<&DriveConfig> for DriveState {
    fn from(drive: &DriveConfig) -> Self {
        let DriveConfig { path, size_mib, read_only } = drive.clone();
        Self { path, size_mib, read_only }
    }
}

impl From<&DriveState> for DriveConfig {
    fn from(drive: &DriveState) -> Self {
        let DriveState { path, size_mib, read_only } = drive.clone();
        Self { path, size_mib, read_only }
    }
}

/// A state file's content.
#[derive(Debug)]
pub struct SavedVm {
    /// The machine.
    pub machine: MachineState,
    /// Its devices.
    pub devices: DevicesState,
    /// What KVM held.
    pub kvm: SavedKvm,
}

/// Writes the state file of a VM that stands still.
///
/// # Errors
/// It would be too long.
pub fn encode(machine: &Machine, kvm: &SavedKvm, generation: u32) -> Result<Vec<u8>, StateError> {
    let blueprint = machine.blueprint();
    let state = MachineState {
        id: blueprint.id.clone(),
        drives: blueprint.drives.iter().map(DriveState::from).collect(),
        vcpus: kvm.vcpus.len() as u8,
        generation,
    };
    write(&state, &machine.save_devices(), kvm)
}

fn write(
    machine: &MachineState,
    devices: &DevicesState,
    kvm: &SavedKvm,
) -> Result<Vec<u8>, StateError> {
    let mut writer = Writer::new()
        .section(MACHINE, VERSION, machine)?
        .section(DEVICES, VERSION, devices)?
        .section(KVM, VERSION, &kvm.vm)?;
    for (index, vcpu) in (0..).zip(&kvm.vcpus) {
        writer.add(Tag::indexed(b"CPU", index), VERSION, vcpu)?;
    }
    if kvm.mode == GuestMode::PvmNative {
        writer.add(MODE, VERSION, &ModeState::from(kvm.mode))?;
    }
    Ok(writer.finish())
}

impl SavedVm {
    /// Writes a state file, of the current version.
    ///
    /// # Errors
    /// It would be too long.
    pub fn encode(&self) -> Result<Vec<u8>, StateError> {
        write(&self.machine, &self.devices, &self.kvm)
    }

    /// Reads a state file.
    ///
    /// # Errors
    /// It is damaged, or of a forkd that knows more.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let reader = Reader::parse(bytes)?;
        let machine: MachineState = reader.section(MACHINE, VERSION)?;
        let devices = reader.section(DEVICES, VERSION)?;
        let vm: VmState = reader.section(KVM, VERSION)?;
        let vcpus = (0..machine.vcpus)
            .map(|index| reader.section::<VcpuState>(Tag::indexed(b"CPU", index), VERSION))
            .collect::<Result<Vec<_>, _>>()?;
        let mode = if reader.has(MODE) {
            reader.section::<ModeState>(MODE, VERSION)?.into()
        } else if vcpus.iter().any(|vcpu| vcpu.pvm.is_some()) {
            GuestMode::PvmEmulated
        } else {
            GuestMode::Hardware
        };
        Ok(Self { machine, devices, kvm: SavedKvm { mode, vm, vcpus } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_version_is_refused_by_name() {
        let state = MachineState { id: "vm".into(), drives: vec![], vcpus: 1, generation: 0 };
        let bytes = Writer::new().section(MACHINE, VERSION + 1, &state).unwrap().finish();
        let text = SavedVm::decode(&bytes).unwrap_err().to_string();
        assert!(text.contains("MACH") && text.contains('2'), "{text}");
        let bytes = Writer::new().section(MACHINE, VERSION, &state).unwrap().finish();
        assert!(SavedVm::decode(&bytes).unwrap_err().to_string().contains("DEVS"));
    }
}
