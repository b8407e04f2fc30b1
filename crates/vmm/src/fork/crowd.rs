//! Children that wake up a few at a time.
//!
//! Where guest kernel mode is emulated, a guest that shares its CPU with a crowd gets little done: each time
//! it gets the CPU, a timer tick waits, which takes much of its time slice to emulate. A hundred children that
//! wake up together then take several times the CPU that they take one after the other. So the children of
//! one request share a pipe with a few tokens; each takes one before its vCPUs run, and puts it back when
//! its agent has acknowledged (or failed). A token dies with a child that is killed meanwhile: whoever has
//! waited for [`PATIENCE`] goes without one.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use forkd_sys::reactor::wait_readable;

/// Longest wait for a token.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The tokens of one request.
#[derive(Debug)]
pub struct Crowd {
    reader: io::PipeReader,
    writer: io::PipeWriter,
}

impl Crowd {
    /// `tokens` tokens.
    ///
    /// # Errors
    /// No pipe to be had.
    pub fn new(tokens: usize) -> io::Result<Self> {
        let (reader, mut writer) = io::pipe()?;
        forkd_sys::fds::set_nonblocking(&reader, true)?;
        writer.write_all(&vec![0; tokens])?;
        Ok(Self { reader, writer })
    }

    /// The same tokens once more, for one child.
    ///
    /// # Errors
    /// No fds to be had.
    #[cfg(test)]
    fn share(&self) -> io::Result<Self> {
        Ok(Self { reader: self.reader.try_clone()?, writer: self.writer.try_clone()? })
    }

    /// The pipe's ends, which a child keeps.
    pub fn fds(&self) -> (&io::PipeReader, &io::PipeWriter) {
        (&self.reader, &self.writer)
    }

    /// Waits for a token, [`PATIENCE`] at most.
    ///
    /// # Errors
    /// The pipe is broken.
    pub fn enter(self) -> io::Result<Option<Token>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match (&self.reader).read(&mut [0]) {
                Ok(1) => return Ok(Some(Token(self.writer))),
                Ok(_) => return Ok(None),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !wait_readable(&self.reader, Some(left))? {
                return Ok(None);
            }
        }
    }
}

/// The right to wake up; given back when dropped.
#[derive(Debug)]
pub struct Token(io::PipeWriter);

impl Drop for Token {
    fn drop(&mut self) {
        // If all readers are gone, nobody waits for it.
        let _ = self.0.write(&[0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_goes_from_one_to_the_next() {
        let crowd = Crowd::new(1).unwrap();
        let first = crowd.share().unwrap().enter().unwrap().unwrap();
        let waiting = crowd.share().unwrap();
        let next = std::thread::spawn(move || waiting.enter().unwrap().is_some());
        assert!(!next.is_finished());
        drop(first);
        assert!(next.join().unwrap());
        assert!(crowd.enter().unwrap().is_some(), "the second gave it back");
    }
}
