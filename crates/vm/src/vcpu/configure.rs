//! A vCPU at power-on: CPUID, MSRs, local APIC, and for the first one the registers of the boot protocol.

use super::{Shared, Vcpu, VcpuError};
use crate::boot::{BootEntry, registers};
use crate::mode::GuestMode;
use crate::pvm::native;
use crate::{clock, cpuid, msr};

/// Offsets of LINT0 and LINT1 in the local APIC's page (Intel SDM volume 3, table 11-1).
const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
/// Delivery modes of a local vector table entry, bits 10:8.
const APIC_MODE_NMI: u32 = 4;
const APIC_MODE_EXTINT: u32 = 7;

/// MSRs that differ from their value at reset when Linux boots.
const BOOT_MSRS: [(u32, u64); 2] = [
    // Fast strings.
    (msr::IA32_MISC_ENABLE, 1),
    // MTRRs on, default type write-back.
    (msr::MTRR_DEF_TYPE, 1 << 11 | 6),
];

impl Vcpu {
    /// Prepares a new vCPU for a boot. The first vCPU (index 0) starts at `entry`, the others wait for the kernel to
    /// start them.
    ///
    /// # Errors
    ///
    /// Names the ioctl or MSR that failed.
    pub fn configure_boot(&mut self, entry: &BootEntry) -> Result<(), VcpuError> {
        let Shared { host, mode, count, .. } = &self.shared;
        let cpuid = cpuid::for_vcpu(host.cpuid(), *mode, self.index, *count);
        self.fd.set_cpuid2(&cpuid).map_err(self.ioctl_error("KVM_SET_CPUID2"))?;
        self.cpuid = cpuid.as_slice().to_vec();
        self.msrs = msr::usable(&self.fd, self.shared.host.msrs()).map_err(self.msr_error())?;
        msr::write(&self.fd, &BOOT_MSRS).map_err(self.msr_error())?;
        if self.shared.mode == GuestMode::PvmNative {
            // The first, as at restore: what follows is then of a vCPU that runs natively. The other vCPUs' kernel sets it.
            self.msrs.insert(0, native::MSR_CONTROL);
        }
        if self.shared.mode.is_pvm() && self.shared.host.has_vcpu_attrs() {
            clock::set_tsc_offset(&self.fd, 0)
                .map_err(self.ioctl_error("KVM_SET_DEVICE_ATTR(KVM_VCPU_TSC_OFFSET)"))?;
        }
        self.configure_lapic()?;
        if self.index == 0 {
            let mut sregs = self.fd.get_sregs().map_err(self.ioctl_error("KVM_GET_SREGS"))?;
            registers::special(entry, &mut sregs);
            self.fd.set_sregs(&sregs).map_err(self.ioctl_error("KVM_SET_SREGS"))?;
            self.fd
                .set_regs(&registers::general(entry))
                .map_err(self.ioctl_error("KVM_SET_REGS"))?;
            if let Some(control) = entry.control {
                msr::write(&self.fd, &[(native::MSR_CONTROL, control)])
                    .map_err(self.msr_error())?;
            }
        }
        Ok(())
    }

    /// LINT0 takes the PIC's interrupts, LINT1 NMIs, as a BIOS leaves them.
    fn configure_lapic(&mut self) -> Result<(), VcpuError> {
        let mut lapic = self.fd.get_lapic().map_err(self.ioctl_error("KVM_GET_LAPIC"))?;
        for (offset, mode) in [(APIC_LVT0, APIC_MODE_EXTINT), (APIC_LVT1, APIC_MODE_NMI)] {
            let old = super::state::lapic_register(&lapic, offset);
            super::state::set_lapic_register(&mut lapic, offset, (old & !0x700) | (mode << 8));
        }
        self.fd.set_lapic(&lapic).map_err(self.ioctl_error("KVM_SET_LAPIC"))
    }
}
