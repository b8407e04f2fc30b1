//! A vCPU's state: what is saved, and in which order it goes back.
//!
//! The structures are KVM's own, which are kernel ABI and as stable as a file format of ours could be; they
//! are kept as their bytes. MSRs and CPUID are kept as lists.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, Xsave, kvm_cpuid_entry2, kvm_debugregs,
    kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use serde::{Deserialize, Serialize};

use super::{Vcpu, VcpuError};
use crate::clock::{self, ClockShift};
use crate::mode::GuestMode;
use crate::pvm::native;
use crate::{msr, pvm};

/// Version of [`VcpuState`]'s encoding.
pub const VCPU_STATE_VERSION: u16 = 1;

/// Local vector table entry of the APIC timer, and its mode bits 18:17 (Intel SDM volume 3, figure 11-8).
const APIC_LVTT: usize = 0x320;
const APIC_LVTT_MODE: u32 = 3 << 17;
const APIC_LVTT_TSC_DEADLINE: u32 = 2 << 17;

/// Most that a guest's TSC frequency may differ from the host's without scaling, in parts per million
/// (Linux: `tsc_tolerance_ppm`).
const TSC_TOLERANCE_PPM: u64 = 250;

/// Saved state of one vCPU.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VcpuState {
    /// Number of the vCPU.
    pub index: u8,
    /// Whether it runs, halts or waits for start-up.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segment and control registers.
    pub sregs: kvm_sregs,
    /// XSAVE area, standard format.
    pub xsave: Vec<u8>,
    /// Extended control registers.
    pub xcrs: kvm_xcrs,
    /// Local APIC.
    pub lapic: kvm_lapic_state,
    /// Debug registers.
    pub debugregs: kvm_debugregs,
    /// Exceptions, interrupts and NMIs that are pending or being delivered.
    pub events: kvm_vcpu_events,
    /// MSRs: index and value.
    pub msrs: Vec<(u32, u64)>,
    /// CPUID as the guest sees it.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Frequency of the guest's TSC in kHz.
    pub tsc_khz: u32,
    /// TSC offset; none if the kernel does not tell: then the TSC's value is among `msrs`.
    pub tsc_offset: Option<u64>,
    /// State of PVM's remedies.
    pub pvm: Option<pvm::PvmState>,
}

impl Vcpu {
    /// Saves this vCPU's state. It must have been configured or restored, and must be out of `run`; it can go on
    /// afterwards.
    ///
    /// # Errors
    ///
    /// Names the ioctl or MSR that failed.
    pub fn save(&mut self) -> Result<VcpuState, VcpuError> {
        self.finish_io()?;
        if let Some(assist) = &mut self.assist {
            let index = self.index;
            assist.commit(&mut self.fd).map_err(|source| VcpuError::Pvm { index, source })?;
        }
        // First, as it makes KVM take pending INITs and start-up IPIs into account.
        let mp_state = self.fd.get_mp_state().map_err(self.ioctl_error("KVM_GET_MP_STATE"))?;
        let regs = self.fd.get_regs().map_err(self.ioctl_error("KVM_GET_REGS"))?;
        let sregs = self.fd.get_sregs().map_err(self.ioctl_error("KVM_GET_SREGS"))?;
        let xsave = self.save_xsave()?;
        let xcrs = self.fd.get_xcrs().map_err(self.ioctl_error("KVM_GET_XCRS"))?;
        let debugregs = self.fd.get_debug_regs().map_err(self.ioctl_error("KVM_GET_DEBUGREGS"))?;
        let lapic = self.fd.get_lapic().map_err(self.ioctl_error("KVM_GET_LAPIC"))?;
        let tsc_khz = self.fd.get_tsc_khz().map_err(self.ioctl_error("KVM_GET_TSC_KHZ"))?;
        let mut msrs = msr::read(&self.fd, &self.msrs).map_err(self.msr_error())?;
        keep_expired_deadline(&lapic, &mut msrs);
        let tsc_offset = if self.shared.host.has_vcpu_attrs() {
            let call = "KVM_GET_DEVICE_ATTR(KVM_VCPU_TSC_OFFSET)";
            Some(clock::tsc_offset(&self.fd).map_err(self.ioctl_error(call))?)
        } else {
            let tsc = msr::read(&self.fd, &[msr::IA32_TSC]).map_err(self.msr_error())?;
            msrs.extend(tsc);
            None
        };
        let events = self.fd.get_vcpu_events().map_err(self.ioctl_error("KVM_GET_VCPU_EVENTS"))?;
        let pvm = self.assist.as_ref().map(pvm::VcpuAssist::save);
        Ok(VcpuState {
            index: self.index,
            mp_state,
            regs,
            sregs,
            xsave,
            xcrs,
            lapic,
            debugregs,
            events,
            msrs,
            cpuid: self.cpuid.clone(),
            tsc_khz,
            tsc_offset,
            pvm,
        })
    }

    /// Puts saved state into this vCPU, which has not run yet. `shift` is the same for all vCPUs of a VM
    /// ([`crate::vm::VmState::clock_shift`]).
    ///
    /// # Errors
    ///
    /// Names what does not fit, or the ioctl or MSR that failed. No part is skipped silently.
    pub fn restore(&mut self, state: &VcpuState, shift: ClockShift) -> Result<(), VcpuError> {
        self.check(state)?;
        let cpuid = CpuId::from_entries(&state.cpuid)
            .map_err(|_| self.state_error("too many CPUID entries"))?;
        self.fd.set_cpuid2(&cpuid).map_err(self.ioctl_error("KVM_SET_CPUID2"))?;
        self.cpuid.clone_from(&state.cpuid);
        self.restore_tsc(state, shift)?;
        self.fd.set_regs(&state.regs).map_err(self.ioctl_error("KVM_SET_REGS"))?;
        // The APIC base is part of sregs, so they precede the APIC.
        self.fd.set_sregs(&state.sregs).map_err(self.ioctl_error("KVM_SET_SREGS"))?;
        self.restore_xsave(&state.xsave)?;
        self.fd.set_xcrs(&state.xcrs).map_err(self.ioctl_error("KVM_SET_XCRS"))?;
        self.fd.set_debug_regs(&state.debugregs).map_err(self.ioctl_error("KVM_SET_DEBUGREGS"))?;
        self.fd.set_lapic(&state.lapic).map_err(self.ioctl_error("KVM_SET_LAPIC"))?;
        // After the APIC, whose timer mode decides whether the deadline is taken, and the deadline last.
        let (deadline, others): (Vec<_>, Vec<_>) =
            state.msrs.iter().copied().partition(|(i, _)| *i == msr::IA32_TSC_DEADLINE);
        let ordered: Vec<_> = others.into_iter().chain(deadline).collect();
        msr::write(&self.fd, &ordered).map_err(self.msr_error())?;
        self.msrs = state.msrs.iter().map(|(i, _)| *i).filter(|i| *i != msr::IA32_TSC).collect();
        self.fd.set_vcpu_events(&state.events).map_err(self.ioctl_error("KVM_SET_VCPU_EVENTS"))?;
        self.fd.set_mp_state(state.mp_state).map_err(self.ioctl_error("KVM_SET_MP_STATE"))?;
        if let (Some(assist), Some(saved)) = (&mut self.assist, &state.pvm) {
            let index = self.index;
            assist
                .restore(saved, &mut self.fd)
                .map_err(|source| VcpuError::Pvm { index, source })?;
        }
        Ok(())
    }

    /// KVM_RUN may have returned in the middle of an access, which the next KVM_RUN completes: with
    /// `immediate_exit` that is all it does.
    fn finish_io(&mut self) -> Result<(), VcpuError> {
        if !self.unfinished {
            return Ok(());
        }
        self.fd.set_kvm_immediate_exit(1);
        let result = self.fd.run().map(|exit| format!("{exit:?}"));
        self.fd.set_kvm_immediate_exit(0);
        match result {
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
                self.unfinished = false;
                Ok(())
            }
            Err(e) => Err(self.ioctl_error("KVM_RUN")(e)),
            Ok(exit) => Err(self.state_error(format!("an access is not complete: {exit}"))),
        }
    }

    fn check(&self, state: &VcpuState) -> Result<(), VcpuError> {
        if state.index != self.index {
            return Err(self.state_error(format!("it is vCPU {}'s", state.index)));
        }
        if state.msrs.len() > KVM_MAX_MSR_ENTRIES || state.cpuid.len() > KVM_MAX_CPUID_ENTRIES {
            return Err(self.state_error("too many MSRs or CPUID entries"));
        }
        if state.xsave.len() != self.shared.host.xsave_size() {
            return Err(self.state_error(format!(
                "XSAVE area of {} bytes, this host's is {}",
                state.xsave.len(),
                self.shared.host.xsave_size()
            )));
        }
        if state.pvm.is_some() != self.assist.is_some() {
            return Err(self.state_error("saved on another flavour of KVM (PVM or not)"));
        }
        let native = state.msrs.iter().any(|(index, _)| *index == native::MSR_CONTROL);
        if native != (self.shared.mode == GuestMode::PvmNative) {
            let reason = if native {
                "kernel mode ran natively"
            } else {
                "kernel mode did not run natively"
            };
            return Err(
                self.state_error(format!("{reason}, and here it is {}", self.shared.mode.name()))
            );
        }
        Ok(())
    }

    fn restore_tsc(&self, state: &VcpuState, shift: ClockShift) -> Result<(), VcpuError> {
        let host_khz = self.fd.get_tsc_khz().map_err(self.ioctl_error("KVM_GET_TSC_KHZ"))?;
        let (host, guest) = (u64::from(host_khz), u64::from(state.tsc_khz));
        if host.abs_diff(guest) * 1_000_000 > host * TSC_TOLERANCE_PPM {
            if !self.shared.host.has_tsc_control() {
                return Err(self.state_error(format!(
                    "its TSC runs at {guest} kHz, this host's at {host} kHz and cannot be scaled"
                )));
            }
            self.fd.set_tsc_khz(state.tsc_khz).map_err(self.ioctl_error("KVM_SET_TSC_KHZ"))?;
        }
        let Some(saved) = state.tsc_offset.filter(|_| self.shared.host.has_vcpu_attrs()) else {
            return Ok(());
        };
        let offset = if self.shared.mode.is_pvm() { 0 } else { shift.apply(saved) };
        clock::set_tsc_offset(&self.fd, offset)
            .map_err(self.ioctl_error("KVM_SET_DEVICE_ATTR(KVM_VCPU_TSC_OFFSET)"))
    }

    fn save_xsave(&self) -> Result<Vec<u8>, VcpuError> {
        let size = self.shared.host.xsave_size();
        let mut bytes = Vec::with_capacity(size);
        if self.shared.host.has_xsave2() {
            let mut xsave = self.xsave_buffer()?;
            // SAFETY: the buffer is as long as KVM_CAP_XSAVE2 says.
            unsafe { self.fd.get_xsave2(&mut xsave) }
                .map_err(self.ioctl_error("KVM_GET_XSAVE2"))?;
            let fixed = xsave.as_fam_struct_ref();
            push_words(&mut bytes, &fixed.xsave.region);
            push_words(&mut bytes, xsave.as_slice());
        } else {
            let xsave = self.fd.get_xsave().map_err(self.ioctl_error("KVM_GET_XSAVE"))?;
            push_words(&mut bytes, &xsave.region);
        }
        bytes.resize(size, 0);
        Ok(bytes)
    }

    fn restore_xsave(&self, bytes: &[u8]) -> Result<(), VcpuError> {
        let mut xsave = self.xsave_buffer()?;
        let mut words = bytes
            .chunks_exact(4)
            .map(|c| c.iter().rev().fold(0u32, |word, byte| (word << 8) | u32::from(*byte)));
        // SAFETY: only the fixed part is written; the length stays.
        let fixed = unsafe { xsave.as_mut_fam_struct() };
        for word in &mut fixed.xsave.region {
            *word = words.next().unwrap_or(0);
        }
        for word in xsave.as_mut_slice() {
            *word = words.next().unwrap_or(0);
        }
        // SAFETY: the buffer is as long as KVM_CAP_XSAVE2 says, or 4,096 bytes if the kernel knows only those.
        unsafe { self.fd.set_xsave2(&xsave) }.map_err(self.ioctl_error("KVM_SET_XSAVE"))
    }

    fn xsave_buffer(&self) -> Result<Xsave, VcpuError> {
        let fixed = size_of::<kvm_bindings::kvm_xsave>();
        let extra = self.shared.host.xsave_size().saturating_sub(fixed).div_ceil(4);
        Xsave::new(extra).map_err(|_| self.state_error("no memory for an XSAVE area"))
    }
}

fn push_words(bytes: &mut Vec<u8>, words: &[u32]) {
    for word in words {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
}

/// A register of the local APIC's page.
pub(super) fn lapic_register(lapic: &kvm_lapic_state, offset: usize) -> u32 {
    let byte = |i: usize| u32::from(lapic.regs.get(offset + i).map_or(0, |b| *b as u8));
    byte(0) | byte(1) << 8 | byte(2) << 16 | byte(3) << 24
}

/// Sets a register of the local APIC's page.
pub(super) fn set_lapic_register(lapic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (reg, byte) in lapic.regs.iter_mut().skip(offset).zip(value.to_le_bytes()) {
        *reg = byte as _;
    }
}

/// A deadline of zero is either none, or one that has passed and whose interrupt KVM has not put into the APIC yet; that
/// is not part of any state. A deadline long past makes the timer fire once more: harmless if it was not due.
fn keep_expired_deadline(lapic: &kvm_lapic_state, msrs: &mut [(u32, u64)]) {
    if lapic_register(lapic, APIC_LVTT) & APIC_LVTT_MODE != APIC_LVTT_TSC_DEADLINE {
        return;
    }
    for (index, value) in msrs {
        if *index == msr::IA32_TSC_DEADLINE && *value == 0 {
            *value = 1;
        }
    }
}
