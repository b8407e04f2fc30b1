//! The snapshots below one directory. What is called what there: [`crate::names`].

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forkd_sys::lock::is_held;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::chain::MAX_DEPTH;
use crate::digest::Digest;
use crate::io::{Io, Kernel, Renaming};
use crate::manifest::{MANIFEST, Manifest, Parent};
use crate::names::{
    FAILED, Failure, INTENT, Intent, LOCK, Purpose, SNAPSHOT, STORE_LOCK, check_tag, read_note,
};
use crate::staged::{Staged, prepare, write_failure};
use crate::{SnapshotError, tree};

/// What a failed snapshot says whose writer left no reason.
const DIED: &str = "its writer ended before it was done";

/// The snapshots below one directory, which several processes may use at once. Clones are the same.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
    io: Arc<dyn Io>,
}

/// A complete snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    dir: PathBuf,
    manifest: Manifest,
}

impl Snapshot {
    pub(crate) fn new(dir: PathBuf, manifest: Manifest) -> Self {
        Self { dir, manifest }
    }

    /// What it is.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// What a tag stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// Complete.
    Ready(Box<Manifest>),
    /// Its manifest is damaged or of a later format; the reason.
    Unreadable(String),
    /// Somebody is writing it.
    Writing {
        /// What it will be a diff over.
        parent: Option<Parent>,
    },
    /// Its writer gave up or died; the reason.
    Failed(String),
}

/// A tag and what it stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The tag.
    pub tag: String,
    /// Its status.
    pub status: Status,
}

/// What [`Store::sweep`] did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Swept {
    /// Hidden directories that were deleted: rests of deletions, compactions and writers.
    pub deleted: Vec<String>,
    /// Tags whose writer was found dead; their data is freed, and they stay listed as failed.
    pub failed: Vec<String>,
}

/// The lock on what is called what. Dropping it lets go, also where a forked child still has a copy.
#[derive(Debug)]
pub(crate) struct NamesLock(File);

impl Drop for NamesLock {
    fn drop(&mut self) {
        // It can't fail on an open file; and closing does the same.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// A hidden directory.
#[derive(Debug)]
pub(crate) struct Hidden {
    pub purpose: Purpose,
    pub tag: String,
    pub dir: PathBuf,
}

impl Hidden {
    pub(crate) fn is_alive(&self) -> Result<bool, SnapshotError> {
        is_held(&self.dir.join(LOCK)).map_err(SnapshotError::Io)
    }

    pub(crate) fn intent(&self) -> Option<Intent> {
        read_note(&self.dir.join(INTENT))
    }

    /// What it shows of its tag; nothing if it has none, as when it is just done.
    fn status(&self) -> Result<Option<Status>, SnapshotError> {
        if self.purpose != Purpose::Staging {
            return Ok(None);
        }
        if let Some(Failure { reason }) = read_note(&self.dir.join(FAILED)) {
            return Ok(Some(Status::Failed(reason)));
        }
        if self.is_alive()? {
            let parent = self.intent().and_then(|intent| intent.parent);
            return Ok(Some(Status::Writing { parent }));
        }
        let begun = self.dir.join(SNAPSHOT).exists() || self.dir.join(FAILED).exists();
        Ok(begun.then(|| Status::Failed(DIED.to_string())))
    }
}

impl Store {
    /// The store in a directory, which is made if it does not exist.
    ///
    /// # Errors
    /// It cannot be made or used.
    pub fn open(dir: &Path) -> Result<Self, SnapshotError> {
        Self::open_with(dir, Arc::new(Kernel))
    }

    /// The same over another file system; for tests.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_with(dir: &Path, io: Arc<dyn Io>) -> Result<Self, SnapshotError> {
        fs::create_dir_all(dir).map_err(|e| SnapshotError::io("make", dir, e))?;
        let store = Self { dir: dir.to_owned(), io };
        drop(store.open_lock()?);
        Ok(store)
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn io(&self) -> &Arc<dyn Io> {
        &self.io
    }

    pub(crate) fn sync(&self) -> Result<(), SnapshotError> {
        self.io.sync_dir(&self.dir).map_err(|e| SnapshotError::io("sync", &self.dir, e))
    }

    fn open_lock(&self) -> Result<File, SnapshotError> {
        let path = self.dir.join(STORE_LOCK);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        options.open(&path).map_err(|e| SnapshotError::io("open", &path, e))
    }

    fn lock(&self, operation: FlockOperation) -> Result<NamesLock, SnapshotError> {
        let file = self.open_lock()?;
        loop {
            match flock(&file, operation) {
                Ok(()) => return Ok(NamesLock(file)),
                Err(Errno::INTR) => {}
                Err(e) => return Err(SnapshotError::io("lock", &self.dir.join(STORE_LOCK), e)),
            }
        }
    }

    /// Waits until nobody else looks at or changes names. Held for renames, never for data.
    pub(crate) fn lock_names(&self) -> Result<NamesLock, SnapshotError> {
        self.lock(FlockOperation::LockExclusive)
    }

    /// Waits until nobody changes names.
    pub(crate) fn share_names(&self) -> Result<NamesLock, SnapshotError> {
        self.lock(FlockOperation::LockShared)
    }

    /// All directories: those of tags, and the hidden ones; sorted.
    pub(crate) fn scan(&self) -> Result<(Vec<String>, Vec<Hidden>), SnapshotError> {
        let failed = |e| SnapshotError::io("list", &self.dir, e);
        let (mut tags, mut hidden) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if let Some((purpose, tag)) = Purpose::parse(&name) {
                hidden.push(Hidden { purpose, tag: tag.to_string(), dir: entry.path() });
            } else if check_tag(&name).is_ok() {
                tags.push(name);
            }
        }
        tags.sort_unstable();
        hidden.sort_unstable_by(|a, b| a.dir.cmp(&b.dir));
        Ok((tags, hidden))
    }

    /// Begins a snapshot: a flat one, or a diff over `parent`. An earlier attempt that failed is
    /// deleted.
    ///
    /// # Errors
    /// [`SnapshotError::BadTag`], [`SnapshotError::Exists`], [`SnapshotError::Writing`]; for a parent
    /// whatever is wrong with its chain, or that the chain would be too deep; or the store cannot be
    /// written.
    pub fn stage(&self, tag: &str, parent: Option<&str>) -> Result<Staged, SnapshotError> {
        self.stage_with(tag, || parent.map(|parent| self.parent_for(tag, parent)).transpose())
    }

    /// Begins a diff over a snapshot that was known before: by its root, or compacted since.
    ///
    /// # Errors
    /// As [`Store::stage`]; [`SnapshotError::ParentMissing`] and [`SnapshotError::ParentChanged`] if what
    /// has that tag now is not it.
    pub fn stage_over(&self, tag: &str, parent: &Parent) -> Result<Staged, SnapshotError> {
        self.stage_with(tag, || {
            self.check_parent(tag, parent)?;
            self.parent_for(tag, &parent.tag).map(Some)
        })
    }

    fn stage_with(
        &self,
        tag: &str,
        parent: impl FnOnce() -> Result<Option<Parent>, SnapshotError>,
    ) -> Result<Staged, SnapshotError> {
        check_tag(tag)?;
        let (staged, trash) = {
            let _names = self.lock_names()?;
            if self.dir.join(tag).exists() {
                return Err(SnapshotError::Exists(tag.to_string()));
            }
            let parent = parent()?;
            let mut trash = Vec::new();
            for old in self.scan()?.1.iter().filter(|h| h.tag == tag) {
                match old.status()? {
                    Some(Status::Writing { .. }) => {
                        return Err(SnapshotError::Writing(tag.to_string()));
                    }
                    Some(Status::Failed(_)) => trash.push(self.discard(&old.dir, tag)?),
                    _ => {}
                }
            }
            (self.prepare(Purpose::Staging, tag, parent)?, trash)
        };
        for dir in trash {
            tree::remove(&*self.io, &dir)?;
        }
        Ok(staged)
    }

    /// The caller has the names locked.
    pub(crate) fn prepare(
        &self,
        purpose: Purpose,
        tag: &str,
        parent: Option<Parent>,
    ) -> Result<Staged, SnapshotError> {
        let dir = self.dir.join(purpose.name(tag)?);
        match prepare(&*self.io, &dir, parent.as_ref()) {
            Ok(lock) => Ok(Staged::new(self.clone(), tag, dir, parent, lock)),
            Err(error) => {
                // What is left has no owner, and is swept.
                drop(tree::remove(&*self.io, &dir));
                Err(error)
            }
        }
    }

    fn parent_for(&self, tag: &str, parent: &str) -> Result<Parent, SnapshotError> {
        check_tag(parent)?;
        let chain = self.manifests(parent)?;
        // The new one has the parent's parents and the parent.
        if chain.len() > MAX_DEPTH {
            return Err(SnapshotError::TooDeep { tag: tag.to_string(), limit: MAX_DEPTH });
        }
        Ok(Parent { tag: parent.to_string(), root: chain[0].root })
    }

    /// Whether what has the parent's tag is the parent.
    pub(crate) fn check_parent(
        &self,
        child: &str,
        parent: &Parent,
    ) -> Result<Manifest, SnapshotError> {
        let dir = self.dir.join(&parent.tag);
        if check_tag(&parent.tag).is_err() || !dir.exists() {
            let (child, parent) = (child.to_string(), parent.tag.clone());
            return Err(SnapshotError::ParentMissing { child, parent });
        }
        let there = self.manifest_in(&dir, &parent.tag)?;
        if !there.answers_to(parent.root) {
            let (child, found) = (child.to_string(), there.root.to_string());
            return Err(SnapshotError::ParentChanged { child, parent: parent.clone(), found });
        }
        Ok(there)
    }

    /// The manifest in a tag's directory, which must name that tag.
    pub(crate) fn manifest_in(&self, dir: &Path, tag: &str) -> Result<Manifest, SnapshotError> {
        let manifest = Manifest::read(dir)?;
        if manifest.tag != tag {
            let what = format!("it is the manifest of {:?}", manifest.tag);
            return Err(SnapshotError::damaged(&dir.join(MANIFEST), what));
        }
        Ok(manifest)
    }

    /// A complete snapshot, by its manifest alone.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`], [`SnapshotError::Writing`], [`SnapshotError::Failed`], or its
    /// manifest is damaged or of a later format.
    pub fn get(&self, tag: &str) -> Result<Snapshot, SnapshotError> {
        let _names = self.share_names()?;
        let manifest = self.manifest(tag)?;
        Ok(Snapshot::new(self.dir.join(tag), manifest))
    }

    /// Calls `f` with the directory of a snapshot, while nobody renames or removes it: for what is kept beside the
    /// snapshot and is no part of it, as a hint that may be lost or wrong.
    ///
    /// # Errors
    /// As [`Store::get`]; [`SnapshotError::NotFound`] if the tag is another snapshot's by now.
    pub fn beside<R>(
        &self,
        tag: &str,
        root: Digest,
        f: impl FnOnce(&Path) -> R,
    ) -> Result<R, SnapshotError> {
        let _names = self.share_names()?;
        if !self.manifest(tag)?.answers_to(root) {
            return Err(SnapshotError::NotFound(tag.to_string()));
        }
        Ok(f(&self.dir.join(tag)))
    }

    /// The caller has the names locked, as in all that does not lock them itself.
    pub(crate) fn manifest(&self, tag: &str) -> Result<Manifest, SnapshotError> {
        check_tag(tag)?;
        let dir = self.dir.join(tag);
        if dir.exists() {
            return self.manifest_in(&dir, tag);
        }
        let tag = tag.to_string();
        for hidden in self.scan()?.1.iter().filter(|hidden| hidden.tag == tag) {
            match hidden.status()? {
                Some(Status::Writing { .. }) => return Err(SnapshotError::Writing(tag)),
                Some(Status::Failed(reason)) => return Err(SnapshotError::Failed { tag, reason }),
                _ => {}
            }
        }
        Err(SnapshotError::NotFound(tag))
    }

    /// All snapshots, sorted by tag. One whose manifest cannot be read is listed as that.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> Result<Vec<Entry>, SnapshotError> {
        let _names = self.share_names()?;
        let (tags, hidden) = self.scan()?;
        let mut entries = Vec::new();
        for tag in tags {
            let status = match self.manifest_in(&self.dir.join(&tag), &tag) {
                Ok(manifest) => Status::Ready(Box::new(manifest)),
                Err(error) => Status::Unreadable(error.to_string()),
            };
            entries.push(Entry { tag, status });
        }
        for hidden in hidden {
            if let Some(status) = hidden.status()? {
                entries.push(Entry { tag: hidden.tag, status });
            }
        }
        entries.sort_by(|a, b| a.tag.cmp(&b.tag));
        Ok(entries)
    }

    /// Renames a directory to one that is being deleted, durably. The caller deletes it, best after
    /// it has let go of the names.
    pub(crate) fn discard(&self, dir: &Path, tag: &str) -> Result<PathBuf, SnapshotError> {
        let trash = self.dir.join(Purpose::Removed.name(tag)?);
        self.io
            .rename(dir, &trash, Renaming::New)
            .map_err(|e| SnapshotError::io("remove", dir, e))?;
        self.sync()?;
        Ok(trash)
    }

    /// Deletes what dead processes left behind, and frees the data of snapshots whose writer died.
    ///
    /// # Errors
    /// Something cannot be deleted.
    pub fn sweep(&self) -> Result<Swept, SnapshotError> {
        let mut swept = Swept::default();
        let mut trash = Vec::new();
        {
            let _names = self.lock_names()?;
            for hidden in self.scan()?.1 {
                if hidden.purpose == Purpose::Removed {
                    trash.push(hidden.dir);
                    continue;
                }
                if hidden.is_alive()? {
                    continue;
                }
                match hidden.status()? {
                    Some(Status::Failed(_)) if !hidden.dir.join(SNAPSHOT).exists() => {}
                    Some(Status::Failed(reason)) => {
                        write_failure(&*self.io, &hidden.dir, &reason)?;
                        swept.failed.push(hidden.tag);
                    }
                    _ => trash.push(self.discard(&hidden.dir, &hidden.tag)?),
                }
            }
        }
        for dir in trash {
            tree::remove(&*self.io, &dir)?;
            let name = dir.file_name().unwrap_or_default();
            swept.deleted.push(name.to_string_lossy().into_owned());
        }
        Ok(swept)
    }
}
