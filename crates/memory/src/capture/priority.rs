//! The writer's threads and the CPU.
//!
//! vCPUs keep every CPU busy, and the scheduler takes a CPU away at a tick, every 4 ms (`HZ` 250). So a
//! fault handler that has to wait for its turn holds up a vCPU for that long, for work of 10
//! microseconds; so does a bulk copier that loses the CPU in the middle of a chunk that it has claimed,
//! and a bulk copier that gets a CPU takes it from a vCPU for as long.
//!
//! Hence: whoever has a page that a vCPU may wait for is a real-time thread ([`Urgency`]), the handler
//! always, as it runs only when one waits; the bulk copier for the 50 microseconds of a claim. And the
//! bulk copier gives the CPU away of its own accord between claims, every half millisecond ([`Turns`]):
//! as it is not charged for its real-time work it would starve the guest else.

#![allow(unsafe_code)]

use std::time::{Duration, Instant};

/// How long the bulk copier keeps a CPU that others want.
const TURN: Duration = Duration::from_micros(500);
/// The shortest slice that the kernel gives.
const SLICE: Duration = Duration::from_micros(100);

fn set(policy: libc::c_int, priority: libc::c_int) -> bool {
    let parameters = libc::sched_param { sched_priority: priority };
    // SAFETY: the parameters live across the call; 0 means the calling thread (sched(7)).
    unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) == 0 }
}

/// Whether the calling thread may be real-time (`SCHED_FIFO`, its lowest priority): with
/// `CAP_SYS_NICE`, or by RLIMIT_RTPRIO. If not it has short slices, which come sooner, and the rest
/// of this does nothing.
#[derive(Debug, Clone, Copy)]
pub struct Urgency {
    real_time: bool,
}

impl Urgency {
    /// Finds out. The thread is an ordinary one afterwards.
    pub fn of_this_thread() -> Self {
        let urgency = Self { real_time: set(libc::SCHED_FIFO, 1) };
        urgency.relax();
        if !urgency.real_time {
            // Linux before 6.12 ignores it.
            let _shorter = forkd_sys::sched::set_slice(SLICE);
        }
        urgency
    }

    /// From now on no ordinary thread takes the CPU away.
    pub fn hurry(self) {
        if self.real_time {
            set(libc::SCHED_FIFO, 1);
        }
    }

    /// An ordinary thread again.
    pub fn relax(self) {
        if self.real_time {
            set(libc::SCHED_OTHER, 0);
        }
    }
}

/// A thread that takes turns with whoever wants its CPU.
#[derive(Debug)]
pub struct Turns(Instant);

impl Turns {
    /// The first turn.
    pub fn new() -> Self {
        Self(Instant::now())
    }

    /// A moment at which the CPU may go; it goes if the turn is over.
    pub fn pause(&mut self) {
        if self.0.elapsed() >= TURN {
            std::thread::yield_now();
            self.0 = Instant::now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_hurries_and_relaxes() {
        std::thread::spawn(|| {
            // SAFETY: takes a number; 0 means the calling thread.
            let policy = || unsafe { libc::sched_getscheduler(0) };
            let urgency = Urgency::of_this_thread();
            assert_eq!(policy(), libc::SCHED_OTHER);
            urgency.hurry();
            let quick = if urgency.real_time { libc::SCHED_FIFO } else { libc::SCHED_OTHER };
            assert_eq!(policy(), quick);
            urgency.relax();
            assert_eq!(policy(), libc::SCHED_OTHER);
        })
        .join()
        .expect("join");
    }
}
