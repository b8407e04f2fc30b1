//! The event loop's core: a small level-triggered epoll set.
//!
//! A [`Reactor`] maps descriptors to [`Token`]s chosen by the caller and tells which are ready. It
//! owns no descriptor but its own and calls nobody back: the loop that uses it matches tokens. Level
//! -triggered means that what is not consumed is told again, so a subscriber may do a bounded piece
//! of work per turn and return.
//!
//! An epoll set is shared over fork(2): a child that changed an inherited one would change its
//! parent's. So a forked child drops the reactor (which closes only the child's descriptor), makes a
//! new one, and registers its descriptors afresh. A descriptor that was inherited stays in the
//! parent's set as long as any process has the open file; remove it with [`Reactor::remove`] before
//! closing it.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Most events taken in one [`Reactor::wait`]; the rest is told in the next.
const BATCH: usize = 64;

/// What the caller calls a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u64);

/// What to be told about a descriptor. Errors and hang-up are told in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Interest {
    /// When it can be read (or accepted from), or its peer has stopped writing.
    pub read: bool,
    /// When it can be written.
    pub write: bool,
}

impl Interest {
    /// Reading only.
    pub const READ: Self = Self { read: true, write: false };
    /// Writing only.
    pub const WRITE: Self = Self { read: false, write: true };
    /// Reading and writing.
    pub const BOTH: Self = Self { read: true, write: true };
    /// Only errors and hang-up.
    pub const NONE: Self = Self { read: false, write: false };

    fn flags(self) -> EventFlags {
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN | EventFlags::RDHUP, self.read);
        flags.set(EventFlags::OUT, self.write);
        flags
    }
}

/// One descriptor that is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Readiness {
    /// Its token.
    pub token: Token,
    /// A read will not block: there is data, or end of file, or an error to fetch.
    pub readable: bool,
    /// A write will not block.
    pub writable: bool,
    /// The peer has closed, or closed its writing side; there may still be data to read.
    pub hangup: bool,
    /// The descriptor has an error pending, or is a pipe whose reader has gone.
    pub error: bool,
}

/// A level-triggered epoll set.
pub struct Reactor {
    epoll: OwnedFd,
    events: Vec<epoll::Event>,
}

impl Reactor {
    /// An empty set.
    ///
    /// # Errors
    /// That of `epoll_create1(2)`: out of descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: epoll::create(CreateFlags::CLOEXEC)?, events: Vec::with_capacity(BATCH) })
    }

    /// Adds a descriptor.
    ///
    /// # Errors
    /// That of `epoll_ctl(2)`: `AlreadyExists` if it is in, `PermissionDenied` for a regular file.
    pub fn add(&self, fd: impl AsFd, token: Token, interest: Interest) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, EventData::new_u64(token.0), interest.flags())?)
    }

    /// Changes the token or the interest of a descriptor.
    ///
    /// # Errors
    /// That of `epoll_ctl(2)`: `NotFound` if it is not in.
    pub fn modify(&self, fd: impl AsFd, token: Token, interest: Interest) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, fd, EventData::new_u64(token.0), interest.flags())?)
    }

    /// Removes a descriptor. Do it before closing it.
    ///
    /// # Errors
    /// That of `epoll_ctl(2)`: `NotFound` if it is not in.
    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.epoll, fd)?)
    }

    /// Waits until something is ready, at most `timeout` (`None`: for ever), and puts it into
    /// `ready`, which is cleared first and stays empty on a timeout. A signal does not end the wait.
    ///
    /// # Errors
    /// That of `epoll_wait(2)`.
    pub fn wait(
        &mut self,
        ready: &mut Vec<Readiness>,
        timeout: Option<Duration>,
    ) -> io::Result<()> {
        ready.clear();
        let deadline = Deadline::after(timeout);
        loop {
            self.events.clear();
            let left = deadline.left();
            match epoll::wait(&self.epoll, spare_capacity(&mut self.events), left.as_ref()) {
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        ready.extend(self.events.iter().map(|event| readiness(*event)));
        Ok(())
    }
}

impl fmt::Debug for Reactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reactor").field("epoll", &self.epoll).finish_non_exhaustive()
    }
}

impl AsFd for Reactor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

fn readiness(event: epoll::Event) -> Readiness {
    let (flags, data) = (event.flags, event.data);
    let error = flags.contains(EventFlags::ERR);
    let closed = flags.contains(EventFlags::HUP);
    Readiness {
        token: Token(data.u64()),
        readable: error || closed || flags.intersects(EventFlags::IN | EventFlags::RDHUP),
        writable: error || flags.contains(EventFlags::OUT),
        hangup: closed || flags.contains(EventFlags::RDHUP),
        error,
    }
}

/// Waits for `flags` on one descriptor, at most `timeout` (`None`: for ever); true if it is ready,
/// in error or hung up. A signal does not end the wait.
///
/// # Errors
/// That of `poll(2)`.
pub fn poll_one(fd: impl AsFd, flags: PollFlags, timeout: Option<Duration>) -> io::Result<bool> {
    let deadline = Deadline::after(timeout);
    loop {
        let mut fds = [PollFd::new(&fd, flags)];
        match poll(&mut fds, deadline.left().as_ref()) {
            Ok(count) => return Ok(count > 0),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Waits until a descriptor can be read, at most `timeout`; see [`poll_one`].
///
/// # Errors
/// That of `poll(2)`.
pub fn wait_readable(fd: impl AsFd, timeout: Option<Duration>) -> io::Result<bool> {
    poll_one(fd, PollFlags::IN, timeout)
}

/// Waits until a descriptor can be written, at most `timeout`; see [`poll_one`].
///
/// # Errors
/// That of `poll(2)`.
pub fn wait_writable(fd: impl AsFd, timeout: Option<Duration>) -> io::Result<bool> {
    poll_one(fd, PollFlags::OUT, timeout)
}

/// A moment to wait until, so that waits that are interrupted do not grow.
enum Deadline {
    Never,
    At(Instant),
}

impl Deadline {
    /// A timeout beyond what an `Instant` can hold is no timeout.
    fn after(timeout: Option<Duration>) -> Self {
        timeout.and_then(|t| Instant::now().checked_add(t)).map_or(Self::Never, Self::At)
    }

    fn left(&self) -> Option<Timespec> {
        match self {
            Self::Never => None,
            Self::At(at) => {
                let left = at.saturating_duration_since(Instant::now());
                // Without epoll_pwait2 the kernel takes milliseconds in an i32: 24 days.
                let left = left.min(Duration::from_millis(i32::MAX.unsigned_abs().into()));
                Some(Timespec {
                    tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                    tv_nsec: i64::from(left.subsec_nanos()),
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{fork_with, turn};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn level_triggered_until_consumed() {
        let (mut near, mut far) = UnixStream::pair().expect("a pair");
        let mut reactor = Reactor::new().expect("a reactor");
        reactor.add(&near, Token(7), Interest::READ).expect("add");
        let mut ready = Vec::new();
        reactor.wait(&mut ready, Some(Duration::ZERO)).expect("wait");
        assert!(ready.is_empty());

        far.write_all(b"x").expect("write");
        for _ in 0..2 {
            reactor.wait(&mut ready, None).expect("wait");
            assert_eq!(
                ready,
                [Readiness {
                    token: Token(7),
                    readable: true,
                    writable: false,
                    hangup: false,
                    error: false
                }]
            );
        }
        near.read_exact(&mut [0]).expect("read");
        reactor.wait(&mut ready, Some(Duration::ZERO)).expect("wait");
        assert!(ready.is_empty());

        reactor.modify(&near, Token(8), Interest::BOTH).expect("modify");
        drop(far);
        reactor.wait(&mut ready, None).expect("wait");
        assert_eq!(ready.len(), 1);
        assert_eq!(ready[0].token, Token(8));
        assert!(ready[0].readable && ready[0].writable && ready[0].hangup);

        reactor.remove(&near).expect("remove");
        reactor.wait(&mut ready, Some(Duration::ZERO)).expect("wait");
        assert!(ready.is_empty());
        assert_eq!(reactor.remove(&near).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn hangup_is_told_without_interest() {
        let (near, far) = UnixStream::pair().expect("a pair");
        let mut reactor = Reactor::new().expect("a reactor");
        reactor.add(&near, Token(1), Interest::NONE).expect("add");
        drop(far);
        let mut ready = Vec::new();
        reactor.wait(&mut ready, None).expect("wait");
        assert!(ready[0].hangup);
    }

    #[test]
    fn a_child_that_rebuilds_leaves_its_parents_set_alone() {
        let _turn = turn();
        let (near, mut far) = UnixStream::pair().expect("a pair");
        let mut reactor = Reactor::new().expect("a reactor");
        reactor.add(&near, Token(1), Interest::READ).expect("add");
        let mut ready = Vec::new();
        let mut child = fork_with(|| {
            let rebuilt = Reactor::new().and_then(|mut rebuilt| {
                std::mem::swap(&mut reactor, &mut rebuilt);
                drop(rebuilt);
                reactor.add(&near, Token(2), Interest::WRITE)?;
                reactor.wait(&mut ready, None)?;
                reactor.remove(&near)
            });
            let right = rebuilt.is_ok() && ready.first().is_some_and(|r| r.token == Token(2));
            i32::from(!right)
        });
        assert_eq!(child.wait().expect("wait").code(), Some(0));
        far.write_all(b"x").expect("write");
        reactor.wait(&mut ready, None).expect("wait");
        assert_eq!((ready.len(), ready[0].token, ready[0].writable), (1, Token(1), false));
    }

    #[test]
    fn more_events_than_a_batch_are_all_told() {
        let pairs: Vec<_> = (0..BATCH + 9).map(|_| UnixStream::pair().expect("a pair")).collect();
        let mut reactor = Reactor::new().expect("a reactor");
        for (index, (near, _)) in pairs.iter().enumerate() {
            reactor.add(near, Token(index as u64), Interest::WRITE).expect("add");
        }
        let (mut seen, mut ready) = (std::collections::BTreeSet::new(), Vec::new());
        for _ in 0..8 {
            reactor.wait(&mut ready, Some(Duration::ZERO)).expect("wait");
            seen.extend(ready.iter().map(|r| r.token.0));
        }
        assert_eq!(seen.len(), pairs.len());
    }

    #[test]
    fn an_endless_timeout_is_taken() {
        let (near, far) = UnixStream::pair().expect("a pair");
        drop(far);
        assert!(wait_readable(&near, Some(Duration::MAX)).expect("poll"));
        let (quiet, _peer) = UnixStream::pair().expect("a pair");
        assert!(!wait_readable(&quiet, Some(Duration::ZERO)).expect("poll"));
    }
}
