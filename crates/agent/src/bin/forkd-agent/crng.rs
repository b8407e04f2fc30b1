//! Telling the guest's kernel that its random numbers must differ from those of its siblings.
//!
//! The device is kept open: opening it after a fork would cost two more system calls on the way to
//! the first answer.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use forkd_agent::protocol::init::MAX_ENTROPY;

/// `_IOW('R', 0x03, int[2])`, include/uapi/linux/random.h.
const RNDADDENTROPY: u32 = 0x4008_5203;
/// `_IO('R', 0x07)`, include/uapi/linux/random.h.
const RNDRESEEDCRNG: u32 = 0x5207;

/// `struct rand_pool_info` of include/uapi/linux/random.h, with its array.
#[repr(C)]
struct PoolInfo {
    entropy_bits: i32,
    len: i32,
    bytes: [u8; MAX_ENTROPY],
}

/// The kernel's generator.
pub struct Crng(File);

impl Crng {
    /// Opens it.
    ///
    /// # Errors
    ///
    /// There is no /dev/urandom, or it may not be written to.
    pub fn open() -> io::Result<Self> {
        File::options().write(true).open("/dev/urandom").map(Self)
    }

    /// Mixes in `entropy`, at most [`MAX_ENTROPY`] bytes, and reseeds, so that all numbers from now
    /// on depend on it.
    ///
    /// # Errors
    ///
    /// The kernel refuses: this is not PID 1 of a guest.
    pub fn reseed(&self, entropy: &[u8]) -> io::Result<()> {
        let entropy = &entropy[..entropy.len().min(MAX_ENTROPY)];
        let len = i32::try_from(entropy.len()).unwrap_or(0);
        let mut info = PoolInfo { entropy_bits: len * 8, len, bytes: [0; MAX_ENTROPY] };
        info.bytes[..entropy.len()].copy_from_slice(entropy);
        let fd = self.0.as_raw_fd();
        // SAFETY: the kernel reads the two integers and `len` bytes after them, all inside `info`.
        let added = unsafe { libc::ioctl(fd, RNDADDENTROPY as _, &raw const info) };
        // SAFETY: this request takes no argument.
        if added == 0 && unsafe { libc::ioctl(fd, RNDRESEEDCRNG as _) } == 0 {
            return Ok(());
        }
        Err(io::Error::last_os_error())
    }
}
