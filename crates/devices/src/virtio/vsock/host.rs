//! Connecting to a socket of the host without waiting for it.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use forkd_sys::unix_path::MAX_DIRECT;
use rustix::fs::{Mode, OFlags, open};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// Connects to a listening Unix socket; the stream does not block, and nor does this: a listener whose
/// backlog is full is as good as none.
///
/// # Errors
/// That of `connect(2)`: nobody listens, or the backlog is full (`WouldBlock`).
pub(super) fn connect_nonblocking(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    if path.as_os_str().len() <= MAX_DIRECT {
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        return Ok(UnixStream::from(socket));
    }
    // As in forkd_sys::unix_path: a short path to the same file, through its directory.
    let invalid = || io::Error::from(io::ErrorKind::InvalidFilename);
    let (parent, name) =
        (path.parent().ok_or_else(invalid)?, path.file_name().ok_or_else(invalid)?);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = open(parent, flags, Mode::empty())?;
    let mut short = format!("/proc/self/fd/{}/", directory.as_raw_fd()).into_bytes();
    short.extend_from_slice(name.as_bytes());
    connect(&socket, &SocketAddrUnix::new(short)?)?;
    Ok(UnixStream::from(socket))
}
