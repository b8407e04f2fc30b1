//! CPUID of a guest whose kernel runs natively.
//!
//! Such a kernel asks by `int 0x1a` and gets what KVM_SET_CPUID2 has; so do user programs on hosts that can
//! make CPUID fault (Intel); on others they see the CPU's own. What is cleared here is what the kernel must not use.
//! All that only user mode uses stays.
//!
//! | feature | why it goes |
//! |---|---|
//! | SMEP, SMAP, UMIP | kernel mode is at CPL 3 on pages with U/S = 1: the bits cannot be given, and stac, clac would fault |
//! | PKU, OSPKE | keys would apply to the kernel as well |
//! | CET (SHSTK, IBT), FRED, LKGS | state and entry of a CPL 0 that is not there |
//! | PCID, INVPCID | shadow paging gains nothing; CR3 bit 12 is the mode |
//! | LA57, LAM | the host's shadow page tables and the kernel's half of the address space are as without them |
//! | FSGSBASE | wrgsbase would change what the host exchanges at events behind its back; the kernel uses rdfsbase by itself |
//! | XSAVES, XFD, AMX | XSAVES and XFD's MSR need CPL 0; AMX needs XFD |
//! | MONITOR, MWAIT, MWAITX | need CPL 0; the idle loop halts by a hypercall |
//! | PMU, PDCM (leaf 0xa, RDPMC) | its MSRs trap, and counters are not tested |
//! | VMX, SVM | no nesting |
//! | INVLPGB, automatic IBRS, upper address ignore | AMD's counterparts |
//! | KVM: PV_UNHALT, PV_TLB_FLUSH, PV_SEND_IPI, PV_SCHED_YIELD, MIGRATION_CONTROL, HC_MAP_GPA_RANGE | need vmcall, which this KVM does not take |
//! | KVM: POLL_CONTROL | tunes the host's polling, which suits idle guests already |
//! | KVM: STEAL_TIME | the host would write guest memory each time it loads the vCPU, for accounting alone |
//! | KVM: MMU_OP | gone from Linux for long |
//!
//! Of KVM's features stay: both clock sources, the stable bit, NOP_IO_DELAY (each delay would be an exit), PV_EOI (each EOI
//! that it saves is an exit), MSI_EXT_DEST_ID.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

const fn bits(list: &[u32]) -> u32 {
    let (mut mask, mut i) = (0, 0);
    while i < list.len() {
        mask |= 1 << list[i];
        i += 1;
    }
    mask
}

/// MONITOR, VMX, PDCM, PCID.
const LEAF1_ECX: u32 = bits(&[3, 5, 15, 17]);
/// FSGSBASE, SMEP, INVPCID, SMAP.
const LEAF7_EBX: u32 = bits(&[0, 7, 10, 20]);
/// UMIP, PKU, OSPKE, SHSTK, LA57.
const LEAF7_ECX: u32 = bits(&[2, 3, 4, 7, 16]);
/// IBT, AMX-BF16, AMX-TILE, AMX-INT8.
const LEAF7_EDX: u32 = bits(&[20, 22, 24, 25]);
/// Leaf 7, subleaf 1, EAX: FRED, LKGS, AMX-FP16, LAM.
const LEAF7_1_EAX: u32 = bits(&[17, 18, 21, 26]);
/// Leaf 7, subleaf 1, EDX: AMX-COMPLEX, supervisor shadow stacks of CET.
const LEAF7_1_EDX: u32 = bits(&[8, 18]);
/// XCR0: TILECFG, TILEDATA; PKRU.
const XCR0: u32 = bits(&[9, 17, 18]);
/// Leaf 0xd, subleaf 1, EAX: XSAVES, XFD.
const LEAFD_1_EAX: u32 = bits(&[3, 4]);
/// AMD: SVM, MWAITX.
const AMD1_ECX: u32 = bits(&[2, 29]);
/// AMD leaf 0x80000008, EBX: INVLPGB.
const AMD8_EBX: u32 = bits(&[3]);
/// AMD leaf 0x80000021, EAX: upper address ignore, automatic IBRS.
const AMD21_EAX: u32 = bits(&[7, 8]);
/// KVM's features that stay (Linux, Documentation/virt/kvm/x86/cpuid.rst): see the module.
const KVM_KEEP: u32 = bits(&[0, 1, 3, 6, 15, 24]);

/// Clears what a kernel that runs natively must not use.
pub fn filter(cpuid: &mut CpuId) {
    let entries = cpuid.as_mut_slice();
    for entry in entries.iter_mut() {
        filter_entry(entry);
    }
    let size = xsave_size(entries);
    for entry in entries.iter_mut().filter(|e| (e.function, e.index) == (0xd, 0)) {
        entry.ecx = entry.ecx.min(size);
    }
}

fn filter_entry(entry: &mut kvm_cpuid_entry2) {
    match (entry.function, entry.index) {
        (0x1, _) => entry.ecx &= !LEAF1_ECX,
        // Sizes of MONITOR's lines, and counters.
        (0x5 | 0xa, _) => clear(entry),
        (0x7, 0) => {
            entry.ebx &= !LEAF7_EBX;
            entry.ecx &= !LEAF7_ECX;
            entry.edx &= !LEAF7_EDX;
        }
        (0x7, 1) => {
            entry.eax &= !LEAF7_1_EAX;
            entry.edx &= !LEAF7_1_EDX;
        }
        (0xd, 0) => entry.eax &= !XCR0,
        // No supervisor components either, and so no size of them.
        (0xd, 1) => {
            entry.eax &= !LEAFD_1_EAX;
            (entry.ecx, entry.edx) = (0, 0);
        }
        // ECX bit 0: a supervisor component.
        (0xd, index) if entry.ecx & 1 != 0 || XCR0.checked_shr(index).unwrap_or(0) & 1 != 0 => {
            clear(entry);
        }
        // Tiles.
        (0x1d | 0x1e, _) => clear(entry),
        (0x4000_0001, _) => entry.eax &= KVM_KEEP,
        (0x8000_0001, _) => entry.ecx &= !AMD1_ECX,
        (0x8000_0008, _) => entry.ebx &= !AMD8_EBX,
        (0x8000_0021, _) => entry.eax &= !AMD21_EAX,
        _ => {}
    }
}

fn clear(entry: &mut kvm_cpuid_entry2) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
}

/// Length of an XSAVE area with all components that are left, in the standard format, in bytes.
fn xsave_size(entries: &[kvm_cpuid_entry2]) -> u32 {
    /// Legacy area and header.
    const LEAST: u32 = 576;
    let components = entries.iter().filter(|e| e.function == 0xd && e.index >= 2);
    components.map(|e| e.ebx.saturating_add(e.eax)).fold(LEAST, u32::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_ones(function: u32, index: u32) -> kvm_cpuid_entry2 {
        let ones = u32::MAX;
        kvm_cpuid_entry2 {
            function,
            index,
            eax: ones,
            ebx: ones,
            ecx: ones,
            edx: ones,
            ..Default::default()
        }
    }

    fn filtered(entries: &[kvm_cpuid_entry2]) -> Vec<kvm_cpuid_entry2> {
        let mut cpuid = CpuId::from_entries(entries).unwrap();
        filter(&mut cpuid);
        cpuid.as_slice().to_vec()
    }

    #[test]
    fn what_needs_cpl_0_goes_and_what_user_mode_uses_stays() {
        let leaves = [(1, 0), (7, 0), (7, 1), (0x8000_0001, 0)].map(|(f, i)| all_ones(f, i));
        let [one, seven, seven1, amd] = filtered(&leaves).try_into().unwrap();
        for (word, gone, kept) in [
            // MONITOR, PCID; SSE3, FMA, XSAVE, OSXSAVE, AVX, RDRAND.
            (one.ecx, vec![3, 17], vec![0, 12, 26, 27, 28, 30]),
            // FSGSBASE, SMEP, INVPCID, SMAP; BMI1, AVX2, ERMS, AVX512F, SHA.
            (seven.ebx, vec![0, 7, 10, 20], vec![3, 5, 9, 16, 29]),
            // UMIP, PKU, OSPKE, SHSTK, LA57; VAES, RDPID.
            (seven.ecx, vec![2, 3, 4, 7, 16], vec![9, 22]),
            // IBT, AMX; FSRM, ARCH_CAPABILITIES.
            (seven.edx, vec![20, 22, 24, 25], vec![4, 29]),
            // FRED, LKGS, AMX-FP16, LAM; AVX-VNNI.
            (seven1.eax, vec![17, 18, 21, 26], vec![4]),
            (amd.ecx, vec![2, 29], vec![0, 5]),
            // NX, RDTSCP.
            (amd.edx, vec![], vec![20, 27]),
        ] {
            assert!(gone.iter().all(|bit| word & (1 << bit) == 0), "{word:#x} {gone:?}");
            assert!(kept.iter().all(|bit| word & (1 << bit) != 0), "{word:#x} {kept:?}");
        }
    }

    #[test]
    fn of_kvm_only_what_needs_no_hypercall_is_left() {
        let eax = filtered(&[all_ones(0x4000_0001, 0)])[0].eax;
        assert_eq!(eax, 1 | 1 << 1 | 1 << 3 | 1 << 6 | 1 << 15 | 1 << 24);
    }

    #[test]
    fn xsave_loses_what_needs_cpl_0_and_its_size_fits() {
        let component = |index, eax, ebx, ecx| kvm_cpuid_entry2 {
            function: 0xd,
            index,
            eax,
            ebx,
            ecx,
            ..Default::default()
        };
        let leaves = [
            component(0, 0x6_02e7, 2696, 11_008),
            component(1, 0x1f, 0, 0x1800),
            component(2, 256, 576, 0),
            component(7, 1024, 1664, 0),
            component(9, 8, 2688, 0),
            component(11, 16, 0, 1),
            component(18, 8192, 2816, 6),
        ];
        let got = filtered(&leaves);
        assert_eq!(got[0].eax, 0xe7, "no PKRU, no AMX");
        assert_eq!(got[0].ecx, 2688, "as far as the last component");
        assert_eq!(got[1].eax & 0x1f, 0b111, "XSAVEOPT, XSAVEC and XGETBV stay");
        assert_eq!(got[1].ecx, 0);
        assert_eq!((got[2].eax, got[3].eax), (256, 1024));
        assert_eq!(got[4..].iter().map(|e| e.eax).collect::<Vec<_>>(), [0, 0, 0]);
    }
}
