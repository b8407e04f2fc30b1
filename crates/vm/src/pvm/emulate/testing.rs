//! For the tests: a [`Machine`] of plain memory, and the CPU we run on to compare it with.

use iced_x86::{Decoder, DecoderOptions};
use kvm_bindings::{kvm_regs, kvm_sregs};

use super::{Machine, Segment, Trap, execute};
use crate::pvm::exception::Exception;
use crate::pvm::linear::cr;
use crate::pvm::metrics::Metrics;
use crate::pvm::xstate::Xstate;

/// Registers, one piece of memory, extended state.
pub(in super::super) struct Mock {
    pub regs: kvm_regs,
    pub sregs: kvm_sregs,
    /// Address of `memory`.
    pub base: u64,
    pub memory: Vec<u8>,
    pub xstate: Xstate,
    pub stores: usize,
    pub xcr0: u64,
    pub metrics: Metrics,
}

impl Mock {
    /// In 64-bit kernel mode, with `memory` at `base`.
    pub fn new(base: u64, memory: Vec<u8>) -> Self {
        let mut sregs = kvm_sregs::default();
        sregs.cs.l = 1;
        sregs.cr4 = cr::CR4_OSXSAVE | (1 << 16);
        Self {
            regs: kvm_regs { rflags: 2, rip: 0x1000, ..Default::default() },
            sregs,
            base,
            memory,
            xstate: Xstate::initial(),
            stores: 0,
            // SAFETY: all CPUs that run the tests have XSAVE enabled.
            xcr0: unsafe { std::arch::x86_64::_xgetbv(0) },
            metrics: Metrics::default(),
        }
    }

    /// Does the instruction `code`.
    pub fn run(&mut self, code: &[u8]) -> Result<(), Trap> {
        let ip = self.regs.rip;
        let i = Decoder::with_ip(64, code, ip, DecoderOptions::NONE).decode();
        assert_eq!(i.len(), code.len(), "{code:x?} is one instruction");
        let metrics = std::mem::take(&mut self.metrics);
        let result = execute(self, &i, &metrics);
        self.metrics = metrics;
        result
    }

    /// The exception that `code` raises.
    pub fn exception(&mut self, code: &[u8]) -> Exception {
        match self.run(code) {
            Err(Trap::Exception(e)) => e,
            other => panic!("{code:x?}: {other:?}"),
        }
    }

    fn range(&self, address: u64, len: usize, write: bool) -> Result<std::ops::Range<usize>, Trap> {
        let fault = Exception::page_fault(address, if write { 2 } else { 0 });
        let start = address.checked_sub(self.base).ok_or(fault)? as usize;
        let end = start.checked_add(len).filter(|e| *e <= self.memory.len()).ok_or(fault)?;
        Ok(start..end)
    }
}

impl Machine for Mock {
    fn regs(&mut self) -> &mut kvm_regs {
        &mut self.regs
    }

    fn sregs(&self) -> &kvm_sregs {
        &self.sregs
    }

    fn set_base(&mut self, segment: Segment, base: u64) {
        match segment {
            Segment::Fs => self.sregs.fs.base = base,
            Segment::Gs => self.sregs.gs.base = base,
        }
    }

    fn read(&mut self, address: u64, data: &mut [u8]) -> Result<(), Trap> {
        let range = self.range(address, data.len(), false)?;
        data.copy_from_slice(&self.memory[range]);
        Ok(())
    }

    fn write(&mut self, address: u64, data: &[u8]) -> Result<(), Trap> {
        let range = self.range(address, data.len(), true)?;
        self.memory[range].copy_from_slice(data);
        Ok(())
    }

    fn compare_exchange(&mut self, address: u64, expected: u128, new: u128) -> Result<u128, Trap> {
        let range = self.range(address, 16, true)?;
        let found = u128::from_le_bytes(self.memory[range.clone()].try_into().unwrap());
        if found == expected {
            self.memory[range].copy_from_slice(&new.to_le_bytes());
        }
        Ok(found)
    }

    fn xstate(&mut self) -> Result<&mut Xstate, Trap> {
        Ok(&mut self.xstate)
    }

    fn store_xstate(&mut self) -> Result<(), Trap> {
        self.stores += 1;
        Ok(())
    }

    fn xcr0(&mut self) -> Result<u64, Trap> {
        Ok(self.xcr0)
    }

    fn set_xcr0(&mut self, value: u64) -> Result<bool, Trap> {
        self.xcr0 = value;
        Ok(value & 1 != 0)
    }

    fn msr(&mut self, index: u32) -> Result<u64, Trap> {
        Ok(u64::from(index) << 32 | 0x77)
    }

    fn random(&mut self) -> Result<u64, Trap> {
        Ok(0x1234_5678_9abc_def0)
    }
}

/// Registers that go in and out of the CPU: RAX, RCX, RDX, RBX, RSI, RDI, R8, R9, R10, R11 and flags.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in super::super) struct Native {
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub rflags: u64,
}

impl From<&kvm_regs> for Native {
    fn from(r: &kvm_regs) -> Self {
        Self {
            rax: r.rax,
            rcx: r.rcx,
            rdx: r.rdx,
            rbx: r.rbx,
            rsi: r.rsi,
            rdi: r.rdi,
            r8: r.r8,
            r9: r.r9,
            r10: r.r10,
            r11: r.r11,
            rflags: r.rflags,
        }
    }
}

/// Executable copy of one instruction.
pub(in super::super) struct Code(*mut libc::c_void);

impl Code {
    pub fn new(instruction: &[u8]) -> Self {
        let rwx = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh mapping of one page; the instruction and the `ret` behind it fit.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, rwx, flags, -1, 0) };
        assert_ne!(page, libc::MAP_FAILED);
        // SAFETY: as above.
        unsafe {
            let to = page.cast::<u8>();
            std::ptr::copy_nonoverlapping(instruction.as_ptr(), to, instruction.len());
            to.add(instruction.len()).write(0xc3);
        }
        Self(page)
    }

    /// Runs it on the CPU.
    ///
    /// # Safety
    ///
    /// The instruction must not fault, and may only change the registers of [`Native`], extended state that the
    /// caller does not use, and memory that the caller owns.
    pub unsafe fn run(&self, native: &mut Native) {
        // SAFETY: all registers are saved around the call; RBX and RBP by hand, as the compiler reserves them. The
        // arithmetic flags are the only ones that the callers set.
        unsafe {
            std::arch::asm!(
                "push rbx",
                "push r15",
                "push r14",
                "mov r15, r12",
                "mov r14, r13",
                "push qword ptr [r15 + 80]",
                "mov rax, [r15]",
                "mov rcx, [r15 + 8]",
                "mov rdx, [r15 + 16]",
                "mov rbx, [r15 + 24]",
                "mov rsi, [r15 + 32]",
                "mov rdi, [r15 + 40]",
                "mov r8, [r15 + 48]",
                "mov r9, [r15 + 56]",
                "mov r10, [r15 + 64]",
                "mov r11, [r15 + 72]",
                "popfq",
                "call r14",
                "pushfq",
                "mov [r15], rax",
                "mov [r15 + 8], rcx",
                "mov [r15 + 16], rdx",
                "mov [r15 + 24], rbx",
                "mov [r15 + 32], rsi",
                "mov [r15 + 40], rdi",
                "mov [r15 + 48], r8",
                "mov [r15 + 56], r9",
                "mov [r15 + 64], r10",
                "mov [r15 + 72], r11",
                "pop qword ptr [r15 + 80]",
                "pop r14",
                "pop r15",
                "pop rbx",
                inout("r12") std::ptr::from_mut(native) => _,
                inout("r13") self.0 => _,
                out("rax") _, out("rcx") _, out("rdx") _, out("rsi") _, out("rdi") _,
                out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            );
        }
    }
}

impl Drop for Code {
    fn drop(&mut self) {
        // SAFETY: the page is ours, and nothing runs in it any more.
        unsafe { libc::munmap(self.0, 4096) };
    }
}
