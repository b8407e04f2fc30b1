//! Checks that files are what was written, in parallel, and remembers it.
//!
//! Every block is checked as it reads from the file: that pages which the layer does not hold read as
//! zero is checked too, so that a flat memory file can be mapped with its smaller holes.
//!
//! What was checked is noted in `verified.json` beside the files: the root, the boot of the host, and
//! each file's inode, size and times. Any of them being different voids it, so after a boot the first
//! load reads everything again, from the disk and not from what the page cache still had.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::SnapshotError;
use crate::chain::{Layer, SourceFile, Verification};
use crate::digest::{
    BLOCK_SIZE, Digest, PAGE, PAGE_SIZE, PAGES_PER_BLOCK, PageSet, block_hash, is_zero, page_hash,
};
use crate::io::Io;
use crate::manifest::STATE;
use crate::pages::{PageMap, block_count};
use crate::store::Store;

const STAMP: &str = "verified.json";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// More do not make it faster: the disk or memory is the limit.
const MAX_THREADS: usize = 16;

/// What a verification read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Verified {
    /// Layers of the chain.
    pub layers: usize,
    /// Blocks that were hashed.
    pub blocks: u64,
    /// Bytes that were read of them.
    pub bytes: u64,
}

impl Store {
    /// Reads all of a snapshot and its parents and compares it with its hashes, whatever was
    /// remembered.
    ///
    /// # Errors
    /// The first thing that is damaged, by file and block; or as [`Store::load`].
    pub fn verify(&self, tag: &str) -> Result<Verified, SnapshotError> {
        let layers = {
            let _names = self.share_names()?;
            let layers = self.layers(tag)?;
            for layer in &layers {
                let path = layer.dir.join(STATE);
                let said = &layer.manifest.state;
                let bytes = crate::manifest::read_whole(&path, said.bytes)?;
                if Digest::of(&bytes) != said.digest {
                    return Err(SnapshotError::damaged(&path, "it does not have its digest"));
                }
            }
            layers
        };
        let mut sum = Verified { layers: layers.len(), ..Verified::default() };
        for layer in &layers {
            let found = check(&**self.io(), layer, Verification::Always)?;
            sum.blocks += found.blocks;
            sum.bytes += found.bytes;
        }
        Ok(sum)
    }
}

/// Verifies a layer if it has to be.
pub(crate) fn check(
    io: &dyn Io,
    layer: &Layer,
    verification: Verification,
) -> Result<Verified, SnapshotError> {
    // Before the files are read: what is changed meanwhile must void the stamp.
    let stamp = match verification {
        Verification::Skip => return Ok(Verified::default()),
        _ => Stamp::of(layer)?,
    };
    if verification == Verification::Remembered && stamp.is_some() && Stamp::read(layer) == stamp {
        return Ok(Verified::default());
    }
    let mut sum = Verified { layers: 1, ..Verified::default() };
    for (file, map) in layer.paged() {
        let found = verify_file(file, map)?;
        sum.blocks += found.blocks;
        sum.bytes += found.bytes;
    }
    if let Some(stamp) = stamp {
        stamp.write(io, &layer.dir);
    }
    Ok(sum)
}

/// Notes that a layer that was just written and hashed on the way needs no verification.
pub(crate) fn remember(io: &dyn Io, layer: &Layer) {
    if let Ok(Some(stamp)) = Stamp::of(layer) {
        stamp.write(io, &layer.dir);
    }
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    boot: String,
    root: Digest,
    files: Vec<Identity>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
    modified_s_ns: (i64, i64),
    changed_s_ns: (i64, i64),
}

impl Stamp {
    /// Nothing where the boot has no id.
    fn of(layer: &Layer) -> Result<Option<Self>, SnapshotError> {
        let Ok(boot) = fs::read_to_string(BOOT_ID) else { return Ok(None) };
        let mut files = Vec::new();
        for (SourceFile { path, file }, _) in layer.paged() {
            let meta = file.metadata().map_err(|e| SnapshotError::io("stat", path, e))?;
            files.push(Identity {
                device: meta.dev(),
                inode: meta.ino(),
                bytes: meta.size(),
                modified_s_ns: (meta.mtime(), meta.mtime_nsec()),
                changed_s_ns: (meta.ctime(), meta.ctime_nsec()),
            });
        }
        Ok(Some(Self { boot: boot.trim().to_string(), root: layer.manifest.root, files }))
    }

    fn read(layer: &Layer) -> Option<Self> {
        crate::names::read_note(&layer.dir.join(STAMP))
    }

    /// If it can't be written, or is torn by another who writes it too, the next load verifies again.
    fn write(&self, io: &dyn Io, dir: &Path) {
        let path = dir.join(STAMP);
        let Ok(text) = serde_json::to_vec(self) else { return };
        drop(io.unlink(&path));
        if let Ok(file) = io.create(&path, 0) {
            drop(io.write_at(&file, &path, &text, 0));
        }
    }
}

/// A block to be checked.
struct Job {
    block: u64,
    /// Pages to be read; the others are holes.
    pages: PageSet,
    /// None where the layer has no data: it must be zero.
    expected: Option<Digest>,
}

fn verify_file(source: &SourceFile, map: &PageMap) -> Result<Verified, SnapshotError> {
    let jobs = jobs(source, map)?;
    let next = AtomicUsize::new(0);
    let outcome = Mutex::new((Verified::default(), Vec::<u64>::new(), None::<SnapshotError>));
    let work = || {
        let mut buffer = vec![0; BLOCK_SIZE as usize];
        let (mut sum, mut bad, mut failed) = (Verified::default(), Vec::new(), None);
        while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            match check_block(source, map.len, job, &mut buffer, &mut sum) {
                Ok(true) => {}
                Ok(false) => bad.push(job.block),
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        let mut outcome = outcome.lock().unwrap_or_else(PoisonError::into_inner);
        outcome.0.blocks += sum.blocks;
        outcome.0.bytes += sum.bytes;
        outcome.1.extend(bad);
        outcome.2 = outcome.2.take().or(failed);
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 1..cores.min(MAX_THREADS).min(jobs.len()) {
            scope.spawn(work);
        }
        work();
    });
    let (sum, bad, failed) = outcome.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Some(block) = bad.iter().min().copied() {
        return Err(SnapshotError::DamagedBlocks {
            path: source.path.clone(),
            block,
            count: bad.len() as u64,
            of: block_count(map.len),
        });
    }
    failed.map_or(Ok(sum), Err)
}

/// The blocks that hold data by the map or by the file.
fn jobs(source: &SourceFile, map: &PageMap) -> Result<Vec<Job>, SnapshotError> {
    let mut allocated = allocated_blocks(source, map.len)?.into_iter().peekable();
    let mut jobs = Vec::new();
    for ((block, mut pages), hash) in map.blocks().into_iter().zip(&map.hashes) {
        while let Some((other, pages)) = allocated.next_if(|(other, _)| *other < block) {
            jobs.push(Job { block: other, pages, expected: None });
        }
        if let Some((_, more)) = allocated.next_if(|(other, _)| *other == block) {
            pages.insert_all(&more);
        }
        jobs.push(Job { block, pages, expected: Some(*hash) });
    }
    jobs.extend(allocated.map(|(block, pages)| Job { block, pages, expected: None }));
    Ok(jobs)
}

/// The pages that the file system keeps bytes for.
fn allocated_blocks(source: &SourceFile, len: u64) -> Result<Vec<(u64, PageSet)>, SnapshotError> {
    let SourceFile { path, file } = source;
    let seek_to = |from: SeekFrom| match seek(&**file, from) {
        Ok(at) => Ok(Some(at)),
        Err(Errno::NXIO) => Ok(None),
        Err(e) => Err(SnapshotError::io("find the holes of", path, e)),
    };
    let mut blocks: Vec<(u64, PageSet)> = Vec::new();
    let mut at = 0;
    while at < len {
        let Some(data) = seek_to(SeekFrom::Data(at))? else { break };
        let hole = seek_to(SeekFrom::Hole(data))?.unwrap_or(len).min(len);
        for page in data / PAGE_SIZE..hole.div_ceil(PAGE_SIZE) {
            let block = page / PAGES_PER_BLOCK as u64;
            if blocks.last().is_none_or(|(last, _)| *last != block) {
                blocks.push((block, PageSet::default()));
            }
            if let Some((_, pages)) = blocks.last_mut() {
                pages.insert((page % PAGES_PER_BLOCK as u64) as usize);
            }
        }
        // A hole is behind data, but a file that changes meanwhile must not stop us here.
        at = hole.max(data + 1);
    }
    Ok(blocks)
}

/// Whether a block is what it should be.
fn check_block(
    source: &SourceFile,
    len: u64,
    job: &Job,
    buffer: &mut [u8],
    sum: &mut Verified,
) -> Result<bool, SnapshotError> {
    let start = job.block * BLOCK_SIZE;
    let last = ((len - start).min(BLOCK_SIZE) / PAGE_SIZE) as usize;
    let mut page = 0;
    let mut zero = true;
    while page < last {
        let first = page;
        while page < last && job.pages.has(page) {
            page += 1;
        }
        if first == page {
            page += 1;
            continue;
        }
        let bytes = &mut buffer[first * PAGE..page * PAGE];
        let at = start + (first * PAGE) as u64;
        read(&source.file, &source.path, bytes, at)?;
        sum.bytes += bytes.len() as u64;
        zero = zero && job.expected.is_none() && is_zero(bytes);
    }
    sum.blocks += 1;
    let Some(expected) = job.expected else { return Ok(zero) };
    if job.pages.is_full() {
        return Ok(Digest::of(buffer) == expected);
    }
    let hash_of = |page: usize| page_hash(page, &buffer[page * PAGE..][..PAGE]);
    Ok(block_hash(&job.pages, &hash_of) == expected)
}

fn read(file: &File, path: &Path, bytes: &mut [u8], at: u64) -> Result<(), SnapshotError> {
    file.read_exact_at(bytes, at).map_err(|e| {
        let block = at / BLOCK_SIZE;
        SnapshotError::damaged(path, format_args!("block {block} cannot be read: {e}"))
    })
}
