//! A KVM virtual machine: memory slots, interrupt controller, clock.
//!
//! Order matters in [`Vm::new`]: memory slots are set before the interrupt controller exists. Once it does,
//! each slot waits for an SRCU grace period, which turns 0.2 ms into 5 to 10 ms. Of the interrupt controller, KVM has
//! the local APICs; the rest is [`crate::ioapic`].
//!
//! A VM belongs to the address space that created it, so it does not survive fork(2): the child calls
//! [`Vm::abandon`] on what it inherited and builds a new one over the same RAM. [`IrqLine`]s that devices
//! hold may be moved to the new VM by [`Vm::adopt`].

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, PoisonError, RwLock};

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MEM_READONLY, kvm_clock_data, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::errno;

use crate::clock::{self, ClockShift};
use crate::host::Host;
use crate::ioapic::{Interrupts, IoapicState, RaiseError};
use crate::kick::Siblings;
use crate::layout;
use crate::mode::GuestMode;
use crate::pvm;
use crate::vcpu::{Shared, Vcpu, VcpuError};

/// Version of [`VmState`]'s encoding.
pub const VM_STATE_VERSION: u16 = 1;

/// Failures of a VM as a whole.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// An ioctl failed.
    #[error("{call} failed: {source}")]
    Ioctl {
        /// Name of the ioctl.
        call: &'static str,
        /// What the kernel said.
        source: errno::Error,
    },
    /// A memory slot cannot be set.
    #[error("memory slot {slot} ({len:#x} bytes at guest address {gpa:#x}): {source}")]
    Slot {
        /// Number of the slot.
        slot: u32,
        /// Guest address.
        gpa: u64,
        /// Length in bytes.
        len: u64,
        /// What the kernel said.
        source: errno::Error,
    },
    /// The number of vCPUs is out of range.
    #[error("{asked} vCPUs: must be 1 to {most}")]
    Vcpus {
        /// How many were asked for.
        asked: u8,
        /// Most that forkd and this KVM allow.
        most: u8,
    },
    /// More memory slots than KVM allows.
    #[error("{asked} memory slots, but KVM allows {most}")]
    Slots {
        /// How many were asked for.
        asked: usize,
        /// Most that KVM allows.
        most: usize,
    },
    /// The mode is not one of this host's.
    #[error("a guest whose kernel mode is {}: this host's KVM is {host}", .mode.name())]
    Mode {
        /// How the guest runs kernel mode.
        mode: GuestMode,
        /// What the host has.
        host: &'static str,
    },
    /// An interrupt line is used before it has a VM, or after its VM has gone.
    #[error("interrupt {gsi}: no VM is connected")]
    Unconnected {
        /// The line.
        gsi: u32,
    },
    /// There is no such interrupt line.
    #[error("interrupt {gsi}: there are {} lines", layout::GSIS)]
    NoLine {
        /// The line.
        gsi: u32,
    },
}

/// A piece of this process's memory that is to be guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemSlot {
    /// Number of the slot; unique in a VM.
    pub slot: u32,
    /// Guest address, page-aligned.
    pub gpa: u64,
    /// Length in bytes, a multiple of the page size.
    pub len: u64,
    /// Address in this process, page-aligned. The mapping must outlive the VM.
    pub host_addr: u64,
    /// The guest may not write: writes become MMIO exits.
    pub read_only: bool,
}

/// A KVM virtual machine.
#[derive(Debug)]
pub struct Vm {
    host: Host,
    mode: GuestMode,
    fd: Arc<VmFd>,
    vcpus: u8,
    interrupts: Arc<Interrupts>,
    lines: IrqLine,
    siblings: Arc<Siblings>,
    pvm: Option<Arc<pvm::Shared>>,
}

/// What is saved of a VM besides its vCPUs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmState {
    /// The IOAPIC.
    pub ioapic: IoapicState,
    /// The guest's clock (kvmclock), in nanoseconds.
    pub clock_ns: u64,
    /// The host's TSC at the same instant.
    pub host_tsc: u64,
}

impl VmState {
    /// The time that restored vCPUs must not notice: read it once, and give it to each [`Vcpu::restore`].
    pub fn clock_shift(&self) -> ClockShift {
        ClockShift::since(self.host_tsc)
    }
}

fn ioctl(call: &'static str) -> impl Fn(errno::Error) -> VmError {
    move |source| VmError::Ioctl { call, source }
}

impl Vm {
    /// Creates a VM over `slots`, with an interrupt controller, for `vcpus` vCPUs. `mode` is what
    /// [`Host::mode_for`] said of its kernel, or what the saved VM had.
    ///
    /// # Errors
    ///
    /// Names the ioctl or slot that failed.
    pub fn new(
        host: &Host,
        mode: GuestMode,
        slots: &[MemSlot],
        vcpus: u8,
    ) -> Result<Self, VmError> {
        if mode.is_pvm() != host.is_pvm() {
            return Err(VmError::Mode { mode, host: host.flavour().name() });
        }
        let most = u8::try_from(host.max_vcpus()).unwrap_or(u8::MAX).min(layout::MAX_VCPUS);
        if vcpus == 0 || vcpus > most {
            return Err(VmError::Vcpus { asked: vcpus, most });
        }
        if slots.len() > host.max_memslots() {
            return Err(VmError::Slots { asked: slots.len(), most: host.max_memslots() });
        }
        let fd = Arc::new(host.kvm().create_vm().map_err(ioctl("KVM_CREATE_VM"))?);
        let interrupts = Interrupts::new(&fd);
        let vm = Self {
            host: host.clone(),
            vcpus,
            lines: IrqLine(Arc::new(RwLock::new(Some(interrupts.clone())))),
            interrupts,
            siblings: Arc::default(),
            mode,
            pvm: mode.is_emulated().then(pvm::Shared::new),
            fd,
        };
        for slot in slots {
            vm.add_slot(slot)?;
        }
        vm.fd
            .set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(ioctl("KVM_SET_IDENTITY_MAP_ADDR"))?;
        vm.fd.set_tss_address(layout::KVM_TSS as usize).map_err(ioctl("KVM_SET_TSS_ADDR"))?;
        let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        split.args[0] = layout::GSIS.into();
        vm.fd.enable_cap(&split).map_err(ioctl("KVM_ENABLE_CAP(KVM_CAP_SPLIT_IRQCHIP)"))?;
        Ok(vm)
    }

    /// Adds guest memory. Slow (5 to 10 ms) once the VM exists: prefer [`Vm::new`]'s `slots`.
    ///
    /// # Errors
    ///
    /// The kernel refuses slots that overlap or are not page-aligned.
    pub fn add_slot(&self, slot: &MemSlot) -> Result<(), VmError> {
        let region = kvm_userspace_memory_region {
            slot: slot.slot,
            flags: if slot.read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: slot.gpa,
            memory_size: slot.len,
            userspace_addr: slot.host_addr,
        };
        // SAFETY: the caller of `Vm::new` or `add_slot` promises (see `MemSlot::host_addr`) that the mapping
        // outlives the VM; the guest can only reach what the slot covers. If the mapping went away early,
        // KVM would report a failed access, not touch other memory: it resolves addresses on each fault.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(|source| VmError::Slot {
            slot: slot.slot,
            gpa: slot.gpa,
            len: slot.len,
            source,
        })
    }

    /// Creates vCPU `index`, 0 to the VM's number of vCPUs. It does not know yet whether it boots
    /// ([`Vcpu::configure_boot`]) or goes on from saved state ([`Vcpu::restore`]). `ram` is the guest's RAM, for
    /// [`crate::pvm`]'s remedies, and to tell the instruction of a vCPU that cannot go on.
    ///
    /// # Errors
    ///
    /// Names the ioctl that failed.
    pub fn create_vcpu(&self, index: u8, ram: &GuestMemoryMmap) -> Result<Vcpu, VcpuError> {
        let fd = self.fd.create_vcpu(u64::from(index)).map_err(|source| VcpuError::Ioctl {
            index,
            call: "KVM_CREATE_VCPU",
            source,
        })?;
        let assist = self.pvm.as_ref().map(|s| pvm::VcpuAssist::new(ram.clone(), s.clone()));
        let shared = Shared {
            host: self.host.clone(),
            mode: self.mode,
            count: self.vcpus,
            siblings: self.siblings.clone(),
            interrupts: self.interrupts.clone(),
        };
        Vcpu::new(shared, fd, index, ram.clone(), assist)
    }

    /// How its guest runs kernel mode.
    pub fn mode(&self) -> GuestMode {
        self.mode
    }

    /// Number of vCPUs this VM was made for.
    pub fn vcpus(&self) -> u8 {
        self.vcpus
    }

    /// A handle that raises interrupts of this VM.
    pub fn irq_line(&self) -> IrqLine {
        self.lines.clone()
    }

    /// Lets `line`, and all its clones, raise interrupts of this VM from now on.
    pub fn adopt(&mut self, line: &IrqLine) {
        line.connect(self.interrupts.clone());
        self.lines = line.clone();
    }

    /// Counters of the remedies for PVM; none elsewhere.
    pub fn pvm_metrics(&self) -> Option<&pvm::Metrics> {
        self.pvm.as_ref().map(|s| s.metrics())
    }

    /// Saves interrupt controller and clock. The vCPUs must be out of KVM_RUN.
    ///
    /// # Errors
    ///
    /// Names the ioctl that failed.
    pub fn save(&self) -> Result<VmState, VmError> {
        let clock = self.fd.get_clock().map_err(ioctl("KVM_GET_CLOCK"))?;
        let host_tsc = clock::host_tsc();
        Ok(VmState { ioapic: self.interrupts.save(), clock_ns: clock.clock, host_tsc })
    }

    /// Restores what [`Vm::save`] saved, into a VM whose vCPUs exist and are restored. The guest's clock goes on
    /// from the saved instant.
    ///
    /// # Errors
    ///
    /// Names the ioctl that failed.
    pub fn restore(&self, state: &VmState) -> Result<(), VmError> {
        self.interrupts.restore(&state.ioapic);
        // Without KVM_CLOCK_REALTIME the clock goes on from where it was saved: to the guest no time has passed.
        let clock = kvm_clock_data { clock: state.clock_ns, ..Default::default() };
        self.fd.set_clock(&clock).map_err(ioctl("KVM_SET_CLOCK"))
    }

    /// The descriptor's number, for a registry of what must not survive fork(2).
    pub fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// In a child of fork(2): lets go of everything of the parent's VM. Closes the VM's and its vCPUs' descriptors,
    /// and disables [`IrqLine`]s and kick handles made from them. [`Vcpu`] values that the child inherited
    /// may be dropped after this, or be left on the stacks of threads that do not exist in the child.
    pub fn abandon(self) {
        self.siblings.abandon();
    }
}

/// Raises interrupts of a VM. Clones share the VM.
#[derive(Debug, Clone)]
pub struct IrqLine(Arc<RwLock<Option<Arc<Interrupts>>>>);

impl IrqLine {
    /// A line of no VM yet: raising an interrupt fails until a VM adopts it ([`Vm::adopt`]).
    #[must_use]
    pub fn unconnected() -> Self {
        Self(Arc::new(RwLock::new(None)))
    }

    /// Raises and lowers a line: one edge, one interrupt.
    ///
    /// # Errors
    ///
    /// No VM is connected, there is no such line, or KVM refuses.
    pub fn pulse(&self, gsi: u32) -> Result<(), VmError> {
        let target = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let interrupts = target.as_ref().ok_or(VmError::Unconnected { gsi })?;
        interrupts.raise(gsi).map_err(|e| match e {
            RaiseError::Gone => VmError::Unconnected { gsi },
            RaiseError::NoLine => VmError::NoLine { gsi },
            RaiseError::Signal(source) => VmError::Ioctl { call: "KVM_SIGNAL_MSI", source },
        })
    }

    fn connect(&self, interrupts: Arc<Interrupts>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(interrupts);
    }
}
