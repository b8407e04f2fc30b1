//! Writing a durable snapshot.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use forkd_api::types::{ChildResult, ChildSpec, Timing, VmRecord};
use forkd_devices::virtio::block::{Disk, ExtentKind};
use forkd_memory::GuestRam;
use forkd_snapshot::{
    Facts, ImageRef, Manifest, Mode, PAGE_SIZE, PageWriter, Parent, Platform, SnapshotError,
    Staged, Store,
};
use forkd_state::StateError;
use forkd_sys::pagemap::{Categories, Pagemap, Pages, Query};
use vm_memory::{Bytes, GuestAddress};

use super::state::encode;
use crate::fork::{Delivered, Destiny, Forked, Quiesced, SavedKvm, fork_all, report_pipes};
use crate::machine::Machine;
use crate::machine::past::Forebear;
use crate::machine::saved::Disks;
use crate::process::report;

/// Bytes of RAM that are copied at a time.
const PIECE: u64 = 1 << 20;

/// Why a snapshot could not be written.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The store does not take it.
    #[error(transparent)]
    Store(#[from] SnapshotError),
    /// The state can't be encoded.
    #[error("cannot encode the VM's state: {0}")]
    State(#[from] StateError),
    /// RAM can't be read.
    #[error("cannot read guest RAM at {gpa:#x}: {why}")]
    Ram {
        /// Where.
        gpa: u64,
        /// Why.
        why: String,
    },
    /// A disk can't be read.
    #[error("cannot read drive {index}: {source}")]
    Disk {
        /// Number of the drive.
        index: usize,
        /// Why.
        source: io::Error,
    },
    /// The host is not known well enough to say where the snapshot may be used.
    #[error("{0}")]
    Host(&'static str),
}

/// What a writer is forked for.
#[derive(Debug)]
pub struct Errand {
    /// The snapshot that is begun.
    pub staged: Staged,
    /// How it was taken.
    pub mode: Mode,
}

/// Begins a flat snapshot `tag` in the store at `store`.
///
/// # Errors
/// The tag is taken, or the store can't be used.
pub fn stage(store: &Path, tag: &str) -> Result<Staged, SnapshotError> {
    Store::open(store)?.stage(tag, None)
}

/// Begins a diff `tag` over the last durable snapshot of a machine, or the one that it was loaded from.
///
/// # Errors
/// One line: there is no such snapshot, or not that one any more; the tag is taken, or the store can't be used.
pub fn stage_diff(machine: &mut Machine, store: &Path, tag: &str) -> Result<Staged, String> {
    let store = Store::open(store).map_err(|e| e.to_string())?;
    let mut why = "a diff needs a durable snapshot of this VM: take one first, or fork it from one"
        .to_owned();
    let mut gone = Vec::new();
    let mut staged = None;
    for forebear in machine.forebears() {
        let parent = match &forebear {
            Forebear::Snapshot(parent) => parent.clone(),
            Forebear::Zygote { tag, instant } => match store.get(tag) {
                Ok(snapshot) if snapshot.manifest().instant == Some(*instant) => {
                    Parent { tag: tag.clone(), root: snapshot.manifest().root }
                }
                // Another one has its tag now.
                Ok(_) => {
                    gone.push(forebear);
                    continue;
                }
                // It may be saved later.
                Err(SnapshotError::NotFound(_)) => continue,
                Err(error) => {
                    why = error.to_string();
                    continue;
                }
            },
        };
        match store.stage_over(tag, &parent) {
            Ok(over) => {
                staged = Some(over);
                break;
            }
            Err(error @ SnapshotError::TooDeep { .. }) => {
                why = format!("{error}; take mode fork");
            }
            Err(
                error @ (SnapshotError::ParentMissing { .. } | SnapshotError::ParentChanged { .. }),
            ) => {
                why = format!("{error}; take mode fork");
                gone.push(forebear);
            }
            Err(error) => return Err(error.to_string()),
        }
    }
    // What was removed does not come back: it need not be looked for the next time.
    machine.past_mut().forget(&gone);
    staged.ok_or(why)
}

/// Forks a process that writes what `errand` says; it tells so in a report.
pub fn fork_writer(quiesced: &Quiesced, tag: &str, errand: Errand, requested_ns: u64) -> Forked {
    let spec = ChildSpec { id: tag.to_owned(), name: tag.to_owned(), dir: PathBuf::new() };
    let pipes = report_pipes(1);
    let forked = fork_all(
        quiesced,
        vec![spec],
        pipes,
        None,
        Destiny::Writer(Box::new(errand)),
        requested_ns,
    );
    if let Forked::Source(delivered, Destiny::Writer(errand)) = &forked
        && let Some(Delivered { outcome: Err(error), .. }) = delivered.first()
    {
        // The answer tells; the list does, too.
        drop(errand.staged.fail(&format!("cannot fork a writer: {error}")));
    }
    forked
}

/// How long a writer has. 64 GiB to a disk of 50 MB/s take half an hour.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(3600);

/// In a process that was forked for it: writes the snapshot, tells the source, and ends.
pub fn run_writer(
    machine: &Machine,
    saved: &SavedKvm,
    source: &VmRecord,
    errand: Errand,
    id: String,
    mut pipe: io::PipeWriter,
    timing: Timing,
) -> ! {
    let Errand { mut staged, mode } = errand;
    let filled = fill(machine, saved, source, &mut staged);
    let written = finish(machine, source, staged, mode, filled);
    let code = i32::from(written.is_err());
    let (root, error) = match written {
        Ok(snapshot) => (Some(snapshot.root.to_string()), None),
        Err(error) => (None, Some(error.to_string())),
    };
    let pid = Some(std::process::id());
    report(&mut pipe, &ChildResult { id, pid, error, root, timing });
    forkd_sys::fork::exit_now(code)
}

/// Publishes what [`fill`] has written, and says what a diff over it would name; the VM may run again.
///
/// # Errors
/// That of `filled`, or [`SaveError`]; the store then lists it as failed, with the reason.
pub fn finish(
    machine: &Machine,
    source: &VmRecord,
    staged: Staged,
    mode: Mode,
    filled: Result<(), SaveError>,
) -> Result<Parent, SaveError> {
    match filled.and_then(|()| facts(machine, source, mode)) {
        Ok(facts) => {
            let snapshot = staged.commit(facts)?;
            let Manifest { tag, root, .. } = snapshot.manifest();
            Ok(Parent { tag: tag.clone(), root: *root })
        }
        Err(error) => {
            // The error at hand is the one to tell; without the note the list says that the writer died.
            drop(staged.fail(&error.to_string()));
            Err(error)
        }
    }
}

/// Writes state, RAM and disks of a VM that stands still.
///
/// # Errors
/// [`SaveError`].
pub fn fill(
    machine: &Machine,
    saved: &SavedKvm,
    source: &VmRecord,
    staged: &mut Staged,
) -> Result<(), SaveError> {
    staged.state(&encode(machine, saved, source.generation)?)?;
    let ram = staged.memory(u64::from(machine.ram().mem_mib()) << 20)?;
    let skip_base = staged.parent().is_some() && machine.blueprint().base.is_some();
    write_ram(machine.ram(), &ram, skip_base)?;
    write_disks(&machine.disks(), staged)
}

/// Bytes of RAM that [`fill`] would read for a flat snapshot, if the VM stood still now; all, if that cannot be told.
pub fn bytes_to_fill(machine: &Machine) -> u64 {
    let ram = machine.ram();
    let bytes = |ranges: Vec<Vec<Range<u64>>>| -> u64 {
        ranges.iter().flatten().map(|range| range.end - range.start).sum()
    };
    to_write(ram, false).map_or(u64::from(ram.mem_mib()) << 20, bytes)
}

/// Writes the layers of all disks.
pub(super) fn write_disks(disks: &Disks, staged: &mut Staged) -> Result<(), SaveError> {
    let mut index = 0;
    disks.each(|disk| {
        let whole = staged.parent().is_none();
        let writer = staged.disk(disk.size().next_multiple_of(PAGE_SIZE), whole)?;
        write_disk(index, disk, &writer)?;
        index += 1;
        Ok(())
    })
}

pub(super) fn facts(machine: &Machine, source: &VmRecord, mode: Mode) -> Result<Facts, SaveError> {
    let kvm = super::kvm_of(machine.host(), machine.mode()).ok_or(SaveError::Host(
        "it is not known which KVM this host has, so a durable snapshot could not say where it may be used",
    ))?;
    Ok(Facts {
        created_unix_ms: forkd_sys::clock::realtime_ns() / 1_000_000,
        forkd: env!("CARGO_PKG_VERSION").to_owned(),
        platform: Platform::of_host(kvm)?,
        kernel: machine.blueprint().kernel.clone(),
        image: ImageRef {
            digest: source.image_digest.clone(),
            tag: Some(source.image.clone()).filter(|tag| *tag != source.image_digest),
        },
        vcpus: u32::from(source.vcpus),
        mem_mib: u64::from(source.mem_mib),
        mode,
        // In this mode the source is the zygote, whose id is its tag.
        instant: (mode == Mode::Fork).then(|| machine.past().instant_of(&source.id)).flatten(),
    })
}

/// Writes RAM: regions lie one after the other in the file. What was never touched is skipped where that can be told.
fn write_ram(ram: &GuestRam, writer: &PageWriter, skip_base: bool) -> Result<(), SaveError> {
    let mut buffer = vec![0; PIECE as usize];
    let mut linear = 0;
    for (region, ranges) in ram.regions().zip(to_write(ram, skip_base)?) {
        for range in ranges {
            let mut at = range.start;
            while at < range.end {
                let len = PIECE.min(range.end - at) as usize;
                let gpa = region.gpa + at;
                ram.guest()
                    .read_slice(&mut buffer[..len], GuestAddress(gpa))
                    .map_err(|e| SaveError::Ram { gpa, why: e.to_string() })?;
                writer.write(linear + at, &buffer[..len])?;
                at += len as u64;
            }
        }
        linear += region.len;
    }
    Ok(())
}

/// Of each region what has to be written, as offsets in it: what was touched, and what files have for it.
///
/// With `skip_base` the pages that are still the base snapshot's are skipped, and so those of all diffs over it on the
/// way here: those that are of its files. (A page that was written since is anonymous memory of this VM. It is given to
/// the writer even if it is zero.) What is given and is the parent's all the same, the writer drops.
fn to_write(ram: &GuestRam, skip_base: bool) -> Result<Vec<Vec<Range<u64>>>, SaveError> {
    let none_of = if skip_base { Categories::FILE } else { Categories::ZERO };
    let touched =
        Query { any_of: Categories::PRESENT | Categories::SWAPPED, none_of, ..Query::default() };
    let failed = |gpa, why: String| SaveError::Ram { gpa, why };
    let mut pagemap = match Pagemap::own() {
        // Without it there is no telling what changed: no diff then.
        Err(error) if skip_base => return Err(failed(0, error.to_string())),
        pagemap => pagemap.ok(),
    };
    let backed = match skip_base {
        true => Vec::new(),
        false => ram.backed().map_err(|e| failed(0, e.to_string()))?,
    };
    let mut linear = 0;
    let mut all = Vec::new();
    for region in ram.regions() {
        let host = region.host_addr..region.host_addr + region.len;
        let mut ranges = Vec::new();
        let scanned = pagemap.as_mut().is_some_and(|pagemap| {
            let each = |pages: Pages| {
                ranges.push(pages.range.start - host.start..pages.range.end - host.start);
            };
            pagemap.scan(host.clone(), touched, each).is_ok()
        });
        if !scanned && skip_base {
            let why = "this kernel cannot tell which pages changed (PAGEMAP_SCAN, Linux 6.7)";
            return Err(failed(region.gpa, why.to_owned()));
        }
        let here = linear..linear + region.len;
        if scanned {
            let within = |part: &Range<u64>| {
                let part = part.start.max(here.start)..part.end.min(here.end);
                (!part.is_empty()).then(|| part.start - linear..part.end - linear)
            };
            ranges.extend(backed.iter().filter_map(within));
        } else {
            // A kernel without PAGEMAP_SCAN: all of it is read.
            ranges = std::iter::once(0..region.len).collect();
        }
        all.push(union(ranges));
        linear = here.end;
    }
    Ok(all)
}

/// The same bytes in ranges that are ascending and do not touch each other.
fn union(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// Writes the layer of disk `index`.
fn write_disk(index: usize, disk: &Disk, writer: &PageWriter) -> Result<(), SaveError> {
    let mut page = vec![0; PAGE_SIZE as usize];
    for extent in disk.layer_state().extents {
        let range = extent.first * PAGE_SIZE..(extent.first + extent.count) * PAGE_SIZE;
        if extent.kind == ExtentKind::Zero {
            writer.write_zero(range)?;
            continue;
        }
        for at in range.step_by(PAGE_SIZE as usize) {
            // The last block of a disk may be a part of a page: the rest of it is zeroes.
            let len = disk.size().saturating_sub(at).min(PAGE_SIZE) as usize;
            page.fill(0);
            disk.read(at, &mut page[..len])
                .map_err(|e| SaveError::Disk { index, source: io::Error::other(e) })?;
            writer.write(at, &page)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_memory::memfd::{MemfdOptions, create_empty};
    use forkd_memory::{AnonOptions, FileExtent, Sharing};

    const MIB: usize = 4;
    const LEN: u64 = (MIB as u64) << 20;

    fn write(ram: &GuestRam, page: u64) {
        ram.guest().write_slice(&[7; 4096], GuestAddress(page * PAGE_SIZE)).expect("within RAM");
    }

    /// The pages of one region that have to be written.
    fn pages(ram: &GuestRam, skip_base: bool) -> Vec<Range<u64>> {
        let mut all = to_write(ram, skip_base).expect("ranges");
        assert_eq!(all.len(), 1);
        let ranges = all.remove(0).into_iter();
        ranges.map(|range| range.start / PAGE_SIZE..range.end / PAGE_SIZE).collect()
    }

    fn covers(ranges: &[Range<u64>], page: u64) -> bool {
        ranges.iter().any(|range| range.contains(&page))
    }

    fn written(ranges: &[Range<u64>]) -> u64 {
        ranges.iter().map(|range| range.end - range.start).sum()
    }

    /// Small pages, so that what is beside a page is not present with it.
    #[test]
    fn of_anonymous_ram_what_was_touched() {
        let options = AnonOptions { thp: false };
        let ram = GuestRam::anonymous(MIB as u32, options).expect("RAM");
        [3, 4, 700].into_iter().for_each(|page| write(&ram, page));
        assert_eq!(pages(&ram, false), [3..5, 700..701]);
    }

    #[test]
    fn of_files_what_they_have_and_what_was_touched() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(LEN).expect("size");
        let at = |page: u64| page * PAGE_SIZE;
        // Mapped in one piece; there are holes in it.
        let extent = FileExtent { ram_offset: 0, len: LEN, file: 0, file_offset: 0 };
        let data = vec![at(16)..at(20), at(20)..at(24)];
        let ram = GuestRam::from_file(MIB as u32, &[file], &[extent], data).expect("RAM");
        [17, 100].into_iter().for_each(|page| write(&ram, page));
        assert_eq!(pages(&ram, false), [16..24, 100..101]);
        // A diff over those files.
        assert_eq!(pages(&ram, true), [17..18, 100..101]);
    }

    #[test]
    fn of_memfds_what_they_have_and_what_was_touched() {
        for sharing in [Sharing::Shared, Sharing::Private] {
            let region = create_empty(LEN, "to-write", &MemfdOptions::default()).expect("a memfd");
            let before = region.try_clone().expect("clone");
            std::os::unix::fs::FileExt::write_all_at(before.file(), &[1], 5 * PAGE_SIZE)
                .expect("write");
            let ram = GuestRam::memfd(MIB as u32, region, sharing).expect("RAM");
            write(&ram, 600);
            let ranges = pages(&ram, false);
            assert!(covers(&ranges, 5) && covers(&ranges, 600), "{sharing:?}: {ranges:?}");
            assert!(written(&ranges) < LEN / PAGE_SIZE / 2, "{sharing:?}: {ranges:?}");
        }
    }

    #[test]
    fn ranges_are_joined() {
        assert_eq!(union(vec![8..9, 0..2, 1..4, 4..5, 0..1]), [0..5, 8..9]);
        assert!(union(Vec::new()).is_empty());
    }
}
