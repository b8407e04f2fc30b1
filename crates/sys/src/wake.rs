//! Waking the event loop from another thread: an eventfd that counts calls.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

/// A wake-up call. Clones are the same one; the loop registers it for reading.
///
/// After fork(2) the underlying counter is shared with the parent, so a child makes a new one.
#[derive(Debug, Clone)]
pub struct Waker(Arc<OwnedFd>);

impl Waker {
    /// A new one, not yet called.
    ///
    /// # Errors
    /// That of `eventfd2(2)`: out of descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    /// Calls: makes the descriptor readable until [`Waker::drain`]. Any number of calls before that
    /// are one. Async-signal-safe.
    ///
    /// # Errors
    /// None in practice: a full counter is readable already and counts as success.
    pub fn wake(&self) -> io::Result<()> {
        loop {
            match rustix::io::write(&*self.0, &1u64.to_ne_bytes()) {
                Ok(_) | Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Takes back all calls so far; true if there was one.
    ///
    /// # Errors
    /// None in practice.
    pub fn drain(&self) -> io::Result<bool> {
        drain_counter(&*self.0).map(|count| count > 0)
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Reads and resets the counter of an eventfd or timerfd; 0 if it has not counted.
pub(crate) fn drain_counter(fd: impl AsFd) -> io::Result<u64> {
    let mut count = [0u8; 8];
    loop {
        match rustix::io::read(&fd, &mut count) {
            Ok(_) => return Ok(u64::from_ne_bytes(count)),
            Err(Errno::AGAIN) => return Ok(0),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reactor::wait_readable;
    use std::time::Duration;

    #[test]
    fn calls_are_merged_and_drained() {
        let waker = Waker::new().expect("a waker");
        assert!(!waker.drain().expect("drain"));
        let clone = waker.clone();
        std::thread::spawn(move || {
            clone.wake().expect("wake");
            clone.wake().expect("wake");
        })
        .join()
        .expect("the thread");
        assert!(wait_readable(&waker, None).expect("poll"));
        assert!(waker.drain().expect("drain"));
        assert!(!wait_readable(&waker, Some(Duration::ZERO)).expect("poll"));
        assert!(!waker.drain().expect("drain"));
    }
}
