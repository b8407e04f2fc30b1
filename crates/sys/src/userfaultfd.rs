//! userfaultfd(2): page faults of this process as messages on a descriptor.
//!
//! A [`Userfaultfd`] belongs to the address space of the process that made it, and stays so when it is
//! inherited or passed on: whoever holds it reads that process's faults and resolves them. When the
//! last copy is closed, by the holder's death too, the kernel unregisters all ranges, takes away every
//! write protection and wakes whoever waits. A holder that might die should hence be the only one.
//!
//! What a fault is depends on how the range was registered ([`Mode`]): *missing* is the first touch of
//! a page, *write-protect* a write to a page that [`Userfaultfd::write_protect`] has protected. With
//! [`Features::WP_ASYNC`] the kernel resolves the latter itself and no message comes; which pages those
//! were is then asked of [`crate::pagemap`].
//!
//! A fault in the kernel's own access (a system call's buffer, KVM) is reported as well: that is what
//! guests need, and why making one takes `CAP_SYS_PTRACE`, access to `/dev/userfaultfd`, or the sysctl
//! `vm.unprivileged_userfaultfd`.
//!
//! All numbers are from `include/uapi/linux/userfaultfd.h`, Linux 6.12, where no other source is said.

#![allow(unsafe_code)]

use std::io;
use std::ops::{BitAnd, BitOr, Range};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::event::PollFlags;

/// `UFFD_API`, also the type byte of its ioctls.
const UFFD_API: u64 = 0xAA;
/// `_IOC_WRITE` and `_IOC_READ` of `asm-generic/ioctl.h`, as on x86-64 and arm64.
const IOC_READ: u32 = 2;
const IOC_WRITE: u32 = 1;

/// `_IOC(direction, 0xAA, number, size)` of `asm-generic/ioctl.h`.
const fn request(direction: u32, number: u32, size: usize) -> libc::Ioctl {
    // The sizes are those of the structures below, all under 2^14.
    ((direction << 30) | ((size as u32) << 16) | (0xAA << 8) | number) as libc::Ioctl
}

/// `USERFAULTFD_IOC_NEW` of /dev/userfaultfd.
const DEVICE_NEW: libc::Ioctl = request(0, 0x00, 0);
const UFFDIO_API: libc::Ioctl = request(IOC_READ | IOC_WRITE, 0x3F, size_of::<ApiArgs>());
const UFFDIO_REGISTER: libc::Ioctl = request(IOC_READ | IOC_WRITE, 0x00, size_of::<RegisterArgs>());
const UFFDIO_UNREGISTER: libc::Ioctl = request(IOC_READ, 0x01, size_of::<RangeArgs>());
const UFFDIO_WAKE: libc::Ioctl = request(IOC_READ, 0x02, size_of::<RangeArgs>());
const UFFDIO_COPY: libc::Ioctl = request(IOC_READ | IOC_WRITE, 0x03, size_of::<CopyArgs>());
const UFFDIO_ZEROPAGE: libc::Ioctl = request(IOC_READ | IOC_WRITE, 0x04, size_of::<ZeroArgs>());
const UFFDIO_WRITEPROTECT: libc::Ioctl =
    request(IOC_READ | IOC_WRITE, 0x06, size_of::<ProtectArgs>());

/// Bits of `uffdio_register.mode`.
const REGISTER_MISSING: u64 = 1 << 0;
const REGISTER_WP: u64 = 1 << 1;
/// Bit of `uffdio_copy.mode`, `uffdio_zeropage.mode`.
const COPY_DONTWAKE: u64 = 1 << 0;
/// Bit of `uffdio_copy.mode`.
const COPY_WP: u64 = 1 << 1;
/// Bits of `uffdio_writeprotect.mode`.
const PROTECT_WP: u64 = 1 << 0;
const PROTECT_DONTWAKE: u64 = 1 << 1;
/// `uffd_msg.event`.
const EVENT_PAGEFAULT: u8 = 0x12;
/// Bits of `uffd_msg.arg.pagefault.flags`.
const FAULT_WRITE: u64 = 1 << 0;
const FAULT_WP: u64 = 1 << 1;
/// `sizeof(struct uffd_msg)`, which is packed.
const MESSAGE: usize = 32;
/// Most messages taken by one read.
const BATCH: usize = 64;

#[repr(C)]
struct ApiArgs {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RangeArgs {
    start: u64,
    len: u64,
}

#[repr(C)]
struct RegisterArgs {
    range: RangeArgs,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct CopyArgs {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct ZeroArgs {
    range: RangeArgs,
    mode: u64,
    zeropage: i64,
}

#[repr(C)]
struct ProtectArgs {
    range: RangeArgs,
    mode: u64,
}

/// What a kernel can do, or is asked to: `UFFD_FEATURE_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features(u64);

impl Features {
    /// Nothing beyond the first version.
    pub const NONE: Self = Self(0);
    /// Write-protect faults of anonymous memory (Linux 5.7).
    pub const PAGEFAULT_FLAG_WP: Self = Self(1 << 0);
    /// Missing faults of hugetlbfs (4.11).
    pub const MISSING_HUGETLBFS: Self = Self(1 << 4);
    /// Missing faults of shared memory: memfd, tmpfs (4.11).
    pub const MISSING_SHMEM: Self = Self(1 << 5);
    /// Faults say which thread (4.14).
    pub const THREAD_ID: Self = Self(1 << 8);
    /// Faults say the address to the byte, not to the page (5.18).
    pub const EXACT_ADDRESS: Self = Self(1 << 11);
    /// Write-protect faults of shared memory and hugetlbfs (5.19). Pages that are not there are
    /// protected too in such memory, with this alone.
    pub const WP_HUGETLBFS_SHMEM: Self = Self(1 << 12);
    /// Pages of anonymous memory that are not there are protected too (6.4).
    pub const WP_UNPOPULATED: Self = Self(1 << 13);
    /// The kernel resolves write-protect faults itself (6.7). Brings `WP_UNPOPULATED`.
    pub const WP_ASYNC: Self = Self(1 << 15);

    /// Whether all of `other` are among these.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// These without `other`.
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// The bits, as in `uffdio_api.features`.
    pub fn bits(self) -> u64 {
        self.0
    }
}

impl BitOr for Features {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitAnd for Features {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

/// Which faults of a range are reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mode {
    /// The first touch of a page.
    pub missing: bool,
    /// Writes to write-protected pages.
    pub write_protect: bool,
}

impl Mode {
    /// Missing pages only.
    pub const MISSING: Self = Self { missing: true, write_protect: false };
    /// Write-protected pages only.
    pub const WRITE_PROTECT: Self = Self { missing: false, write_protect: true };
    /// Both.
    pub const BOTH: Self = Self { missing: true, write_protect: true };
}

/// What a fault is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// The page is not there; `write` if the access that wants it is a write.
    Missing {
        /// The access is a write.
        write: bool,
    },
    /// The page is write-protected, and was written to.
    WriteProtect,
}

/// One fault. The thread waits until the page is resolved, or [`Userfaultfd::wake`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Address of the access: of the page, unless [`Features::EXACT_ADDRESS`] was asked for.
    pub address: u64,
    /// What it is about.
    pub kind: FaultKind,
    /// Thread id of who waits; 0 unless [`Features::THREAD_ID`] was asked for.
    pub thread: u32,
}

/// How a page was put in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placed {
    /// All of it.
    Done,
    /// Only this many bytes (whole pages), as a page behind them was there already. It was not
    /// changed, and nobody who waits for it was woken.
    Exists(usize),
}

/// A userfaultfd, non-blocking.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: OwnedFd,
    features: Features,
}

impl Userfaultfd {
    /// What this kernel can do.
    ///
    /// # Errors
    /// As for [`Userfaultfd::new`].
    pub fn available() -> io::Result<Features> {
        // A descriptor can be asked once; the answer does not say what is on, but what could be.
        handshake(&open()?, Features::NONE)
    }

    /// Makes one for this process, with all `required` features and those `optional` ones that the
    /// kernel has.
    ///
    /// # Errors
    /// `Unsupported` with the missing bits if the kernel lacks a required feature, or userfaultfd
    /// altogether; `PermissionDenied` if this process may not watch the kernel's faults.
    pub fn new(required: Features, optional: Features) -> io::Result<Self> {
        let available = Self::available()?;
        let missing = required.without(available);
        if missing != Features::NONE {
            let text =
                format!("this kernel's userfaultfd lacks the features {:#x}", missing.bits());
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        let features = required | (optional & available);
        let fd = open()?;
        handshake(&fd, features)?;
        Ok(Self { fd, features })
    }

    /// The features that are on.
    pub fn features(&self) -> Features {
        self.features
    }

    /// Another descriptor of the same one.
    ///
    /// # Errors
    /// That of `fcntl(2)`: out of descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { fd: self.fd.try_clone()?, features: self.features })
    }

    /// Reports the faults of a range of the owner's memory from now on. Protects nothing.
    ///
    /// # Errors
    /// `InvalidInput` for a range that is not of whole pages, has a gap, or is of memory that cannot
    /// be watched so; `ResourceBusy` (EBUSY) if another userfaultfd has it; ESRCH if the owner is gone.
    pub fn register(&self, range: Range<u64>, mode: Mode) -> io::Result<()> {
        let mut bits = 0;
        if mode.missing {
            bits |= REGISTER_MISSING;
        }
        if mode.write_protect {
            bits |= REGISTER_WP;
        }
        let mut args = RegisterArgs { range: range_args(&range)?, mode: bits, ioctls: 0 };
        // SAFETY: the argument is the structure that the request reads and writes.
        unsafe { self.ioctl(UFFDIO_REGISTER, &mut args) }
    }

    /// Stops reporting the faults of a range, takes its write protection away, and wakes who waits.
    /// Parts that are not registered are skipped.
    ///
    /// # Errors
    /// `InvalidInput` for a range that is not of whole pages; ESRCH if the owner is gone.
    pub fn unregister(&self, range: Range<u64>) -> io::Result<()> {
        let mut args = range_args(&range)?;
        // SAFETY: the argument is the structure that the request reads.
        unsafe { self.ioctl(UFFDIO_UNREGISTER, &mut args)? };
        // The kernel itself wakes only those who wait for missing pages (fs/userfaultfd.c,
        // userfaultfd_unregister); a write to a protected page would wait for ever. Who comes to wait
        // has the mapping locked until he is in the queue, so after the above all are in it.
        self.wake(range)
    }

    /// Write-protects the pages of a registered range, so that a write to one is reported.
    ///
    /// # Errors
    /// `NotFound` if a part is not registered for it; ESRCH if the owner is gone.
    pub fn write_protect(&self, range: Range<u64>) -> io::Result<()> {
        self.set_protection(range, PROTECT_WP)
    }

    /// Takes the write protection away, and with `wake` wakes who waits for a page of the range.
    ///
    /// # Errors
    /// As for [`Userfaultfd::write_protect`].
    pub fn write_unprotect(&self, range: Range<u64>, wake: bool) -> io::Result<()> {
        self.set_protection(range, if wake { 0 } else { PROTECT_DONTWAKE })
    }

    fn set_protection(&self, range: Range<u64>, mode: u64) -> io::Result<()> {
        let mut args = ProtectArgs { range: range_args(&range)?, mode };
        retry(|| {
            // SAFETY: the argument is the structure that the request reads.
            unsafe { self.ioctl(UFFDIO_WRITEPROTECT, &mut args) }
        })
    }

    /// Puts a copy of `bytes` (whole pages) in place at `address`, where no page is yet, and with
    /// `wake` wakes who waits; with `protect` the pages are write-protected from the start.
    ///
    /// # Errors
    /// `InvalidInput` for what is not of whole pages; `NotFound` if the range is not registered;
    /// `OutOfMemory`; ESRCH if the owner is gone. What was placed before the error stays.
    pub fn copy(
        &self,
        address: u64,
        bytes: &[u8],
        wake: bool,
        protect: bool,
    ) -> io::Result<Placed> {
        let mut mode = if wake { 0 } else { COPY_DONTWAKE };
        if protect {
            mode |= COPY_WP;
        }
        place(bytes.len(), |done| {
            let mut args = CopyArgs {
                dst: address.saturating_add(done as u64),
                src: (bytes.as_ptr().addr() + done) as u64,
                len: (bytes.len() - done) as u64,
                mode,
                copy: 0,
            };
            // SAFETY: the argument is the structure that the request reads and writes. The kernel
            // reads `bytes` and fills pages of a range whose owner has registered it for that, and
            // only where none is.
            let result = unsafe { self.ioctl(UFFDIO_COPY, &mut args) };
            (result, args.copy)
        })
    }

    /// Puts pages of zeroes in place in a range, where no page is yet.
    ///
    /// # Errors
    /// As for [`Userfaultfd::copy`]; hugetlbfs has no zero page: `InvalidInput`.
    pub fn zero(&self, range: Range<u64>, wake: bool) -> io::Result<Placed> {
        let RangeArgs { start, len } = range_args(&range)?;
        let mode = if wake { 0 } else { COPY_DONTWAKE };
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        place(len, |done| {
            let range = RangeArgs { start: start + done as u64, len: (len - done) as u64 };
            let mut args = ZeroArgs { range, mode, zeropage: 0 };
            // SAFETY: the argument is the structure that the request reads and writes.
            let result = unsafe { self.ioctl(UFFDIO_ZEROPAGE, &mut args) };
            (result, args.zeropage)
        })
    }

    /// Wakes who waits for a page of the range; if it is not resolved they fault again.
    ///
    /// # Errors
    /// `InvalidInput` for a range that is not of whole pages.
    pub fn wake(&self, range: Range<u64>) -> io::Result<()> {
        let mut args = range_args(&range)?;
        // SAFETY: the argument is the structure that the request reads.
        unsafe { self.ioctl(UFFDIO_WAKE, &mut args) }
    }

    /// Takes the faults that have come, at most 64, and appends them to `faults`; returns how many.
    /// Never waits: 0 if there are none. The descriptor is readable when there are.
    ///
    /// # Errors
    /// That of `read(2)`; `InvalidData` for a message of another kind than was asked for.
    pub fn read(&self, faults: &mut Vec<Fault>) -> io::Result<usize> {
        let mut buffer = [0u8; MESSAGE * BATCH];
        let got = match rustix::io::retry_on_intr(|| rustix::io::read(&self.fd, &mut buffer[..])) {
            Ok(got) => got,
            Err(rustix::io::Errno::AGAIN) => 0,
            Err(errno) => return Err(errno.into()),
        };
        for message in buffer.get(..got).unwrap_or(&[]).chunks_exact(MESSAGE) {
            faults.push(parse(message)?);
        }
        Ok(got / MESSAGE)
    }

    /// Waits until there are faults to read, at most `timeout` (`None`: for ever); true if there are.
    ///
    /// # Errors
    /// That of `poll(2)`.
    pub fn wait(&self, timeout: Option<std::time::Duration>) -> io::Result<bool> {
        crate::reactor::poll_one(&self.fd, PollFlags::IN, timeout)
    }

    /// # Safety
    /// `args` must be the structure that the request takes.
    unsafe fn ioctl<T>(&self, request: libc::Ioctl, args: &mut T) -> io::Result<()> {
        // SAFETY: the caller vouches for the structure, which lives across the call. None of the
        // requests makes memory of this process go away; the most they change is what a page that
        // was never touched reads as, in ranges whose owner has handed them over.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), request, std::ptr::from_mut(args)) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// By the system call, or where that is not permitted by the device (Linux 6.1).
fn open() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: takes flags, returns a new descriptor. UFFD_USER_MODE_ONLY is left out on purpose.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if fd >= 0 {
        return owned(fd);
    }
    let refused = io::Error::last_os_error();
    if refused.raw_os_error() == Some(libc::ENOSYS) {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel has no userfaultfd"));
    }
    let Ok(device) = std::fs::File::open("/dev/userfaultfd") else { return Err(refused) };
    // SAFETY: the request takes flags by value and returns a new descriptor.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), DEVICE_NEW, flags) };
    if fd < 0 { Err(io::Error::last_os_error()) } else { owned(fd.into()) }
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).map_err(|_| io::Error::other("a descriptor out of range"))?;
    // SAFETY: the kernel has just returned it, so it is open and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Turns features on; returns what the kernel could do.
fn handshake(fd: &OwnedFd, features: Features) -> io::Result<Features> {
    let mut args = ApiArgs { api: UFFD_API, features: features.bits(), ioctls: 0 };
    // SAFETY: the argument is the structure that the request reads and writes.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut args) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(Features(args.features)) }
}

fn range_args(range: &Range<u64>) -> io::Result<RangeArgs> {
    match range.end.checked_sub(range.start) {
        Some(len) if len > 0 => Ok(RangeArgs { start: range.start, len }),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{:#x}..{:#x} is no range of memory", range.start, range.end),
        )),
    }
}

/// EAGAIN of these requests means that the owner's mappings are changing at the moment (a fork, a
/// munmap): it passes.
fn retry(mut call: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    loop {
        match call() {
            Err(error) if is_transient(&error) => std::thread::yield_now(),
            other => return other,
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR))
}

/// Repeats a request that fills `len` bytes until all are, from where the last one stopped. The
/// request returns its result and its out-field: bytes done, or a negated error number.
fn place(
    len: usize,
    mut request: impl FnMut(usize) -> (io::Result<()>, i64),
) -> io::Result<Placed> {
    let mut done = 0;
    while done < len {
        let (result, moved) = request(done);
        // Signed: a request that stops midway says how far it came and fails with EAGAIN.
        done = done.saturating_add(usize::try_from(moved).unwrap_or(0)).min(len);
        match result {
            Ok(()) if moved <= 0 => return Err(io::Error::other("userfaultfd placed nothing")),
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                return Ok(Placed::Exists(done));
            }
            Err(error) if is_transient(&error) => {
                if moved <= 0 {
                    std::thread::yield_now();
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Placed::Done)
}

/// `struct uffd_msg`: event at 0, then at 8 the fault's flags, address and thread.
fn parse(message: &[u8]) -> io::Result<Fault> {
    let short = || io::Error::new(io::ErrorKind::InvalidData, "a userfaultfd message is cut short");
    let word = |at: usize| -> io::Result<u64> {
        let bytes = message.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        Ok(u64::from_ne_bytes(bytes.ok_or_else(short)?))
    };
    let event = *message.first().ok_or_else(short)?;
    if event != EVENT_PAGEFAULT {
        let text = format!("userfaultfd message {event:#x}, which was not asked for");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    let (flags, address) = (word(8)?, word(16)?);
    let thread = message.get(24..28).and_then(|bytes| bytes.try_into().ok());
    let kind = if flags & FAULT_WP != 0 {
        FaultKind::WriteProtect
    } else {
        FaultKind::Missing { write: flags & FAULT_WRITE != 0 }
    };
    Ok(Fault { address, kind, thread: u32::from_ne_bytes(thread.ok_or_else(short)?) })
}

#[cfg(test)]
mod tests;
