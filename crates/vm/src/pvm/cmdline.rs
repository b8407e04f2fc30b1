//! What a guest's kernel has to be told on its command line.

/// Words for the guest kernel's command line under PVM, separated by spaces.
///
/// `cpuid` runs natively in a PVM guest, so features cannot be hidden with KVM_SET_CPUID2; Linux 5.17
/// and later takes feature names in `clearcpuid=`. Unknown names only give a warning. It keeps 127 characters of the list
/// (`cpu_parse_early_param`, arch/x86/kernel/cpu/common.c), so two of them are numbers: bits of word 4, asm/cpufeatures.h.
///
/// | word | why |
/// |---|---|
/// | umip, smap, smep | CR4 bits that PVM cannot give; smap also brings clac and stac into every user copy |
/// | popcnt, cx16, sse4_2 | KVM's emulator lacks popcnt, cmpxchg16b and crc32: each use would be an exit |
/// | xsaves, xsavec, xsaveopt | the kernel then uses plain XSAVE; xsave itself must stay, or the guest would not switch the AVX state of its processes |
/// | rdrand, rdseed | not in the emulator |
/// | pcid, invpcid | shadow paging gains nothing from them, and invpcid has no remedy |
/// | erms, fsrm | `rep movsb` and `rep stosb` are emulated byte by byte; words are eight times quicker |
/// | fsgsbase, rdtscp, rdpid | not in the emulator, and on the entry paths |
/// | aes, 129 (pclmulqdq) | keeps SIMD crypto of the kernel away: the emulator has none of it |
/// | 131 (monitor) | not in the emulator; the idle loop uses `hlt`, which KVM waits in |
/// | pti=off | the guest's kernel is emulated: user mode cannot read it speculatively; page table isolation would only add CR3 loads, and keep the trampoline away |
/// | mitigations=off | for the same reason; what they guard is the boundary to a kernel that never runs on the CPU. (Guests' processes are not guarded against each other.) |
/// | ibt=off | CR4.CET cannot be set |
/// | nopvspin | kicks sleeping vCPUs by `vmcall`, which never returns on PVM |
/// | lpj= | no delay-loop calibration |
/// | random.trust_cpu=on | harmless where rdrand is cleared; seeds early elsewhere |
/// | tick_stretch= | a tick costs 2 to 3 ms: one each 250 ms instead of 10 (a parameter of our kernel, guest/kernel/patches) |
/// | sched_base_slice= | a context switch costs 0.5 ms: slices of 10 ms instead of 0.7 (ours too) |
/// | fair_server=off | a tenth of each context switch, and timers in idle guests (ours too) |
/// | percpu_alloc=page | a first chunk of huge pages means clearing 2 MiB, emulated |
/// | lean_sysfs=on | the files of /sys/module/*/parameters and /sys/kernel/slab take 7 of 23 s to make (ours too) |
/// | nf_conntrack.hashsize= | the connection tracker scans its whole table at intervals, in idle guests too |
#[must_use]
pub fn cmdline() -> &'static str {
    "clearcpuid=umip,smap,smep,popcnt,cx16,xsaves,xsavec,xsaveopt,rdrand,rdseed,pcid,invpcid,erms,fsrm,\
     fsgsbase,rdtscp,rdpid,sse4_2,aes,129,131 pti=off mitigations=off ibt=off nopvspin \
     lpj=2600000 random.trust_cpu=on percpu_alloc=page \
     tick_stretch=25 sched_base_slice=10000 fair_server=off \
     lean_sysfs=on nf_conntrack.hashsize=1024"
}

#[cfg(test)]
mod tests {
    use super::cmdline;

    #[test]
    fn xsave_stays_and_what_cannot_be_emulated_goes() {
        let words: Vec<_> = cmdline().split_whitespace().collect();
        let cleared: Vec<_> = words
            .iter()
            .find_map(|w| w.strip_prefix("clearcpuid="))
            .map(|names| names.split(',').collect())
            .unwrap_or_default();
        // Without it the guest would not switch the AVX state of its processes.
        assert!(!cleared.contains(&"xsave"), "{cleared:?}");
        let list = cleared.join(",");
        assert!(list.len() < 128, "the kernel cuts the list off: {} characters", list.len());
        for name in ["xsaves", "smap", "pcid", "invpcid", "fsgsbase", "131"] {
            assert!(cleared.contains(&name), "{name}");
        }
        // Without these a boot takes half as long again.
        for word in ["percpu_alloc=page", "lean_sysfs=on"] {
            assert!(words.contains(&word), "{word}");
        }
        // COMMAND_LINE_SIZE is 2048, and other words share it.
        assert!(cmdline().len() < 640);
    }
}
