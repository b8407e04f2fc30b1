//! System calls and page faults: how user mode gets into the guest's kernel.
//!
//! Under PVM `syscall` in user mode does all that the CPU does (RCX, R11, RFLAGS masked, RIP at LSTAR) except for
//! leaving CPL 3. The first fetch at LSTAR then faults, and the guest sees a user-mode page fault at its own system
//! call entry: it would kill the process. Two remedies, in this order of a guest's life:
//!
//! 1. A hardware breakpoint on the guest's page-fault handler, which works because kernel mode is emulated.
//!    Every page fault exits to us (KVM_EXIT_DEBUG); a frame that says "CPL 3 at LSTAR" is a system call, and we
//!    finish it; any other is let through. About 32 us an exit.
//! 2. From the first fault of user mode on, a [`trampoline`]: a few instructions in the guest, in front of its
//!    handler, that do the same. About 3 us, and no exit. The breakpoint goes away.
//!
//! ```text
//!            LSTAR set, gate 14 set          first user fault, trampoline fits
//! unknown ───────────────────────> breakpoint ──────────────────────────────────> trampoline
//!                                   │      ^                                          │
//!                                   └──────┴── gate 14 changes (kexec) ───────────────┘
//! ```
//!
//! The gate is looked at whenever an instruction is remedied. A kernel restores extended state (XRSTOR) before it
//! enters user mode, so no user code runs before its gate has been seen.

use std::sync::atomic::{AtomicU64, Ordering};

use super::PvmError;
use super::cpu::Cpu;
use super::linear::{Context, Unreachable};

pub(super) const MSR_STAR: u32 = 0xc000_0081;
pub(super) const MSR_LSTAR: u32 = 0xc000_0082;
pub(super) const MSR_SFMASK: u32 = 0xc000_0084;
/// RFLAGS bit 1 is always one.
const RFLAGS_FIXED: u64 = 1 << 1;
const RFLAGS_RF: u64 = 1 << 16;
/// Offset of the page-fault gate in a 64-bit IDT: vector 14, 16 bytes each.
const GATE_OFFSET: u64 = 14 * 16;
const GATE_PRESENT: u64 = 1 << 47;

/// Where system calls go, of one vCPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct SyscallTarget {
    pub star: u64,
    pub lstar: u64,
    pub sfmask: u64,
}

impl SyscallTarget {
    pub(super) fn read(cpu: &Cpu<'_>) -> Result<Self, PvmError> {
        let [star, lstar, sfmask] = cpu.msrs([MSR_STAR, MSR_LSTAR, MSR_SFMASK])?;
        Ok(Self { star, lstar, sfmask })
    }
}

/// The gate of vector 14.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gate {
    /// Guest physical address of its first half.
    pub gpa: u64,
    /// Its first half.
    pub low: u64,
    /// Where it leads.
    pub handler: u64,
}

impl Gate {
    /// Reads the gate; none if there is no IDT yet or the gate is not present.
    pub(super) fn read(cpu: &Cpu<'_>) -> Option<Self> {
        let idt = cpu.sregs.idt;
        if u64::from(idt.limit) < GATE_OFFSET + 15 || cpu.sregs.cs.l == 0 {
            return None;
        }
        let context = Context { user: false, ..cpu.context() };
        let at = idt.base.checked_add(GATE_OFFSET)?;
        let memory = cpu.memory();
        let gpa = memory.translate_for_system(&context, at).ok()?;
        let low = memory.word(gpa).ok()?.load(Ordering::Acquire);
        let high = memory.word(gpa + 8).ok()?.load(Ordering::Acquire);
        if low & GATE_PRESENT == 0 {
            return None;
        }
        let handler = (low & 0xffff) | ((low >> 48) << 16) | (high << 32);
        Some(Self { gpa, low, handler })
    }

    /// Its first half when it leads to `handler`, whose upper 32 bits must be those of the present one.
    pub(super) fn redirected(&self, handler: u64) -> u64 {
        let middle = 0x0000_ffff_ffff_0000;
        (self.low & middle) | (handler & 0xffff) | (((handler >> 16) & 0xffff) << 48)
    }
}

/// What the CPU pushes for a fault, from the lowest address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame {
    pub error_code: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

impl Frame {
    /// Reads the frame at RSP.
    pub(super) fn read(cpu: &Cpu<'_>) -> Result<Self, Unreachable> {
        let context = Context { user: false, ..cpu.context() };
        let mut words = [0; 6];
        let mut at = cpu.regs.rsp;
        for word in &mut words {
            *word = cpu.memory().system_word(&context, at)?;
            at = at.wrapping_add(8);
        }
        let [error_code, rip, cs, rflags, rsp, ss] = words;
        Ok(Self { error_code, rip, cs, rflags, rsp, ss })
    }

    /// Whether the fault came from user mode.
    pub(super) fn is_user(&self) -> bool {
        self.cs & 3 == 3
    }

    /// Whether this is a `syscall` that did not leave CPL 3. A jump of user mode to LSTAR is none: its flags are
    /// not masked (user mode cannot clear IF, which kernels mask).
    pub(super) fn is_syscall(&self, target: &SyscallTarget) -> bool {
        self.is_user()
            && target.lstar != 0
            && self.rip == target.lstar
            && self.rflags & target.sfmask & !RFLAGS_RF == 0
    }
}

/// Finishes a system call: CPL 0 at LSTAR, on the user's stack (Intel SDM volume 2, SYSCALL).
pub(super) fn enter_syscall(cpu: &mut Cpu<'_>, frame: &Frame, target: &SyscallTarget) {
    cpu.regs.rip = target.lstar;
    cpu.regs.rsp = frame.rsp;
    cpu.regs.rflags = (frame.rflags & !target.sfmask & !RFLAGS_RF) | RFLAGS_FIXED;
    // The gate has loaded the kernel's CS; SS is null after a change of privilege and is loaded here.
    let code = ((target.star >> 32) & 0xfffc) as u16;
    if cpu.sregs.cs.selector != code || cpu.sregs.ss.selector != code + 8 {
        let sregs = cpu.change_sregs();
        sregs.cs.selector = code;
        sregs.ss.selector = code + 8;
    }
}

/// Where the breakpoint has to stand on every vCPU of a VM; 0 for nowhere.
#[derive(Debug, Default)]
pub(super) struct Breakpoint(AtomicU64);

impl Breakpoint {
    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// True if it stood elsewhere.
    pub(super) fn set(&self, address: u64) -> bool {
        self.0.swap(address, Ordering::AcqRel) != address
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGET: SyscallTarget = SyscallTarget {
        star: 0x0023_0010_0000_0000,
        lstar: 0xffff_ffff_8180_0040,
        // As Linux sets it: all flags but bit 1 and the reserved ones.
        sfmask: 0x25_7fd5,
    };

    /// As PVM leaves a `syscall`: flags masked, RF set by the fault.
    const SYSCALL: Frame = Frame {
        error_code: 0x15,
        rip: TARGET.lstar,
        cs: 0x33,
        rflags: 0x1_0002,
        rsp: 0x7ffc_0000_0000,
        ss: 0x2b,
    };

    #[test]
    fn only_a_syscall_is_taken_for_one() {
        assert!(SYSCALL.is_syscall(&TARGET));
        let others = [
            ("a fault of user code", Frame { rip: 0x40_1000, rflags: 0x1_0202, ..SYSCALL }),
            ("a jump of user code to LSTAR", Frame { rflags: 0x1_0202, ..SYSCALL }),
            ("the same with arithmetic flags", Frame { rflags: 0x1_0206, ..SYSCALL }),
            ("a fault of the kernel", Frame { cs: 0x10, ..SYSCALL }),
            ("a jump near LSTAR", Frame { rip: TARGET.lstar + 1, ..SYSCALL }),
        ];
        for (what, frame) in others {
            assert!(!frame.is_syscall(&TARGET), "{what}");
        }
        let none = SyscallTarget::default();
        assert!(!Frame { rip: 0, ..SYSCALL }.is_syscall(&none), "no LSTAR yet");
    }

    #[test]
    fn a_gate_is_redirected_in_its_first_half_only() {
        let handler = 0xffff_ffff_8180_0b30u64;
        let low = (handler & 0xffff) | 0x8e00_0010_0000 | (((handler >> 16) & 0xffff) << 48);
        let gate = Gate { gpa: 0, low, handler };
        assert_eq!(gate.redirected(handler), low);
        let new = gate.redirected(0xffff_ffff_4000_0080);
        assert_eq!(new, 0x4000_8e00_0010_0080);
    }
}
