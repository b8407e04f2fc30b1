//! A vCPU that stands still after an exit, as a [`Machine`].
//!
//! General, segment and control registers come and go with KVM_RUN itself (KVM_CAP_SYNC_REGS): a vCPU ioctl costs
//! 5 us on PVM. What is rarer (extended state, MSRs, events) takes ioctls.

use kvm_bindings::{
    KVM_MAX_XCRS, Msrs, Xsave, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_xcr, kvm_xcrs,
};
use kvm_ioctls::{SyncReg, VcpuFd};

use super::PvmError;
use super::emulate::{Machine, Segment, Trap};
use super::exception::Exception;
use super::linear::{Access, Context, LinearMemory, Unreachable};
use super::xstate::{Layout, Xstate};

/// One vCPU during one exit. What it changed of the registers goes to KVM with the next KVM_RUN, once
/// [`Cpu::finish`] has been called.
pub(super) struct Cpu<'a> {
    fd: &'a mut VcpuFd,
    memory: &'a LinearMemory,
    buffers: &'a mut Buffers,
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    sregs_changed: bool,
    xstate_loaded: bool,
}

/// Buffers that outlive an exit.
#[derive(Debug)]
pub(super) struct Buffers {
    xsave: Xsave,
    xstate: Xstate,
}

impl Buffers {
    pub(super) fn new() -> Result<Self, PvmError> {
        let extra = Layout::host().area().saturating_sub(size_of::<kvm_bindings::kvm_xsave>());
        let xsave = Xsave::new(extra.div_ceil(size_of::<u32>()))
            .map_err(|_| PvmError::Host { what: "no memory for an XSAVE area" })?;
        Ok(Self { xsave, xstate: Xstate::initial() })
    }

    /// Takes over what KVM gave.
    fn load(&mut self) {
        let fixed = &self.xsave.as_fam_struct_ref().xsave.region;
        let words = fixed.iter().chain(self.xsave.as_slice());
        for (to, from) in self.xstate.bytes_mut().chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&from.to_le_bytes());
        }
    }

    /// Prepares what KVM is to take.
    fn store(&mut self) {
        let mut words = self
            .xstate
            .bytes()
            .chunks_exact(4)
            .map(|b| b.iter().rev().fold(0u32, |word, byte| (word << 8) | u32::from(*byte)));
        // SAFETY: only the fixed part is written, not the length.
        let fixed = unsafe { self.xsave.as_mut_fam_struct() };
        for word in &mut fixed.xsave.region {
            *word = words.next().unwrap_or(0);
        }
        for word in self.xsave.as_mut_slice() {
            *word = words.next().unwrap_or(0);
        }
    }
}

fn ioctl(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> PvmError {
    move |source| PvmError::Ioctl { call, source }
}

impl<'a> Cpu<'a> {
    pub(super) fn new(
        fd: &'a mut VcpuFd,
        memory: &'a LinearMemory,
        buffers: &'a mut Buffers,
    ) -> Self {
        let kvm_bindings::kvm_sync_regs { regs, sregs, .. } = fd.sync_regs();
        Self { fd, memory, buffers, regs, sregs, sregs_changed: false, xstate_loaded: false }
    }

    pub(super) fn memory(&self) -> &LinearMemory {
        self.memory
    }

    pub(super) fn context(&self) -> Context {
        Context::new(&self.sregs, self.regs.rflags)
    }

    /// Marks segment registers as changed.
    pub(super) fn change_sregs(&mut self) -> &mut kvm_sregs {
        self.sregs_changed = true;
        &mut self.sregs
    }

    /// Hands changed registers to KVM with the next KVM_RUN.
    pub(super) fn finish(self) {
        let sync = self.fd.sync_regs_mut();
        sync.regs = self.regs;
        self.fd.set_sync_dirty_reg(SyncReg::Register);
        if self.sregs_changed {
            self.fd.sync_regs_mut().sregs = self.sregs;
            self.fd.set_sync_dirty_reg(SyncReg::SystemRegister);
        }
    }

    /// Injects `exception`, with the registers as they are now. Done by ioctls, as KVM_SET_REGS drops what is
    /// pending.
    pub(super) fn inject(self, exception: Exception) -> Result<(), PvmError> {
        let Self { fd, regs, mut sregs, sregs_changed, .. } = self;
        fd.set_regs(&regs).map_err(ioctl("KVM_SET_REGS"))?;
        if sregs_changed || exception.cr2.is_some() {
            sregs.cr2 = exception.cr2.unwrap_or(sregs.cr2);
            fd.set_sregs(&sregs).map_err(ioctl("KVM_SET_SREGS"))?;
        }
        let mut events = fd.get_vcpu_events().map_err(ioctl("KVM_GET_VCPU_EVENTS"))?;
        events.exception.injected = 1;
        events.exception.pending = 0;
        events.exception.nr = exception.vector;
        events.exception.has_error_code = u8::from(exception.error_code.is_some());
        events.exception.error_code = exception.error_code.unwrap_or(0);
        fd.set_vcpu_events(&events).map_err(ioctl("KVM_SET_VCPU_EVENTS"))?;
        // The copy in kvm_run is stale now.
        let sync = fd.sync_regs_mut();
        (sync.regs, sync.sregs) = (regs, sregs);
        fd.clear_sync_dirty_reg(SyncReg::Register);
        fd.clear_sync_dirty_reg(SyncReg::SystemRegister);
        Ok(())
    }

    /// Gives the guest a #DB that KVM gave us.
    pub(super) fn reinject_debug(self, dr6: u64, vector: u8) -> Result<(), PvmError> {
        let mut debug = self.fd.get_debug_regs().map_err(ioctl("KVM_GET_DEBUGREGS"))?;
        debug.dr6 |= dr6;
        self.fd.set_debug_regs(&debug).map_err(ioctl("KVM_SET_DEBUGREGS"))?;
        self.inject(Exception { vector, error_code: None, cr2: None, trap: true })
    }

    /// Reads MSRs; fails if one cannot be read.
    pub(super) fn msrs<const N: usize>(&self, indices: [u32; N]) -> Result<[u64; N], PvmError> {
        let call = "KVM_GET_MSRS";
        let entries = indices.map(|index| kvm_msr_entry { index, ..Default::default() });
        let mut list = Msrs::from_entries(&entries)
            .map_err(|_| PvmError::Host { what: "too many MSRs asked for" })?;
        let read = self.fd.get_msrs(&mut list).map_err(ioctl(call))?;
        let mut values = [0; N];
        if read != N {
            return Err(PvmError::Host { what: "an MSR of system calls cannot be read" });
        }
        for (value, entry) in values.iter_mut().zip(list.as_slice()) {
            *value = entry.data;
        }
        Ok(values)
    }

    fn trap(&self, error: Unreachable) -> Trap {
        match error {
            Unreachable::Fault(e) => Trap::Exception(e),
            Unreachable::NotRam { gpa } => {
                Trap::Failed(PvmError::NotRam { rip: self.regs.rip, gpa })
            }
        }
    }
}

impl Machine for Cpu<'_> {
    fn regs(&mut self) -> &mut kvm_regs {
        &mut self.regs
    }

    fn sregs(&self) -> &kvm_sregs {
        &self.sregs
    }

    fn set_base(&mut self, segment: Segment, base: u64) {
        let sregs = self.change_sregs();
        match segment {
            Segment::Fs => sregs.fs.base = base,
            Segment::Gs => sregs.gs.base = base,
        }
    }

    fn read(&mut self, address: u64, data: &mut [u8]) -> Result<(), Trap> {
        let context = self.context();
        self.memory.read(&context, address, Access::Read, data).map_err(|e| self.trap(e))
    }

    fn write(&mut self, address: u64, data: &[u8]) -> Result<(), Trap> {
        let context = self.context();
        self.memory.write(&context, address, data).map_err(|e| self.trap(e))
    }

    fn compare_exchange(&mut self, address: u64, expected: u128, new: u128) -> Result<u128, Trap> {
        let context = self.context();
        self.memory
            .compare_exchange(&context, address, expected, new)
            .map_err(|e| self.trap(e))?
            .ok_or(Trap::NoRemedy)
    }

    fn xstate(&mut self) -> Result<&mut Xstate, Trap> {
        if !self.xstate_loaded {
            // SAFETY: the buffer is as long as the largest area this CPU can have, which bounds KVM's.
            unsafe { self.fd.get_xsave2(&mut self.buffers.xsave) }
                .map_err(ioctl("KVM_GET_XSAVE2"))?;
            self.buffers.load();
            self.xstate_loaded = true;
        }
        Ok(&mut self.buffers.xstate)
    }

    fn store_xstate(&mut self) -> Result<(), Trap> {
        self.buffers.xstate.prepare_for_kvm();
        self.buffers.store();
        // SAFETY: the buffer is as long as the largest area this CPU can have, which bounds what KVM reads.
        unsafe { self.fd.set_xsave2(&self.buffers.xsave) }.map_err(ioctl("KVM_SET_XSAVE"))?;
        Ok(())
    }

    fn xcr0(&mut self) -> Result<u64, Trap> {
        let xcrs = self.fd.get_xcrs().map_err(ioctl("KVM_GET_XCRS"))?;
        let count = (xcrs.nr_xcrs as usize).min(KVM_MAX_XCRS as usize);
        let xcr0 = xcrs.xcrs.iter().take(count).find(|x| x.xcr == 0);
        xcr0.map(|x| x.value).ok_or(PvmError::Host { what: "KVM_GET_XCRS gave no XCR0" }.into())
    }

    fn set_xcr0(&mut self, value: u64) -> Result<bool, Trap> {
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0] = kvm_xcr { xcr: 0, value, ..Default::default() };
        match self.fd.set_xcrs(&xcrs) {
            Ok(()) => Ok(true),
            Err(e) if e.errno() == libc::EINVAL => Ok(false),
            Err(e) => Err(ioctl("KVM_SET_XCRS")(e).into()),
        }
    }

    fn msr(&mut self, index: u32) -> Result<u64, Trap> {
        let [value] = self.msrs([index])?;
        Ok(value)
    }

    fn random(&mut self) -> Result<u64, Trap> {
        let mut bytes = [0u8; 8];
        // SAFETY: the buffer is valid for its length.
        let read = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        if read != bytes.len().cast_signed() {
            return Err(PvmError::Host { what: "getrandom failed" }.into());
        }
        Ok(u64::from_le_bytes(bytes))
    }
}
