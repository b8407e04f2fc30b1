//! Where the console's output is kept: a file of bounded size, and the newest bytes in memory.
//!
//! The guest may print without end. When the file would grow past its limit, its newest half is moved to
//! its front and the rest cut off, so that printing costs a constant factor and the newest output
//! is always there. The file gets whole lines, or pieces of 1 KiB: one system call a line, not a byte.
//!
//! Clones are the same log. After fork(2) the file is the source's: a child that finds itself in another
//! process than the one that opened it lets go of it, and holds what its guest prints until it has a file
//! of its own ([`ConsoleLog::reopen`]).

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use forkd_sys::PathError;

/// Usual limit of the file, in bytes.
pub const DEFAULT_FILE_LIMIT: u64 = 1 << 20;
/// Bytes kept in memory.
pub const TAIL_LEN: usize = 64 * 1024;
/// Bytes that wait for the end of their line.
const PENDING_LEN: usize = 1024;
/// Least limit of a file: room for some lines.
const MIN_FILE_LIMIT: u64 = 4096;

/// A bounded log.
#[derive(Debug, Clone)]
pub struct ConsoleLog(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    /// The process that the file belongs to.
    pid: u32,
    /// This process has not opened its own file yet.
    awaits_file: bool,
    file: Option<File>,
    file_len: u64,
    limit: u64,
    /// Output that is not in the file yet.
    pending: Vec<u8>,
    tail: VecDeque<u8>,
    bytes: u64,
    lost: u64,
}

impl ConsoleLog {
    /// A log without a file.
    pub fn in_memory() -> Self {
        Self::with_file(None, DEFAULT_FILE_LIMIT)
    }

    /// A log into a new or emptied file at `path`, which takes at most `limit` bytes (at least 4096).
    ///
    /// # Errors
    /// That of opening the file.
    pub fn create(path: &Path, limit: u64) -> Result<Self, PathError> {
        Ok(Self::with_file(Some(open(path)?), limit))
    }

    fn with_file(file: Option<File>, limit: u64) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            pid: std::process::id(),
            awaits_file: false,
            file,
            file_len: 0,
            limit: limit.max(MIN_FILE_LIMIT),
            pending: Vec::with_capacity(PENDING_LEN),
            tail: VecDeque::new(),
            bytes: 0,
            lost: 0,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Goes on in a new file at `path`, for the child of a fork. What was printed before the fork stays in
    /// memory only.
    ///
    /// # Errors
    /// That of opening the file; then the log has no file.
    pub fn reopen(&self, path: &Path) -> Result<(), PathError> {
        let mut inner = self.lock();
        inner.let_go_of_the_sources();
        inner.awaits_file = false;
        inner.file = None;
        inner.file_len = 0;
        inner.file = Some(open(path)?);
        inner.write_pending();
        Ok(())
    }

    /// The file's descriptor: what the child of a fork keeps open until it has its own.
    pub fn raw_fd(&self) -> Option<std::os::fd::RawFd> {
        use std::os::fd::AsRawFd;
        self.lock().file.as_ref().map(File::as_raw_fd)
    }

    /// Writes an unfinished line to the file.
    pub fn flush(&self) {
        let mut inner = self.lock();
        inner.let_go_of_the_sources();
        inner.write_pending();
    }

    /// The newest output, at most [`TAIL_LEN`] bytes.
    pub fn tail(&self) -> Vec<u8> {
        self.lock().tail.iter().copied().collect()
    }

    /// The newest `count` lines as text, without control characters: for error messages.
    pub fn last_lines(&self, count: usize) -> String {
        let tail = self.tail();
        let text = String::from_utf8_lossy(&tail);
        let clean = |line: &str| -> String {
            line.chars().filter(|c| !c.is_control() || *c == '\t').collect()
        };
        let lines: Vec<String> =
            text.lines().map(clean).filter(|line| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(count)..].join("\n")
    }

    /// Bytes printed, and bytes that the file lost (disk full).
    pub fn counters(&self) -> (u64, u64) {
        let inner = self.lock();
        (inner.bytes, inner.lost)
    }
}

fn open(path: &Path) -> Result<File, PathError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .map_err(|e| PathError::new("open the console log", path, e))
}

impl Inner {
    /// In the child of a fork: the file, and the line that was begun, are the source's.
    fn let_go_of_the_sources(&mut self) {
        let pid = std::process::id();
        if self.pid != pid {
            self.pid = pid;
            self.awaits_file = self.file.take().is_some();
            self.file_len = 0;
            self.pending.clear();
        }
    }

    fn write_pending(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        if self.awaits_file {
            // The newest are kept.
            let excess = self.pending.len().saturating_sub(TAIL_LEN);
            self.pending.drain(..excess);
            self.lost += excess as u64;
            return;
        }
        let len = self.pending.len() as u64;
        if self.append().is_err() {
            // The console must go on when the disk is full.
            self.lost += len;
        }
        self.pending.clear();
    }

    fn append(&mut self) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let len = self.pending.len() as u64;
        if self.file_len + len > self.limit {
            let keep = (self.limit / 2).min(self.file_len);
            let mut newest = vec![0; keep as usize];
            file.read_exact_at(&mut newest, self.file_len - keep)?;
            // From a line's beginning on, if there is one.
            let start = newest.iter().position(|&b| b == b'\n').map_or(0, |at| at + 1);
            let newest = &newest[start..];
            file.write_all_at(newest, 0)?;
            file.set_len(newest.len() as u64)?;
            self.file_len = newest.len() as u64;
        }
        file.write_all_at(&self.pending, self.file_len)?;
        self.file_len += len;
        Ok(())
    }
}

impl Write for ConsoleLog {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut inner = self.lock();
        inner.let_go_of_the_sources();
        for &byte in data {
            if inner.tail.len() == TAIL_LEN {
                inner.tail.pop_front();
            }
            inner.tail.push_back(byte);
            inner.pending.push(byte);
            if byte == b'\n' || inner.pending.len() >= PENDING_LEN {
                inner.write_pending();
            }
        }
        inner.bytes += data.len() as u64;
        Ok(data.len())
    }

    /// Does nothing: the UART flushes each byte. See [`ConsoleLog::flush`] of the log itself.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_is_bounded_and_keeps_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut log = ConsoleLog::create(&path, 8192).unwrap();
        for n in 0..5000 {
            log.write_all(format!("line {n}\n").as_bytes()).unwrap();
            assert!(std::fs::metadata(&path).unwrap().len() <= 8192);
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.ends_with("line 4998\nline 4999\n"));
        assert!(text.starts_with("line "), "{:?}", &text[..20]);
        let numbers: Vec<u32> =
            text.lines().map(|l| l.trim_start_matches("line ").parse().unwrap()).collect();
        assert!(numbers.windows(2).all(|w| w[1] == w[0] + 1), "no line is lost in between");
        assert_eq!(log.last_lines(2), "line 4998\nline 4999");
    }

    #[test]
    fn a_child_goes_on_in_its_own_file() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let mut log = ConsoleLog::create(&a, 8192).unwrap();
        log.write_all(b"before\nunfinished").unwrap();
        // As if forked: another process has opened the file.
        log.lock().pid = 0;
        log.write_all(b" line\nearly\n").unwrap();
        assert_eq!(std::fs::read(&a).unwrap(), b"before\n", "it is the source's");
        log.reopen(&b).unwrap();
        log.write_all(b"after\n").unwrap();
        assert_eq!(std::fs::read(&a).unwrap(), b"before\n");
        assert_eq!(std::fs::read(&b).unwrap(), b" line\nearly\nafter\n");
        assert_eq!(log.tail(), b"before\nunfinished line\nearly\nafter\n");
    }

    #[test]
    fn what_waits_for_a_file_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let mut log = ConsoleLog::create(&a, 1 << 20).unwrap();
        log.lock().pid = 0;
        for n in 0..20_000 {
            log.write_all(format!("{n:09}\n").as_bytes()).unwrap();
        }
        assert!(log.lock().pending.len() <= TAIL_LEN);
        log.reopen(&b).unwrap();
        let text = std::fs::read_to_string(&b).unwrap();
        assert!(text.len() <= TAIL_LEN && text.ends_with("000019999\n"));
    }

    #[test]
    fn full_disk_is_counted_and_not_fatal() {
        let mut log = ConsoleLog::create(Path::new("/dev/full"), 8192).unwrap();
        log.write_all(b"hello\nworld").unwrap();
        log.flush();
        assert_eq!(log.counters(), (11, 11));
        assert_eq!(log.tail(), b"hello\nworld");
    }

    #[test]
    fn control_characters_do_not_reach_error_messages() {
        let mut log = ConsoleLog::in_memory();
        log.write_all(b"ok\r\n\x1b[31mred\x07\r\n\n\xff\n").unwrap();
        assert_eq!(log.last_lines(9), "ok\n[31mred\n\u{fffd}");
    }
}
