//! Scheduling of threads.

#![allow(unsafe_code)]

use std::io;
use std::time::Duration;

/// `struct sched_attr` (include/uapi/linux/sched/types.h), version 0.
#[repr(C)]
#[derive(Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// `SCHED_NORMAL` (include/uapi/linux/sched.h).
const SCHED_OTHER: u32 = 0;

/// Asks that the calling thread, once it has a CPU, keeps it for `slice` while others wait (0.1 to 100 ms; the
/// kernel clamps it). Its share of the CPU stays the same. For ordinary threads; Linux before 6.12 ignores it.
///
/// # Errors
/// That of `sched_setattr(2)`.
pub fn set_slice(slice: Duration) -> io::Result<()> {
    let nice = rustix::process::getpriority_process(None)?;
    let attr = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        policy: SCHED_OTHER,
        nice,
        runtime: u64::try_from(slice.as_nanos()).unwrap_or(u64::MAX),
        ..SchedAttr::default()
    };
    // SAFETY: the attributes live across the call, and their size is in them; 0 means the calling thread.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_may_ask_for_a_longer_slice() {
        std::thread::spawn(|| set_slice(Duration::from_millis(50)).unwrap()).join().unwrap();
    }
}
