//! Why a vCPU cannot go on.

/// Why a vCPU cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum PvmError {
    /// The guest's kernel mode met an instruction that neither KVM nor this module does.
    #[error("PVM: no remedy for `{text}` (bytes {}) at RIP {rip:#x}", hex(.bytes))]
    Unsupported {
        /// Address of the instruction.
        rip: u64,
        /// The instruction's bytes, up to 15.
        bytes: Vec<u8>,
        /// Mnemonic, or why there is none.
        text: String,
    },
    /// KVM reported an internal error of another kind than a failed emulation.
    #[error("PVM: KVM internal error {suberror} at RIP {rip:#x}")]
    Internal {
        /// `KVM_INTERNAL_ERROR_*` of linux/kvm.h.
        suberror: u32,
        /// Address of the instruction.
        rip: u64,
    },
    /// An instruction, or the guest's page tables, led to an address without RAM.
    #[error("PVM: guest physical address {gpa:#x} is not RAM (at RIP {rip:#x})")]
    NotRam {
        /// Address of the instruction.
        rip: u64,
        /// The address.
        gpa: u64,
    },
    /// The guest's kernel runs on memory that it has not mapped.
    #[error("PVM: linear address {address:#x} is not mapped (at RIP {rip:#x})")]
    Unmapped {
        /// Address of the instruction.
        rip: u64,
        /// The address.
        address: u64,
    },
    /// An ioctl on the vCPU failed.
    #[error("PVM: {call} failed: {source}")]
    Ioctl {
        /// Name of the ioctl.
        call: &'static str,
        /// What the kernel said.
        source: kvm_ioctls::Error,
    },
    /// The host lacks something.
    #[error("PVM: {what}")]
    Host {
        /// What.
        what: &'static str,
    },
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ")
}
