//! How a VM's guest runs its kernel mode.
//!
//! It is decided once, at boot, by the kernel image and the host ([`crate::Host::mode_for`]), and is part of what a
//! snapshot says of itself: a guest that was booted in one mode cannot go on in another.

use std::time::Duration;

use crate::pvm;

/// How a VM's guest runs its kernel mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestMode {
    /// On the CPU, by VT-x or SVM.
    Hardware,
    /// By KVM's instruction emulator and the remedies of [`crate::pvm`].
    PvmEmulated,
    /// On the CPU at CPL 3, by PVM's interface for kernels that know it: see [`crate::pvm::native`].
    PvmNative,
}

impl GuestMode {
    /// Name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hardware => "hardware",
            Self::PvmEmulated => "PVM, emulated",
            Self::PvmNative => "PVM, native",
        }
    }

    /// Whether the guest's TSC is the host's, whatever its offset: see [`crate::clock`].
    pub fn is_pvm(self) -> bool {
        self != Self::Hardware
    }

    /// Whether kernel mode is emulated, which makes it some hundred times slower.
    pub fn is_emulated(self) -> bool {
        self == Self::PvmEmulated
    }

    /// How many forked guests should wake up at once, if there is a limit: a crowd of them gets nothing done where
    /// kernel mode is emulated.
    pub fn waking_limit(self) -> Option<usize> {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        self.is_emulated().then_some(cpus + 1)
    }

    /// The time slice that vCPU threads should ask for, if not the host's default.
    pub fn vcpu_slice(self) -> Option<Duration> {
        self.is_emulated().then_some(pvm::VCPU_SLICE)
    }
}

#[cfg(test)]
mod tests {
    use super::GuestMode::{Hardware, PvmEmulated, PvmNative};

    #[test]
    fn only_emulation_is_waited_for() {
        for quick in [Hardware, PvmNative] {
            assert_eq!((quick.waking_limit(), quick.vcpu_slice()), (None, None), "{quick:?}");
        }
        assert!(PvmEmulated.waking_limit().is_some_and(|n| n > 1));
        assert!(PvmEmulated.vcpu_slice().is_some());
        assert_eq!([Hardware, PvmEmulated, PvmNative].map(|m| m.is_pvm()), [false, true, true]);
    }
}
