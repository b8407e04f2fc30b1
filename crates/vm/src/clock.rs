//! The guest's time-stamp counter (TSC), and how it goes on across a fork.
//!
//! A guest's TSC is the host's plus an offset per vCPU. To the guest, no time passes between save and restore:
//! its TSC and its kvmclock both go on from the saved instant, and the agent then corrects the wall clock. So
//! no timer of a guest fires early because its snapshot lay about for an hour. [`ClockShift`] is the time to
//! hide, read once per restore and applied to every vCPU alike, so that their TSCs agree to the tick.
//!
//! PVM is different: a guest's user mode executes RDTSC natively and sees the host's TSC, whatever the offset.
//! Kernel mode, where it is emulated, sees the offset (natively it sees the host's TSC as well). Both agree only if the
//! offset is zero, so it is set to zero at boot and at restore. The TSC of a PVM guest then runs on while it is saved; its kvmclock does not (the
//! kvmclock page that the host writes hides the difference), so such guests should use the clock source
//! `kvm-clock`, which [`crate::cmdline`] asks for.

use std::os::fd::AsRawFd;

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

/// Two ioctls on a vCPU that kvm-ioctls does not offer on x86-64.
#[allow(missing_docs, reason = "the macro makes functions without documentation")]
mod ioctls {
    use super::{KVMIO, ioctl_iow_nr, kvm_device_attr};

    ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
    ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
}

/// The host's TSC now.
pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC is there on every x86-64 CPU and has no memory effects.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// How far the host's TSC has moved since the VM was saved: what restored vCPUs must not notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockShift(u64);

impl ClockShift {
    /// No time has passed.
    pub const NONE: Self = Self(0);

    /// Since `saved_host_tsc`; modulo 2^64, so it holds for another boot of the host, too.
    pub fn since(saved_host_tsc: u64) -> Self {
        Self(host_tsc().wrapping_sub(saved_host_tsc))
    }

    /// The offset that replaces `saved_offset`.
    pub fn apply(self, saved_offset: u64) -> u64 {
        saved_offset.wrapping_sub(self.0)
    }
}

fn attr(value: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: value as u64,
        flags: 0,
    }
}

/// The vCPU's TSC offset, in ticks, modulo 2^64.
pub fn tsc_offset(fd: &VcpuFd) -> Result<u64, errno::Error> {
    let mut value = 0u64;
    let attr = attr(&raw mut value);
    // SAFETY: the attribute is eight bytes (Linux, Documentation/virt/kvm/devices/vcpu.rst), which the kernel
    // writes to `value`; both live until after the call.
    let rc = unsafe { ioctl_with_ref(&fd.as_raw_fd(), ioctls::KVM_GET_DEVICE_ATTR(), &attr) };
    if rc == 0 { Ok(value) } else { Err(errno::Error::last()) }
}

/// Sets the vCPU's TSC offset.
pub fn set_tsc_offset(fd: &VcpuFd, offset: u64) -> Result<(), errno::Error> {
    let mut value = offset;
    let attr = attr(&raw mut value);
    // SAFETY: as above; the kernel only reads `value`.
    let rc = unsafe { ioctl_with_ref(&fd.as_raw_fd(), ioctls::KVM_SET_DEVICE_ATTR(), &attr) };
    if rc == 0 { Ok(()) } else { Err(errno::Error::last()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        /// Guest TSC at restore equals guest TSC at save, for any offset and any host TSCs, also of another boot.
        #[test]
        fn the_guest_sees_no_time_pass(offset: u64, saved: u64, now: u64) {
            let shift = ClockShift(now.wrapping_sub(saved));
            let guest_before = saved.wrapping_add(offset);
            let guest_after = now.wrapping_add(shift.apply(offset));
            proptest::prop_assert_eq!(guest_before, guest_after);
        }
    }
}
