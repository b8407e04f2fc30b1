//! The saved form of vCPUs and VMs: it round-trips, hostile bytes do no harm, and it does not drift unnoticed.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use forkd_vm::ioapic::IoapicState;
use forkd_vm::vcpu::VCPU_STATE_VERSION;
use forkd_vm::vm::VM_STATE_VERSION;
use forkd_vm::{VcpuState, VmState};
use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use proptest::prelude::*;

fn vcpu(seed: u64, msrs: Vec<(u32, u64)>, xsave: Vec<u8>, tsc_offset: Option<u64>) -> VcpuState {
    let mut lapic = kvm_lapic_state::default();
    for (i, reg) in lapic.regs.iter_mut().enumerate() {
        *reg = (seed >> (i % 57)) as _;
    }
    VcpuState {
        index: seed as u8,
        mp_state: kvm_mp_state { mp_state: seed as u32 & 7 },
        regs: kvm_regs { rax: seed, rip: !seed, rflags: 2, ..Default::default() },
        sregs: kvm_sregs { cr3: seed.rotate_left(7), efer: 0x500, ..Default::default() },
        xsave,
        xcrs: kvm_xcrs { nr_xcrs: 1, ..Default::default() },
        lapic,
        debugregs: kvm_debugregs { dr7: 0x400, ..Default::default() },
        events: kvm_vcpu_events { sipi_vector: seed as u32, ..Default::default() },
        msrs,
        cpuid: vec![kvm_cpuid_entry2 { function: 1, eax: seed as u32, ..Default::default() }],
        tsc_khz: 2_596_144,
        tsc_offset,
        pvm: None,
    }
}

fn vm(seed: u64) -> VmState {
    VmState {
        ioapic: IoapicState { id: seed as u32, pending: !seed as u32, ..Default::default() },
        clock_ns: seed,
        host_tsc: !seed,
    }
}

proptest! {
    #[test]
    fn states_round_trip(
        seed: u64,
        msrs in prop::collection::vec(any::<(u32, u64)>(), 0..100),
        xsave in prop::collection::vec(any::<u8>(), 0..5000),
        offset: Option<u64>,
    ) {
        let state = vcpu(seed, msrs, xsave, offset);
        let bytes = postcard::to_stdvec(&state).unwrap();
        let back: VcpuState = postcard::from_bytes(&bytes).unwrap();
        prop_assert_eq!(postcard::to_stdvec(&back).unwrap(), bytes);
        prop_assert_eq!(back.regs, state.regs);
        prop_assert_eq!(back.sregs, state.sregs);
        prop_assert_eq!(back.lapic.regs, state.lapic.regs);
        prop_assert_eq!(back.msrs, state.msrs);
        prop_assert_eq!(back.xsave, state.xsave);
        prop_assert_eq!(back.tsc_offset, state.tsc_offset);
        let bytes = postcard::to_stdvec(&vm(seed)).unwrap();
        let back: VmState = postcard::from_bytes(&bytes).unwrap();
        prop_assert_eq!(back.clock_ns, seed);
        prop_assert_eq!(postcard::to_stdvec(&back).unwrap(), bytes);
    }

    #[test]
    fn hostile_bytes_do_no_harm(
        damage in prop::collection::vec((any::<usize>(), any::<u8>()), 0..20),
        cut in prop::option::of(any::<usize>()),
    ) {
        let mut bytes = postcard::to_stdvec(&vcpu(5, vec![(1, 2); 60], vec![3; 4096], None)).unwrap();
        for (at, byte) in damage {
            let len = bytes.len();
            bytes[at % len] = byte;
        }
        bytes.truncate(cut.map_or(bytes.len(), |c| c % bytes.len()));
        let _ = postcard::from_bytes::<VcpuState>(&bytes);
        let _ = postcard::from_bytes::<VmState>(&bytes);
    }
}

/// FNV-1a.
fn digest(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
}

/// If this fails, the saved form has changed: raise the version, and teach the reader the former one if snapshots
/// on disk have it.
#[test]
fn the_encoding_is_that_of_its_version() {
    let bytes =
        postcard::to_stdvec(&vcpu(0x1234_5678_9abc_def0, vec![(1, 2)], vec![9; 64], Some(7)));
    let bytes = bytes.unwrap();
    assert_eq!(
        (VCPU_STATE_VERSION, bytes.len(), digest(&bytes)),
        (1, 2198, 1_362_397_046_209_020_143)
    );
    let bytes = postcard::to_stdvec(&vm(77)).unwrap();
    assert_eq!(
        (VM_STATE_VERSION, bytes.len(), digest(&bytes)),
        (1, 90, 17_373_965_877_036_827_988)
    );
}
