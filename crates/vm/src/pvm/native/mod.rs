//! Guest kernel mode on the CPU: the interface that the development hosts' PVM has for kernels that know it.
//!
//! The guest's kernel runs at CPL 3 like its user mode, on page tables of its own; it asks the host by software
//! interrupts, and its interrupt flag is a byte in a page that it shares with the host, the VIF page. The guest kernel's
//! side is a flavour of ours (guest/kernel, `forkd_pvm`), which an ELF note tells ([`NativeKernel`]). The VMM's
//! side is little:
//!
//! | when | what |
//! |---|---|
//! | start | `probe.rs`: is the interface there, and does it do what our kernel relies on? Remembered ([`memo`]) |
//! | boot | page tables with U/S = 1, the PML4 aligned to 8 KiB ([`crate::boot`]); [`MSR_CONTROL`] on vCPU 0 |
//! | boot | CPUID without what such a kernel must not use (`cpuid.rs`) |
//! | save, restore | [`MSR_CONTROL`] goes with the other MSRs |
//! | any surprise | the VM fails, with all that is known of the vCPU ([`crate::vcpu::Surprise`]) |
//!
//! Nothing else of [`crate::pvm`] is active in such a VM. Whether a vCPU is in kernel mode is told by CR3 ([`CR3_USER`]),
//! never by CPL, which is 3 in both.
//!
//! The interface is not documented; it was found by experiment, and is verified before it is used. Known holes:
//! what the probe does not run through (events from user mode, interrupts, halting, several vCPUs) is taken on trust;
//! one host of Intel's was seen.

pub(crate) mod cpuid;
mod guest;
pub mod memo;
mod probe;

use std::str::FromStr;

use crate::layout;

pub(crate) use probe::verify;

/// VIF page and features of a vCPU, read and written; 0 where kernel mode is emulated. It is not in KVM's index list.
pub const MSR_CONTROL: u32 = 0x4b56_4d10;
/// Reads [`IDENTITY`] where the interface is there.
pub const MSR_IDENTITY: u32 = 0x4b56_4d11;
/// Features that the host has.
pub const MSR_FEATURES: u32 = 0x4b56_4d12;
/// What [`MSR_IDENTITY`] reads: "PVM".
pub const IDENTITY: u64 = 0x4d_5650;

/// Features that our kernel asks for, the low bits of [`MSR_CONTROL`]: kernel mode at CPL 3 (0); GS and CR3
/// exchanged at events (1) and at SYSCALL (2); CR2 in the VIF page (4); user page tables without anything of the kernel (5);
/// `int 0x17` (6), for which 3 is needed.
pub const FEATURES: u64 = 0x7f;
/// Bits of [`MSR_CONTROL`] that are the VIF page's guest-physical address.
pub const VIF_MASK: u64 = !0xfff;

/// Bit of CR3 that is set in user mode, and clear in kernel mode. So page table roots come in pairs of 8 KiB.
pub const CR3_USER: u64 = 1 << 12;

/// Version of the interface between forkd and its kernel: the note's.
pub const INTERFACE_VERSION: u32 = 1;

/// Owner and type of the ELF note of kernels that know the interface.
pub(crate) const NOTE_NAME: &[u8] = b"forkd\0";
/// See [`NOTE_NAME`].
pub(crate) const NOTE_TYPE: u32 = 0x4d_5650;
/// Length of the note's description: version and reserved (u32 each), control (u64).
pub(crate) const NOTE_LEN: usize = 16;

/// Words for the kernel's command line. What emulation needs is not there: CPUID is filtered (`cpuid.rs`), kernel
/// mode is quick, and page table isolation, which the kernel forces on, is what keeps user mode out of the kernel.
///
/// | word | why |
/// |---|---|
/// | mitigations=off | a guest's processes are not guarded against each other's speculation, nor its kernel against theirs, but by page table isolation; the host guards itself |
/// | random.trust_cpu=on | random numbers at once; rdrand runs on the CPU |
/// | nf_conntrack.hashsize= | the connection tracker scans its whole table at intervals, in idle guests too |
///
/// Not `nopvspin`: without PV_UNHALT in CPUID there are no paravirtual spinlocks, and the word would also switch off the
/// simple ones, which suit vCPUs that lose their CPU. Not `lpj=`: kvmclock tells the kernel the TSC's frequency.
pub const CMDLINE: &str = "mitigations=off random.trust_cpu=on nf_conntrack.hashsize=1024";

/// What a kernel that knows the interface says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NativeKernel {
    /// Value of [`MSR_CONTROL`] on the boot CPU before the first instruction.
    pub control: u64,
}

impl NativeKernel {
    /// Reads the note's description. An error says what is wrong with it.
    pub(crate) fn parse(description: &[u8]) -> Result<Self, NoteError> {
        let len = description.len();
        let bytes: &[u8; NOTE_LEN] = description.try_into().map_err(|_| NoteError::Length(len))?;
        let [v0, v1, v2, v3, _, _, _, _, control @ ..] = *bytes;
        let version = u32::from_le_bytes([v0, v1, v2, v3]);
        if version != INTERFACE_VERSION {
            return Err(NoteError::Version(version));
        }
        let control = u64::from_le_bytes(control);
        let features = control & !VIF_MASK;
        if features != FEATURES {
            return Err(NoteError::Features(features));
        }
        Ok(Self { control })
    }

    /// Guest-physical address of the boot CPU's VIF page.
    pub fn vif_page(self) -> u64 {
        self.control & VIF_MASK
    }

    /// Length of that page in bytes.
    pub const VIF_LEN: u64 = 4096;
}

/// What is wrong with a kernel's note.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoteError {
    /// Another length.
    #[error("its note on PVM has {0} bytes, not {NOTE_LEN}")]
    Length(usize),
    /// Another interface.
    #[error(
        "its note on PVM is of version {0}, this forkd knows {INTERFACE_VERSION}: build the kernel of this forkd \
         with `make kernel`"
    )]
    Version(u32),
    /// Features that nobody has verified.
    #[error("its note on PVM asks for the features {0:#x}, this forkd verifies {FEATURES:#x}")]
    Features(u64),
    /// The VIF page is not in the kernel.
    #[error("its note on PVM has the VIF page at {0:#x}, where nothing of the kernel is")]
    VifPage(u64),
}

/// What is wanted of a host that has PVM: the value of FORKD_PVM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Choice {
    /// Native where it was verified, otherwise emulated.
    #[default]
    Auto,
    /// Native, or nothing.
    Native,
    /// Never native.
    Emulated,
}

/// A value of FORKD_PVM that there is not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not auto, native or emulated")]
pub struct UnknownChoice(String);

impl FromStr for Choice {
    type Err = UnknownChoice;

    fn from_str(text: &str) -> Result<Self, UnknownChoice> {
        match text {
            "auto" | "" => Ok(Self::Auto),
            "native" => Ok(Self::Native),
            "emulated" => Ok(Self::Emulated),
            other => Err(UnknownChoice(other.chars().take(40).collect())),
        }
    }
}

/// Why a host cannot run guest kernel mode natively by PVM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotNative {
    /// Its KVM is another.
    #[error("this host's KVM is not PVM")]
    NotPvm,
    /// [`Choice::Emulated`].
    #[error("FORKD_PVM=emulated switches it off")]
    SwitchedOff,
    /// The probe found something else than it relies on.
    #[error("this host's PVM lacks the interface: {0}")]
    Differs(String),
}

// The boot tables' root and its user twin must be the pair that CR3_USER tells apart.
const _: () = assert!(layout::BOOT_PML4.is_multiple_of(2 * CR3_USER));

#[cfg(test)]
mod tests {
    use super::*;

    fn note(version: u32, control: u64) -> Vec<u8> {
        let mut bytes = version.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(control.to_le_bytes());
        bytes
    }

    #[test]
    fn a_note_gives_the_vif_page_or_says_what_is_wrong() {
        let kernel = NativeKernel::parse(&note(1, 0x1cc_b07f)).unwrap();
        assert_eq!((kernel.control, kernel.vif_page()), (0x1cc_b07f, 0x1cc_b000));
        assert_eq!(NativeKernel::parse(&note(2, 0x1cc_b07f)), Err(NoteError::Version(2)));
        assert_eq!(NativeKernel::parse(&note(1, 0x1cc_b0ff)), Err(NoteError::Features(0xff)));
        assert_eq!(NativeKernel::parse(&note(1, 0x1cc_b000)), Err(NoteError::Features(0)));
        for len in [0, 8, 15, 17] {
            let mut bytes = note(1, 0x7f);
            bytes.resize(len, 0);
            assert_eq!(NativeKernel::parse(&bytes), Err(NoteError::Length(len)));
        }
    }

    #[test]
    fn choices_are_words() {
        assert_eq!("auto".parse(), Ok(Choice::Auto));
        assert_eq!("native".parse(), Ok(Choice::Native));
        assert_eq!("emulated".parse(), Ok(Choice::Emulated));
        assert!("Native".parse::<Choice>().unwrap_err().to_string().contains("\"Native\""));
    }

    #[test]
    fn native_guests_are_not_made_late() {
        for word in ["tick_stretch", "sched_base_slice", "fair_server", "pti=off", "clearcpuid"] {
            assert!(!CMDLINE.contains(word), "{word}");
        }
    }
}
