//! Counters of remedies, one set for a VM, shared by its vCPU threads.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// How often each remedy was applied since the VM process began counting. Counters wrap at 2^64.
        #[derive(Debug, Default)]
        pub struct Metrics {
            $($(#[$doc])* pub(super) $name: AtomicU64,)*
        }

        impl Metrics {
            /// All counters by name, in a fixed order. Not atomic as a whole: vCPUs go on counting.
            #[must_use]
            pub fn snapshot(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.load(Ordering::Relaxed)),)*]
            }
        }
    };
}

counters! {
    /// `syscall` entries finished by the breakpoint. Those by the trampoline leave no trace here.
    syscall,
    /// Page faults that the breakpoint let through to the guest's handler.
    real_pf,
    /// Trampolines put in place.
    trampoline,
    /// `int3`: #BP injected.
    int3,
    /// `clac`, `stac`.
    clac_stac,
    /// `popcnt`.
    popcnt,
    /// `fwait`.
    fwait,
    /// `ldmxcsr`.
    ldmxcsr,
    /// `stmxcsr`.
    stmxcsr,
    /// `xsave`, `xsaveopt`, `xsavec`.
    xsave,
    /// `xrstor`.
    xrstor,
    /// `fxsave`, `fxrstor`, `fninit`, `emms` and the like.
    fpu,
    /// `cmpxchg16b`.
    cmpxchg16b,
    /// Bit manipulation, `movbe`, `crc32` and other integer instructions.
    integer,
    /// `xgetbv`, `xsetbv`, `rdtscp`, `rdpid` and other system instructions.
    system,
    /// Exceptions injected because a remedied instruction faulted.
    injected_fault,
    /// Times that the breakpoint was set, moved or removed on a vCPU.
    armed,
}

/// Counts one event.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
