//! Remedies that let unmodified guest kernels run on PVM. (Being written: signatures are stable.)

#![allow(unsafe_code)]

mod cmdline;
mod metrics;
mod state;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_ioctls::{Kvm, VcpuFd};
use vm_memory::GuestMemoryMmap;

pub use cmdline::cmdline;
pub use metrics::Metrics;
pub use state::PvmState;

/// Whether /dev/kvm is PVM: found by behaviour, once per process (less than 2 ms).
pub fn active(kvm: &Kvm) -> bool {
    let _ = kvm;
    std::path::Path::new("/sys/module/kvm_pvm").exists()
}

/// Why a vCPU cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum PvmError {
    /// The guest's kernel mode met an instruction that neither KVM nor this module does.
    #[error("PVM: no remedy for `{text}` (bytes {}) at RIP {rip:#x}", hex(.bytes))]
    Unsupported {
        /// Address of the instruction.
        rip: u64,
        /// The instruction's bytes, up to 15.
        bytes: Vec<u8>,
        /// Mnemonic, or why it could not be read.
        text: String,
    },
    /// An ioctl on the vCPU failed.
    #[error("PVM: {call} failed: {source}")]
    Ioctl {
        /// Name of the ioctl.
        call: &'static str,
        /// What the kernel said.
        source: kvm_ioctls::Error,
    },
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ")
}

/// What the run loop has to do after a remedy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// Call KVM_RUN again.
    Resume,
    /// Kick every other vCPU out of KVM_RUN, so that each sees [`VcpuAssist::needs_arming`]; then call KVM_RUN again.
    KickOthers,
}

/// What the vCPUs of one VM share: counters, and where the breakpoint has to stand.
#[derive(Debug, Default)]
pub struct Shared {
    metrics: Metrics,
    handler: AtomicU64,
}

impl Shared {
    /// For a new VM.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The VM's counters.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }
}

/// Assistance of one vCPU; lives on its thread.
#[derive(Debug)]
pub struct VcpuAssist {
    mem: GuestMemoryMmap<()>,
    shared: Arc<Shared>,
    armed: u64,
}

impl VcpuAssist {
    /// Assistance for a vCPU whose guest's RAM is `mem`.
    #[must_use]
    pub fn new(mem: GuestMemoryMmap<()>, shared: Arc<Shared>) -> Self {
        Self { mem, shared, armed: 0 }
    }

    /// Asks KVM to hand over registers with every exit. Call once for every new `VcpuFd`, before its first KVM_RUN.
    pub fn attach(&mut self, fd: &mut VcpuFd) -> Result<(), PvmError> {
        let _ = fd;
        Ok(())
    }

    /// Whether the breakpoint has to be set or moved on this vCPU: check before every KVM_RUN (one atomic load).
    #[must_use]
    pub fn needs_arming(&self) -> bool {
        self.shared.handler.load(Ordering::Acquire) != self.armed
    }

    /// Sets the breakpoint.
    pub fn arm(&mut self, fd: &mut VcpuFd) -> Result<(), PvmError> {
        let _ = fd;
        self.armed = self.shared.handler.load(Ordering::Acquire);
        Ok(())
    }

    /// Remedy for KVM_EXIT_INTERNAL_ERROR.
    pub fn on_internal_error(&mut self, fd: &mut VcpuFd) -> Result<Outcome, PvmError> {
        let _ = (fd, &self.mem);
        Ok(Outcome::Resume)
    }

    /// Remedy for KVM_EXIT_DEBUG.
    pub fn on_debug(&mut self, fd: &mut VcpuFd) -> Result<Outcome, PvmError> {
        let _ = fd;
        Ok(Outcome::Resume)
    }

    /// Writes register changes that wait in kvm_run for the next KVM_RUN to the vCPU, so that KVM_GET_REGS and the like tell
    /// the truth. Call before saving the vCPU's state.
    pub fn commit(&mut self, fd: &mut VcpuFd) -> Result<(), PvmError> {
        let _ = fd;
        Ok(())
    }

    /// What to save.
    #[must_use]
    pub fn save(&self) -> PvmState {
        PvmState { page_fault_handler: self.armed }
    }

    /// Takes over saved state and sets the breakpoint on a new vCPU.
    pub fn restore(&mut self, state: &PvmState, fd: &mut VcpuFd) -> Result<(), PvmError> {
        self.shared.handler.store(state.page_fault_handler, Ordering::Release);
        self.arm(fd)
    }
}
