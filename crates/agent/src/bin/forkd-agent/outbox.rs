//! What is to be sent on a connection.
//!
//! Pieces of a chunked body are gathered into one chunk until the buffer is flushed, so that a turn of
//! the event loop costs one write however many events it brought. The chunk's size is written with
//! leading zeros into room that was kept for it.

use std::io;
use std::os::fd::AsFd;

use rustix::io::Errno;

/// Room for a chunk's size: eight hex digits and a line's end.
const SIZE_LINE: usize = 10;
/// From this many unsent bytes on, whoever produces them shall pause.
pub const HIGH: usize = 256 << 10;
/// Below this many, it may go on.
pub const LOW: usize = 64 << 10;
/// A buffer that grew beyond this is given back when it is empty and no body is being sent.
const KEEP: usize = 64 << 10;

/// How a flush ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flushed {
    /// All is sent.
    All,
    /// The socket takes no more now.
    Blocked,
}

/// Bytes to be sent, the oldest first.
#[derive(Default)]
pub struct Outbox {
    bytes: Vec<u8>,
    sent: usize,
    /// Where the open chunk's size line is.
    chunk: Option<usize>,
    /// A chunked body has begun and not ended: the buffer will be needed again.
    streaming: bool,
}

impl Outbox {
    /// Bytes not yet sent.
    pub fn len(&self) -> usize {
        self.bytes.len() - self.sent
    }

    /// Appends what is no piece of a chunked body.
    pub fn raw(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        self.close_chunk();
        write(&mut self.bytes);
    }

    /// Appends a piece of a chunked body. `write` must append something.
    pub fn piece(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        self.streaming = true;
        if self.chunk.is_none() {
            self.chunk = Some(self.bytes.len());
            self.bytes.extend_from_slice(b"00000000\r\n");
        }
        write(&mut self.bytes);
    }

    /// Appends the end of a chunked body.
    pub fn end(&mut self) {
        self.raw(|out| out.extend_from_slice(b"0\r\n\r\n"));
        self.streaming = false;
    }

    fn close_chunk(&mut self) {
        let Some(at) = self.chunk.take() else { return };
        let size = self.bytes.len() - at - SIZE_LINE;
        let digits = format!("{size:08x}");
        self.bytes[at..at + digits.len()].copy_from_slice(digits.as_bytes());
        self.bytes.extend_from_slice(b"\r\n");
    }

    /// Sends as much as the socket takes.
    ///
    /// # Errors
    ///
    /// The connection is broken.
    pub fn flush(&mut self, fd: impl AsFd) -> io::Result<Flushed> {
        self.close_chunk();
        while self.sent < self.bytes.len() {
            let unsent = &self.bytes[self.sent..];
            match rustix::io::write(&fd, unsent) {
                Ok(n) => self.sent += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.bytes.drain(..self.sent);
                    self.sent = 0;
                    return Ok(Flushed::Blocked);
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        if self.bytes.capacity() > KEEP && !self.streaming {
            self.bytes = Vec::new();
        }
        self.bytes.clear();
        self.sent = 0;
        Ok(Flushed::All)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn pieces_of_one_flush_are_one_chunk() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut out = Outbox::default();
        out.raw(|b| b.extend_from_slice(b"head\r\n"));
        out.piece(|b| b.extend_from_slice(b"abc"));
        out.piece(|b| b.extend_from_slice(&[b'd'; 14]));
        assert_eq!(out.flush(&near).unwrap(), Flushed::All);
        out.piece(|b| b.push(b'x'));
        out.end();
        assert_eq!(out.flush(&near).unwrap(), Flushed::All);
        drop(near);
        let mut got = String::new();
        far.read_to_string(&mut got).unwrap();
        let want =
            format!("head\r\n00000011\r\nabc{}\r\n00000001\r\nx\r\n0\r\n\r\n", "d".repeat(14));
        assert_eq!(got, want);
    }

    #[test]
    fn what_the_socket_does_not_take_stays() {
        let (near, mut far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let mut out = Outbox::default();
        out.raw(|b| b.resize(8 << 20, 7));
        assert_eq!(out.flush(&near).unwrap(), Flushed::Blocked);
        let reader = std::thread::spawn(move || {
            let mut sum = 0;
            let mut buf = vec![0; 1 << 16];
            while let Ok(n) = far.read(&mut buf) {
                if n == 0 {
                    break;
                }
                assert!(buf[..n].iter().all(|b| *b == 7));
                sum += n;
            }
            sum
        });
        near.set_nonblocking(false).unwrap();
        assert_eq!(out.flush(&near).unwrap(), Flushed::All);
        assert_eq!(out.len(), 0);
        drop(near);
        assert_eq!(reader.join().unwrap(), 8 << 20);
    }
}
