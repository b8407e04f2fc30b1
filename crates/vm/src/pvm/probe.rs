//! Is this PVM? Asked of its behaviour, where its module is loaded.

use std::path::Path;
use std::sync::OnceLock;

use kvm_bindings::{KVM_INTERNAL_ERROR_EMULATION, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// The kernel module of PVM.
const MODULE: &str = "/sys/module/kvm_pvm";

/// Whether the VMs of this `/dev/kvm` need the remedies of this module. Where PVM's kernel module is not loaded
/// the answer is no, at the cost of one stat(2). Where it is, a VM of 64 KiB executes an instruction that only
/// hardware virtualization can do in kernel mode (about 1 ms). The answer is kept for the life of the
/// process and its children.
pub fn active(kvm: &Kvm) -> bool {
    static ACTIVE: OnceLock<bool> = OnceLock::new();
    *ACTIVE.get_or_init(|| {
        // If no VM can be made at all, the module's presence is the best answer; making the real VM will say why.
        Path::new(MODULE).exists() && lacks_popcnt(kvm).unwrap_or(true)
    })
}

/// Flat segments of 64-bit kernel mode, for the guests of probes: code, and data.
pub(super) fn flat_segments(code: u16, data: u16) -> (kvm_segment, kvm_segment) {
    let code = kvm_segment {
        limit: u32::MAX,
        selector: code,
        type_: 11,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    (code, kvm_segment { selector: data, type_: 3, l: 0, db: 1, ..code })
}

/// Runs `popcnt eax, eax; hlt` in 64-bit kernel mode. True if KVM failed to emulate it; none if it cannot be
/// told.
fn lacks_popcnt(kvm: &Kvm) -> Option<bool> {
    const CODE: [u8; 5] = [0xf3, 0x0f, 0xb8, 0xc0, 0xf4];
    const LEN: usize = 0x1_0000;
    const PML4: u64 = 0x1000;
    const PDPT: u64 = 0x2000;
    const AT: u64 = 0x3000;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), LEN)]).ok()?;
    // Present and writable, and accessed: the first GiB maps itself (bit 7: one large page).
    memory.write_obj(PDPT | 0x23, GuestAddress(PML4)).ok()?;
    memory.write_obj(0xa3u64, GuestAddress(PDPT)).ok()?;
    memory.write_slice(&CODE, GuestAddress(AT)).ok()?;
    let host = memory.get_host_address(GuestAddress(0)).ok()?;
    let vm = kvm.create_vm().ok()?;
    let region = kvm_userspace_memory_region {
        memory_size: LEN as u64,
        userspace_addr: host as u64,
        ..Default::default()
    };
    // SAFETY: the memory is mapped until after the VM is gone: `memory` is dropped after `vm`, which was
    // declared later.
    unsafe { vm.set_user_memory_region(region) }.ok()?;
    let mut vcpu = vm.create_vcpu(0).ok()?;
    let mut sregs = vcpu.get_sregs().ok()?;
    let (code, data) = flat_segments(0x10, 0x18);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // Paging and protection; PAE; long mode, enabled and active.
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0011, PML4, 0x20, 0x500);
    vcpu.set_sregs(&sregs).ok()?;
    let mut regs = vcpu.get_regs().ok()?;
    (regs.rip, regs.rsp, regs.rflags) = (AT, AT, 2);
    vcpu.set_regs(&regs).ok()?;
    match vcpu.run().ok()? {
        VcpuExit::Hlt => Some(false),
        VcpuExit::InternalError => {
            // SAFETY: after KVM_EXIT_INTERNAL_ERROR this is the union's valid member, of plain integers.
            let suberror = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror };
            (suberror == KVM_INTERNAL_ERROR_EMULATION).then_some(true)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_found_where_its_module_is_and_quickly() {
        let Ok(kvm) = Kvm::new() else { return };
        let begin = std::time::Instant::now();
        assert_eq!(active(&kvm), Path::new(MODULE).exists());
        assert!(begin.elapsed().as_millis() < 200, "{:?}", begin.elapsed());
        let begin = std::time::Instant::now();
        active(&kvm);
        assert!(begin.elapsed().as_micros() < 1000);
    }
}
