//! For this crate's tests: forking without getting in each other's way.
//!
//! A forked child has copies of all descriptors, those of tests on other threads too, and so keeps
//! their locks and pipes alive. Tests that fork, and those that would be misled, take turns.

#![allow(unsafe_code)]

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::fork::{Child, Fork, exit_now, fork};

static TURN: Mutex<()> = Mutex::new(());

/// Waits for this test's turn, which lasts until the result is dropped.
pub fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Forks; the child runs `body` and ends with what it returns. `body` must not panic, print, or take
/// locks that other threads may have.
pub fn fork_with(body: impl FnOnce() -> i32) -> Child {
    // SAFETY: the child makes system calls and allocations, and takes no lock of another thread.
    match unsafe { fork() }.expect("fork") {
        Fork::Parent(child) => child,
        Fork::Child => {
            // A child whose test has failed must not stay behind.
            let tied = crate::signal::set_pdeathsig(Some(rustix::process::Signal::KILL));
            exit_now(if tied.is_ok() { body() } else { 127 })
        }
    }
}
