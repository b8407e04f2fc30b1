//! Clocks in nanoseconds.
//!
//! `CLOCK_MONOTONIC` is one clock for all processes of a host, so its values may be compared between
//! a VM process and its forks. `u64` nanoseconds last 584 years.

use std::io;

use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

const NANOS_PER_SEC: u64 = 1_000_000_000;

fn to_ns(time: Timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(NANOS_PER_SEC).saturating_add(nanos)
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub fn monotonic_ns() -> u64 {
    to_ns(clock_gettime(ClockId::Monotonic))
}

/// Nanoseconds of `CLOCK_BOOTTIME`: as monotonic, but goes on while the machine is suspended.
pub fn boottime_ns() -> u64 {
    to_ns(clock_gettime(ClockId::Boottime))
}

/// Nanoseconds since the Unix epoch (`CLOCK_REALTIME`); 0 for a clock set before 1970.
pub fn realtime_ns() -> u64 {
    to_ns(clock_gettime(ClockId::Realtime))
}

/// Sets `CLOCK_REALTIME` to `ns` nanoseconds since the Unix epoch.
///
/// # Errors
/// `PermissionDenied` without `CAP_SYS_TIME`; `InvalidInput` for a time that the kernel refuses.
pub fn set_realtime(ns: u64) -> io::Result<()> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let time = Timespec {
        tv_sec: i64::try_from(ns / NANOS_PER_SEC).map_err(invalid)?,
        tv_nsec: i64::try_from(ns % NANOS_PER_SEC).map_err(invalid)?,
    };
    Ok(clock_settime(ClockId::Realtime, time)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn monotonic_never_goes_back() {
        let mut last = monotonic_ns();
        for _ in 0..1000 {
            let now = monotonic_ns();
            assert!(now >= last);
            last = now;
        }
    }

    #[test]
    fn realtime_is_that_of_std() {
        let std = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .expect("a clock after 1970");
        let ours = realtime_ns();
        assert!(u128::from(ours).abs_diff(std.as_nanos()) < 5_000_000_000);
    }
}
