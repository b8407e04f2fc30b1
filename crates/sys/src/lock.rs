//! A file's lock as the sign of life of its owner.
//!
//! The lock is `flock(2)`'s. It belongs to the *open file description*: it is let go when the last
//! descriptor of that description is closed, which the kernel does however the process ends, so a
//! free lock means a dead owner.
//!
//! **Fork**: a child inherits the descriptor and with it a share of the same lock. It would keep
//! its parent's lock held after the parent's death, so a forked child must close the inherited
//! descriptor ([`FileLock::as_fd`] tells which; dropping the `FileLock` does it without unlocking
//! the parent) and take a lock of its own on a file of its own.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::PathError;

/// A prober ([`is_held`]) has the lock shared for an instant; an owner that meets one tries again.
const TRIES: u32 = 10;
const BETWEEN_TRIES: Duration = Duration::from_millis(1);

/// Why a lock was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has it.
    #[error("{} is locked by another process", .0.display())]
    Held(PathBuf),
    /// The file cannot be opened or locked.
    #[error(transparent)]
    Io(#[from] PathError),
}

/// An exclusive lock, held until dropped.
#[derive(Debug)]
pub struct FileLock {
    file: File,
}

impl FileLock {
    /// Takes the lock on a file, which is made (mode 0600 less the umask) if it does not exist.
    ///
    /// # Errors
    /// [`LockError::Held`] if another has it; [`LockError::Io`] for everything else.
    pub fn try_exclusive(path: &Path) -> Result<Self, LockError> {
        use std::os::unix::fs::OpenOptionsExt;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)
            .map_err(|e| PathError::new("open", path, e))?;
        for _ in 0..TRIES {
            if try_flock(&file, FlockOperation::NonBlockingLockExclusive, path)? {
                return Ok(Self { file });
            }
            std::thread::sleep(BETWEEN_TRIES);
        }
        Err(LockError::Held(path.to_owned()))
    }
}

impl AsFd for FileLock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Whether some process holds the lock on a file now. A file that does not exist is not held.
///
/// # Errors
/// The file exists but cannot be opened or probed.
pub fn is_held(path: &Path) -> Result<bool, PathError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(PathError::new("open", path, error)),
    };
    // Shared, so that two probers do not see each other.
    Ok(!try_flock(&file, FlockOperation::NonBlockingLockShared, path)?)
}

/// False if it is held by another.
fn try_flock(file: &File, operation: FlockOperation, path: &Path) -> Result<bool, PathError> {
    loop {
        match flock(file, operation) {
            Ok(()) => return Ok(true),
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(PathError::new("lock", path, errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{fork_with, turn};

    #[test]
    fn one_owner_at_a_time() {
        let _turn = turn();
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("lock");
        assert!(!is_held(&path).expect("absent"));
        let lock = FileLock::try_exclusive(&path).expect("free");
        assert!(is_held(&path).expect("probe"));
        assert!(matches!(FileLock::try_exclusive(&path), Err(LockError::Held(p)) if p == path));
        drop(lock);
        assert!(!is_held(&path).expect("probe"));
        FileLock::try_exclusive(&path).expect("free again");
    }

    #[test]
    fn a_forked_child_shares_the_lock_until_it_drops_it() {
        let _turn = turn();
        use std::io::{Read, Write};
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("lock");
        let lock = FileLock::try_exclusive(&path).expect("free");
        let (mut go_reader, mut go) = std::io::pipe().expect("a pipe");
        let (mut done, mut done_writer) = std::io::pipe().expect("a pipe");
        let share = lock.file.try_clone().expect("a share");
        let mut child = fork_with(|| {
            // Close what is inherited, and keep only `share`.
            drop(lock);
            let waited = go_reader.read_exact(&mut [0]).is_ok();
            drop(share);
            let told = done_writer.write_all(&[1]).is_ok();
            i32::from(!(waited && told))
        });
        assert!(is_held(&path).expect("probe"), "the child's share holds it");
        assert!(matches!(FileLock::try_exclusive(&path), Err(LockError::Held(_))));
        go.write_all(&[1]).expect("go");
        done.read_exact(&mut [0]).expect("done");
        assert!(!is_held(&path).expect("probe"), "the last share is gone");
        assert_eq!(child.wait().expect("wait").code(), Some(0));
    }

    #[test]
    fn probers_do_not_disturb_an_owner() {
        let _turn = turn();
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("lock");
        std::fs::write(&path, "").expect("a file");
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    is_held(&path).expect("probe");
                }
            });
            let taken = (0..200).all(|_| FileLock::try_exclusive(&path).is_ok());
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(taken);
        });
    }

    #[test]
    fn errors_name_the_path() {
        let path = Path::new("/nonexistent-forkd/lock");
        let error = FileLock::try_exclusive(path).expect_err("no directory");
        assert!(error.to_string().contains("/nonexistent-forkd/lock"), "{error}");
    }
}
