//! What the host's KVM can do.
//!
//! [`Host::open`] opens `/dev/kvm` once and asks everything that stays the same for the life of the machine:
//! flavour, supported CPUID, which MSRs make up a vCPU's state, the size of its XSAVE area. A fork keeps the
//! `Host` (the descriptor of `/dev/kvm` itself is not bound to a process), so a child spends no time on it.
//!
//! Of PVM there are two kinds, with native kernel mode and without. Which it is is asked when it first matters
//! ([`Host::native_pvm`]), as it takes milliseconds, and remembered in a file if [`HostOptions`] names one.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_VCPU_ATTRIBUTES, KVM_CAP_XSAVE2, KVM_MAX_CPUID_ENTRIES,
};
use kvm_ioctls::{Cap, Kvm};
use vmm_sys_util::errno;

use crate::boot::{self, BootError};
use crate::mode::GuestMode;
use crate::pvm::native::{self, Choice, NativeKernel, NotNative, memo::Memo};
use crate::{msr, pvm};

/// Where KVM is found.
const KVM_PATH: &str = "/dev/kvm";

/// Least size of the XSAVE area in KVM's interface, in bytes (`struct kvm_xsave`).
const XSAVE_MIN: usize = 4096;
/// Most that is believed of the kernel's answer: AMX needs 11 KiB.
const XSAVE_MAX: usize = 64 << 10;

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// There is no `/dev/kvm`.
    #[error(
        "{KVM_PATH} does not exist: load a KVM module (modprobe kvm_intel, kvm_amd or kvm_pvm), or switch \
         on virtualization in the firmware, or pass the device into this container"
    )]
    Missing,
    /// `/dev/kvm` may not be opened.
    #[error(
        "{KVM_PATH}: permission denied: run as root, or add this user to the group that owns it \
         (usermod -aG kvm USER, then log in again)"
    )]
    NotPermitted,
    /// `/dev/kvm` cannot be opened for another reason.
    #[error("{KVM_PATH}: cannot be opened: {0}")]
    Open(errno::Error),
    /// The kernel speaks another version of the interface.
    #[error("{KVM_PATH}: API version {0}, but forkd needs {KVM_API_VERSION}: use a newer kernel")]
    ApiVersion(i32),
    /// Capabilities that forkd cannot do without.
    #[error("{KVM_PATH}: this kernel's KVM lacks {}: use a newer kernel (6.1 or later is known to work)", .0.join(", "))]
    MissingCaps(Vec<&'static str>),
    /// A question to KVM failed.
    #[error("{KVM_PATH}: {call} failed: {source}")]
    Query {
        /// Name of the ioctl.
        call: &'static str,
        /// What the kernel said.
        source: errno::Error,
    },
}

/// Which implementation stands behind `/dev/kvm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    /// Intel's VT-x.
    Vmx,
    /// AMD's SVM.
    Svm,
    /// PVM: no hardware support; see [`crate::pvm`].
    Pvm,
    /// None of the known modules is there.
    Unknown,
}

impl Flavour {
    fn detect(kvm: &Kvm) -> Self {
        let module = |name: &str| Path::new("/sys/module").join(name).exists();
        if module("kvm_pvm") || pvm::active(kvm) {
            Self::Pvm
        } else if module("kvm_intel") {
            Self::Vmx
        } else if module("kvm_amd") {
            Self::Svm
        } else {
            Self::Unknown
        }
    }

    /// Name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vmx => "VT-x (kvm_intel)",
            Self::Svm => "SVM (kvm_amd)",
            Self::Pvm => "PVM (kvm_pvm)",
            Self::Unknown => "unknown",
        }
    }
}

/// What the user wants of a host that has PVM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostOptions {
    /// Whether guest kernel mode runs natively where it can.
    pub pvm: Choice,
    /// File that remembers what the probe found; its directory should be this user's alone.
    pub memo: Option<PathBuf>,
}

/// Why a kernel cannot be booted on this host.
#[derive(Debug, thiserror::Error)]
pub enum ModeError {
    /// The kernel is the flavour for native kernel mode on PVM.
    #[error(
        "kernel {}: it runs on hosts whose PVM runs kernel mode natively, and {reason}: `make kernel` builds the \
         flavour that this host needs", .path.display()
    )]
    NotNative {
        /// Its path.
        path: PathBuf,
        /// Why this host is none of those.
        reason: NotNative,
    },
    /// The kernel is not that flavour, and native was asked for.
    #[error(
        "kernel {}: it does not know PVM's native kernel mode, and FORKD_PVM=native asks for that: `make kernel` \
         builds one that does", .path.display()
    )]
    Stock {
        /// Its path.
        path: PathBuf,
    },
    /// It cannot be looked at.
    #[error(transparent)]
    Boot(#[from] BootError),
}

/// An opened `/dev/kvm` and what it can do. Clones share it.
#[derive(Debug, Clone)]
pub struct Host(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    kvm: Kvm,
    flavour: Flavour,
    options: HostOptions,
    native: OnceLock<Result<(), NotNative>>,
    cpuid: CpuId,
    msrs: Vec<u32>,
    xsave_size: usize,
    has_xsave2: bool,
    has_vcpu_attrs: bool,
    has_tsc_control: bool,
    max_vcpus: usize,
    max_memslots: usize,
}

/// Capabilities without which nothing works, with their names in `linux/kvm.h`.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
];

impl Host {
    /// Opens `/dev/kvm` and finds out what it can do.
    ///
    /// # Errors
    ///
    /// Each error's message says what to do about it.
    pub fn open() -> Result<Self, HostError> {
        Self::open_with(HostOptions::default())
    }

    /// The same, with what the user wants.
    ///
    /// # Errors
    ///
    /// As [`Host::open`].
    pub fn open_with(options: HostOptions) -> Result<Self, HostError> {
        let kvm = Kvm::new().map_err(|e| match e.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => HostError::Missing,
            libc::EACCES | libc::EPERM => HostError::NotPermitted,
            _ => HostError::Open(e),
        })?;
        let version = kvm.get_api_version();
        if u32::try_from(version) != Ok(KVM_API_VERSION) {
            return Err(HostError::ApiVersion(version));
        }
        let missing: Vec<_> = REQUIRED
            .iter()
            .filter(|(cap, _)| !kvm.check_extension(*cap))
            .map(|(_, name)| *name)
            .collect();
        if !missing.is_empty() {
            return Err(HostError::MissingCaps(missing));
        }
        let query = |call| move |source| HostError::Query { call, source };
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(query("KVM_GET_SUPPORTED_CPUID"))?;
        let listed = kvm.get_msr_index_list().map_err(query("KVM_GET_MSR_INDEX_LIST"))?;
        let xsave2 = usize::try_from(kvm.check_extension_raw(KVM_CAP_XSAVE2.into())).unwrap_or(0);
        let flavour = Flavour::detect(&kvm);
        Ok(Self(Arc::new(Inner {
            flavour,
            options,
            native: OnceLock::new(),
            cpuid,
            msrs: msr::candidates(listed.as_slice()),
            xsave_size: xsave2.clamp(XSAVE_MIN, XSAVE_MAX),
            has_xsave2: xsave2 > 0,
            has_vcpu_attrs: kvm.check_extension_raw(KVM_CAP_VCPU_ATTRIBUTES.into()) > 0,
            has_tsc_control: kvm.check_extension(Cap::TscControl),
            max_vcpus: kvm.get_max_vcpus(),
            max_memslots: kvm.get_nr_memslots(),
            kvm,
        })))
    }

    /// The system descriptor.
    pub fn kvm(&self) -> &Kvm {
        &self.0.kvm
    }

    /// Which implementation this is.
    pub fn flavour(&self) -> Flavour {
        self.0.flavour
    }

    /// Whether this is PVM, of either kind.
    pub fn is_pvm(&self) -> bool {
        self.0.flavour == Flavour::Pvm
    }

    /// Whether guest kernel mode can run natively on this host's PVM: its interface was verified. Asked once; the first
    /// time takes a second at most, some milliseconds as a rule, or the reading of a file.
    ///
    /// # Errors
    ///
    /// Why it can't.
    pub fn native_pvm(&self) -> Result<(), NotNative> {
        let answer = self.0.native.get_or_init(|| match (self.0.flavour, self.0.options.pvm) {
            (Flavour::Pvm, Choice::Emulated) => Err(NotNative::SwitchedOff),
            (Flavour::Pvm, Choice::Auto | Choice::Native) => {
                self.remembered().map_err(NotNative::Differs)
            }
            _ => Err(NotNative::NotPvm),
        });
        answer.clone()
    }

    fn remembered(&self) -> Result<(), String> {
        let memo = self.0.options.memo.as_deref().and_then(Memo::of_host);
        if let Some(found) = memo.as_ref().and_then(Memo::read) {
            return found;
        }
        let verified = native::verify(self);
        let lasting = verified.as_ref().map_or_else(|refusal| refusal.lasting, |()| true);
        let found = verified.map_err(|refusal| refusal.reason);
        if let Some(memo) = memo.filter(|_| lasting) {
            // Without it the next one asks again.
            let _ = memo.write(&found);
        }
        found
    }

    /// How a kernel runs on this host; `kernel` is what [`boot::native_kernel`] found in the file `path`.
    ///
    /// # Errors
    ///
    /// It does not: says why, and what to do.
    pub fn mode_of(
        &self,
        kernel: Option<NativeKernel>,
        path: &Path,
    ) -> Result<GuestMode, ModeError> {
        let path = || path.to_owned();
        match kernel {
            Some(_) => match self.native_pvm() {
                Ok(()) => Ok(GuestMode::PvmNative),
                Err(reason) => Err(ModeError::NotNative { path: path(), reason }),
            },
            None if !self.is_pvm() => Ok(GuestMode::Hardware),
            None if self.0.options.pvm == Choice::Native => Err(ModeError::Stock { path: path() }),
            None => Ok(GuestMode::PvmEmulated),
        }
    }

    /// How the kernel in a file runs on this host.
    ///
    /// # Errors
    ///
    /// It does not, or the file can't be read.
    pub fn mode_for(&self, kernel: &Path) -> Result<GuestMode, ModeError> {
        self.mode_of(boot::native_kernel(kernel)?, kernel)
    }

    /// CPUID that KVM can give to a guest.
    pub fn cpuid(&self) -> &CpuId {
        &self.0.cpuid
    }

    /// MSRs that belong to a vCPU's state, before those are removed which cannot be read.
    pub fn msrs(&self) -> &[u32] {
        &self.0.msrs
    }

    /// Size of a vCPU's XSAVE area in bytes: 4,096 or more.
    pub fn xsave_size(&self) -> usize {
        self.0.xsave_size
    }

    /// Whether KVM_GET_XSAVE2 is there.
    pub fn has_xsave2(&self) -> bool {
        self.0.has_xsave2
    }

    /// Whether vCPUs have device attributes: the TSC offset (Linux 5.16 and later).
    pub fn has_vcpu_attrs(&self) -> bool {
        self.0.has_vcpu_attrs
    }

    /// Whether guests can run at a TSC frequency other than the host's.
    pub fn has_tsc_control(&self) -> bool {
        self.0.has_tsc_control
    }

    /// Most vCPUs that KVM allows a VM.
    pub fn max_vcpus(&self) -> usize {
        self.0.max_vcpus
    }

    /// Most memslots that KVM allows a VM.
    pub fn max_memslots(&self) -> usize {
        self.0.max_memslots
    }

    /// What there is, for people: pairs of name and value.
    pub fn describe(&self) -> Vec<(&'static str, String)> {
        let yes = |b: bool| if b { "yes" } else { "no" }.to_owned();
        vec![
            ("flavour", self.0.flavour.name().to_owned()),
            ("vCPUs of a VM, at most", self.0.max_vcpus.to_string()),
            ("memslots of a VM, at most", self.0.max_memslots.to_string()),
            ("XSAVE area", format!("{} bytes", self.0.xsave_size)),
            ("TSC offset can be set", yes(self.0.has_vcpu_attrs)),
            ("TSC frequency can be set", yes(self.0.has_tsc_control)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_the_thing_and_the_remedy() {
        assert!(HostError::Missing.to_string().contains("modprobe"));
        assert!(HostError::NotPermitted.to_string().contains("usermod"));
        let caps = HostError::MissingCaps(vec!["KVM_CAP_IRQCHIP", "KVM_CAP_XCRS"]).to_string();
        assert!(caps.contains("KVM_CAP_IRQCHIP, KVM_CAP_XCRS"), "{caps}");
    }
}
