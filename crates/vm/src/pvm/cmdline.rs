//! What a guest's kernel has to be told on its command line.

/// Words for the guest kernel's command line under PVM, separated by spaces.
///
/// `cpuid` runs natively in a PVM guest, so features cannot be hidden with KVM_SET_CPUID2; Linux 5.17
/// and later takes feature names in `clearcpuid=`.
///
/// | word | why |
/// |---|---|
/// | umip, smap, smep | CR4 bits that PVM cannot give; smap also brings clac/stac into every user copy |
/// | popcnt, cx16, sse4_2 | KVM's emulator lacks popcnt, cmpxchg16b and crc32: each use would be an exit |
/// | xsaves, xsavec, xsaveopt | the kernel then uses plain XSAVE, which [`super`] does; xsave itself must stay, or the guest would not switch the AVX state of its processes |
/// | rdrand, rdseed | not in the emulator |
/// | pcid, invpcid | shadow paging gains nothing from them, and invpcid is an exit |
/// | erms, fsrm | `rep movsb` is emulated byte by byte; the unrolled copies are quicker |
/// | fsgsbase, rdtscp, rdpid | not in the emulator, and on the entry paths |
/// | aes, pclmulqdq | keeps in-kernel SIMD crypto away: all of it would be emulated |
/// | lpj= | no delay-loop calibration |
/// | tsc=reliable, no_timer_check | no calibration against slow emulated timers |
/// | random.trust_cpu=on | harmless where rdrand is cleared; seeds early elsewhere |
/// | percpu_alloc=page | a first chunk of huge pages means clearing 2 MiB, emulated |
/// | initcall_blacklist= | the files of /sys/module/*/parameters and /sys/kernel/slab take 7 of 23 s to make |
#[must_use]
pub fn cmdline() -> &'static str {
    "clearcpuid=umip,smap,smep,popcnt,cx16,xsaves,xsavec,xsaveopt,rdrand,rdseed,pcid,invpcid,erms,fsrm,\
     fsgsbase,rdtscp,rdpid,sse4_2,aes,pclmulqdq lpj=2600000 tsc=reliable no_timer_check \
     random.trust_cpu=on percpu_alloc=page initcall_blacklist=param_sysfs_builtin_init,slab_late_init"
}
