//! What can go wrong with images. Each message names the thing and says what to do.

use std::io;
use std::path::{Path, PathBuf};

/// Why an image could not be built, found or removed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A program that is needed is not installed.
    #[error("{tool} is missing: install it with `apt-get install {package}`")]
    MissingTool {
        /// The program.
        tool: &'static str,
        /// The Debian package that holds it.
        package: &'static str,
    },
    /// A program failed.
    #[error("{what}: {tool} failed ({status}): {message}")]
    Tool {
        /// What it was run for.
        what: String,
        /// The program.
        tool: &'static str,
        /// Its exit status, in words.
        status: String,
        /// The end of what it said.
        message: String,
    },
    /// The file system is full.
    #[error(
        "no space left on the file system of {path} ({detail}): free some, or set FORKD_HOME elsewhere"
    )]
    DiskFull {
        /// Where the space was needed.
        path: PathBuf,
        /// What is free there, and what would be needed if that is known.
        detail: String,
    },
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
    /// There is no such image.
    #[error("no image {0:?}: `forkd image ls` lists them, `forkd image build` makes one")]
    NotFound(String),
    /// A digest prefix that fits more than one image.
    #[error("{0:?} fits more than one image: give more digits of the digest")]
    Ambiguous(String),
    /// The image is used by living VMs or snapshots.
    #[error(
        "image {image} is in use by {users}: end those first (`forkd kill`, `forkd snapshot rm`)"
    )]
    InUse {
        /// The image, as the user named it.
        image: String,
        /// Who uses it.
        users: String,
    },
    /// The recipe can't be used.
    #[error("{0}")]
    Recipe(String),
    /// The archive can't be unpacked.
    #[error("{path} is no usable tar archive: {message}")]
    Tar {
        /// The archive.
        path: PathBuf,
        /// What tar said.
        message: String,
    },
    /// What is in the store is not what its digest says.
    #[error("{path} is corrupt: {reason}; remove it (`forkd image rm`) and build it again")]
    Corrupt {
        /// The image file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The build needs root.
    #[error(
        "{0} needs root: file owners and device nodes can't be made otherwise; use sudo, or build from --tar or --dir"
    )]
    NeedsRoot(&'static str),
    /// The agent binary can't be PID 1 of an initramfs.
    #[error("{path} can't be the guest's /init: {reason}")]
    Agent {
        /// The binary.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// How the names of staging directories begin.
pub(crate) const STAGING: &str = ".staging-";

/// Free space below which a failed program is taken to have failed for lack of it.
const FULL_BELOW_MIB: u64 = 4;

impl ImageError {
    /// Turns an I/O error on `path` into the error that tells the user most.
    pub(crate) fn io(what: &'static str, path: &Path, source: io::Error) -> Self {
        if source.kind() == io::ErrorKind::StorageFull {
            return full(path, free_mib(path).unwrap_or(0), None);
        }
        Self::Io { what, path: path.to_path_buf(), source }
    }

    /// If the file system of `path` is full, that is why a program that writes there failed.
    pub(crate) fn or_disk_full(self, path: &Path) -> Self {
        match free_mib(path) {
            Some(free_mib) if free_mib < FULL_BELOW_MIB => full(path, free_mib, None),
            _ => self,
        }
    }
}

fn full(path: &Path, free_mib: u64, need_mib: Option<u64>) -> ImageError {
    // A staging directory is gone by the time the message is read.
    let staged = |p: &Path| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(STAGING));
    let path = path.ancestors().filter(|p| staged(p)).last().and_then(Path::parent).unwrap_or(path);
    let need = need_mib.map(|need| format!(", {need} MiB needed")).unwrap_or_default();
    ImageError::DiskFull { path: path.to_path_buf(), detail: format!("{free_mib} MiB free{need}") }
}

/// Free space for this user on the file system of `path`, in MiB; none if it can't be told.
pub(crate) fn free_mib(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(path).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize) >> 20)
}

/// Fails unless `need_mib` MiB are free on the file system of `path`.
pub(crate) fn require_space(path: &Path, need_mib: u64) -> Result<(), ImageError> {
    match free_mib(path) {
        Some(free_mib) if free_mib < need_mib => Err(full(path, free_mib, Some(need_mib))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_named_by_a_path_that_stays() {
        let source = || io::Error::from(io::ErrorKind::StorageFull);
        let error =
            ImageError::io("cannot write", Path::new("/d/images/.staging-x/tree/etc"), source());
        let text = error.to_string();
        assert!(text.contains("of /d/images (") && text.contains("FORKD_HOME"), "{text}");
        let error = full(Path::new("/d"), 7, Some(9)).to_string();
        assert!(error.contains("7 MiB free, 9 MiB needed"), "{error}");
    }
}
