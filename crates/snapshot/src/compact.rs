//! Makes a flat snapshot of a diff, in its place.
//!
//! The flat one has another root, as it is another layer; its `replaces` names the diff's, and
//! children that name that go on with it. A hash over the resolved content would need no such note,
//! but to know it, each diff would have to read every block that it touches in its parents: 1 GiB for
//! 8 MiB of pages that are spread. The layers are verified in full before they are copied, so that a
//! fault cannot get a good hash on the way.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::chain::{Grain, Layer, Resolved, Verification, resolve_all};
use crate::digest::BLOCK_SIZE;
use crate::manifest::{Facts, Manifest, STATE, read_whole};
use crate::names::Purpose;
use crate::staged::{Landing, Staged};
use crate::store::{Snapshot, Store};
use crate::writer::PageWriter;
use crate::{Digest, SnapshotError, verify};

const MAX_THREADS: usize = 8;

impl Store {
    /// Writes a flat snapshot in the place of a diff, atomically; who has the diff loaded keeps it.
    /// A flat one is left as it is.
    ///
    /// # Errors
    /// As [`Store::load`]; [`SnapshotError::Changed`] or [`SnapshotError::Cancelled`] if it was
    /// replaced or removed meanwhile; or the disk does not take it. Then the diff is still there.
    pub fn compact(&self, tag: &str) -> Result<Snapshot, SnapshotError> {
        let (layers, mut staged, state) = {
            let _names = self.lock_names()?;
            let manifest = self.manifest(tag)?;
            if manifest.parent.is_none() {
                return Ok(Snapshot::new(self.dir().join(tag), manifest));
            }
            let layers = self.layers(tag)?;
            let path = layers[0].dir.join(STATE);
            let said = &layers[0].manifest.state;
            let state = read_whole(&path, said.bytes)?;
            if Digest::of(&state) != said.digest {
                return Err(SnapshotError::damaged(&path, "it does not have its digest"));
            }
            (layers, self.prepare(Purpose::Compact, tag, None)?, state)
        };
        if let Err(error) = self.flatten(&layers, &state, &mut staged) {
            // What cannot be deleted now is swept later; the cause counts.
            drop(staged.cancel());
            return Err(error);
        }
        let manifest = &layers[0].manifest;
        let root = manifest.root;
        staged.commit_as(facts_of(manifest), Some(root), Landing::InPlaceOf(root))
    }

    fn flatten(
        &self,
        layers: &[Layer],
        state: &[u8],
        staged: &mut Staged,
    ) -> Result<(), SnapshotError> {
        for layer in layers {
            verify::check(&**self.io(), layer, Verification::Always)?;
        }
        let (memory, disks) = resolve_all(layers, Grain::Data)?;
        copy(&memory, &staged.memory(memory.len)?)?;
        for disk in &disks {
            copy(disk, &staged.disk(disk.len, true)?)?;
        }
        staged.state(state)
    }
}

fn facts_of(manifest: &Manifest) -> Facts {
    let manifest = manifest.clone();
    Facts {
        created_unix_ms: manifest.created_unix_ms,
        forkd: manifest.forkd,
        platform: manifest.platform,
        kernel: manifest.kernel,
        image: manifest.image,
        vcpus: manifest.vcpus,
        mem_mib: manifest.mem_mib,
        mode: manifest.mode,
        instant: manifest.instant,
    }
}

/// Copies what is in extents, in pieces of at most a block, on several threads.
fn copy(from: &Resolved, to: &PageWriter) -> Result<(), SnapshotError> {
    for zero in &from.zeroes {
        to.write_zero(zero.clone())?;
    }
    let mut pieces = Vec::new();
    for extent in &from.extents {
        let end = extent.offset + extent.len;
        let mut at = extent.offset;
        while at < end {
            let stop = end.min((at / BLOCK_SIZE + 1) * BLOCK_SIZE);
            pieces.push(at..stop);
            at = stop;
        }
    }
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    let work = || {
        let mut buffer = vec![0; BLOCK_SIZE as usize];
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            let bytes = &mut buffer[..(piece.end - piece.start) as usize];
            let copied =
                from.read_at(piece.start, bytes).and_then(|()| to.write(piece.start, bytes));
            if let Err(error) = copied {
                failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                // The others need not go on.
                next.store(pieces.len(), Ordering::Relaxed);
            }
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 1..cores.min(MAX_THREADS).min(pieces.len()) {
            scope.spawn(work);
        }
        work();
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}
