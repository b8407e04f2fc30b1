//! AF_VSOCK sockets, which neither std nor rustix knows.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use rustix::event::PollFlags;

/// The host's context id.
const HOST_CID: u32 = libc::VMADDR_CID_HOST;
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

fn socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: socket takes numbers and returns a new descriptor or -1.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: an address is plain numbers, for which zero is a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

type AddressCall = unsafe extern "C" fn(i32, *const libc::sockaddr, libc::socklen_t) -> libc::c_int;

fn with_address(call: AddressCall, fd: &OwnedFd, address: &libc::sockaddr_vm) -> io::Result<()> {
    let len = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: `call` is bind or connect, which read `len` bytes at the address; it has as many.
    let result = unsafe { call(fd.as_raw_fd(), (&raw const *address).cast(), len) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A non-blocking socket that listens on `port`.
///
/// # Errors
///
/// The kernel has no vsock transport, or the port is taken.
pub fn listen(port: u32) -> io::Result<OwnedFd> {
    let fd = socket()?;
    with_address(libc::bind, &fd, &address(libc::VMADDR_CID_ANY, port))?;
    // SAFETY: listen takes two numbers.
    if unsafe { libc::listen(fd.as_raw_fd(), BACKLOG) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd)
}

/// A blocking connection to a port of the host.
///
/// # Errors
///
/// Nobody listens there, or nobody answers in time.
pub fn connect_host(port: u32, timeout: Duration) -> io::Result<OwnedFd> {
    let fd = socket()?;
    match with_address(libc::connect, &fd, &address(HOST_CID, port)) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        other => return other.map(|()| fd),
    }
    if !forkd_sys::reactor::poll_one(&fd, PollFlags::OUT, Some(timeout))? {
        return Err(io::ErrorKind::TimedOut.into());
    }
    match rustix::net::sockopt::socket_error(&fd)? {
        Ok(()) => {}
        Err(errno) => return Err(errno.into()),
    }
    forkd_sys::fds::set_nonblocking(&fd, false)?;
    Ok(fd)
}
