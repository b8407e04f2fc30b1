//! Input of a process: a queue before its pipe or terminal, and the clients that wait for it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use forkd_sys::reactor::Interest;
use rustix::io::Errno;

use crate::agent::Agent;
use crate::slab::Key;
use crate::source::Source;

/// Most bytes queued for one process.
const MAX_QUEUE: usize = 8 << 20;

/// Where input goes.
#[derive(Default)]
pub struct Stdin {
    fd: Option<OwnedFd>,
    queue: Vec<u8>,
    /// Bytes that were queued, and that were written, since the start.
    queued: u64,
    written: u64,
    /// Who waits until `written` has come this far; ascending.
    waiters: VecDeque<(u64, Key)>,
    close_when_empty: bool,
    broken: bool,
    watched: bool,
}

/// What became of input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// All written.
    Written,
    /// Some waits for the process to read.
    Queued,
}

/// Input cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum StdinError {
    /// It was not asked for, or has been closed by either side.
    #[error("its standard input is closed")]
    Closed,
    /// The process does not read.
    #[error("{MAX_QUEUE} bytes of input are waiting already")]
    Full,
    /// Writing fails.
    #[error("writing to its standard input: {0}")]
    Write(io::Error),
}

impl Stdin {
    /// Input through this descriptor, which must be non-blocking.
    pub fn new(fd: Option<OwnedFd>) -> Self {
        Self { fd, ..Self::default() }
    }

    /// The descriptor, for a terminal's size.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    /// Writes, or queues what cannot be written now.
    pub fn send(&mut self, data: &[u8]) -> Result<Sent, StdinError> {
        if self.fd.is_none() || self.close_when_empty || self.broken {
            return Err(StdinError::Closed);
        }
        if self.queue.len() + data.len() > MAX_QUEUE {
            return Err(StdinError::Full);
        }
        self.queued += data.len() as u64;
        // What is queued is written when the reactor tells of room, and then those who wait are told: here nobody would be.
        if !self.queue.is_empty() {
            self.queue.extend_from_slice(data);
            return Ok(Sent::Queued);
        }
        let (done, result) = self.write(data);
        match result {
            Ok(Sent::Queued) => self.queue.extend_from_slice(&data[done..]),
            Ok(Sent::Written) => {}
            Err(_) => self.broken = true,
        }
        result
    }

    /// Writes what the descriptor takes of `data`; how much that was is told in any case.
    fn write(&mut self, data: &[u8]) -> (usize, Result<Sent, StdinError>) {
        let Some(fd) = &self.fd else { return (0, Err(StdinError::Closed)) };
        let mut done = 0;
        let result = loop {
            if done == data.len() {
                break Ok(Sent::Written);
            }
            match rustix::io::write(fd, &data[done..]) {
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break Ok(Sent::Queued),
                Err(errno) => break Err(StdinError::Write(errno.into())),
            }
        };
        self.written += done as u64;
        (done, result)
    }

    /// Has `waiter` told when all that is queued now has been written.
    pub fn wait(&mut self, waiter: Key) {
        self.waiters.push_back((self.queued, waiter));
    }

    /// Writes what can be written.
    fn pump(&mut self) -> Result<Sent, StdinError> {
        let mut queue = std::mem::take(&mut self.queue);
        let (done, result) = self.write(&queue);
        queue.drain(..done);
        self.queue = queue;
        if self.queue.is_empty() {
            self.queue = Vec::new();
        }
        if result.is_err() {
            self.broken = true;
            self.queue = Vec::new();
        }
        result
    }

    /// Takes those whose input has been written.
    fn served(&mut self) -> Vec<Key> {
        let count = self.waiters.iter().take_while(|(at, _)| *at <= self.written).count();
        self.waiters.drain(..count).map(|(_, key)| key).collect()
    }

    /// Closes once all is written: [`Agent::watch_stdin`] does.
    pub fn close_after_queue(&mut self) {
        self.close_when_empty = true;
    }

    /// Closes now; returns who waited in vain.
    pub fn close(&mut self) -> Vec<Key> {
        self.fd = None;
        self.queue = Vec::new();
        self.waiters.drain(..).map(|(_, key)| key).collect()
    }
}

impl Agent {
    /// A process can take input again, or has closed its end.
    pub fn stdin_ready(&mut self, key: Key) {
        let Some(process) = self.processes.all.get_mut(key) else { return };
        let pid = process.pid;
        let result = process.stdin.pump();
        let (served, failed) = match result {
            Ok(_) => (process.stdin.served(), Vec::new()),
            Err(_) => (process.stdin.served(), process.stdin.close()),
        };
        self.watch_stdin(key);
        for waiter in served {
            self.input_written(waiter);
        }
        for waiter in failed {
            self.input_failed(waiter, pid);
        }
    }

    /// Watches for room while something is queued, and closes what is to be closed.
    pub fn watch_stdin(&mut self, key: Key) {
        let Some(process) = self.processes.all.get_mut(key) else { return };
        let stdin = &mut process.stdin;
        let Some(fd) = &stdin.fd else { return };
        let wanted = !stdin.queue.is_empty();
        let result = match (wanted, stdin.watched) {
            (true, false) => self.reactor.add(fd, Source::Stdin(key).token(), Interest::WRITE),
            // Also before closing: a terminal's duplicate would keep it in the epoll set.
            (false, true) => self.reactor.remove(fd),
            _ => Ok(()),
        };
        stdin.watched = wanted;
        if stdin.broken || (stdin.close_when_empty && !wanted) {
            stdin.fd = None;
        }
        if let Err(error) = result {
            self.report(&format_args!("cannot watch a process's input: {error}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    #[test]
    fn waiters_are_served_in_order_of_what_was_written() {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        let mut stdin = Stdin::new(Some(writer));
        let key = Key::from_bits;
        assert_eq!(stdin.send(&vec![1; 100_000]).unwrap(), Sent::Queued);
        stdin.wait(key(1));
        assert_eq!(stdin.send(&vec![2; 50_000]).unwrap(), Sent::Queued);
        stdin.wait(key(2));
        stdin.close_after_queue();
        assert!(matches!(stdin.send(b"x"), Err(StdinError::Closed)));
        assert!(stdin.served().is_empty());
        let mut got = Vec::new();
        let mut served = Vec::new();
        while got.len() < 150_000 {
            let mut buf = vec![0; 30_000];
            let n = rustix::io::read(&reader, &mut buf).unwrap();
            got.extend_from_slice(&buf[..n]);
            let _ = stdin.pump();
            served.extend(stdin.served());
        }
        assert_eq!(served, [key(1), key(2)]);
        assert_eq!(got, [vec![1; 100_000], vec![2; 50_000]].concat());
    }

    /// A stream stood still for good: its second message emptied the queue, of which its first was to be told.
    #[test]
    fn input_that_comes_while_others_wait_leaves_it_to_the_reactor_to_tell_them() {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        let mut stdin = Stdin::new(Some(writer));
        assert_eq!(stdin.send(&vec![1; 100_000]).unwrap(), Sent::Queued);
        stdin.wait(Key::from_bits(1));
        let mut buffer = vec![0; 30_000];
        while rustix::io::read(&reader, &mut buffer).is_ok() {}
        assert_eq!(stdin.send(b"x").unwrap(), Sent::Queued);
        assert!(!stdin.queue.is_empty(), "so its room is still watched for");
        stdin.pump().unwrap();
        assert_eq!(stdin.served(), [Key::from_bits(1)]);
    }

    #[test]
    fn a_reader_that_has_gone_is_an_error() {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        drop(reader);
        let mut stdin = Stdin::new(Some(writer));
        stdin.wait(Key::from_bits(1));
        assert!(matches!(stdin.send(b"x"), Err(StdinError::Write(_))));
        assert!(matches!(stdin.send(b"x"), Err(StdinError::Closed)));
        assert_eq!(stdin.close(), [Key::from_bits(1)]);
    }
}
