//! The run directory of a VM or zygote: one directory, owned by one process for its whole life.
//!
//! Ownership is a flock on `lock` inside it. The kernel drops the lock when the owner dies, however it
//! dies, so "is it alive?" never depends on pids that may have been reused. A directory is made under a
//! hidden name, locked, and only then renamed into place: at its final path it always has an owner, or
//! its owner is dead and [`sweep`] may remove it.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use forkd_api::types::VmRecord;
use forkd_sys::lock::FileLock;

/// Why a run directory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// Something is at that path already.
    #[error("{0} exists already: pick another name, or remove it")]
    Exists(PathBuf),
    /// A file system operation failed.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The lock could not be had.
    #[error(transparent)]
    Lock(#[from] forkd_sys::lock::LockError),
    /// The record could not be read or written as JSON.
    #[error("{path}: {source}")]
    Record {
        /// Path of the record.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RunDirError {
    let path = path.to_path_buf();
    move |source| RunDirError::Io { what, path, source }
}

/// A run directory that this process owns. Dropping it only gives up ownership: removal is explicit,
/// since a forked child drops its copy of the source's.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    _lock: FileLock,
}

impl RunDir {
    /// Makes the directory and owns it.
    ///
    /// # Errors
    /// [`RunDirError::Exists`] if something is at `path`; otherwise what the file system said.
    pub fn create(path: &Path) -> Result<Self, RunDirError> {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let staging = path.with_file_name(format!(".new-{}-{name}", std::process::id()));
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(io_error("cannot make", parent))?;
        }
        fs::create_dir(&staging).map_err(io_error("cannot make", &staging))?;
        Self::take(&staging, path).inspect_err(|_| {
            // Best effort: the error that is returned says what went wrong.
            let _ = fs::remove_dir_all(&staging);
        })
    }

    fn take(staging: &Path, path: &Path) -> Result<Self, RunDirError> {
        let lock_path = staging.join("lock");
        let lock = FileLock::try_exclusive(&lock_path)?;
        // Without NOREPLACE, a rename over an empty directory would succeed.
        match rustix::fs::renameat_with(
            rustix::fs::CWD,
            staging,
            rustix::fs::CWD,
            path,
            rustix::fs::RenameFlags::NOREPLACE,
        ) {
            Ok(()) => Ok(Self { path: path.to_path_buf(), _lock: lock }),
            Err(rustix::io::Errno::EXIST | rustix::io::Errno::NOTEMPTY) => {
                Err(RunDirError::Exists(path.to_path_buf()))
            }
            Err(e) => Err(io_error("cannot make", path)(e.into())),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Path of a file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Writes `vm.json`, whole or not at all.
    ///
    /// # Errors
    /// What the file system said.
    pub fn write_record(&self, record: &VmRecord) -> Result<(), RunDirError> {
        let path = self.file("vm.json");
        let staging = self.file(".vm.json.new");
        let text = serde_json::to_vec(record)
            .map_err(|source| RunDirError::Record { path: path.clone(), source })?;
        let mut file = fs::File::create(&staging).map_err(io_error("cannot write", &staging))?;
        file.write_all(&text).map_err(io_error("cannot write", &staging))?;
        fs::rename(&staging, &path).map_err(io_error("cannot write", &path))
    }

    /// Removes the directory with all in it.
    ///
    /// # Errors
    /// What the file system said; a directory that is gone already is fine.
    pub fn remove(self) -> Result<(), RunDirError> {
        remove_tree(&self.path)
    }
}

fn remove_tree(path: &Path) -> Result<(), RunDirError> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_error("cannot remove", path)(e)),
        _ => Ok(()),
    }
}

/// Reads the record of a run directory.
///
/// # Errors
/// No such file, or not a record.
pub fn read_record(dir: &Path) -> Result<VmRecord, RunDirError> {
    let path = dir.join("vm.json");
    let text = fs::read(&path).map_err(io_error("cannot read", &path))?;
    serde_json::from_slice(&text).map_err(|source| RunDirError::Record { path, source })
}

/// Whether a living process owns the run directory.
pub fn is_alive(dir: &Path) -> bool {
    // A lock that can't be opened (no such file) is held by nobody.
    forkd_sys::lock::is_held(&dir.join("lock")).unwrap_or(false)
}

/// Removes run directories below `parent` whose owners are dead; returns what was removed.
///
/// # Errors
/// A parent that can't be read (none at all is fine), or a directory that can't be removed.
pub fn sweep(parent: &Path) -> Result<Vec<PathBuf>, RunDirError> {
    let entries = match fs::read_dir(parent) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(io_error("cannot read", parent))?,
    };
    let mut removed = Vec::new();
    for entry in entries {
        let path = entry.map_err(io_error("cannot read", parent))?.path();
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let stale = match name.strip_prefix(".new-") {
            Some(rest) => !maker_lives(rest),
            None => path.is_dir() && !is_alive(&path),
        };
        if stale {
            remove_tree(&path)?;
            removed.push(path);
        }
    }
    Ok(removed)
}

/// Whether the process that makes `.new-<pid>-<name>` still exists.
fn maker_lives(rest: &str) -> bool {
    rest.split('-').next().is_some_and(|pid| Path::new("/proc").join(pid).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> VmRecord {
        VmRecord {
            id: "vm-0".into(),
            name: "zero".into(),
            zygote: false,
            pid: 1,
            vcpus: 1,
            mem_mib: 64,
            image: "i".into(),
            image_digest: "d".into(),
            parent: None,
            generation: 0,
            created_unix_ms: 7,
        }
    }

    #[test]
    fn a_directory_has_an_owner_from_the_moment_it_is_there() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("vms/a");
        let dir = RunDir::create(&path).unwrap();
        assert!(is_alive(&path));
        dir.write_record(&record()).unwrap();
        assert_eq!(read_record(&path).unwrap(), record());
        assert!(sweep(&tmp.path().join("vms")).unwrap().is_empty());
        dir.remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_taken_path_is_refused_and_nothing_is_left() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("a");
        fs::create_dir(&path).unwrap();
        assert!(matches!(RunDir::create(&path), Err(RunDirError::Exists(p)) if p == path));
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_sweep_takes_the_dead_and_leaves_the_living() {
        let tmp = tempfile::tempdir().unwrap();
        let live = RunDir::create(&tmp.path().join("live")).unwrap();
        drop(RunDir::create(&tmp.path().join("dead")).unwrap());
        fs::create_dir(tmp.path().join(".new-4194305-x")).unwrap();
        let mut removed = sweep(tmp.path()).unwrap();
        removed.sort();
        assert_eq!(removed, [tmp.path().join(".new-4194305-x"), tmp.path().join("dead")]);
        assert!(live.path().exists());
        assert!(sweep(&tmp.path().join("none")).unwrap().is_empty());
    }
}
