//! Waits until a snapshot that is being written is complete or has failed.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;

use crate::SnapshotError;
use crate::names::check_tag;
use crate::store::{Snapshot, Store};

/// A commit, a deletion and a failure that is told wake the waiter at once. That a writer died is seen
/// by its lock alone, of which the kernel tells nobody: so often it is looked at.
const LOOK_AT_LOCK: Duration = Duration::from_millis(100);

impl Store {
    /// A complete snapshot, as [`Store::get`]; one that is being written is waited for.
    ///
    /// # Errors
    /// [`SnapshotError::Writing`] if it still is when the time is up; otherwise as [`Store::get`].
    pub fn wait(&self, tag: &str, limit: Duration) -> Result<Snapshot, SnapshotError> {
        check_tag(tag)?;
        let start = Instant::now();
        let failed = |errno: Errno| SnapshotError::io("watch", self.dir(), errno);
        let events = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).map_err(failed)?;
        let moves = WatchFlags::MOVED_TO | WatchFlags::MOVED_FROM;
        inotify::add_watch(&events, self.dir(), moves).map_err(failed)?;
        for hidden in self.scan()?.1.iter().filter(|hidden| hidden.tag == tag) {
            // For failed.json. The directory may be gone by now: then the move above tells.
            match inotify::add_watch(&events, &hidden.dir, WatchFlags::CLOSE_WRITE) {
                Ok(_) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
        // Watched first, then looked: nothing is missed in between.
        loop {
            let left = limit.saturating_sub(start.elapsed());
            match self.get(tag) {
                Err(SnapshotError::Writing(_)) if !left.is_zero() => {}
                other => return other,
            }
            let pause = left.min(LOOK_AT_LOCK);
            // It is below a second.
            let pause = Timespec { tv_sec: 0, tv_nsec: i64::from(pause.subsec_nanos()) };
            match poll(&mut [PollFd::new(&events, PollFlags::IN)], Some(&pause)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(failed(errno)),
            }
            // What happened is looked up; that something did is enough.
            let mut buffer = [0; 4096];
            while matches!(rustix::io::read(&events, &mut buffer), Ok(1..)) {}
        }
    }
}
