//! Nothing stays behind when a verb fails or is interrupted.
//!
//! A [`Guard`] holds what has to be undone. It runs when it is dropped, which `?` does, and also when
//! SIGINT, SIGTERM or SIGHUP arrives: [`watch_signals`] starts a thread that takes those signals,
//! runs all guards that are alive, newest first, and ends forkd with 128 + signal. Success disarms.

use std::io;
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use forkd_sys::reactor::wait_readable;
use forkd_sys::signal::{SignalFd, SignalSet};

type Action = Box<dyn FnOnce() + Send>;

/// Guards that are alive, oldest first.
static GUARDS: Mutex<Vec<(u64, Action)>> = Mutex::new(Vec::new());

/// A signal is ending this process.
static ENDING: AtomicBool = AtomicBool::new(false);

/// SIGHUP, SIGINT, SIGTERM: signal(7).
const SIGNALS: [i32; 3] = [1, 2, 15];

fn guards() -> MutexGuard<'static, Vec<(u64, Action)>> {
    GUARDS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Something to be undone unless it is disarmed.
#[must_use = "dropping it at once undoes the thing"]
#[derive(Debug)]
pub struct Guard(Option<u64>);

impl Guard {
    /// Runs `undo` on drop or signal.
    pub fn new(undo: impl FnOnce() + Send + 'static) -> Self {
        let mut guards = guards();
        let id = guards.last().map_or(0, |(id, _)| id + 1);
        guards.push((id, Box::new(undo)));
        Self(Some(id))
    }

    /// All went well: nothing is undone.
    pub fn disarm(mut self) {
        if let Some(id) = self.0.take() {
            drop(take(id));
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(undo) = self.0.take().and_then(take) {
            undo();
        }
    }
}

fn take(id: u64) -> Option<Action> {
    let mut guards = guards();
    let at = guards.iter().position(|(other, _)| *other == id)?;
    Some(guards.remove(at).1)
}

/// Takes the signals that end programs, from now on. Call it before other threads exist: they inherit
/// the mask that leaves the signals to this one.
///
/// # Errors
/// No descriptor or thread is to be had.
pub fn watch_signals() -> io::Result<()> {
    let set = SignalSet::of(&SIGNALS)?;
    set.block()?;
    let signals = SignalFd::new(&set)?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        loop {
            match wait_readable(&signals, None).and_then(|_| signals.read()) {
                Ok(Some(received)) => {
                    ENDING.store(true, Ordering::Release);
                    run_all();
                    process::exit(128 + received.signal);
                }
                Ok(None) => {}
                Err(_) => return,
            }
        }
    })?;
    Ok(())
}

/// Lets this process be ended by signals again, and what it starts with it: the inverse of
/// [`watch_signals`] for a process that was started by one that watches.
///
/// # Errors
/// None in practice.
pub fn unblock_signals() -> io::Result<()> {
    SignalSet::of(&SIGNALS)?.unblock().map(drop)
}

/// Never returns if a signal is ending this process: what fails then fails because of that, and the status is
/// the signal's.
pub fn yield_to_signal() {
    while ENDING.load(Ordering::Acquire) {
        thread::park();
    }
}

fn run_all() {
    loop {
        // Not held while an action runs: it may drop a guard itself.
        let next = guards().pop();
        match next {
            Some((_, undo)) => undo(),
            None => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn a_guard_runs_once_unless_disarmed() {
        let runs = Arc::new(AtomicU32::new(0));
        let guard = |n: u32| {
            let runs = runs.clone();
            Guard::new(move || {
                runs.fetch_add(n, Ordering::Relaxed);
            })
        };
        drop(guard(1));
        assert_eq!(runs.load(Ordering::Relaxed), 1);
        guard(10).disarm();
        assert_eq!(runs.load(Ordering::Relaxed), 1);
        let (first, second) = (guard(100), guard(1000));
        drop(first);
        second.disarm();
        assert_eq!(runs.load(Ordering::Relaxed), 101);
    }
}
