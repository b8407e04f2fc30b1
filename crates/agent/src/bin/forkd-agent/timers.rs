//! Deadlines of the event loop, kept in user space: the earliest is epoll's timeout, so that a timer
//! costs no system call.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Names a timer, to cancel it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct TimerId {
    at: Instant,
    seq: u64,
}

/// Timers that carry a `T`.
pub struct Timers<T> {
    due: BTreeMap<TimerId, T>,
    seq: u64,
}

impl<T> Timers<T> {
    /// None yet.
    pub const fn new() -> Self {
        Self { due: BTreeMap::new(), seq: 0 }
    }

    /// Fires `what` after `delay`. A delay beyond the clock's range never fires.
    pub fn after(&mut self, delay: Duration, what: T) -> Option<TimerId> {
        let at = Instant::now().checked_add(delay)?;
        self.seq += 1;
        let id = TimerId { at, seq: self.seq };
        self.due.insert(id, what);
        Some(id)
    }

    /// Forgets a timer; nothing if it has fired.
    pub fn cancel(&mut self, id: Option<TimerId>) {
        if let Some(id) = id {
            self.due.remove(&id);
        }
    }

    /// How long until the next; `None` if there is none.
    pub fn next(&self) -> Option<Duration> {
        let (id, _) = self.due.first_key_value()?;
        Some(id.at.saturating_duration_since(Instant::now()))
    }

    /// Takes one that is due.
    pub fn pop(&mut self) -> Option<T> {
        let entry = self.due.first_entry()?;
        (entry.key().at <= Instant::now()).then(|| entry.remove())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fire_in_order_once() {
        let mut timers = Timers::new();
        assert_eq!(timers.next(), None);
        timers.after(Duration::from_secs(3600), 'z');
        timers.after(Duration::ZERO, 'a');
        let b = timers.after(Duration::ZERO, 'b');
        timers.after(Duration::ZERO, 'c');
        timers.cancel(b);
        assert_eq!(timers.next(), Some(Duration::ZERO));
        assert_eq!((timers.pop(), timers.pop(), timers.pop()), (Some('a'), Some('c'), None));
        assert!(timers.next().is_some_and(|left| left > Duration::from_secs(3000)));
        assert_eq!(timers.after(Duration::MAX, 'x'), None);
    }
}
