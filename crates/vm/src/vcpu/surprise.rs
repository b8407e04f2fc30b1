//! What is told of a vCPU that cannot go on: the exit, the registers, the instruction.
//!
//! Where guest kernel mode runs natively on PVM, the host's interface is not documented: what it does with a guest
//! that it does not like must at least be told in full.

use std::fmt;

use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{Vcpu, VcpuError, suberror_name};
use crate::mode::GuestMode;
use crate::pvm::native::CR3_USER;

/// Bytes at RIP that are told: more than the longest instruction.
const BYTES: usize = 16;
const PAGE: u64 = 4096;
/// Words of `kvm_run.internal.data`.
const DATA_MAX: usize = 16;

/// Where a vCPU stands. As far as KVM tells: what it does not is zero, and no bytes.
#[derive(Debug, Clone, Default)]
pub struct View {
    regs: kvm_regs,
    sregs: kvm_sregs,
    kernel: bool,
    bytes: Vec<u8>,
}

impl View {
    fn of(fd: &VcpuFd, ram: &GuestMemoryMmap, mode: GuestMode) -> Self {
        let regs = fd.get_regs().unwrap_or_default();
        let sregs = fd.get_sregs().unwrap_or_default();
        let kernel = match mode {
            // CPL is 3 in both.
            GuestMode::PvmNative => sregs.cr3 & CR3_USER == 0,
            GuestMode::Hardware | GuestMode::PvmEmulated => sregs.cs.dpl == 0,
        };
        let in_page = usize::try_from(PAGE - regs.rip % PAGE).unwrap_or(BYTES);
        let mut bytes = vec![0; BYTES.min(in_page)];
        let at = fd.translate_gva(regs.rip).ok().filter(|t| t.valid != 0);
        let read = at.map(|t| ram.read_slice(&mut bytes, GuestAddress(t.physical_address)));
        if !matches!(read, Some(Ok(()))) {
            bytes.clear();
        }
        Self { regs, sregs, kernel, bytes }
    }
}

impl fmt::Display for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { regs, sregs, kernel, bytes } = self;
        write!(
            f,
            "{} mode, rip {:#x} rsp {:#x} rflags {:#x} cs {:#x} cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x} \
             gs.base {:#x} rax {:#x}, ",
            if *kernel { "kernel" } else { "user" },
            regs.rip,
            regs.rsp,
            regs.rflags,
            sregs.cs.selector,
            sregs.cr0,
            sregs.cr2,
            sregs.cr3,
            sregs.cr4,
            sregs.efer,
            sregs.gs.base,
            regs.rax,
        )?;
        if bytes.is_empty() {
            return write!(f, "bytes at rip cannot be read");
        }
        let bytes: Vec<_> = bytes.iter().map(|b| format!("{b:02x}")).collect();
        write!(f, "bytes at rip {}", bytes.join(" "))
    }
}

/// An exit that nobody has a use for, and where the vCPU stood.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{exit}: {view}")]
pub struct Surprise {
    /// Name of the exit, and what it says.
    pub exit: String,
    /// The vCPU.
    pub view: View,
}

impl Vcpu {
    /// Where this vCPU stands. It must be out of `run`.
    pub fn view(&self) -> View {
        View::of(&self.fd, &self.ram, self.shared.mode)
    }

    pub(super) fn surprise(&self, exit: impl Into<String>) -> VcpuError {
        let source = Box::new(Surprise { exit: exit.into(), view: self.view() });
        VcpuError::Surprise { index: self.index, source }
    }

    pub(super) fn internal_error(&mut self) -> VcpuError {
        // SAFETY: the exit reason says that this member is valid; it is of plain integers.
        let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let (kind, count) = (internal.suberror, internal.ndata as usize);
        let data = internal.data.iter().take(count.min(DATA_MAX));
        let data: Vec<_> = data.map(|word| format!("{word:#x}")).collect();
        let name = suberror_name(kind);
        let data = if data.is_empty() { "none".to_owned() } else { data.join(" ") };
        self.surprise(format!("KVM_EXIT_INTERNAL_ERROR, suberror {kind} ({name}), data {data}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_known_is_told() {
        let view = View {
            regs: kvm_regs { rip: 0xffff_ffff_8100_0000, rsp: 0x1234, ..Default::default() },
            sregs: kvm_sregs { cr2: 0xdead, cr3: 0xa000, efer: 0xd01, ..Default::default() },
            kernel: true,
            bytes: vec![0x0f, 0x01, 0xc1],
        };
        let surprise = Surprise { exit: "KVM_EXIT_SHUTDOWN".into(), view };
        let text = surprise.to_string();
        for word in [
            "KVM_EXIT_SHUTDOWN: kernel mode",
            "rip 0xffffffff81000000",
            "rsp 0x1234",
            "cr2 0xdead",
            "cr3 0xa000",
            "efer 0xd01",
            "bytes at rip 0f 01 c1",
        ] {
            assert!(text.contains(word), "{word}: {text}");
        }
        assert!(View::default().to_string().contains("user mode"));
        assert!(View::default().to_string().ends_with("cannot be read"));
    }
}
