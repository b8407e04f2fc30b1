//! Being on the CPU when the guest waits.
//!
//! vCPUs keep every CPU busy. A handler that has to wait for its turn, or a bulk copier that loses the
//! CPU while it has pages claimed, holds up a vCPU for as long as the scheduler's slices are: several
//! milliseconds, where the work takes 10 microseconds. So both are real-time threads (`SCHED_FIFO`, its
//! lowest priority) for just that work, if this process may have such (`CAP_SYS_NICE`, RLIMIT_RTPRIO);
//! if not, they ask for the shortest slices.

#![allow(unsafe_code)]

use std::time::Duration;

/// The shortest slice that the kernel gives.
const SLICE: Duration = Duration::from_micros(100);

fn set(policy: libc::c_int, priority: libc::c_int) -> bool {
    let parameters = libc::sched_param { sched_priority: priority };
    // SAFETY: the parameters live across the call; 0 means the calling thread (sched(7)).
    unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) == 0 }
}

/// How the calling thread can be quick.
#[derive(Debug, Clone, Copy)]
pub struct Urgency {
    real_time: bool,
}

impl Urgency {
    /// Finds out, and asks for short slices.
    pub fn of_this_thread() -> Self {
        // Linux before 6.12 ignores it.
        let _shorter = forkd_sys::sched::set_slice(SLICE);
        let urgency = Self { real_time: set(libc::SCHED_FIFO, 1) };
        urgency.relax();
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
