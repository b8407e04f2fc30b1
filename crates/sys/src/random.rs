//! The kernel's random numbers, and, in a guest, telling the kernel that it has been forked.

#![allow(unsafe_code)]

use std::io;

use rustix::fd::AsRawFd;
use rustix::rand::{GetRandomFlags, getrandom};

/// Most bytes of one [`add_entropy_and_reseed`].
pub const MAX_ENTROPY: usize = 512;

/// `_IOW('R', 0x03, int[2])`, include/uapi/linux/random.h.
const RNDADDENTROPY: u32 = 0x4008_5203;
/// `_IO('R', 0x07)`, include/uapi/linux/random.h.
const RNDRESEEDCRNG: u32 = 0x5207;

/// Fills `buffer` from the kernel's generator; waits until that is seeded, once after boot.
///
/// # Errors
/// That of `getrandom(2)`.
pub fn fill(buffer: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        match getrandom(&mut buffer[done..], GetRandomFlags::empty()) {
            Ok(count) => done += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// `struct rand_pool_info` of include/uapi/linux/random.h with room for its flexible array.
#[repr(C)]
struct PoolInfo {
    entropy_bits: i32,
    size: i32,
    bytes: [u8; MAX_ENTROPY],
}

/// Mixes `entropy`, credited in full, into the kernel's pool and makes the generator reseed from it
/// at once, so that what it gives from now on differs from every other fork's.
///
/// # Errors
/// `InvalidInput` if `entropy` is empty or longer than [`MAX_ENTROPY`]; that of opening
/// `/dev/urandom`; `PermissionDenied` without `CAP_SYS_ADMIN`.
pub fn add_entropy_and_reseed(entropy: &[u8]) -> io::Result<()> {
    if entropy.is_empty() || entropy.len() > MAX_ENTROPY {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} bytes of entropy; 1 to {MAX_ENTROPY} are taken", entropy.len()),
        ));
    }
    let device = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/urandom")
        .map_err(|e| crate::PathError::new("open", "/dev/urandom".as_ref(), e))?;
    // The length is at most MAX_ENTROPY, so it and its bits fit an i32.
    let size = entropy.len() as i32;
    let mut info = PoolInfo { entropy_bits: size * 8, size, bytes: [0; MAX_ENTROPY] };
    info.bytes[..entropy.len()].copy_from_slice(entropy);
    // SAFETY: the request reads the two integers and `size` bytes after them, all within `info`,
    // which lives across the call.
    let added = unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY as _, &raw const info) };
    if added != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the request takes no argument.
    let reseeded = unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG as _) };
    if reseeded != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_fills_differ() {
        let (mut a, mut b) = ([0u8; 300], [0u8; 300]);
        fill(&mut a).expect("fill");
        fill(&mut b).expect("fill");
        assert_ne!(a, b);
        fill(&mut []).expect("nothing is filled");
    }

    #[test]
    fn entropy_is_bounded() {
        for bad in [0, MAX_ENTROPY + 1] {
            let error = add_entropy_and_reseed(&vec![1; bad]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }

    #[test]
    fn root_can_reseed() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        add_entropy_and_reseed(&[7; 32]).expect("reseed");
    }
}
