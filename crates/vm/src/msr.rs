//! Model-specific registers: which of them make up a vCPU's state, and how to read and write many at once.
//!
//! KVM lists some hundred MSRs (KVM_GET_MSR_INDEX_LIST). A vCPU's state is that list, less what is another
//! part of the state (TSC), what has no effect (performance counters, which the guest's CPUID does not
//! offer; capability MSRs, which only describe; Hyper-V's), plus the MTRRs, which some kernels' lists omit.
//! What the kernel refuses to read or to take back is dropped once, on the first vCPU, so a save is one ioctl.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;

/// Time-stamp counter. Saved as an offset, not by value: see [`crate::clock`].
pub const IA32_TSC: u32 = 0x10;
/// APIC base; part of sregs.
const IA32_APICBASE: u32 = 0x1b;
/// Fast strings and other switches.
pub const IA32_MISC_ENABLE: u32 = 0x1a0;
/// Default memory type.
pub const MTRR_DEF_TYPE: u32 = 0x2ff;
/// Deadline of the local APIC's timer. Written last: it starts the timer.
pub const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// Fixed-range MTRRs (Intel SDM volume 4, table 2-2).
const MTRR_FIXED: [u32; 11] =
    [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
/// Variable-range MTRRs: eight pairs.
const MTRR_VARIABLE: std::ops::RangeInclusive<u32> = 0x200..=0x20f;

/// Failures of MSR access, each with the index.
#[derive(Debug, thiserror::Error)]
pub enum MsrError {
    /// The ioctl itself failed.
    #[error("{call} of {count} MSRs failed: {source}")]
    Ioctl {
        /// Name of the ioctl.
        call: &'static str,
        /// How many were asked for.
        count: usize,
        /// What the kernel said.
        source: errno::Error,
    },
    /// The kernel stopped at this MSR.
    #[error("MSR {index:#x} cannot be {}", match .value { Some(v) => format!("set to {v:#x}"), None => "read".to_owned() })]
    Refused {
        /// Index of the MSR.
        index: u32,
        /// What it was to be set to; none when reading.
        value: Option<u64>,
    },
}

/// Of the MSRs that KVM lists, those that belong to a vCPU's state, plus MTRRs; sorted, each once.
pub fn candidates(listed: &[u32]) -> Vec<u32> {
    let mut list: Vec<u32> = listed.iter().copied().filter(|i| is_state(*i)).collect();
    list.extend(MTRR_FIXED);
    list.extend(MTRR_VARIABLE);
    list.push(MTRR_DEF_TYPE);
    list.sort_unstable();
    list.dedup();
    list.truncate(KVM_MAX_MSR_ENTRIES);
    list
}

fn is_state(index: u32) -> bool {
    match index {
        IA32_TSC | IA32_APICBASE => false,
        // Performance counters and their selectors: Intel, then AMD.
        0xc1..=0xc8
        | 0x186..=0x18d
        | 0x309..=0x30c
        | 0x329
        | 0x345
        | 0x38d..=0x391
        | 0x3f1..=0x3f2 => false,
        0x4c1..=0x4c8 | 0xc001_0000..=0xc001_0007 | 0xc001_0200..=0xc001_020b => false,
        0xc000_0300..=0xc000_0302 => false,
        // kvmclock by its former numbers, an alias; and the wall clock, where a write is an order to
        // write guest memory, not state.
        0x11 | 0x12 | 0x4b56_4d00 => false,
        // VMX capabilities; the guest is offered no VMX.
        0x480..=0x493 => false,
        // Capabilities of the CPU: only describe.
        0xce | 0xcf | 0x10a => false,
        // Hyper-V's, synthetic debugger included: CPUID does not offer them.
        0x4000_0000..=0x4000_0118 => false,
        _ => true,
    }
}

/// The part of `candidates` that this vCPU, which has not run yet, lets be read and written back.
pub fn usable(fd: &VcpuFd, candidates: &[u32]) -> Result<Vec<u32>, MsrError> {
    let mut kept = Vec::with_capacity(candidates.len());
    for &index in candidates {
        let mut one = batch(&[(index, 0)], "KVM_GET_MSRS")?;
        if matches!(fd.get_msrs(&mut one), Ok(1)) && matches!(fd.set_msrs(&one), Ok(1)) {
            kept.push(index);
        }
    }
    Ok(kept)
}

/// Reads all of `list` with one ioctl.
pub fn read(fd: &VcpuFd, list: &[u32]) -> Result<Vec<(u32, u64)>, MsrError> {
    let call = "KVM_GET_MSRS";
    let entries: Vec<_> = list.iter().map(|&index| (index, 0)).collect();
    let mut msrs = batch(&entries, call)?;
    let done = fd.get_msrs(&mut msrs).map_err(|source| MsrError::Ioctl {
        call,
        count: list.len(),
        source,
    })?;
    if let Some(&index) = list.get(done) {
        return Err(MsrError::Refused { index, value: None });
    }
    Ok(msrs.as_slice().iter().map(|e| (e.index, e.data)).collect())
}

/// Writes all of `list`, in order, with one ioctl.
pub fn write(fd: &VcpuFd, list: &[(u32, u64)]) -> Result<(), MsrError> {
    let call = "KVM_SET_MSRS";
    if list.is_empty() {
        return Ok(());
    }
    let msrs = batch(list, call)?;
    let done =
        fd.set_msrs(&msrs).map_err(|source| MsrError::Ioctl { call, count: list.len(), source })?;
    match list.get(done) {
        Some(&(index, value)) => Err(MsrError::Refused { index, value: Some(value) }),
        None => Ok(()),
    }
}

fn batch(list: &[(u32, u64)], call: &'static str) -> Result<Msrs, MsrError> {
    let entries: Vec<_> = list
        .iter()
        .map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() })
        .collect();
    Msrs::from_entries(&entries).map_err(|_| MsrError::Ioctl {
        call,
        count: list.len(),
        source: errno::Error::new(libc::E2BIG),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_hold_the_essential_and_no_doubles() {
        let listed =
            [0x174, 0x175, 0x176, 0x10, 0x1b, 0xc000_0081, 0x6e0, 0x480, 0xc1, 0x174, 0x4b56_4d02];
        let list = candidates(&listed);
        for index in [0x174, 0x6e0, 0xc000_0081, 0x4b56_4d02, MTRR_DEF_TYPE, 0x250] {
            assert!(list.contains(&index), "{index:#x}");
        }
        for index in [IA32_TSC, IA32_APICBASE, 0x480, 0xc1] {
            assert!(!list.contains(&index), "{index:#x}");
        }
        assert!(list.windows(2).all(|w| w[0] < w[1]));
    }

    #[test]
    fn a_refusal_names_the_index() {
        let e = MsrError::Refused { index: 0x1a0, value: Some(5) }.to_string();
        assert_eq!(e, "MSR 0x1a0 cannot be set to 0x5");
    }
}
