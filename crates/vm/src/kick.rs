//! Getting a vCPU out of KVM_RUN from another thread.
//!
//! A kick sets `kvm_run.immediate_exit` and then signals the vCPU's thread. Whichever way the two race with
//! KVM_RUN, it returns EINTR: if the thread had not entered yet, the flag makes KVM_RUN return at once; if it
//! had, the signal does. Two kinds share this: a *kick* makes [`crate::vcpu::Vcpu::run`] return
//! `Exit::Kicked`, a *poke* only makes it look around and go on.
//!
//! A handle may outlive its vCPU. Both the mapping of `kvm_run` and the thread's id are behind a mutex that
//! the vCPU takes to enter and leave `run` and to go away, so a handle never touches either afterwards. No
//! vCPU thread holds that mutex while it is parked, so fork(2) cannot catch it locked by one.

use std::fs::File;
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

use vmm_sys_util::errno;

use crate::stats::{self, Counters};

/// Lets another thread get a vCPU out of KVM_RUN. Clones are equal; all may outlive the vCPU.
#[derive(Debug, Clone)]
pub struct KickHandle(pub(crate) Arc<Target>);

impl KickHandle {
    /// Makes the vCPU's `run` return `Exit::Kicked`: now, or as soon as it is called. Does nothing if the vCPU is gone.
    pub fn kick(&self) {
        self.0.requested.store(true, Ordering::SeqCst);
        self.0.interrupt();
    }

    /// Whether the vCPU's thread sleeps in KVM_RUN: its guest has halted, or is waiting for the host. Of the moment, and for
    /// choosing a good one; false if it cannot be told.
    pub fn is_asleep(&self) -> bool {
        let Some(tid) = self.0.live().tid else { return false };
        let stat = std::fs::read_to_string(format!("/proc/self/task/{tid}/stat"));
        // The name, in parentheses, may hold anything; the state is the first field behind it (proc_pid_stat(5)).
        stat.is_ok_and(|s| s.rsplit_once(')').is_some_and(|(_, rest)| rest.starts_with(" S")))
    }

    /// Has the vCPU open its counters, if that was not done yet; what it makes of it is told by [`KickHandle::counters`].
    pub fn want_counters(&self) {
        let mut live = self.0.live();
        if live.immediate_exit.is_none() || !matches!(live.counters, CountersFile::Unasked) {
            return;
        }
        live.counters = CountersFile::Wanted;
        if live.tid.is_none() {
            // Nobody is in KVM_RUN, so the ioctl waits for nobody.
            live.open_counters();
            return;
        }
        drop(live);
        self.0.interrupt();
    }

    /// KVM's counters of the vCPU, while it runs. None if the host has none, or the vCPU is gone, or does not open them in
    /// that time.
    pub fn counters(&self, patience: Duration) -> Option<Counters> {
        self.want_counters();
        let live = self.0.live();
        let wanted = |live: &mut Live| matches!(live.counters, CountersFile::Wanted);
        let waited = self.0.opened.wait_timeout_while(live, patience, wanted);
        let (live, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match &live.counters {
            CountersFile::Open(file) => stats::read(file).ok(),
            CountersFile::Unasked | CountersFile::Wanted | CountersFile::None => None,
        }
    }

    /// Makes the vCPU leave and enter KVM_RUN.
    pub(crate) fn poke(&self) {
        self.0.interrupt();
    }
}

/// The part of a vCPU that kick handles share.
#[derive(Debug)]
pub(crate) struct Target {
    requested: AtomicBool,
    live: Mutex<Live>,
    /// [`Live::counters`] were opened, or there are none.
    opened: Condvar,
}

#[derive(Debug)]
struct Live {
    /// `kvm_run.immediate_exit`; none once the vCPU is gone.
    immediate_exit: Option<FlagPtr>,
    /// The thread that is in `run`.
    tid: Option<libc::pid_t>,
    /// The vCPU's descriptor.
    fd: RawFd,
    counters: CountersFile,
}

/// The file of a vCPU's counters. Most VMs are never asked, so it is opened when they are first wanted; as the ioctl
/// waits while the vCPU is in KVM_RUN, by the vCPU's own thread.
#[derive(Debug)]
enum CountersFile {
    Unasked,
    Wanted,
    Open(File),
    None,
}

impl Live {
    fn open_counters(&mut self) {
        self.counters = stats::open(self.fd).map_or(CountersFile::None, CountersFile::Open);
    }
}

#[derive(Debug, Clone, Copy)]
struct FlagPtr(NonNull<AtomicU8>);

// SAFETY: the pointee is an atomic in a mapping that lives as long as `Live::immediate_exit` is set.
unsafe impl Send for FlagPtr {}

impl Target {
    /// # Safety
    ///
    /// `immediate_exit` must point to the flag in a mapped `kvm_run` and stay valid until [`Target::retire`].
    pub(crate) unsafe fn new(immediate_exit: NonNull<u8>, fd: RawFd) -> Arc<Self> {
        install_handler();
        let flag = FlagPtr(immediate_exit.cast());
        Arc::new(Self {
            requested: AtomicBool::new(false),
            live: Mutex::new(Live {
                immediate_exit: Some(flag),
                tid: None,
                fd,
                counters: CountersFile::Unasked,
            }),
            opened: Condvar::new(),
        })
    }

    fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn interrupt(&self) {
        let live = self.live();
        let Some(FlagPtr(flag)) = live.immediate_exit else { return };
        // SAFETY: the flag is set, so the mapping is alive (see `new`), and the lock keeps it so.
        unsafe { flag.as_ref() }.store(1, Ordering::SeqCst);
        if let Some(tid) = live.tid {
            // SAFETY: tgkill has no memory effects; the thread is inside `run`, so its id is its own.
            let rc = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, signal()) };
            // EAGAIN: too many signals wait. Whoever waits for the vCPU kicks again.
            let error = errno::Error::last();
            debug_assert!(rc == 0 || error.errno() == libc::EAGAIN, "tgkill: {error}");
        }
    }

    /// The calling thread enters `run`.
    pub(crate) fn enter(&self) {
        // SAFETY: gettid cannot fail and has no effects.
        self.live().tid = Some(unsafe { libc::gettid() });
    }

    /// The calling thread leaves `run`.
    pub(crate) fn leave(&self) {
        self.live().tid = None;
    }

    /// After KVM_RUN returned EINTR: lowers the flag; true if this was a kick.
    pub(crate) fn take(&self) -> bool {
        let mut live = self.live();
        if let Some(FlagPtr(flag)) = live.immediate_exit {
            // SAFETY: as in `interrupt`.
            unsafe { flag.as_ref() }.store(0, Ordering::SeqCst);
        }
        if matches!(live.counters, CountersFile::Wanted) {
            live.open_counters();
            self.opened.notify_all();
        }
        drop(live);
        // Only now: a kick that comes between the two raises the flag again, and the next KVM_RUN sees it.
        self.requested.swap(false, Ordering::SeqCst)
    }

    /// The vCPU goes away. False if that had happened already (see [`Siblings::abandon`]).
    pub(crate) fn retire(&self) -> bool {
        let mut live = self.live();
        live.counters = CountersFile::None;
        live.immediate_exit.take().is_some()
    }

    fn abandon(&self) {
        let mut live = self.live();
        live.counters = CountersFile::None;
        if live.immediate_exit.take().is_some() {
            // SAFETY: the descriptor is the vCPU's, and by taking the flag we have become the one who closes it.
            unsafe { libc::close(live.fd) };
        }
    }
}

/// The vCPUs of one VM.
#[derive(Debug, Default)]
pub(crate) struct Siblings(Mutex<Vec<KickHandle>>);

impl Siblings {
    fn list(&self) -> MutexGuard<'_, Vec<KickHandle>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add(&self, handle: KickHandle) {
        self.list().push(handle);
    }

    /// Makes every vCPU but `me` leave and enter KVM_RUN.
    pub(crate) fn poke_others(&self, me: &Target) {
        for handle in self.list().iter().filter(|h| !std::ptr::eq(h.0.as_ref(), me)) {
            handle.poke();
        }
    }

    /// In a child of fork(2): closes all vCPUs' descriptors; their `Vcpu` values then own nothing.
    pub(crate) fn abandon(&self) {
        for handle in self.list().drain(..) {
            handle.0.abandon();
        }
    }
}

/// The signal that gets a thread out of KVM_RUN: the first real-time signal.
pub fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn on_signal(_: libc::c_int) {}

fn install_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let handler: extern "C" fn(libc::c_int) = on_signal;
        // SAFETY: the action is fully initialised (all zeroes is valid), the handler does nothing at all, and
        // no flag asks for restarting system calls.
        let rc = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as libc::sighandler_t;
            libc::sigaction(signal(), &action, std::ptr::null_mut())
        };
        assert_eq!(rc, 0, "sigaction of the first real-time signal cannot fail");
    });
}
