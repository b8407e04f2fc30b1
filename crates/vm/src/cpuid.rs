//! CPUID as a vCPU sees it: what KVM supports, plus a topology of one package with one thread per core.
//!
//! Where PVM emulates kernel mode, CPUID runs on the CPU, so none of this has an effect there; features that must not be
//! used are cleared by the kernel command line instead ([`crate::pvm::cmdline`]). A kernel that runs natively on PVM asks the
//! host, and is not offered what it must not use ([`crate::pvm::native`]).

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::mode::GuestMode;
use crate::pvm;

/// Leaf 1, ECX.
const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: more than one logical processor in the package.
const LEAF1_EDX_HTT: u32 = 1 << 28;
/// Leaf 6, EAX: the APIC timer always runs.
const LEAF6_EAX_ARAT: u32 = 1 << 2;
/// Features of KVM (leaf 0x40000001, EAX) that a fork cannot carry over: asynchronous page faults (bits 4, 10 and 14).
/// A task that waits for a page-ready event would wait for one that the parent's VM keeps. (Linux,
/// Documentation/virt/kvm/x86/cpuid.rst)
const KVM_FEATURES_ASYNC_PF: u32 = 1 << 4 | 1 << 10 | 1 << 14;

/// CPUID for vCPU `index` of `count`, from what KVM supports, in a VM of this mode.
pub fn for_vcpu(supported: &CpuId, mode: GuestMode, index: u8, count: u8) -> CpuId {
    let mut cpuid = supported.clone();
    if mode == GuestMode::PvmNative {
        pvm::native::cpuid::filter(&mut cpuid);
    }
    let apic_id = u32::from(index);
    let count = u32::from(count.max(1));
    // Width of the core number within the APIC id.
    let shift = count.next_power_of_two().trailing_zeros();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => {
                entry.ebx = (entry.ebx & 0xffff) | (apic_id << 24) | (count << 16);
                entry.ecx |= LEAF1_ECX_X2APIC | LEAF1_ECX_TSC_DEADLINE | LEAF1_ECX_HYPERVISOR;
                set(&mut entry.edx, LEAF1_EDX_HTT, count > 1);
            }
            // Intel, cache parameters: cores in the package; each cache is one core's, level 3 is the package's.
            0x4 if entry.eax & 0x1f != 0 => {
                let level = (entry.eax >> 5) & 0x7;
                let sharing = if level >= 3 { count - 1 } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | ((count - 1).min(63) << 26);
            }
            0x6 => entry.eax |= LEAF6_EAX_ARAT,
            0xb | 0x1f => extended_topology(entry, apic_id, count, shift),
            0x4000_0001 => entry.eax &= !KVM_FEATURES_ASYNC_PF,
            0x8000_0008 => entry.ecx = (shift << 12) | (count - 1),
            // AMD, cache topology: as leaf 4.
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let level = (entry.eax >> 5) & 0x7;
                let sharing = if level >= 3 { count - 1 } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | (sharing << 14);
            }
            // AMD: APIC id, core id with one thread, node 0.
            0x8000_001e => {
                entry.eax = apic_id;
                entry.ebx = apic_id;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    cpuid
}

/// Leaves 0xb and 0x1f: level 0 is the thread (one per core), level 1 the core, level 2 ends the list.
fn extended_topology(entry: &mut kvm_cpuid_entry2, apic_id: u32, count: u32, shift: u32) {
    /// Level types (Intel SDM volume 2, CPUID leaf 0xb).
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    entry.flags |= KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
    let (width, logical, kind) = match entry.index {
        0 => (0, 1, THREAD),
        1 => (shift, count, CORE),
        _ => (0, 0, 0),
    };
    entry.eax = width;
    entry.ebx = logical;
    entry.ecx = (kind << 8) | entry.index;
    entry.edx = apic_id;
}

fn set(word: &mut u32, bit: u32, on: bool) {
    if on { *word |= bit } else { *word &= !bit }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax: 0x21, ebx: 0, ..Default::default() }
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_in_all_leaves() {
        let leaves = [entry(1, 0), entry(0xb, 0), entry(0xb, 1), entry(0x8000_001e, 0)];
        let supported = CpuId::from_entries(&leaves).unwrap();
        for index in 0..3u8 {
            let cpuid = for_vcpu(&supported, GuestMode::Hardware, index, 3);
            let id = u32::from(index);
            assert_eq!(find(&cpuid, 1, 0).ebx >> 24, id);
            assert_eq!(find(&cpuid, 1, 0).ebx >> 16 & 0xff, 3);
            assert_eq!(find(&cpuid, 0xb, 0).edx, id);
            assert_eq!(find(&cpuid, 0xb, 1).eax, 2, "three cores need two bits of APIC id");
            assert_eq!(find(&cpuid, 0x8000_001e, 0).eax, id);
        }
    }

    #[test]
    fn asynchronous_page_faults_are_not_offered() {
        let mut kvm = entry(0x4000_0001, 0);
        kvm.eax = u32::MAX;
        let cpuid = for_vcpu(&CpuId::from_entries(&[kvm]).unwrap(), GuestMode::Hardware, 0, 1);
        let eax = find(&cpuid, 0x4000_0001, 0).eax;
        assert_eq!(eax & (1 << 4 | 1 << 10 | 1 << 14), 0);
        assert_ne!(eax & (1 << 3), 0, "kvmclock stays");
    }
}
