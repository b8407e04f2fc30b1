//! A virtual CPU: the run loop.
//!
//! A [`Vcpu`] is created by [`crate::vm::Vm::create_vcpu`], configured to boot or restored from saved state, and then
//! driven by one thread at a time with [`Vcpu::run`]. Port and MMIO accesses go to an [`ExitBus`] inside the
//! loop; `run` returns for what the VM process has to decide. [`KickHandle`]s get it out from other threads.
//!
//! Where PVM is active, the vCPU carries a [`pvm::VcpuAssist`], which the loop asks on exits that no other KVM
//! flavour takes. Elsewhere there is none, and the loop pays one test of an option.

mod configure;
mod state;
mod surprise;

use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;

use kvm_bindings::{KVM_SYSTEM_EVENT_RESET, kvm_cpuid_entry2, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::errno;

use crate::host::Host;
use crate::ioapic::{Interrupts, RaiseError};
use crate::kick::{KickHandle, Siblings, Target};
use crate::mode::GuestMode;
use crate::msr::MsrError;
use crate::pvm;

pub use state::{VCPU_STATE_VERSION, VcpuState};
pub use surprise::{Surprise, View};

/// Where a guest's port and MMIO accesses go, but for the IOAPIC's. Called on vCPU threads, several at once.
pub trait ExitBus: Sync {
    /// The guest reads `data.len()` bytes (1, 2 or 4) from a port. Unclaimed ports read as all ones.
    fn pio_read(&self, port: u16, data: &mut [u8]);
    /// The guest writes 1, 2 or 4 bytes to a port.
    fn pio_write(&self, port: u16, data: &[u8]);
    /// The guest reads 1 to 8 bytes from an address that is not RAM. Unclaimed addresses read as all ones.
    fn mmio_read(&self, addr: u64, data: &mut [u8]);
    /// The guest writes 1 to 8 bytes to an address that is not writable RAM.
    fn mmio_write(&self, addr: u64, data: &[u8]);
}

/// Why [`Vcpu::run`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// A [`KickHandle`] asked for it.
    Kicked,
    /// Triple fault: the guest has no way on.
    Shutdown,
    /// The guest asked KVM for a reset.
    Reset,
    /// Halted with no interrupt controller to wake it; does not happen with KVM's.
    Hlt,
    /// Another KVM_EXIT_SYSTEM_EVENT, with its type (`KVM_SYSTEM_EVENT_*` of linux/kvm.h).
    SystemEvent(u32),
}

/// Failures of a vCPU, each naming it.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// An ioctl failed.
    #[error("vCPU {index}: {call} failed: {source}")]
    Ioctl {
        /// The vCPU.
        index: u8,
        /// Name of the ioctl.
        call: &'static str,
        /// What the kernel said.
        source: errno::Error,
    },
    /// MSRs could not be read or written.
    #[error("vCPU {index}: {source}")]
    Msr {
        /// The vCPU.
        index: u8,
        /// Which, and why.
        source: MsrError,
    },
    /// An exit that nobody has a use for.
    #[error("vCPU {index}: {source}")]
    Surprise {
        /// The vCPU.
        index: u8,
        /// The exit, and where the vCPU stood.
        source: Box<Surprise>,
    },
    /// An exit that makes no sense.
    #[error("vCPU {index}: unexpected exit: {exit}")]
    Unexpected {
        /// The vCPU.
        index: u8,
        /// The exit, or what is wrong with it.
        exit: String,
    },
    /// PVM's remedies failed.
    #[error("vCPU {index}: {source}")]
    Pvm {
        /// The vCPU.
        index: u8,
        /// Why.
        source: pvm::PvmError,
    },
    /// Saved state does not fit this vCPU or host.
    #[error("vCPU {index}: saved state does not fit: {reason}")]
    State {
        /// The vCPU.
        index: u8,
        /// What does not fit.
        reason: String,
    },
}

/// Names of `KVM_INTERNAL_ERROR_*`.
fn suberror_name(suberror: u32) -> &'static str {
    match suberror {
        1 => "an instruction that KVM cannot emulate",
        2 => "simultaneous exceptions",
        3 => "an exit while delivering an event",
        4 => "an exit reason that KVM does not know",
        _ => "unknown",
    }
}

/// What a vCPU shares with its VM.
#[derive(Debug)]
pub(crate) struct Shared {
    pub host: Host,
    /// How the guest runs kernel mode.
    pub mode: GuestMode,
    /// Number of vCPUs.
    pub count: u8,
    pub siblings: Arc<Siblings>,
    pub interrupts: Arc<Interrupts>,
}

/// A virtual CPU.
///
/// In a child of fork(2), an inherited `Vcpu` may only be dropped after [`crate::vm::Vm::abandon`]: its mapping of
/// `kvm_run` stayed with the parent, and dropping would unmap whatever lies there by now.
#[derive(Debug)]
pub struct Vcpu {
    shared: Shared,
    /// Not dropped if [`crate::vm::Vm::abandon`] has closed it.
    fd: ManuallyDrop<VcpuFd>,
    index: u8,
    /// MSRs that make up the state; empty until configured or restored.
    msrs: Vec<u32>,
    /// CPUID as the guest sees it; empty until configured or restored.
    cpuid: Vec<kvm_cpuid_entry2>,
    target: Arc<Target>,
    assist: Option<pvm::VcpuAssist>,
    /// The guest's RAM.
    ram: GuestMemoryMmap,
    run_size: usize,
    /// KVM_RUN returned something that the next KVM_RUN completes.
    unfinished: bool,
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        if self.target.retire() {
            // SAFETY: dropped here only, and `fd` is not used again.
            unsafe { ManuallyDrop::drop(&mut self.fd) }
        }
    }
}

impl Vcpu {
    pub(crate) fn new(
        shared: Shared,
        mut fd: VcpuFd,
        index: u8,
        ram: GuestMemoryMmap,
        mut assist: Option<pvm::VcpuAssist>,
    ) -> Result<Self, VcpuError> {
        let ioctl = |call| move |source| VcpuError::Ioctl { index, call, source };
        let run_size =
            shared.host.kvm().get_vcpu_mmap_size().map_err(ioctl("KVM_GET_VCPU_MMAP_SIZE"))?;
        let raw = fd.as_raw_fd();
        let run = fd.get_kvm_run();
        let flag = NonNull::from(&mut run.immediate_exit);
        // A child of fork(2) must not inherit the mapping: it would keep the parent's VM alive.
        let start = std::ptr::from_mut(run).cast();
        // SAFETY: the range is the mapping of kvm_run; the advice only affects fork(2).
        if unsafe { libc::madvise(start, run_size, libc::MADV_DONTFORK) } != 0 {
            return Err(ioctl("madvise(MADV_DONTFORK)")(errno::Error::last()));
        }
        // SAFETY: `Drop` retires the target before the mapping goes; `abandon` does in a child, which lacks it.
        let target = unsafe { Target::new(flag, raw) };
        if let Some(assist) = &mut assist {
            assist.attach(&mut fd).map_err(|source| VcpuError::Pvm { index, source })?;
        }
        shared.siblings.add(KickHandle(target.clone()));
        Ok(Self {
            shared,
            fd: ManuallyDrop::new(fd),
            index,
            msrs: Vec::new(),
            cpuid: Vec::new(),
            target,
            assist,
            ram,
            run_size,
            unfinished: false,
        })
    }

    /// Number of this vCPU; its APIC id.
    pub fn index(&self) -> u8 {
        self.index
    }

    /// A handle that gets this vCPU out of [`Vcpu::run`].
    pub fn kick_handle(&self) -> KickHandle {
        KickHandle(self.target.clone())
    }

    /// The descriptor's number, for a registry of what must not survive fork(2).
    pub fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Runs the guest until something happens that is more than I/O.
    ///
    /// # Errors
    ///
    /// The vCPU cannot go on; the error says why.
    pub fn run(&mut self, bus: &dyn ExitBus) -> Result<Exit, VcpuError> {
        self.target.enter();
        let result = self.run_loop(bus);
        self.target.leave();
        result
    }

    fn run_loop(&mut self, bus: &dyn ExitBus) -> Result<Exit, VcpuError> {
        loop {
            if self.assist.as_ref().is_some_and(pvm::VcpuAssist::needs_arming) {
                self.assisted(pvm_arm)?;
            }
            self.unfinished = true;
            match self.fd.run() {
                Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => self.pio(bus)?,
                Ok(VcpuExit::MmioRead(addr, data)) => {
                    if Interrupts::claims(addr) {
                        self.shared.interrupts.mmio_read(addr, data);
                    } else {
                        bus.mmio_read(addr, data);
                    }
                }
                Ok(VcpuExit::MmioWrite(addr, data)) => {
                    if Interrupts::claims(addr) {
                        let result = self.shared.interrupts.mmio_write(addr, data);
                        result.map_err(|e| raise_error(self.index, e))?;
                    } else {
                        bus.mmio_write(addr, data);
                    }
                }
                Err(e) if e.errno() == libc::EINTR => {
                    self.unfinished = false;
                    if self.target.take() {
                        return Ok(Exit::Kicked);
                    }
                }
                // A vCPU that waited for its start-up IPI got it.
                Err(e) if e.errno() == libc::EAGAIN => {}
                Err(e) => return Err(self.ioctl_error("KVM_RUN")(e)),
                Ok(VcpuExit::InternalError) if self.assist.is_some() => {
                    self.assisted(pvm::VcpuAssist::on_internal_error)?;
                }
                Ok(VcpuExit::Debug(_)) if self.assist.is_some() => {
                    self.assisted(pvm::VcpuAssist::on_debug)?;
                }
                // A guest of ours ends by a reset: there it is the host that did something to it.
                Ok(VcpuExit::Shutdown) if self.shared.mode == GuestMode::PvmNative => {
                    return Err(self.surprise("KVM_EXIT_SHUTDOWN (a triple fault)"));
                }
                Ok(VcpuExit::Shutdown) => return Ok(Exit::Shutdown),
                Ok(VcpuExit::Hlt) => return Ok(Exit::Hlt),
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => return Ok(Exit::Reset),
                Ok(VcpuExit::SystemEvent(kind, _)) => return Ok(Exit::SystemEvent(kind)),
                Ok(VcpuExit::InternalError) => return Err(self.internal_error()),
                Ok(VcpuExit::FailEntry(reason, cpu)) => {
                    let exit = format!(
                        "KVM_EXIT_FAIL_ENTRY (the CPU refused the guest's state), reason {reason:#x}, CPU {cpu}"
                    );
                    return Err(self.surprise(exit));
                }
                Ok(VcpuExit::Intr) => {}
                Ok(other) => {
                    let exit = format!("an exit that was not to be expected, {other:?}");
                    return Err(self.surprise(exit));
                }
            }
        }
    }

    fn assisted(
        &mut self,
        remedy: impl FnOnce(&mut pvm::VcpuAssist, &mut VcpuFd) -> Result<pvm::Outcome, pvm::PvmError>,
    ) -> Result<(), VcpuError> {
        let Some(assist) = &mut self.assist else { return Ok(()) };
        let outcome = remedy(assist, &mut self.fd)
            .map_err(|source| VcpuError::Pvm { index: self.index, source })?;
        if outcome == pvm::Outcome::KickOthers {
            self.shared.siblings.poke_others(&self.target);
        }
        Ok(())
    }

    fn pio(&mut self, bus: &dyn ExitBus) -> Result<(), VcpuError> {
        /// `KVM_EXIT_IO_IN` of linux/kvm.h.
        const IN: u8 = 0;
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason says that this member is valid.
        let io = unsafe { run.__bindgen_anon_1.io };
        let size = usize::from(io.size);
        let len = size * io.count as usize;
        let offset = io.data_offset as usize;
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.run_size);
        if !matches!(size, 1 | 2 | 4) || !fits {
            let exit = format!("port I/O with size {size}, count {}, offset {offset:#x}", io.count);
            return Err(VcpuError::Unexpected { index: self.index, exit });
        }
        let base: *mut kvm_run = run;
        // SAFETY: the mapping is `run_size` bytes long and the range was checked to lie within; nobody else uses
        // it while the vCPU is out of KVM_RUN.
        let data = unsafe { std::slice::from_raw_parts_mut(base.cast::<u8>().add(offset), len) };
        for unit in data.chunks_exact_mut(size) {
            if io.direction == IN {
                bus.pio_read(io.port, unit);
            } else {
                bus.pio_write(io.port, unit);
            }
        }
        Ok(())
    }

    fn ioctl_error(&self, call: &'static str) -> impl Fn(errno::Error) -> VcpuError + use<> {
        let index = self.index;
        move |source| VcpuError::Ioctl { index, call, source }
    }

    fn msr_error(&self) -> impl Fn(MsrError) -> VcpuError + use<> {
        let index = self.index;
        move |source| VcpuError::Msr { index, source }
    }

    fn state_error(&self, reason: impl Into<String>) -> VcpuError {
        VcpuError::State { index: self.index, reason: reason.into() }
    }
}

/// The guest unmasked a line with an interrupt that waited, which KVM would not take.
fn raise_error(index: u8, error: RaiseError) -> VcpuError {
    let source = match error {
        RaiseError::Signal(source) => source,
        RaiseError::Gone | RaiseError::NoLine => errno::Error::new(libc::ENODEV),
    };
    VcpuError::Ioctl { index, call: "KVM_SIGNAL_MSI", source }
}

fn pvm_arm(assist: &mut pvm::VcpuAssist, fd: &mut VcpuFd) -> Result<pvm::Outcome, pvm::PvmError> {
    assist.arm(fd)?;
    Ok(pvm::Outcome::Resume)
}
