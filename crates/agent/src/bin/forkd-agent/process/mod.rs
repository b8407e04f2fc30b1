//! Processes started for clients: their output to those who listen, their input, their end.
//!
//! ```text
//! start ──> running ──(SIGCHLD)──> ended ──(what it wrote is read)──> told ──> forgotten
//!                                                                      └─ lingering: somebody
//!                                                                         still has its pipes
//! ```
//!
//! Output goes to every subscribed stream; with none it is read and dropped, so that a command
//! outlives its client. If a subscriber does not keep up, the pipes are left unread until it has, and
//! the process waits. A process that has ended but whose pipes are held by others (a server started
//! in the background) lingers: what they write is dropped, rather than their being killed by SIGPIPE.

pub mod input;
pub mod rpc;
pub mod start;
mod stdin;

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};

use forkd_agent::protocol::process::{EndEvent, ProcessConfig};
use forkd_agent::protocol::raw::Channel;
use forkd_sys::reactor::{Interest, Readiness};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::WaitStatus;

use crate::agent::Agent;
use crate::kill;
use crate::outbox::{HIGH, LOW};
use crate::slab::{Key, Slab};
use crate::source::Source;
use crate::timers::TimerId;
use stdin::Stdin;

/// Most processes at once, lingering ones included.
const MAX_PROCESSES: usize = 512;
/// Most bytes read of a process that has ended, before its end is told: others may go on writing.
const MAX_DRAIN: usize = 2 << 20;
/// Bytes read at once from which on a process is taken to go on writing: what the C library's buffers hold.
const BUSY: usize = 4096;
/// How many ended processes are remembered, for clients that connect late.
const REMEMBERED: usize = 256;

/// All processes.
#[derive(Default)]
pub struct Processes {
    all: Slab<Process>,
    by_pid: HashMap<i32, Key>,
    ended: VecDeque<Ended>,
}

/// One process.
struct Process {
    pid: i32,
    tag: Option<String>,
    config: ProcessConfig,
    /// Input: a pipe's end or the terminal.
    stdin: Stdin,
    /// Output and error; the terminal is in the first place.
    outputs: [Option<OwnedFd>; 2],
    terminal: bool,
    /// Connections with a [`rpc::Stream`] on it.
    subscribers: Vec<Key>,
    /// It wrote much lately.
    busy: bool,
    /// The pipes are not read, because a subscriber does not keep up.
    paused: bool,
    deadline: Option<TimerId>,
    timed_out: bool,
    /// It has ended like this, but output may be left to read.
    end: Option<EndEvent>,
    /// Bytes read since then.
    drained: usize,
    lingering: bool,
}

/// What is remembered of a process that has ended.
struct Ended {
    pid: i32,
    tag: Option<String>,
    end: EndEvent,
}

fn output_source(key: Key, index: usize) -> Source {
    if index == 0 { Source::Stdout(key) } else { Source::Stderr(key) }
}

/// In Go's words, which E2B's clients know.
fn end_event(status: WaitStatus) -> EndEvent {
    let (exit_code, status_text) = match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => (code, format!("exit status {code}")),
        (_, Some(signal)) => (-1, format!("signal: {}", signal_name(signal))),
        _ => (-1, "unknown".to_owned()),
    };
    EndEvent {
        exit_code,
        exited: status.exited(),
        error: (exit_code != 0).then(|| status_text.clone()),
        status: status_text,
    }
}

/// The words of Linux for its signals, as Go's `syscall.Signal` prints them.
fn signal_name(signal: i32) -> String {
    let name = match signal {
        libc::SIGHUP => "hangup",
        libc::SIGINT => "interrupt",
        libc::SIGQUIT => "quit",
        libc::SIGILL => "illegal instruction",
        libc::SIGTRAP => "trace/breakpoint trap",
        libc::SIGABRT => "aborted",
        libc::SIGBUS => "bus error",
        libc::SIGFPE => "floating point exception",
        libc::SIGKILL => "killed",
        libc::SIGUSR1 => "user defined signal 1",
        libc::SIGSEGV => "segmentation fault",
        libc::SIGUSR2 => "user defined signal 2",
        libc::SIGPIPE => "broken pipe",
        libc::SIGALRM => "alarm clock",
        libc::SIGTERM => "terminated",
        other => return format!("signal {other}"),
    };
    name.to_owned()
}

impl Agent {
    /// Readiness of a process's output.
    pub fn output_ready(&mut self, key: Key, index: usize, ready: Readiness) {
        if ready.readable {
            if self.processes.all.get(key).is_some_and(|process| process.busy) {
                // The kernel wakes us for the first bytes in the pipe. Let it be filled.
                std::thread::yield_now();
            }
            self.read_output(key, index, ready.hangup);
        }
    }

    /// Reads an output once and passes it on. `hangup`: nobody can write any more, so that a short
    /// read is the last.
    fn read_output(&mut self, key: Key, index: usize, hangup: bool) {
        let Some(process) = self.processes.all.get_mut(key) else { return };
        let Some(fd) = &process.outputs[index] else { return };
        let n = match rustix::io::read(fd, &mut *self.scratch) {
            Ok(n) => n,
            Err(Errno::INTR | Errno::AGAIN) => return,
            // EIO of a terminal: no process has it open.
            Err(_) => 0,
        };
        process.busy = n >= BUSY;
        if process.end.is_some() {
            process.drained += n;
        }
        let closed = n == 0 || (hangup && !process.terminal && n < self.scratch.len());
        if closed {
            if process.terminal && !process.paused {
                // Its input is a duplicate, so that closing does not take it out of the epoll set.
                let _ = self.reactor.remove(fd);
            }
            process.outputs[index] = None;
        }
        if n > 0 {
            self.publish(key, index, n);
        }
        if closed {
            self.forget_if_over(key);
        }
    }

    /// Gives the first `n` bytes of the scratch buffer to every subscriber.
    fn publish(&mut self, key: Key, index: usize, n: usize) {
        let Some(process) = self.processes.all.get_mut(key) else { return };
        let channel = match (process.terminal, index) {
            (true, _) => Channel::Terminal,
            (false, 0) => Channel::Stdout,
            (false, _) => Channel::Stderr,
        };
        let mut full = false;
        for subscriber in &process.subscribers {
            if let Some(conn) = self.conns.get_mut(*subscriber) {
                rpc::send_data(conn, channel, &self.scratch[..n]);
                full |= conn.out.len() > HIGH;
            }
        }
        for subscriber in process.subscribers.clone() {
            self.mark_dirty(subscriber);
        }
        if full {
            self.process_pause(key);
        }
    }

    fn process_pause(&mut self, key: Key) {
        let Some(process) = self.processes.all.get_mut(key) else { return };
        if process.paused {
            return;
        }
        process.paused = true;
        let mut failed = None;
        for fd in process.outputs.iter().flatten() {
            // With no interest epoll would still tell of hang-up, again and again.
            failed = self.reactor.remove(fd).err().or(failed);
        }
        if let Some(error) = failed {
            self.report(&format_args!("cannot pause a process's output: {error}"));
        }
    }

    /// Reads a process's output again, if it was paused and all subscribers have room.
    pub fn process_resume(&mut self, key: Key) {
        let Some(process) = self.processes.all.get_mut(key) else { return };
        let roomy = |conn: &Key| self.conns.get(*conn).is_none_or(|conn| conn.out.len() <= LOW);
        if !process.paused || !process.subscribers.iter().all(roomy) {
            return;
        }
        process.paused = false;
        let mut failed = None;
        for (index, fd) in process.outputs.iter().enumerate() {
            if let Some(fd) = fd {
                let token = output_source(key, index).token();
                failed = self.reactor.add(fd, token, Interest::READ).err().or(failed);
            }
        }
        if let Some(error) = failed {
            self.report(&format_args!("cannot resume a process's output: {error}"));
        }
        self.drain_if_ended(key);
    }

    /// A child has ended; false if it is none of these processes.
    pub fn process_exited(&mut self, pid: i32, status: WaitStatus) -> bool {
        let Some(key) = self.processes.by_pid.get(&pid).copied() else { return false };
        if let Some(process) = self.processes.all.get_mut(key) {
            process.end = Some(end_event(status));
            self.timers.cancel(process.deadline.take());
        }
        self.drain_if_ended(key);
        true
    }

    /// Reads what an ended process has left, as far as subscribers have room, and then tells its end.
    fn drain_if_ended(&mut self, key: Key) {
        loop {
            let Some(process) = self.processes.all.get(key) else { return };
            if process.end.is_none() || process.lingering || process.paused {
                return;
            }
            if process.drained > MAX_DRAIN {
                break;
            }
            let Some((index, hangup)) = readable(&process.outputs) else { break };
            self.read_output(key, index, hangup);
        }
        self.process_over(key);
    }

    /// Tells a process's end, and forgets it unless somebody still has its pipes.
    fn process_over(&mut self, key: Key) {
        let Some(process) = self.processes.all.get_mut(key) else { return };
        process.lingering = true;
        let mut end = process.end.clone().unwrap_or_default();
        if process.timed_out {
            end.error = Some(format!("{}: it ran for as long as it might", end.status));
        }
        let (pid, timed_out) = (process.pid, process.timed_out);
        let tag = process.tag.take();
        let subscribers = std::mem::take(&mut process.subscribers);
        let waiters = process.stdin.close();
        if process.terminal {
            // Hanging up the terminal is how those who still use it learn that it has gone.
            process.outputs[0] = None;
        }
        self.processes.by_pid.remove(&pid);
        for waiter in waiters {
            self.input_failed(waiter, pid);
        }
        for subscriber in subscribers {
            self.stream_ends(subscriber, &end, timed_out);
        }
        let ended = &mut self.processes.ended;
        if ended.len() >= REMEMBERED {
            ended.pop_front();
        }
        ended.push_back(Ended { pid, tag, end });
        self.forget_if_over(key);
    }

    fn forget_if_over(&mut self, key: Key) {
        let over = |p: &Process| p.lingering && p.outputs.iter().all(Option::is_none);
        if self.processes.all.get(key).is_some_and(over) {
            self.processes.all.remove(key);
        }
    }

    /// A process has run for as long as its client allowed.
    pub fn process_deadline(&mut self, key: Key) {
        if let Some(process) = self.processes.all.get_mut(key) {
            process.timed_out = true;
            // Fails only if it has just ended, of which we shall be told.
            let _ = kill::group(process.pid, libc::SIGKILL);
        }
    }

    /// Ends all processes, on the way to shutting down.
    pub fn kill_processes(&self, signal: i32) {
        for (_, process) in self.processes.all.iter() {
            if process.end.is_none() {
                // As above.
                let _ = kill::group(process.pid, signal);
            }
        }
    }
}

/// An output that has something to read, or has ended; and whether its writers have gone.
fn readable(outputs: &[Option<OwnedFd>; 2]) -> Option<(usize, bool)> {
    for (index, output) in outputs.iter().enumerate() {
        let Some(fd) = output else { continue };
        let fd = fd.as_fd();
        let mut polled = [PollFd::new(&fd, PollFlags::IN)];
        if poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(1) {
            return Some((index, polled[0].revents().contains(PollFlags::HUP)));
        }
    }
    None
}
