//! Loads a snapshot: its chain of layers, opened, checked, and resolved to extents of their files.
//!
//! All files are opened while the store's names are locked, so what is mapped later is what was
//! checked, whatever is renamed or removed meanwhile.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::digest::{Digest, PAGE_SIZE};
use crate::manifest::{
    EXTENTS, MEMORY, Manifest, PagedFile, STATE, SmallFile, disk_name, read_whole,
};
use crate::pages::{Kind, Maps, PageMap, Run};
use crate::store::Store;
use crate::{SnapshotError, tree, verify};

/// Most parents that a snapshot has, counting theirs.
pub const MAX_DEPTH: usize = 64;

/// Whether a load checks the hashes of memory and disks. Those of the manifest, the state and the
/// extents are always checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verification {
    /// Of the layers that have not been, since this host booted, as their files are now.
    Remembered,
    /// Of all.
    Always,
    /// Of none.
    Skip,
}

/// A file of a layer, open for reading.
#[derive(Debug, Clone)]
pub struct SourceFile {
    /// Where it was when it was opened.
    pub path: PathBuf,
    /// The file.
    pub file: Arc<File>,
}

/// A range that is in a file. All numbers are bytes, multiples of 4096.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where in RAM or on the disk.
    pub offset: u64,
    /// How long.
    pub len: u64,
    /// Index into [`Resolved::files`].
    pub file: usize,
    /// Where in the file; the same as `offset` in format 1.
    pub file_offset: u64,
}

/// What RAM or a disk's layer is made of.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// Length in bytes.
    pub len: u64,
    /// The files, the newest layer's first.
    pub files: Vec<SourceFile>,
    /// Sorted, apart, and joined where they can be. Of RAM, what is in no extent is zero.
    pub extents: Vec<Extent>,
    /// Of a disk: ranges that are zero, sorted. What is neither here nor in an extent is the base
    /// image's. Of RAM: empty.
    pub zeroes: Vec<Range<u64>>,
}

impl Resolved {
    /// Reads bytes; what is in no extent reads as zero.
    ///
    /// # Errors
    /// [`SnapshotError::Misuse`] if the range ends behind the end; or a file cannot be read.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), SnapshotError> {
        let end = offset.saturating_add(bytes.len() as u64);
        if end > self.len {
            let path = self.files.first().map_or(Path::new(MEMORY), |file| &file.path);
            return Err(SnapshotError::misuse(path, format_args!("{end:#x} is behind its end")));
        }
        bytes.fill(0);
        let first = self.extents.partition_point(|extent| extent.offset + extent.len <= offset);
        for extent in self.extents[first..].iter().take_while(|extent| extent.offset < end) {
            let from = extent.offset.max(offset);
            let to = (extent.offset + extent.len).min(end);
            let piece = &mut bytes[(from - offset) as usize..(to - offset) as usize];
            let SourceFile { path, file } = &self.files[extent.file];
            file.read_exact_at(piece, extent.file_offset + (from - extent.offset))
                .map_err(|e| SnapshotError::io("read", path, e))?;
        }
        Ok(())
    }
}

/// A snapshot, ready to be run.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// What it is.
    pub manifest: Manifest,
    /// vCPU and device state, as it was given to [`crate::Staged::state`].
    pub state: Vec<u8>,
    /// RAM.
    pub memory: Resolved,
    /// Where RAM has data, in bytes, sorted: the extents of `memory` without the holes of a flat file.
    pub data: Vec<Range<u64>>,
    /// The disks' writable layers.
    pub disks: Vec<Resolved>,
    /// The tags of its parents, the nearest first.
    pub parents: Vec<String>,
}

/// What there is to tell of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Info {
    /// What it is.
    pub manifest: Manifest,
    /// Its directory.
    pub dir: PathBuf,
    /// Bytes that its own files take on the disk.
    pub disk_bytes: u64,
    /// The tags of its parents, the nearest first. None: it is flat.
    pub parents: Vec<String>,
    /// Bytes that it and its parents take on the disk.
    pub chain_disk_bytes: u64,
    /// Mappings that its RAM takes. The kernel allows a process 65530 by default (vm.max_map_count).
    pub memory_extents: usize,
}

/// A layer, open, with its small files checked.
#[derive(Debug)]
pub(crate) struct Layer {
    pub manifest: Manifest,
    pub dir: PathBuf,
    pub maps: Maps,
    pub memory: SourceFile,
    pub disks: Vec<SourceFile>,
}

impl Layer {
    pub(crate) fn open(dir: PathBuf, manifest: Manifest) -> Result<Self, SnapshotError> {
        let path = dir.join(EXTENTS);
        let maps = Maps::decode(&read_small(&path, &manifest.extents)?, &path)?;
        let fits = |map: &PageMap, said: &PagedFile| {
            let PagedFile { bytes, data_bytes, whole } = *said;
            (map.len, map.data_bytes(), map.whole) == (bytes, data_bytes, whole)
        };
        let disks_fit = maps.disks.len() == manifest.disks.len()
            && maps.disks.iter().zip(&manifest.disks).all(|(map, said)| fits(map, said));
        if !disks_fit || !fits(&maps.memory, &manifest.memory) {
            return Err(SnapshotError::damaged(&path, "it is not what the manifest says of it"));
        }
        let memory = open_paged(dir.join(MEMORY), &maps.memory)?;
        let disks = maps.disks.iter().enumerate();
        let disks = disks
            .map(|(index, map)| open_paged(dir.join(disk_name(index)), map))
            .collect::<Result<_, _>>()?;
        Ok(Self { manifest, dir, maps, memory, disks })
    }

    /// The files that are hashed by blocks.
    pub(crate) fn paged(&self) -> impl Iterator<Item = (&SourceFile, &PageMap)> {
        let disks = self.disks.iter().zip(&self.maps.disks);
        std::iter::once((&self.memory, &self.maps.memory)).chain(disks)
    }
}

fn open_paged(path: PathBuf, map: &PageMap) -> Result<SourceFile, SnapshotError> {
    let file = File::open(&path).map_err(|e| SnapshotError::io("open", &path, e))?;
    let len = file.metadata().map_err(|e| SnapshotError::io("stat", &path, e))?.len();
    if len != map.len {
        // To map what is behind the end of a file ends the process that touches it.
        let what = format!("it has {len} bytes and should have {}", map.len);
        return Err(SnapshotError::damaged(&path, what));
    }
    Ok(SourceFile { path, file: Arc::new(file) })
}

/// Reads a file that is hashed as a whole, and checks it.
fn read_small(path: &Path, said: &SmallFile) -> Result<Vec<u8>, SnapshotError> {
    let bytes = read_whole(path, said.bytes)?;
    if bytes.len() as u64 != said.bytes || Digest::of(&bytes) != said.digest {
        return Err(SnapshotError::damaged(path, "it does not have the digest in the manifest"));
    }
    Ok(bytes)
}

impl Store {
    /// The manifests of a chain, the newest first.
    pub(crate) fn manifests(&self, tag: &str) -> Result<Vec<Manifest>, SnapshotError> {
        let mut chain = vec![self.manifest(tag)?];
        while let Some(parent) = chain.last().and_then(|last| last.parent.clone()) {
            if chain.iter().any(|seen| seen.tag == parent.tag) {
                return Err(SnapshotError::Cycle { tag: tag.to_string(), again: parent.tag });
            }
            if chain.len() > MAX_DEPTH {
                return Err(SnapshotError::TooDeep { tag: tag.to_string(), limit: MAX_DEPTH });
            }
            let child = chain.last().map_or("", |last| &last.tag);
            chain.push(self.check_parent(child, &parent)?);
        }
        Ok(chain)
    }

    pub(crate) fn layers(&self, tag: &str) -> Result<Vec<Layer>, SnapshotError> {
        let open = |manifest: Manifest| Layer::open(self.dir().join(&manifest.tag), manifest);
        let layers: Vec<Layer> =
            self.manifests(tag)?.into_iter().map(open).collect::<Result<_, _>>()?;
        for pair in layers.windows(2) {
            if pair[0].maps.memory.len != pair[1].maps.memory.len {
                return Err(other_length(&pair[0].memory.path, &pair[1].memory.path));
            }
        }
        Ok(layers)
    }

    /// Loads a snapshot.
    ///
    /// # Errors
    /// That of [`Store::get`]; what is wrong with the chain; what is damaged, by file and block; or a
    /// file cannot be read.
    pub fn load(&self, tag: &str, verification: Verification) -> Result<Loaded, SnapshotError> {
        let (layers, state) = {
            let _names = self.share_names()?;
            let layers = self.layers(tag)?;
            let top = &layers[0];
            let state = read_small(&top.dir.join(STATE), &top.manifest.state)?;
            (layers, state)
        };
        for layer in &layers {
            verify::check(&**self.io(), layer, verification)?;
        }
        let (memory, disks) = resolve_all(&layers, Grain::Mappings)?;
        let parents = layers[1..].iter().map(|layer| layer.manifest.tag.clone()).collect();
        let data = resolve_memory(&layers, Grain::Data).extents.into_iter();
        let data = data.map(|extent| extent.offset..extent.offset + extent.len).collect();
        Ok(Loaded { manifest: layers[0].manifest.clone(), state, memory, data, disks, parents })
    }

    /// What there is to tell of a snapshot.
    ///
    /// # Errors
    /// As [`Store::load`] without verification.
    pub fn info(&self, tag: &str) -> Result<Info, SnapshotError> {
        let _names = self.share_names()?;
        let layers = self.layers(tag)?;
        let sizes = layers.iter().map(|layer| tree::disk_bytes(&layer.dir));
        let sizes: Vec<u64> = sizes.collect::<Result<_, _>>()?;
        let (memory, _) = resolve_all(&layers, Grain::Mappings)?;
        Ok(Info {
            manifest: layers[0].manifest.clone(),
            dir: layers[0].dir.clone(),
            disk_bytes: sizes[0],
            parents: layers[1..].iter().map(|layer| layer.manifest.tag.clone()).collect(),
            chain_disk_bytes: sizes.iter().sum(),
            memory_extents: memory.extents.len(),
        })
    }
}

fn other_length(path: &Path, parent: &Path) -> SnapshotError {
    SnapshotError::damaged(path, format_args!("its length is not that of {}", parent.display()))
}

/// The smallest hole of a flat memory file that is not mapped with what is around it, in bytes: a transparent huge page
/// fits into it.
const LARGE_HOLE: u64 = 2 << 20;
/// Most pieces into which large holes divide such a file, by a lower limit for them: each piece and each hole is one of
/// the 65,530 mappings that a process may have (`vm.max_map_count`).
const MOST_MAPPED: u64 = 4096;

/// How fine extents are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Grain {
    /// Few: the smaller holes of a flat memory file are part of its extents.
    Mappings,
    /// Data only.
    Data,
}

pub(crate) fn resolve_all(
    layers: &[Layer],
    grain: Grain,
) -> Result<(Resolved, Vec<Resolved>), SnapshotError> {
    let memory = resolve_memory(layers, grain);
    let mut disks = Vec::new();
    for (index, top) in layers[0].disks.iter().enumerate() {
        let mut stack: Vec<(&SourceFile, &PageMap)> = Vec::new();
        for layer in layers {
            let (Some(file), Some(map)) = (layer.disks.get(index), layer.maps.disks.get(index))
            else {
                break;
            };
            if let Some((above, _)) = stack.last().filter(|(_, above)| above.len != map.len) {
                return Err(other_length(&above.path, &file.path));
            }
            stack.push((file, map));
            if map.whole {
                break;
            }
        }
        if !stack.last().is_some_and(|(_, map)| map.whole) {
            return Err(SnapshotError::damaged(&top.path, "no parent has all of it"));
        }
        disks.push(resolve(stack.into_iter(), Under::BaseImage, grain));
    }
    Ok((memory, disks))
}

fn resolve_memory(layers: &[Layer], grain: Grain) -> Resolved {
    let memory = layers.iter().map(|layer| (&layer.memory, &layer.maps.memory));
    resolve(memory, Under::Zero, grain)
}

/// What shows where no layer has anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Under {
    Zero,
    BaseImage,
}

/// A run and the layer it is of.
#[derive(Debug, Clone, Copy)]
struct Piece {
    run: Run,
    layer: usize,
}

/// From the newest layer to the first that is whole. The cost is that of the number of runs.
fn resolve<'a>(
    layers: impl Iterator<Item = (&'a SourceFile, &'a PageMap)>,
    under: Under,
    grain: Grain,
) -> Resolved {
    let mut resolved =
        Resolved { len: 0, files: Vec::new(), extents: Vec::new(), zeroes: Vec::new() };
    let mut pieces = Vec::new();
    for (index, (file, map)) in layers.enumerate() {
        resolved.len = map.len;
        resolved.files.push(file.clone());
        let joined = map.whole && under == Under::Zero && grain == Grain::Mappings;
        pieces = match joined {
            true => underlay(pieces, &over_small_holes(map), index),
            false => underlay(pieces, &map.runs, index),
        };
        if map.whole {
            break;
        }
    }
    for Piece { run, layer } in pieces {
        let (offset, len) = (run.first * PAGE_SIZE, run.count * PAGE_SIZE);
        match run.kind {
            Kind::Data => {
                resolved.extents.push(Extent { offset, len, file: layer, file_offset: offset });
            }
            Kind::Zero if under == Under::Zero => {}
            Kind::Zero => match resolved.zeroes.last_mut() {
                Some(last) if last.end == offset => last.end += len,
                _ => resolved.zeroes.push(offset..offset + len),
            },
        }
    }
    resolved
}

/// The data of a flat memory file, joined over its smaller holes: those read as zeroes, which is what they mean and what
/// verification makes sure of. Larger ones are left out. To touch a page of one would have the kernel read ahead:
/// megabytes of zeroes into the page cache, where anonymous memory costs a page.
fn over_small_holes(map: &PageMap) -> Vec<Run> {
    let least = (LARGE_HOLE / PAGE_SIZE).max(map.len / PAGE_SIZE / MOST_MAPPED);
    let mut joined: Vec<Run> = Vec::new();
    for run in map.runs.iter().filter(|run| run.kind == Kind::Data) {
        match joined.last_mut() {
            Some(last) if run.first - last.end() < least => last.count = run.end() - last.first,
            _ => joined.push(*run),
        }
    }
    joined
}

/// Puts an older layer's runs where the newer pieces leave room.
fn underlay(above: Vec<Piece>, runs: &[Run], layer: usize) -> Vec<Piece> {
    let mut out: Vec<Piece> = Vec::with_capacity(above.len() + runs.len());
    let mut above = above.into_iter().peekable();
    let mut covered = 0;
    for run in runs {
        let mut at = run.first.max(covered);
        while at < run.end() {
            let next = above.peek().map_or(u64::MAX, |piece| piece.run.first);
            if next > at {
                let end = next.min(run.end());
                push(&mut out, Piece { run: Run { first: at, count: end - at, ..*run }, layer });
                at = end;
            } else if let Some(piece) = above.next() {
                covered = piece.run.end();
                at = at.max(covered);
                push(&mut out, piece);
            }
        }
    }
    above.for_each(|piece| push(&mut out, piece));
    out
}

fn push(pieces: &mut Vec<Piece>, piece: Piece) {
    match pieces.last_mut() {
        Some(last)
            if last.layer == piece.layer
                && last.run.kind == piece.run.kind
                && last.run.end() == piece.run.first =>
        {
            last.run.count += piece.run.count;
        }
        _ => pieces.push(piece),
    }
}
