//! For this crate's tests: bytes to tell apart, children, and what the kernel has mapped.

#![allow(unsafe_code)]

use std::ops::Range;

use forkd_sys::fork::{Child, Fork, exit_now, fork};

pub const MIB: u64 = 1 << 20;
pub const PAGE: usize = 4096;

/// Bytes without a zero page, the same for the same seed.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Forks; the child runs `body` and ends with what it returns. `body` must not panic, print, or take
/// locks that other threads may have.
pub fn fork_with(body: impl FnOnce() -> i32) -> Child {
    // SAFETY: the child makes system calls and allocations, and takes no lock of another thread.
    match unsafe { fork() }.expect("fork") {
        Fork::Parent(child) => child,
        Fork::Child => {
            // A child whose test has failed must not stay behind.
            let kill = Some(rustix::process::Signal::KILL);
            exit_now(if forkd_sys::signal::set_pdeathsig(kill).is_ok() { body() } else { 127 })
        }
    }
}

/// The mappings of this process that overlap a range of addresses.
pub fn maps_in(range: Range<u64>) -> Vec<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    let inside = |line: &&str| {
        let mut ends = line.split([' ', '-']).map(|hex| u64::from_str_radix(hex, 16));
        matches!((ends.next(), ends.next()),
            (Some(Ok(start)), Some(Ok(end))) if start < range.end && end > range.start)
    };
    maps.lines().filter(inside).map(str::to_owned).collect()
}
