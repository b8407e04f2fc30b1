//! A snapshot being written.
//!
//! ```text
//!            stage                commit
//!   (none) ─────────> writing ───────────> ready
//!                        │  fail, or the writer dies
//!                        ├───────────────> failed ──> removed, or replaced by the next attempt
//!                        │  remove (by anyone), cancel
//!                        └───────────────> (none), and the commit that follows is refused
//! ```
//!
//! All that is written goes into `.staging-<tag>-<random>/snapshot/`, which a commit renames to
//! `<tag>`. Who deletes renames `.staging-…` away; both renames are atomic, so whichever comes first
//! wins: a writer whose directory has gone cannot commit, and none but its creator knows the random name.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forkd_sys::lock::FileLock;

use crate::below::{Below, Parents};
use crate::chain::Layer;
use crate::digest::Digest;
use crate::io::{Io, Renaming};
use crate::manifest::{
    EXTENTS, FORMAT, Facts, MANIFEST, MEMORY, Manifest, PagedFile, Parent, STATE, SmallFile,
    disk_name,
};
use crate::names::{FAILED, Failure, INTENT, LOCK, SNAPSHOT};
use crate::pages::{MAX_DISKS, MAX_FILE, Maps, PageMap};
use crate::store::{Snapshot, Store};
use crate::writer::{PageWriter, Shape};
use crate::{PAGE_SIZE, SnapshotError, tree, verify};

/// A snapshot being written. If it is dropped, or the process ends, the snapshot has failed.
///
/// **Fork**: a child of fork(2) shares it. Whoever is to write goes on with it; the other drops it,
/// which closes its share of the lock and does nothing else.
#[derive(Debug)]
pub struct Staged {
    store: Store,
    tag: String,
    /// `.staging-<tag>-<random>`.
    dir: PathBuf,
    parent: Option<Parent>,
    /// The parent's files, from the first use on.
    below: Option<Parents>,
    memory: Option<PageWriter>,
    disks: Vec<PageWriter>,
    state: Option<SmallFile>,
    lock: FileLock,
}

/// How a commit takes its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Landing {
    /// Nothing has it yet.
    New,
    /// The snapshot with this root has it, and is the same in content.
    InPlaceOf(Digest),
}

impl Staged {
    pub(crate) fn new(
        store: Store,
        tag: &str,
        dir: PathBuf,
        parent: Option<Parent>,
        lock: FileLock,
    ) -> Self {
        let tag = tag.to_string();
        Self {
            store,
            tag,
            dir,
            parent,
            below: None,
            memory: None,
            disks: vec![],
            state: None,
            lock,
        }
    }

    /// Its tag-to-be.
    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// What it is a diff over.
    pub fn parent(&self) -> Option<&Parent> {
        self.parent.as_ref()
    }

    /// The descriptors that a forked child which goes on with it has to keep.
    pub fn kept_fds(&self) -> Vec<RawFd> {
        let files = self.memory.iter().chain(&self.disks).map(PageWriter::fd);
        let below = self.below.iter().flat_map(Parents::fds);
        files.chain(below).chain([self.lock.as_fd().as_raw_fd()]).collect()
    }

    /// Whether somebody has deleted it meanwhile. Then there is no point in going on.
    pub fn is_cancelled(&self) -> bool {
        !self.dir.exists()
    }

    /// The writer of RAM, `bytes` long; once. Offsets are RAM offsets. What a flat snapshot is not
    /// given is zero, what a diff is not given is the parent's; of what it is given it keeps what
    /// differs from that.
    ///
    /// # Errors
    /// [`SnapshotError::Misuse`] if there is one already or the length is no multiple of 4096;
    /// [`SnapshotError::Cancelled`]; what is wrong with the parent; or the file cannot be made.
    pub fn memory(&mut self, bytes: u64) -> Result<PageWriter, SnapshotError> {
        let shape = Shape { len: bytes, whole: self.parent.is_none(), absent_is_zero: true };
        let path = self.file(MEMORY);
        if self.memory.is_some() {
            return Err(SnapshotError::misuse(&path, "memory is written already"));
        }
        let below = self.below()?.and_then(|parent| parent.memory(bytes));
        let writer = self.paged(path, shape, below)?;
        Ok(self.memory.insert(writer).clone())
    }

    /// The writer of the next disk's writable layer, from disk 0 on. With `whole`, which layers can
    /// afford as they are small, blocks that it is not given are those of the disk's base image;
    /// otherwise, in a diff, they are the parent's, and what is given is kept if it differs from that.
    ///
    /// # Errors
    /// [`SnapshotError::Misuse`] if there are 32 already, the length is no multiple of 4096, or it is
    /// not whole in a flat snapshot; [`SnapshotError::Cancelled`]; what is wrong with the parent; or
    /// the file cannot be made.
    pub fn disk(&mut self, bytes: u64, whole: bool) -> Result<PageWriter, SnapshotError> {
        let path = self.file(&disk_name(self.disks.len()));
        if self.disks.len() == MAX_DISKS {
            return Err(SnapshotError::misuse(
                &path,
                format_args!("{MAX_DISKS} disks are the limit"),
            ));
        }
        if !whole && self.parent.is_none() {
            return Err(SnapshotError::misuse(&path, "without a parent, a disk must be whole"));
        }
        let index = self.disks.len();
        let below = match whole {
            true => None,
            false => self.below()?.and_then(|parent| parent.disk(index, bytes)),
        };
        let shape = Shape { len: bytes, whole, absent_is_zero: false };
        let writer = self.paged(path, shape, below)?;
        self.disks.push(writer.clone());
        Ok(writer)
    }

    /// The parent's files, of a diff.
    fn below(&mut self) -> Result<Option<&Parents>, SnapshotError> {
        if let (None, Some(parent)) = (&self.below, &self.parent) {
            let opened = Parents::open(&self.store, &self.tag, parent);
            self.below = Some(opened.map_err(|error| self.explain(error))?);
        }
        Ok(self.below.as_ref())
    }

    fn paged(
        &self,
        path: PathBuf,
        shape: Shape,
        below: Option<Below>,
    ) -> Result<PageWriter, SnapshotError> {
        if !shape.len.is_multiple_of(PAGE_SIZE) || shape.len > MAX_FILE {
            let what = format!("a length of {} bytes is not possible", shape.len);
            return Err(SnapshotError::misuse(&path, what));
        }
        let io = Arc::clone(self.store.io());
        PageWriter::create(io, path, self.dir.clone(), &self.tag, shape, below)
            .map_err(|error| self.explain(error))
    }

    /// Writes the vCPU and device state; once.
    ///
    /// # Errors
    /// [`SnapshotError::Misuse`] if it is there already; [`SnapshotError::Cancelled`]; or the file
    /// cannot be written.
    pub fn state(&mut self, bytes: &[u8]) -> Result<(), SnapshotError> {
        let path = self.file(STATE);
        if self.state.is_some() {
            return Err(SnapshotError::misuse(&path, "state is written already"));
        }
        self.state = Some(self.small(&path, bytes).map_err(|error| self.explain(error))?);
        Ok(())
    }

    /// Makes it a snapshot: durable when this returns. The parent must still be there.
    ///
    /// # Errors
    /// [`SnapshotError::Cancelled`] if it was deleted meanwhile, [`SnapshotError::Exists`] if another
    /// got the tag, [`SnapshotError::ParentMissing`] or [`SnapshotError::ParentChanged`],
    /// [`SnapshotError::Misuse`] if memory or state was not written or memory does not have
    /// `mem_mib`, or the disk does not take it. Then it has failed, and says so in the list.
    pub fn commit(self, facts: Facts) -> Result<Snapshot, SnapshotError> {
        self.commit_as(facts, None, Landing::New)
    }

    pub(crate) fn commit_as(
        self,
        facts: Facts,
        replaces: Option<Digest>,
        landing: Landing,
    ) -> Result<Snapshot, SnapshotError> {
        match self.try_commit(facts, replaces, landing) {
            Ok(snapshot) => {
                // The rest of the staging directory; what cannot be removed now is swept later.
                drop(tree::remove(&**self.store.io(), &self.dir));
                Ok(snapshot)
            }
            Err(error) => {
                let error = self.explain(error);
                if landing != Landing::New {
                    // What it was to replace is there, and nobody waits for this.
                    drop(tree::remove(&**self.store.io(), &self.dir));
                } else if !matches!(error, SnapshotError::Cancelled(_)) {
                    // That it failed shows even if the reason cannot be written: the lock is free.
                    drop(self.fail(&error.to_string()));
                }
                Err(error)
            }
        }
    }

    fn try_commit(
        &self,
        facts: Facts,
        replaces: Option<Digest>,
        landing: Landing,
    ) -> Result<Snapshot, SnapshotError> {
        let mut manifest = self.finish_files(facts, replaces)?;
        self.small(&self.file(MANIFEST), &manifest.seal())?;
        let io = self.store.io();
        let ready = self.dir.join(SNAPSHOT);
        io.sync_dir(&ready).map_err(|e| SnapshotError::io("sync", &ready, e))?;
        let home = self.store.dir().join(&self.tag);
        let _names = self.store.lock_names()?;
        let how = match landing {
            Landing::New => {
                if let Some(parent) = &self.parent {
                    self.store.check_parent(&self.tag, parent)?;
                }
                if home.exists() {
                    return Err(SnapshotError::Exists(self.tag.clone()));
                }
                Renaming::New
            }
            Landing::InPlaceOf(root) => {
                let there = Manifest::read(&home);
                if !there.is_ok_and(|there| there.root == root) {
                    return Err(SnapshotError::Changed(self.tag.clone()));
                }
                Renaming::Exchange
            }
        };
        io.rename(&ready, &home, how).map_err(|e| SnapshotError::io("rename to", &home, e))?;
        if let Err(error) = self.store.sync() {
            // It may or may not last: rather let the caller's view be the true one.
            let back = if how == Renaming::New { (&home, &ready) } else { (&ready, &home) };
            drop(io.rename(back.0, back.1, how));
            return Err(error);
        }
        self.remember(&home, &manifest);
        Ok(Snapshot::new(home, manifest))
    }

    /// What was hashed on its way to the files just now needs no verification.
    fn remember(&self, home: &Path, manifest: &Manifest) {
        if let Ok(layer) = Layer::open(home.to_owned(), manifest.clone()) {
            verify::remember(&**self.store.io(), &layer);
        }
    }

    /// Makes all files but the manifest durable.
    fn finish_files(
        &self,
        facts: Facts,
        replaces: Option<Digest>,
    ) -> Result<Manifest, SnapshotError> {
        let missing = |name| SnapshotError::misuse(&self.file(name), "it was not written");
        let memory = self.memory.as_ref().ok_or_else(|| missing(MEMORY))?;
        let state = self.state.clone().ok_or_else(|| missing(STATE))?;
        if facts.mem_mib.checked_mul(1 << 20) != Some(memory.len()) {
            let what = format!("{} bytes are not {} MiB", memory.len(), facts.mem_mib);
            return Err(SnapshotError::misuse(memory.path(), what));
        }
        memory.finish()?;
        for disk in &self.disks {
            disk.finish()?;
        }
        let maps =
            Maps { memory: memory.map(), disks: self.disks.iter().map(PageWriter::map).collect() };
        let path = self.file(EXTENTS);
        let extents = self.small(&path, &maps.encode(&path)?)?;
        let paged = |map: &PageMap| PagedFile {
            bytes: map.len,
            data_bytes: map.data_bytes(),
            whole: map.whole,
        };
        Ok(Manifest {
            format: FORMAT,
            root: Digest::ZERO,
            tag: self.tag.clone(),
            created_unix_ms: facts.created_unix_ms,
            forkd: facts.forkd,
            platform: facts.platform,
            kernel: facts.kernel,
            image: facts.image,
            vcpus: facts.vcpus,
            mem_mib: facts.mem_mib,
            mode: facts.mode,
            parent: self.parent.clone(),
            replaces,
            instant: facts.instant,
            state,
            extents,
            memory: paged(&maps.memory),
            disks: maps.disks.iter().map(paged).collect(),
        })
    }

    /// What another process of the same fork has made of it: who commits is not always who began.
    pub fn published(&self) -> Option<Parent> {
        let snapshot = self.store.get(&self.tag).ok()?;
        Some(Parent { tag: self.tag.clone(), root: snapshot.manifest().root })
    }

    /// Gives up: the reason shows in [`Store::list`] until the snapshot is removed, or tried again.
    ///
    /// # Errors
    /// The reason cannot be written. The snapshot counts as failed all the same.
    pub fn fail(&self, reason: &str) -> Result<(), SnapshotError> {
        // The note needs room on the disk, and these are open here. Not if another process of the same fork has
        // published them and could not say so.
        if self.dir.join(SNAPSHOT).exists() {
            self.memory.iter().chain(&self.disks).for_each(PageWriter::free);
        }
        write_failure(&**self.store.io(), &self.dir, reason).map_err(|error| self.explain(error))
    }

    /// Gives up and leaves nothing.
    ///
    /// # Errors
    /// It cannot be deleted.
    pub fn cancel(self) -> Result<(), SnapshotError> {
        let trash = {
            let _names = self.store.lock_names()?;
            self.store.discard(&self.dir, &self.tag)
        };
        match trash {
            Ok(trash) => tree::remove(&**self.store.io(), &trash),
            Err(error) if error.is_missing_file() => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(SNAPSHOT).join(name)
    }

    fn small(&self, path: &Path, bytes: &[u8]) -> Result<SmallFile, SnapshotError> {
        write_small(&**self.store.io(), path, bytes)?;
        Ok(SmallFile { bytes: bytes.len() as u64, digest: Digest::of(bytes) })
    }

    /// A file that is missing because the snapshot was deleted is told as that.
    fn explain(&self, error: SnapshotError) -> SnapshotError {
        if error.is_missing_file() && self.is_cancelled() {
            return SnapshotError::Cancelled(self.tag.clone());
        }
        error
    }
}

/// Writes and syncs a new file.
pub(crate) fn write_small(io: &dyn Io, path: &Path, bytes: &[u8]) -> Result<(), SnapshotError> {
    let file = io.create(path, 0).map_err(|e| SnapshotError::io("create", path, e))?;
    io.write_at(&file, path, bytes, 0).map_err(|e| SnapshotError::io("write", path, e))?;
    io.sync_file(&file, path).map_err(|e| SnapshotError::io("sync", path, e))
}

/// Frees what a staging directory holds and leaves a note of why.
pub(crate) fn write_failure(io: &dyn Io, dir: &Path, reason: &str) -> Result<(), SnapshotError> {
    // First, as the reason may be that the disk is full.
    tree::remove(io, &dir.join(SNAPSHOT))?;
    let path = dir.join(FAILED);
    if path.exists() {
        return Ok(());
    }
    let note = serde_json::to_vec(&Failure { reason: reason.to_string() }).unwrap_or_default();
    write_small(io, &path, &note)?;
    io.sync_dir(dir).map_err(|e| SnapshotError::io("sync", dir, e))
}

/// Makes a staging directory, owned by the caller. The store's names are locked.
pub(crate) fn prepare(
    io: &dyn Io,
    dir: &Path,
    parent: Option<&Parent>,
) -> Result<FileLock, SnapshotError> {
    let made = |path: &Path| io.make_dir(path).map_err(|e| SnapshotError::io("make", path, e));
    made(dir)?;
    let lock_path = dir.join(LOCK);
    let lock = FileLock::try_exclusive(&lock_path)
        .map_err(|e| SnapshotError::io("lock", &lock_path, std::io::Error::other(e)))?;
    let intent = crate::names::Intent { parent: parent.cloned() };
    let text = serde_json::to_vec(&intent).unwrap_or_default();
    write_small(io, &dir.join(INTENT), &text)?;
    made(&dir.join(SNAPSHOT))?;
    Ok(lock)
}
