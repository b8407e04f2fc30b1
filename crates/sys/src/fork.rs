//! Processes: `fork(2)`, children, pidfds.
//!
//! [`fork`] is the whole of fork in one place. It goes through the C library, not the bare system
//! call, so that malloc's locks are usable in the child. It copies only the calling thread: the
//! caller has to see to it that no other thread holds a lock that the child will want. In a VM
//! process that is what `quiesce()` is for.
//!
//! A [`Child`] is waited for by its pid (only its parent can), a [`PidFd`] is a stable reference to
//! any process: it cannot come to mean another process when the pid is reused, and it is readable in
//! a [`crate::reactor::Reactor`] once the process has ended.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, pidfd_send_signal, waitpid,
};

/// Which side of a fork this is.
#[derive(Debug)]
pub enum Fork {
    /// The process that forked.
    Parent(Child),
    /// The new process.
    Child,
}

/// Forks this process.
///
/// # Safety
/// The child has only the calling thread. Locks that other threads hold at this moment stay locked
/// in it for ever, and what they guard may be half changed. The caller must know that every other
/// thread holds none that the child will take (allocator locks excepted: the C library sees to
/// those), and that the child does not run the other threads' destructors.
///
/// # Errors
/// `WouldBlock` at a limit of processes, `OutOfMemory` when page tables cannot be copied.
pub unsafe fn fork() -> io::Result<Fork> {
    // SAFETY: the caller vouches for the state of the other threads; fork itself has no
    // memory-safety precondition.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Fork::Child),
        pid => match Pid::from_raw(pid) {
            Some(pid) => Ok(Fork::Parent(Child { pid, status: None })),
            None => Err(io::Error::other(format!("fork returned the pid {pid}"))),
        },
    }
}

/// Ends this process at once with `code`: no destructors, no `atexit` handlers, no flushing of
/// stdio. This is how a forked child must end.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit ends the process and touches no memory of it.
    unsafe { libc::_exit(code) }
}

/// The calling thread's id, as `tgkill(2)` takes it.
pub fn tid() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}

/// This process's id.
pub fn pid() -> u32 {
    std::process::id()
}

/// A forked child of this process. Dropping it neither ends nor reaps it.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    status: Option<ExitStatus>,
}

impl Child {
    /// The child's process id.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// A pidfd of the child. Sound as long as it has not been waited for.
    ///
    /// # Errors
    /// That of `pidfd_open(2)`.
    pub fn pidfd(&self) -> io::Result<PidFd> {
        PidFd::open(self.pid())
    }

    /// Waits until the child ends, and reaps it. Later calls return the same status.
    ///
    /// # Errors
    /// That of `waitpid(2)`: `ECHILD` if someone else has reaped it.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        loop {
            if let Some(status) = self.wait_with(WaitOptions::empty())? {
                return Ok(status);
            }
        }
    }

    /// Reaps the child if it has ended; `None` while it runs.
    ///
    /// # Errors
    /// That of `waitpid(2)`: `ECHILD` if someone else has reaped it.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.wait_with(WaitOptions::NOHANG)
    }

    /// Sends a signal, unless the child has already been reaped (then its pid is no longer its own).
    ///
    /// # Errors
    /// That of `kill(2)`; `NotFound` after it was reaped.
    pub fn send_signal(&self, signal: Signal) -> io::Result<()> {
        if self.status.is_some() {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(kill_process(self.pid, signal)?)
    }

    fn wait_with(&mut self, options: WaitOptions) -> io::Result<Option<ExitStatus>> {
        if self.status.is_some() {
            return Ok(self.status);
        }
        loop {
            match waitpid(Some(self.pid), options) {
                Ok(found) => {
                    self.status = found.map(|(_, status)| ExitStatus::from_raw(status.as_raw()));
                    return Ok(self.status);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// A stable reference to a process; readable once it has ended.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Refers to the process that has the pid now.
    ///
    /// # Errors
    /// `InvalidInput` for 0 or a number over `i32::MAX`; `ESRCH` if there is none.
    pub fn open(pid: u32) -> io::Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("{pid} is not a process id"))
        })?;
        Ok(Self(pidfd_open(pid, PidfdFlags::empty())?))
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// `ESRCH` if the process has ended and was reaped; `PermissionDenied`.
    pub fn send_signal(&self, signal: Signal) -> io::Result<()> {
        Ok(pidfd_send_signal(&self.0, signal)?)
    }

    /// Waits until the process has ended, at most `timeout`; true if it has. Works for any process,
    /// child or not, and reaps nothing.
    ///
    /// # Errors
    /// That of `poll(2)`.
    pub fn wait(&self, timeout: Option<Duration>) -> io::Result<bool> {
        crate::reactor::poll_one(&self.0, PollFlags::IN, timeout)
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{fork_with, turn};
    use std::os::fd::AsRawFd;

    #[test]
    fn exit_code_reaches_the_parent() {
        let _turn = turn();
        let mut child = fork_with(|| 42);
        assert_eq!(child.wait().expect("wait").code(), Some(42));
        assert_eq!(child.try_wait().expect("again").and_then(|s| s.code()), Some(42));
        assert!(child.send_signal(Signal::TERM).is_err(), "a reaped child takes no signal");
    }

    #[test]
    fn pidfd_kills_and_sees_the_end() {
        let _turn = turn();
        let mut child = fork_with(|| {
            loop {
                // SAFETY: pause only waits.
                unsafe { libc::pause() };
            }
        });
        let pidfd = child.pidfd().expect("pidfd");
        assert!(!pidfd.wait(Some(Duration::ZERO)).expect("poll"));
        assert!(child.try_wait().expect("try_wait").is_none());
        pidfd.send_signal(Signal::KILL).expect("kill");
        assert!(pidfd.wait(None).expect("poll"));
        assert_eq!(child.wait().expect("wait").signal(), Some(libc::SIGKILL));
        assert!(pidfd.send_signal(Signal::KILL).is_err(), "it is gone");
    }

    #[test]
    fn pids_that_cannot_be_are_refused() {
        for pid in [0, u32::MAX, i32::MAX.unsigned_abs() + 1] {
            assert_eq!(PidFd::open(pid).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{pid}");
        }
    }

    #[test]
    fn the_child_keeps_only_what_it_lists() {
        let _turn = turn();
        let (keep, drop) = (tempfile::tempfile().expect("a"), tempfile::tempfile().expect("b"));
        let (keep, drop) = (keep.as_raw_fd(), drop.as_raw_fd());
        let mut child = fork_with(|| {
            // SAFETY: the child uses no descriptor afterwards but by number, and drops none.
            if unsafe { crate::fds::close_range_except(&[keep]) }.is_err() {
                return 1;
            }
            // SAFETY: F_GETFD only asks about a number.
            let open = |fd| unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0;
            i32::from(!(open(keep) && !open(drop) && !open(0))) * 2
        });
        assert_eq!(child.wait().expect("wait").code(), Some(0));
    }
}
