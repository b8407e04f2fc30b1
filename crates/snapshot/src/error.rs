//! What can go wrong with snapshots. Each message names the file, tag or block, and what to do if
//! there is something to do.

use std::io;
use std::path::{Path, PathBuf};

use forkd_sys::PathError;

use crate::manifest::Parent;

/// Why a snapshot could not be written, loaded or removed.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file system operation failed.
    #[error(transparent)]
    Io(PathError),
    /// The file system is full, or the quota is used up.
    #[error("no space left to write {}: free some, and take the snapshot again", .0.display())]
    DiskFull(PathBuf),
    /// Not a name for a snapshot.
    #[error("{tag:?} is no valid tag: {why}")]
    BadTag {
        /// What was given.
        tag: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// There is no such snapshot.
    #[error("no snapshot {0:?}")]
    NotFound(String),
    /// The tag is taken.
    #[error("snapshot {0:?} exists: remove it first, or choose another tag")]
    Exists(String),
    /// It is being written at this moment.
    #[error("snapshot {0:?} is still being written")]
    Writing(String),
    /// Its writer gave up or died.
    #[error("snapshot {tag:?} failed: {reason}")]
    Failed {
        /// The snapshot.
        tag: String,
        /// What its writer said, or that it ended early.
        reason: String,
    },
    /// Somebody deleted the snapshot while it was being written.
    #[error("snapshot {0:?} was deleted while it was being written")]
    Cancelled(String),
    /// A later forkd wrote it.
    #[error(
        "{} has format {found}, this forkd reads up to {supported}: a newer forkd wrote it",
        path.display()
    )]
    Format {
        /// The manifest.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// What this reader knows.
        supported: u32,
    },
    /// A file is not what was written.
    #[error("{} is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How it shows.
        what: String,
    },
    /// Blocks of a file are not what was written.
    #[error(
        "{} is damaged: block {block} (2 MiB at {:#x}) does not have its hash; \
         {count} of {of} blocks are damaged",
        path.display(), block * crate::BLOCK_SIZE
    )]
    DamagedBlocks {
        /// The file.
        path: PathBuf,
        /// Index of the first damaged block.
        block: u64,
        /// How many are damaged.
        count: u64,
        /// How many the file has.
        of: u64,
    },
    /// A link of the chain is not there.
    #[error("snapshot {child:?} is a diff over {parent:?}, which does not exist")]
    ParentMissing {
        /// The diff.
        child: String,
        /// What it names.
        parent: String,
    },
    /// The parent's tag is there, but it is another snapshot.
    #[error(
        "snapshot {child:?} is a diff over {:?} with root {}, and what has that tag now has root {found}",
        parent.tag, parent.root
    )]
    ParentChanged {
        /// The diff.
        child: String,
        /// What it names.
        parent: Parent,
        /// The root of what is there, in hex.
        found: String,
    },
    /// The chain bites its tail.
    #[error("the chain of snapshot {tag:?} comes back to {again:?}")]
    Cycle {
        /// Where it starts.
        tag: String,
        /// What is met twice.
        again: String,
    },
    /// Too many links.
    #[error(
        "the chain of snapshot {tag:?} has more than {limit} parents: `forkd snapshot compact` its parent"
    )]
    TooDeep {
        /// Where it starts.
        tag: String,
        /// The limit.
        limit: usize,
    },
    /// Other snapshots are diffs over it.
    #[error(
        "snapshot {tag:?} has children: {}; remove those first, or give --cascade to remove them too, \
         or --force to make them useless",
        children.join(", ")
    )]
    HasChildren {
        /// What was to be removed.
        tag: String,
        /// Its children, sorted.
        children: Vec<String>,
    },
    /// The snapshot was replaced while it was being compacted.
    #[error("snapshot {0:?} changed while it was being compacted")]
    Changed(String),
    /// The caller gave what cannot be stored.
    #[error("{}: {what}", path.display())]
    Misuse {
        /// The file it was for.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

impl SnapshotError {
    pub(crate) fn io(action: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            return Self::DiskFull(path.to_owned());
        }
        Self::Io(PathError::new(action, path, source))
    }

    pub(crate) fn damaged(path: &Path, what: impl std::fmt::Display) -> Self {
        Self::Damaged { path: path.to_owned(), what: what.to_string() }
    }

    pub(crate) fn misuse(path: &Path, what: impl std::fmt::Display) -> Self {
        Self::Misuse { path: path.to_owned(), what: what.to_string() }
    }

    /// Whether the cause is that a file is not there.
    pub(crate) fn is_missing_file(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == io::ErrorKind::NotFound)
    }
}
