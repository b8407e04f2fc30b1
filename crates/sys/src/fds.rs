//! Descriptors as a set: what stays open over a fork, and what over an exec.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

/// Closes every descriptor of this process that is not in `keep`.
///
/// Works by `close_range(2)` over the gaps between the kept ones, so the cost follows their number
/// and not the limit of open files. Negative numbers and repetitions in `keep` are ignored.
///
/// # Safety
/// The owners (`OwnedFd`, `File`, sockets) of the descriptors that get closed must never use nor
/// drop them afterwards: the numbers will be reused. The intended caller is a freshly forked child
/// that has taken apart, or forgotten, everything it did not list.
///
/// # Errors
/// That of `close_range(2)`: `Unsupported` before Linux 5.9.
pub unsafe fn close_range_except(keep: &[RawFd]) -> io::Result<()> {
    for (first, last) in gaps(keep) {
        // SAFETY: close_range takes two numbers and flags, and reads no memory; that nobody goes on
        // using the closed descriptors is this function's own contract.
        let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0u32) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The inclusive ranges of descriptor numbers that are not in `keep`, ascending.
fn gaps(keep: &[RawFd]) -> Vec<(u32, u32)> {
    let mut kept: Vec<u32> = keep.iter().filter_map(|&fd| u32::try_from(fd).ok()).collect();
    kept.sort_unstable();
    kept.dedup();
    let mut gaps = Vec::with_capacity(kept.len() + 1);
    let mut next = 0u32;
    for fd in kept {
        if fd > next {
            gaps.push((next, fd - 1));
        }
        next = fd + 1;
    }
    gaps.push((next, u32::MAX));
    gaps
}

/// Takes over a descriptor that this process was started with ([`crate::spawn::SpawnOptions`]), by its number. It is
/// close-on-exec afterwards.
///
/// # Safety
/// Nothing in this process may own that descriptor: call it before anything has been opened.
///
/// # Errors
/// `InvalidInput` for a standard stream and for a number that is no open descriptor.
pub unsafe fn take_inherited(number: RawFd) -> io::Result<OwnedFd> {
    let bad = |why: &str| {
        let text = format!("descriptor {number} {why}");
        io::Error::new(io::ErrorKind::InvalidInput, text)
    };
    if number <= libc::STDERR_FILENO {
        return Err(bad("cannot be inherited: it is no number, or that of a standard stream"));
    }
    // SAFETY: takes numbers, and fails for one that is not open.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(bad("is not open"));
    }
    // SAFETY: it is open (see above), and nobody else owns it, as the caller vouches for.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Sets or clears close-on-exec.
///
/// # Errors
/// That of `fcntl(2)`.
pub fn set_cloexec(fd: impl AsFd, on: bool) -> io::Result<()> {
    let mut flags = fcntl_getfd(&fd)?;
    flags.set(FdFlags::CLOEXEC, on);
    Ok(fcntl_setfd(&fd, flags)?)
}

/// Sets or clears `O_NONBLOCK`, which belongs to the open file description, not the descriptor.
///
/// # Errors
/// That of `fcntl(2)`.
pub fn set_nonblocking(fd: impl AsFd, on: bool) -> io::Result<()> {
    let mut flags = rustix::fs::fcntl_getfl(&fd)?;
    flags.set(rustix::fs::OFlags::NONBLOCK, on);
    Ok(rustix::fs::fcntl_setfl(&fd, flags)?)
}

/// The descriptors that this process has open, ascending, by `/proc/self/fd`.
///
/// # Errors
/// `/proc` cannot be read.
pub fn open_fds() -> io::Result<Vec<RawFd>> {
    let mut fds = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        if let Some(fd) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) {
            fds.push(fd);
        }
    }
    // The listing has its own directory handle among them, which is closed by now.
    fds.retain(|&fd| {
        // SAFETY: F_GETFD only asks the kernel about a number.
        unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
    });
    fds.sort_unstable();
    Ok(fds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn gaps_and_kept_partition_all_numbers(keep in proptest::collection::vec(-3i32..200, 0..40)) {
            let gaps = gaps(&keep);
            for fd in 0u32..256 {
                let in_gap = gaps.iter().filter(|(first, last)| (*first..=*last).contains(&fd)).count();
                let kept = keep.iter().any(|&k| k >= 0 && k.unsigned_abs() == fd);
                prop_assert_eq!(in_gap, usize::from(!kept));
            }
            prop_assert_eq!(gaps.last().map(|gap| gap.1), Some(u32::MAX));
            prop_assert!(gaps.windows(2).all(|w| w[0].1 < w[1].0));
        }
    }

    #[test]
    fn the_largest_number_can_be_kept() {
        assert_eq!(gaps(&[RawFd::MAX]).len(), 2);
    }

    #[test]
    fn only_open_descriptors_are_inherited() {
        use std::os::fd::{AsRawFd, IntoRawFd};
        for none in [-1, 0, 1, 2, 1 << 20] {
            // SAFETY: the numbers are refused.
            let error = unsafe { take_inherited(none) }.expect_err("refused").to_string();
            assert!(error.contains(&none.to_string()), "{error}");
        }
        let file = tempfile::tempfile().expect("a temporary file");
        set_cloexec(&file, false).expect("clear");
        let number = file.into_raw_fd();
        // SAFETY: its owner has just given it up.
        let taken = unsafe { take_inherited(number) }.expect("taken");
        assert_eq!(taken.as_raw_fd(), number);
        assert!(fcntl_getfd(&taken).expect("flags").contains(FdFlags::CLOEXEC));
    }

    #[test]
    fn cloexec_is_set_and_cleared() {
        let file = tempfile::tempfile().expect("a temporary file");
        set_cloexec(&file, false).expect("clear");
        assert!(!fcntl_getfd(&file).expect("flags").contains(FdFlags::CLOEXEC));
        set_cloexec(&file, true).expect("set");
        assert!(fcntl_getfd(&file).expect("flags").contains(FdFlags::CLOEXEC));
    }
}
