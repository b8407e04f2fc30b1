//! Remedies that let unmodified Linux guests run on PVM, a KVM flavour for hosts without VT-x or SVM.
//!
//! PVM runs a guest's user mode on the CPU and emulates its kernel mode with KVM's instruction emulator. Two things
//! are then missing, and made up for here:
//!
//! - Instructions that the emulator lacks (KVM_EXIT_INTERNAL_ERROR). The instruction at RIP is decoded by iced-x86 and
//!   done by `emulate` on the vCPU's registers, memory and extended state.
//! - System calls. See `entry`.
//!
//! Memory is reached by a page walk of our own (`linear`), which raises the guest's own page fault where a page is
//! missing. Registers come and go with KVM_RUN, so that most remedies need no further ioctl.
//!
//! ```text
//! KVM_RUN ──> KVM_EXIT_INTERNAL_ERROR ──> on_internal_error: decode ─> emulate ─> registers or exception
//!        └──> KVM_EXIT_DEBUG ──────────> on_debug: system call, or step over the handler's first instruction
//! ```
//!
//! Hosts whose PVM has an interface for it run kernel mode on the CPU, if the guest's kernel is ours for that:
//! [`native`]. Then nothing else of this module is active.
//!
//! [`active`] tells whether this is PVM; nothing here costs anything elsewhere. README.md beside this file has
//! what was measured. Known holes: an operand in memory that is no RAM (pmem, MMIO) is an error; 32-bit kernel
//! mode, protection keys and supervisor XSAVE components are not done; `vmcall` hangs within KVM itself.

mod cmdline;
mod cpu;
mod emulate;
mod entry;
mod error;
mod exception;
mod linear;
#[cfg(test)]
mod live_tests;
mod metrics;
pub mod native;
mod probe;
mod state;
#[cfg(test)]
mod testing;
mod trampoline;
mod xstate;

use std::sync::Arc;

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic};
use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_HW_BP, KVM_INTERNAL_ERROR_EMULATION, kvm_guest_debug,
};
use kvm_ioctls::{SyncReg, VcpuFd};
use vm_memory::GuestMemoryMmap;

use cpu::{Buffers, Cpu};
use emulate::Trap;
use entry::{Breakpoint, Frame, Gate, SyscallTarget};
use exception::Exception;
use linear::{Access, LinearMemory, Unreachable};
use metrics::count;

pub use cmdline::cmdline;
pub use error::PvmError;
pub use metrics::Metrics;
pub use probe::active;
pub use state::PvmState;
pub use trampoline::{GPA as RESERVED_GPA, LEN as RESERVED_LEN};

/// Time slice of vCPU threads. A guest that gets the CPU back has a timer tick waiting, which takes 2 ms of
/// emulation. With the host's slice of 3 ms, a hundred guests that wake up at once spend most of their time on ticks.
pub const VCPU_SLICE: std::time::Duration = std::time::Duration::from_millis(100);

/// Longest instruction, in bytes.
const INSTRUCTION_MAX: usize = 15;

/// DR7: breakpoint 0, global, on execution; bit 10 is always one.
const DR7_EXECUTE_0: u64 = 0x402;

/// #DB.
const DB_VECTOR: u8 = 1;

/// What the run loop has to do after a remedy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// Call KVM_RUN again.
    Resume,
    /// Get every other vCPU out of KVM_RUN, so that each sees [`VcpuAssist::needs_arming`]; then call KVM_RUN again.
    KickOthers,
}

/// What the vCPUs of one VM share: counters, and where the breakpoint has to stand.
#[derive(Debug, Default)]
pub struct Shared {
    metrics: Metrics,
    breakpoint: Breakpoint,
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
    memory: LinearMemory,
    shared: Arc<Shared>,
    buffers: Option<Buffers>,
    /// Where the breakpoint stands on this vCPU; 0 for nowhere.
    armed: u64,
    /// Handler of the page-fault gate when it was last acted upon.
    seen: u64,
    target: SyscallTarget,
    /// Handler before which no trampoline fits.
    refused: u64,
}

impl VcpuAssist {
    /// Assistance for a vCPU whose guest's RAM is `ram`.
    #[must_use]
    pub fn new(ram: GuestMemoryMmap<()>, shared: Arc<Shared>) -> Self {
        Self {
            memory: LinearMemory::new(ram),
            shared,
            buffers: None,
            armed: 0,
            seen: 0,
            target: SyscallTarget::default(),
            refused: 0,
        }
    }

    /// Asks KVM to hand over registers with every exit. Call once for every new `VcpuFd`, before its first KVM_RUN.
    ///
    /// # Errors
    ///
    /// No memory for the extended state.
    pub fn attach(&mut self, fd: &mut VcpuFd) -> Result<(), PvmError> {
        self.buffers = Some(Buffers::new()?);
        fd.set_sync_valid_reg(SyncReg::Register);
        fd.set_sync_valid_reg(SyncReg::SystemRegister);
        Ok(())
    }

    /// Whether the breakpoint has to be set, moved or removed on this vCPU: look before every KVM_RUN (one atomic
    /// load).
    #[must_use]
    pub fn needs_arming(&self) -> bool {
        self.shared.breakpoint.get() != self.armed
    }

    /// Sets, moves or removes the breakpoint.
    ///
    /// # Errors
    ///
    /// KVM_SET_GUEST_DEBUG fails.
    pub fn arm(&mut self, fd: &mut VcpuFd) -> Result<(), PvmError> {
        let address = self.shared.breakpoint.get();
        let mut debug = kvm_guest_debug::default();
        if address != 0 {
            debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
            debug.arch.debugreg[0] = address;
            debug.arch.debugreg[7] = DR7_EXECUTE_0;
        }
        fd.set_guest_debug(&debug)
            .map_err(|source| PvmError::Ioctl { call: "KVM_SET_GUEST_DEBUG", source })?;
        count(&self.shared.metrics.armed);
        self.armed = address;
        Ok(())
    }

    /// Remedy for KVM_EXIT_INTERNAL_ERROR.
    ///
    /// # Errors
    ///
    /// There is none: [`PvmError::Unsupported`] has the instruction. Or an ioctl failed.
    pub fn on_internal_error(&mut self, fd: &mut VcpuFd) -> Result<Outcome, PvmError> {
        // SAFETY: after KVM_EXIT_INTERNAL_ERROR this is the union's valid member, of plain integers.
        let suberror = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
        let Self { memory, shared, buffers, .. } = self;
        let buffers = buffers.as_mut().ok_or(PvmError::Host { what: "not attached" })?;
        let mut cpu = Cpu::new(fd, memory, buffers);
        if suberror != KVM_INTERNAL_ERROR_EMULATION {
            return Err(PvmError::Internal { suberror, rip: cpu.regs.rip });
        }
        let outcome = observe(&cpu, shared, &mut self.seen, &mut self.target)?;
        let before = cpu.regs;
        let (instruction, bytes) = match fetch(&cpu) {
            Ok(fetched) => fetched,
            Err(Unreachable::Fault(e)) => {
                count(&shared.metrics.injected_fault);
                cpu.inject(e)?;
                return Ok(outcome);
            }
            Err(Unreachable::NotRam { gpa }) => {
                return Err(PvmError::NotRam { rip: before.rip, gpa });
            }
        };
        match emulate::execute(&mut cpu, &instruction, &shared.metrics) {
            Ok(()) => cpu.finish(),
            Err(Trap::Exception(e)) => {
                if !e.trap {
                    count(&shared.metrics.injected_fault);
                    cpu.regs = before;
                }
                cpu.inject(e)?;
            }
            Err(Trap::NoRemedy) => return Err(unsupported(&instruction, bytes)),
            Err(Trap::Failed(e)) => return Err(e),
        }
        Ok(outcome)
    }

    /// Remedy for KVM_EXIT_DEBUG.
    ///
    /// # Errors
    ///
    /// The handler begins with an instruction that cannot be stepped over, or an ioctl failed.
    pub fn on_debug(&mut self, fd: &mut VcpuFd) -> Result<Outcome, PvmError> {
        // SAFETY: after KVM_EXIT_DEBUG this is the union's valid member, of plain integers.
        let exit = unsafe { fd.get_kvm_run().__bindgen_anon_1.debug.arch };
        let Self { memory, shared, buffers, .. } = self;
        let buffers = buffers.as_mut().ok_or(PvmError::Host { what: "not attached" })?;
        let mut cpu = Cpu::new(fd, memory, buffers);
        let rip = cpu.regs.rip;
        if self.armed == 0 || rip != self.armed {
            // Single-stepping within the guest: with our breakpoint set, KVM gives us its #DB.
            return cpu.reinject_debug(exit.dr6, DB_VECTOR).map(|()| Outcome::Resume);
        }
        let frame = Frame::read(&cpu).map_err(|e| unreachable_at(rip, e))?;
        if frame.is_user() {
            if self.target.lstar == 0 || (frame.rip >> 63 != 0 && frame.rip != self.target.lstar) {
                self.target = SyscallTarget::read(&cpu)?;
            }
            if self.refused != rip {
                self.refused = rip;
                if hook(&cpu, &self.target)? {
                    count(&shared.metrics.trampoline);
                    shared.breakpoint.set(0);
                }
            }
            if frame.is_syscall(&self.target) {
                count(&shared.metrics.syscall);
                entry::enter_syscall(&mut cpu, &frame, &self.target);
                cpu.finish();
                return Ok(Outcome::Resume);
            }
        }
        count(&shared.metrics.real_pf);
        let (instruction, bytes) = fetch(&cpu).map_err(|e| unreachable_at(rip, e))?;
        if !step(&mut cpu, &instruction)? {
            return Err(unsupported(&instruction, bytes));
        }
        cpu.finish();
        Ok(Outcome::Resume)
    }

    /// Writes register changes that wait in kvm_run for the next KVM_RUN to the vCPU, so that KVM_GET_REGS and the
    /// like tell the truth. Call before saving the vCPU's state.
    ///
    /// # Errors
    ///
    /// An ioctl failed.
    pub fn commit(&mut self, fd: &mut VcpuFd) -> Result<(), PvmError> {
        let ioctl = |call| move |source| PvmError::Ioctl { call, source };
        let dirty = fd.get_kvm_run().kvm_dirty_regs;
        let kvm_bindings::kvm_sync_regs { regs, sregs, .. } = fd.sync_regs();
        if dirty & SyncReg::Register as u64 != 0 {
            fd.set_regs(&regs).map_err(ioctl("KVM_SET_REGS"))?;
            fd.clear_sync_dirty_reg(SyncReg::Register);
        }
        if dirty & SyncReg::SystemRegister as u64 != 0 {
            fd.set_sregs(&sregs).map_err(ioctl("KVM_SET_SREGS"))?;
            fd.clear_sync_dirty_reg(SyncReg::SystemRegister);
        }
        Ok(())
    }

    /// What to save.
    #[must_use]
    pub fn save(&self) -> PvmState {
        PvmState { breakpoint: self.shared.breakpoint.get() }
    }

    /// Takes over saved state and sets the breakpoint on a new vCPU.
    ///
    /// # Errors
    ///
    /// KVM_SET_GUEST_DEBUG fails.
    pub fn restore(&mut self, state: &PvmState, fd: &mut VcpuFd) -> Result<(), PvmError> {
        self.shared.breakpoint.set(state.breakpoint);
        if self.needs_arming() { self.arm(fd) } else { Ok(()) }
    }
}

/// Looks at the page-fault gate, and sets the breakpoint when it leads to a handler not seen before.
fn observe(
    cpu: &Cpu<'_>,
    shared: &Shared,
    seen: &mut u64,
    target: &mut SyscallTarget,
) -> Result<Outcome, PvmError> {
    let Some(gate) = Gate::read(cpu) else { return Ok(Outcome::Resume) };
    if gate.handler == *seen {
        return Ok(Outcome::Resume);
    }
    *target = SyscallTarget::read(cpu)?;
    if target.lstar == 0 {
        // An early IDT: no system calls yet.
        return Ok(Outcome::Resume);
    }
    *seen = gate.handler;
    let wanted = if trampoline::contains(gate.handler) { 0 } else { gate.handler };
    Ok(if shared.breakpoint.set(wanted) { Outcome::KickOthers } else { Outcome::Resume })
}

/// Tries to replace the breakpoint by the trampoline.
fn hook(cpu: &Cpu<'_>, target: &SyscallTarget) -> Result<bool, PvmError> {
    let rip = cpu.regs.rip;
    match Gate::read(cpu) {
        Some(gate) if gate.handler == rip => {
            trampoline::install(cpu, &gate, target).map_err(|e| unreachable_at(rip, e))
        }
        _ => Ok(false),
    }
}

/// Does the first instruction of a page-fault handler: the breakpoint on it would only fire again.
fn step(cpu: &mut Cpu<'_>, instruction: &Instruction) -> Result<bool, PvmError> {
    const RFLAGS_DF: u64 = 1 << 10;
    match instruction.mnemonic() {
        Mnemonic::Cld => cpu.regs.rflags &= !RFLAGS_DF,
        Mnemonic::Clac => cpu.regs.rflags &= !linear::RFLAGS_AC,
        m if emulate::is_no_operation(m) => {}
        _ => return Ok(false),
    }
    cpu.regs.rip = cpu.regs.rip.wrapping_add(instruction.len() as u64);
    Ok(true)
}

/// Reads and decodes the instruction at RIP.
fn fetch(cpu: &Cpu<'_>) -> Result<(Instruction, Vec<u8>), Unreachable> {
    let (rip, context) = (cpu.regs.rip, cpu.context());
    let mut bytes = [0; INSTRUCTION_MAX];
    // The instruction may end with its page, and nothing be mapped behind it.
    let in_page = (4096 - rip % 4096) as usize;
    let mut len = INSTRUCTION_MAX;
    if let Err(e) = cpu.memory().read(&context, rip, Access::Fetch, &mut bytes) {
        if in_page >= INSTRUCTION_MAX {
            return Err(e);
        }
        len = in_page;
        let (head, _) = bytes.split_at_mut(len);
        cpu.memory().read(&context, rip, Access::Fetch, head)?;
    }
    let bitness = if cpu.sregs.cs.l != 0 { 64 } else { 32 };
    let bytes = bytes.get(..len).unwrap_or_default();
    let instruction = Decoder::with_ip(bitness, bytes, rip, DecoderOptions::NONE).decode();
    let len = if instruction.is_invalid() { len } else { instruction.len() };
    Ok((instruction, bytes.get(..len).unwrap_or_default().to_vec()))
}

fn unsupported(instruction: &Instruction, bytes: Vec<u8>) -> PvmError {
    let text = if instruction.is_invalid() {
        "not an instruction".to_owned()
    } else {
        format!("{:?}", instruction.code()).to_lowercase()
    };
    PvmError::Unsupported { rip: instruction.ip(), bytes, text }
}

fn unreachable_at(rip: u64, e: Unreachable) -> PvmError {
    match e {
        Unreachable::NotRam { gpa } => PvmError::NotRam { rip, gpa },
        Unreachable::Fault(Exception { cr2, .. }) => {
            PvmError::Unmapped { rip, address: cr2.unwrap_or(0) }
        }
    }
}
