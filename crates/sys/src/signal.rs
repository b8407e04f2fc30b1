//! Signals: kicking threads out of system calls, and reading signals as events.
//!
//! A vCPU thread sits in `KVM_RUN`. To get it out, the event loop sets `immediate_exit` and sends
//! it the *kick* signal: the first real-time signal that the C library leaves to us, with a handler
//! that does nothing, installed without `SA_RESTART` so that the interrupted call returns `EINTR`.
//!
//! The guest's PID 1 takes the other way: it blocks the signals it cares for ([`SignalSet::block`])
//! and reads them from a [`SignalFd`] in its event loop.

#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::process::{Signal, set_parent_process_death_signal};

/// The number of the kick signal.
pub fn kick_signal() -> i32 {
    libc::SIGRTMIN()
}

extern "C" fn do_nothing(_signal: libc::c_int) {}

/// Installs the do-nothing handler of the kick signal for the whole process. Inherited by forks.
///
/// # Errors
/// None in practice.
pub fn install_kick_handler() -> io::Result<()> {
    let handler = do_nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
    set_action(kick_signal(), handler)
}

/// Makes writes to a closed pipe or socket return `EPIPE` instead of ending the process.
///
/// # Errors
/// None in practice.
pub fn ignore_sigpipe() -> io::Result<()> {
    set_action(libc::SIGPIPE, libc::SIG_IGN)
}

/// Puts a signal's disposition back to the default.
///
/// # Errors
/// `InvalidInput` for a number that is no signal, and for SIGKILL and SIGSTOP.
pub fn restore_default(signal: i32) -> io::Result<()> {
    set_action(signal, libc::SIG_DFL)
}

fn set_action(signal: i32, handler: libc::sighandler_t) -> io::Result<()> {
    // SAFETY: all zeroes is a valid sigaction: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    // SAFETY: the action is a valid structure; the handler is one of SIG_DFL, SIG_IGN and a
    // function that does nothing, which is async-signal-safe.
    let result = unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sends the kick signal to a thread of this process, by its [`crate::fork::tid`].
///
/// # Errors
/// `ESRCH` if there is no such thread any more.
pub fn send_to_thread(tid: i32) -> io::Result<()> {
    let process = libc::c_long::from(std::process::id());
    let (tid, signal) = (libc::c_long::from(tid), libc::c_long::from(kick_signal()));
    // SAFETY: tgkill takes three numbers; the process must have a handler for the kick signal, or
    // it ends, which is no matter of memory safety.
    let result = unsafe { libc::syscall(libc::SYS_tgkill, process, tid, signal) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Asks that this process get `signal` when the *thread* that made it ends; `None` asks for nothing.
///
/// Not inherited over fork(2), and forgotten when credentials change. If the parent may have ended
/// already, compare `getppid()` afterwards.
///
/// # Errors
/// None in practice.
pub fn set_pdeathsig(signal: Option<Signal>) -> io::Result<()> {
    Ok(set_parent_process_death_signal(signal)?)
}

/// A set of signals.
#[derive(Clone, Copy)]
pub struct SignalSet(libc::sigset_t);

impl std::fmt::Debug for SignalSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries((1..=64).filter(|&signal| self.contains(signal))).finish()
    }
}

impl SignalSet {
    /// The set of these signals.
    ///
    /// # Errors
    /// `InvalidInput` for a number that is no signal.
    pub fn of(signals: &[i32]) -> io::Result<Self> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initialises the set it is given, and cannot fail for a valid pointer.
        let mut set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            set.assume_init()
        };
        for &signal in signals {
            // SAFETY: the set is initialised.
            if unsafe { libc::sigaddset(&raw mut set, signal) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(Self(set))
    }

    /// All signals but these.
    ///
    /// # Errors
    /// `InvalidInput` for a number that is no signal.
    pub fn all_but(signals: &[i32]) -> io::Result<Self> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigfillset initialises the set it is given, and cannot fail for a valid pointer.
        let mut set = unsafe {
            libc::sigfillset(set.as_mut_ptr());
            set.assume_init()
        };
        for &signal in signals {
            // SAFETY: the set is initialised.
            if unsafe { libc::sigdelset(&raw mut set, signal) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(Self(set))
    }

    /// Whether a signal is in.
    pub fn contains(&self, signal: i32) -> bool {
        // SAFETY: the set is initialised.
        unsafe { libc::sigismember(&raw const self.0, signal) == 1 }
    }

    /// Blocks these signals in the calling thread, beside what is blocked already; returns the mask
    /// before. Threads made later inherit the mask, forks too.
    ///
    /// # Errors
    /// None in practice.
    pub fn block(&self) -> io::Result<SignalSet> {
        self.change_mask(libc::SIG_BLOCK)
    }

    /// Unblocks these signals in the calling thread; returns the mask before.
    ///
    /// # Errors
    /// None in practice.
    pub fn unblock(&self) -> io::Result<SignalSet> {
        self.change_mask(libc::SIG_UNBLOCK)
    }

    /// Makes this the calling thread's whole mask of blocked signals; returns the mask before.
    ///
    /// # Errors
    /// None in practice.
    pub fn set_mask(&self) -> io::Result<SignalSet> {
        self.change_mask(libc::SIG_SETMASK)
    }

    fn change_mask(&self, how: libc::c_int) -> io::Result<SignalSet> {
        let mut old = MaybeUninit::uninit();
        // SAFETY: both point to sets that live across the call; the second is written by it.
        let error = unsafe { libc::pthread_sigmask(how, &raw const self.0, old.as_mut_ptr()) };
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        // SAFETY: a successful call has written the old mask.
        Ok(Self(unsafe { old.assume_init() }))
    }
}

/// Blocks every signal but the kick in the calling thread: what a vCPU thread does first, so that
/// the process's signals are left to the event loop.
///
/// # Errors
/// None in practice.
pub fn block_all_but_kick() -> io::Result<()> {
    SignalSet::all_but(&[kick_signal()])?.set_mask().map(drop)
}

/// A signal that was read from a [`SignalFd`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// Its number.
    pub signal: i32,
    /// The process that sent it, or for SIGCHLD the child; 0 for the kernel.
    pub pid: u32,
}

/// Signals as events: readable when one of its set is pending. They have to be blocked as well.
#[derive(Debug)]
pub struct SignalFd(OwnedFd);

impl SignalFd {
    /// For the signals of `set`. Block them in all threads, or their default action happens instead.
    ///
    /// # Errors
    /// That of `signalfd(2)`: out of descriptors.
    pub fn new(set: &SignalSet) -> io::Result<Self> {
        let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
        // SAFETY: the set lives across the call; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set.0, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call made this descriptor, and nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Takes one pending signal; `None` if there is none.
    ///
    /// # Errors
    /// None in practice.
    pub fn read(&self) -> io::Result<Option<Received>> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        loop {
            // SAFETY: the buffer has `size` bytes and lives across the call.
            let count = unsafe { libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), size) };
            if usize::try_from(count).is_ok_and(|count| count == size) {
                // SAFETY: the kernel has written the whole structure.
                let info = unsafe { info.assume_init() };
                let signal = i32::try_from(info.ssi_signo).unwrap_or(0);
                return Ok(Some(Received { signal, pid: info.ssi_pid }));
            }
            if count >= 0 {
                return Err(io::Error::other(format!("a signalfd gave {count} bytes")));
            }
            match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                error => return Err(error),
            }
        }
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_kick_interrupts_a_blocking_call() {
        install_kick_handler().expect("install");
        let (tell, told) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            block_all_but_kick().expect("mask");
            let (reader, _writer) = std::io::pipe().expect("a pipe");
            tell.send(crate::fork::tid()).expect("tell");
            rustix::io::read(&reader, &mut [0u8; 1])
        });
        let tid = told.recv().expect("the thread's id");
        // The thread may not have reached its read yet, so kick until it ends.
        while !thread.is_finished() {
            match send_to_thread(tid) {
                Ok(()) => std::thread::yield_now(),
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
                    break;
                }
            }
        }
        assert_eq!(thread.join().expect("join"), Err(rustix::io::Errno::INTR));
        assert!(send_to_thread(tid).is_err(), "the thread is gone");
    }

    #[test]
    fn blocked_signals_are_read_as_events() {
        let set = SignalSet::of(&[libc::SIGUSR2]).expect("a set");
        let old = set.block().expect("block");
        let events = SignalFd::new(&set).expect("a signalfd");
        assert_eq!(events.read().expect("read"), None);
        // To this thread: the test runner's others do not block it.
        // SAFETY: raise sends a signal that this thread blocks.
        assert_eq!(unsafe { libc::raise(libc::SIGUSR2) }, 0);
        assert!(crate::reactor::wait_readable(&events, None).expect("poll"));
        let received = events.read().expect("read").expect("a signal");
        assert_eq!(received, Received { signal: libc::SIGUSR2, pid: std::process::id() });
        old.set_mask().expect("restore");
    }

    #[test]
    fn sets_hold_what_they_say() {
        let some = SignalSet::of(&[libc::SIGTERM, libc::SIGCHLD]).expect("a set");
        assert!(some.contains(libc::SIGTERM) && !some.contains(libc::SIGINT));
        let rest = SignalSet::all_but(&[libc::SIGTERM]).expect("a set");
        assert!(!rest.contains(libc::SIGTERM) && rest.contains(libc::SIGINT));
        assert!(SignalSet::of(&[0]).is_err() && SignalSet::of(&[1000]).is_err());
    }
}
