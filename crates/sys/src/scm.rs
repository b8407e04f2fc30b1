//! Passing descriptors between processes over a Unix stream socket (`SCM_RIGHTS`, unix(7)).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Most descriptors of one message: the kernel's `SCM_MAX_FD`.
pub const MAX_FDS: usize = 253;

/// Sends descriptors along with at least one byte of `data`; returns how many bytes went. The
/// descriptors go with the first byte, so what is left of `data` is sent by a plain write.
///
/// # Errors
/// `InvalidInput` for no data or more than [`MAX_FDS`] descriptors; that of `sendmsg(2)`.
pub fn send_fds(socket: &UnixStream, data: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    if data.is_empty() || fds.len() > MAX_FDS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "{} descriptors with {} bytes; at most {MAX_FDS} go, with at least one byte",
                fds.len(),
                data.len()
            ),
        ));
    }
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    loop {
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::other("the descriptors do not fit a control message"));
        }
        match sendmsg(socket, &[IoSlice::new(data)], &mut control, SendFlags::NOSIGNAL) {
            Ok(sent) => return Ok(sent),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Receives up to `buffer.len()` bytes and the descriptors that came with them, close-on-exec.
/// 0 bytes mean end of stream.
///
/// # Errors
/// That of `recvmsg(2)`; `InvalidData` if descriptors were lost because there were more than
/// [`MAX_FDS`] or this process has no room for them. What did arrive is closed then.
pub fn recv_fds(socket: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    loop {
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(buffer)];
        let message = match recvmsg(socket, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(message) => message,
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        let mut fds = Vec::new();
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = part {
                fds.extend(rights);
            }
        }
        if message.flags.contains(ReturnFlags::CTRUNC) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "some of the descriptors sent were lost: too many, or no room for them here",
            ));
        }
        return Ok((message.bytes, fds));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    #[test]
    fn a_file_travels() {
        let (near, far) = UnixStream::pair().expect("a pair");
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(b"inside").expect("write");
        assert_eq!(send_fds(&near, b"take", &[file.as_fd(), near.as_fd()]).expect("send"), 4);
        let mut data = [0u8; 16];
        let (count, fds) = recv_fds(&far, &mut data).expect("receive");
        assert_eq!((&data[..count], fds.len()), (&b"take"[..], 2));
        let mut received = std::fs::File::from(fds.into_iter().next().expect("a descriptor"));
        received.rewind().expect("rewind");
        let mut text = String::new();
        received.read_to_string(&mut text).expect("read");
        assert_eq!(text, "inside");
    }

    #[test]
    fn the_most_fit_and_no_more() {
        let (near, far) = UnixStream::pair().expect("a pair");
        let file = tempfile::tempfile().expect("a file");
        let many = vec![file.as_fd(); MAX_FDS];
        send_fds(&near, b"x", &many).expect("send");
        assert_eq!(recv_fds(&far, &mut [0]).expect("receive").1.len(), MAX_FDS);
        assert!(send_fds(&near, b"x", &vec![file.as_fd(); MAX_FDS + 1]).is_err());
        assert!(send_fds(&near, b"", &[file.as_fd()]).is_err());
    }

    #[test]
    fn plain_bytes_and_end_of_stream() {
        let (near, far) = UnixStream::pair().expect("a pair");
        send_fds(&near, b"x", &[]).expect("send");
        assert_eq!(recv_fds(&far, &mut [0]).expect("receive").1.len(), 0);
        drop(near);
        assert_eq!(recv_fds(&far, &mut [0]).expect("receive").0, 0);
    }
}
