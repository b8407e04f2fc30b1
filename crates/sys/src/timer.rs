//! One-shot timers for the event loop.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

const ZERO: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// A one-shot timer on `CLOCK_MONOTONIC`; its descriptor is readable once it has expired.
///
/// Shared with the parent after fork(2), so a child makes its own.
#[derive(Debug)]
pub struct TimerFd(OwnedFd);

impl TimerFd {
    /// A disarmed timer.
    ///
    /// # Errors
    /// That of `timerfd_create(2)`: out of descriptors.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self(timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }

    /// Arms it to expire once, `after` from now; replaces what was armed. Zero means at once.
    ///
    /// # Errors
    /// `InvalidInput` for more than `i64::MAX` seconds.
    pub fn arm(&self, after: Duration) -> io::Result<()> {
        // A zero value would disarm.
        let after = after.max(Duration::from_nanos(1));
        let seconds = i64::try_from(after.as_secs())
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        self.set(Timespec { tv_sec: seconds, tv_nsec: i64::from(after.subsec_nanos()) })
    }

    /// Disarms it; an expiry that has not been drained is forgotten.
    ///
    /// # Errors
    /// None in practice.
    pub fn disarm(&self) -> io::Result<()> {
        self.set(ZERO)
    }

    /// Takes back the expiry; true if it had expired.
    ///
    /// # Errors
    /// None in practice.
    pub fn drain(&self) -> io::Result<bool> {
        crate::wake::drain_counter(&self.0).map(|count| count > 0)
    }

    fn set(&self, value: Timespec) -> io::Result<()> {
        let timer = Itimerspec { it_interval: ZERO, it_value: value };
        timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &timer)?;
        Ok(())
    }
}

impl AsFd for TimerFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reactor::wait_readable;

    #[test]
    fn expires_once() {
        let timer = TimerFd::new().expect("a timer");
        assert!(!timer.drain().expect("drain"));
        for after in [Duration::ZERO, Duration::from_millis(1)] {
            timer.arm(after).expect("arm");
            assert!(wait_readable(&timer, None).expect("poll"));
            assert!(timer.drain().expect("drain"));
            assert!(!timer.drain().expect("drain"));
        }
    }

    #[test]
    fn disarmed_does_not_expire() {
        let timer = TimerFd::new().expect("a timer");
        timer.arm(Duration::from_millis(1)).expect("arm");
        assert!(wait_readable(&timer, None).expect("poll"));
        timer.disarm().expect("disarm");
        assert!(!wait_readable(&timer, Some(Duration::ZERO)).expect("poll"));
        assert!(timer.arm(Duration::MAX).is_err());
    }
}
