//! Unix sockets at paths of any length.
//!
//! `struct sockaddr_un` has room for 107 bytes of path, and a run directory under a long home or a
//! test's temporary directory soon passes that. A longer path goes through its directory's
//! descriptor: `/proc/self/fd/N/name` is short and means the same file. Only the last component
//! must fit then; that needs `/proc`.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};

use crate::PathError;

/// `sizeof(sun_path)` less the terminating zero, unix(7).
pub const MAX_DIRECT: usize = 107;

/// Binds a listening socket, close-on-exec, blocking. The path must not exist.
///
/// # Errors
/// That of `bind(2)`, with the path: `AddrInUse` if it exists.
pub fn bind_listener(path: &Path) -> Result<UnixListener, PathError> {
    through(path, "bind a socket at", |path| UnixListener::bind(path))
}

/// Connects to a listening socket.
///
/// # Errors
/// That of `connect(2)`, with the path: `NotFound`, `ConnectionRefused` if nobody listens.
pub fn connect(path: &Path) -> Result<UnixStream, PathError> {
    through(path, "connect to", |path| UnixStream::connect(path))
}

fn through<T>(
    path: &Path,
    action: &'static str,
    call: impl FnOnce(&Path) -> io::Result<T>,
) -> Result<T, PathError> {
    let fail = |error: io::Error| PathError::new(action, path, error);
    if path.as_os_str().len() <= MAX_DIRECT {
        return call(path).map_err(fail);
    }
    let (_directory, short) = shorten(path).map_err(fail)?;
    call(&short).map_err(fail)
}

/// A short path to the same file, good while the directory's descriptor is open.
fn shorten(path: &Path) -> io::Result<(OwnedFd, PathBuf)> {
    let no_name = || io::Error::new(io::ErrorKind::InvalidInput, "the path has no file name");
    let name: &OsStr = path.file_name().ok_or_else(no_name)?;
    let parent = path.parent().ok_or_else(no_name)?;
    let directory =
        open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name);
    if short.as_os_str().as_bytes().len() > MAX_DIRECT {
        return Err(io::Error::new(
            io::ErrorKind::InvalidFilename,
            format!("its last component has {} bytes: too many for a socket", name.len()),
        ));
    }
    Ok((directory, short))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn round_trip(path: &Path) {
        let listener = bind_listener(path).expect("bind");
        let mut client = connect(path).expect("connect");
        client.write_all(b"hi").expect("write");
        drop(client);
        let mut got = String::new();
        listener.accept().expect("accept").0.read_to_string(&mut got).expect("read");
        assert_eq!(got, "hi");
    }

    #[test]
    fn short_and_long_paths_work() {
        let dir = tempfile::tempdir().expect("a directory");
        round_trip(&dir.path().join("s.sock"));
        let deep = dir.path().join("d".repeat(120)).join("e".repeat(200));
        std::fs::create_dir_all(&deep).expect("deep directory");
        round_trip(&deep.join("api.sock"));
        assert!(deep.join("api.sock").exists());
    }

    #[test]
    fn every_length_around_the_limit_works() {
        let dir = tempfile::tempdir().expect("a directory");
        let deep = dir.path().join("d".repeat(40));
        std::fs::create_dir(&deep).expect("a directory");
        for len in MAX_DIRECT - 2..=MAX_DIRECT + 2 {
            let path = deep.join("n".repeat(len - deep.as_os_str().len() - 1));
            assert_eq!(path.as_os_str().len(), len);
            round_trip(&path);
        }
    }

    #[test]
    fn errors_name_the_whole_path() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("x".repeat(150)).join("api.sock");
        let error = connect(&path).expect_err("no such directory");
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(error.to_string().contains(path.to_str().expect("utf-8")));
        let long_name = dir.path().join("y".repeat(200));
        assert_eq!(bind_listener(&long_name).unwrap_err().kind(), io::ErrorKind::InvalidFilename);
    }
}
