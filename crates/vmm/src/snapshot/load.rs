//! Loading a durable snapshot: a zygote over its files, or a VM.
//!
//! RAM is mapped from the snapshot's files, privately: nothing is read before the guest touches it, and all children of
//! all zygotes of a snapshot share the page cache. RAM in a shared memfd is a copy of them.

use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use forkd_api::types::{DriveConfig, RestoreConfig, RestoredMemory, Timing, VmRecord};
use forkd_devices::virtio::block::ExtentKind;
use forkd_memory::memfd::create_empty;
use forkd_memory::{FileExtent, GuestRam, MemfdError, MemfdOptions, MemoryError, Sharing};
use forkd_snapshot::{
    HostFacts, Loaded, PAGE_SIZE, Parent, Platform, Resolved, SnapshotError, Store, Verification,
    check_host,
};
use forkd_sys::clock::{monotonic_ns, realtime_ns};
use forkd_sys::memfd::next_data;
use forkd_sys::reactor::Reactor;
use forkd_vm::Host;

use super::state::SavedVm;
use crate::control::Control;
use crate::fork::{SavedKvm, child};
use crate::machine::{Blueprint, Machine, MachineError};
use crate::process::{Role, VmmError, tell};
use crate::run_dir::RunDir;
use crate::zygote::Zygote;

/// Bytes of RAM that are copied at a time: few enough to stay in the CPU's cache.
const PIECE: usize = 256 << 10;

/// Builds a zygote from a durable snapshot, says so on standard output, and lets go of the standard streams; or a VM,
/// which does so once its vCPUs run.
///
/// # Errors
/// The snapshot is damaged, or not for this host; something can't be had. The run directory is removed then.
pub fn restore(config: &RestoreConfig) -> Result<Role, VmmError> {
    let requested_ns = monotonic_ns();
    let dir = RunDir::create(&config.dir)?;
    let (machine, kvm, record) = match build(config, &dir) {
        Ok(built) => built,
        Err(error) => {
            // The error at hand is the one to tell; a directory that stays is swept later.
            drop(std::fs::remove_dir_all(dir.path()));
            return Err(error);
        }
    };
    let timing = Timing { requested_ns, ..Timing::default() };
    if config.run_as.is_some() {
        return child::run_loaded(machine, &kvm, dir, record, timing).map(Role::Running);
    }
    match serve_zygote(&machine, &dir) {
        Ok(control) => {
            let timing = Timing { ready_ns: monotonic_ns(), ..timing };
            let saved = Arc::new(kvm);
            tell(&serde_json::json!({"ok": true}));
            child::detach_stdio(&dir).map_err(VmmError::io("cannot reopen standard streams"))?;
            Ok(Role::Zygote(Box::new(Zygote { control, machine, saved, dir, record, timing })))
        }
        Err(error) => {
            dir.remove()?;
            Err(error)
        }
    }
}

fn serve_zygote(machine: &Machine, dir: &RunDir) -> Result<Control, VmmError> {
    machine.ram().check_fork().map_err(MachineError::from)?;
    machine.share_root();
    let reactor = Reactor::new().map_err(VmmError::io("cannot make an epoll set"))?;
    Control::new(reactor, &dir.file("api.sock"))
}

fn build(config: &RestoreConfig, dir: &RunDir) -> Result<(Machine, SavedKvm, VmRecord), VmmError> {
    let wrong = |why: String| {
        VmmError::Config(format!("snapshot {} cannot be loaded: {why}", config.restore_from))
    };
    let loaded = Store::open(&config.store)
        .and_then(|store| store.load(&config.restore_from, Verification::Remembered))
        .map_err(|e| VmmError::Config(e.to_string()))?;
    let host = Host::open().map_err(MachineError::from)?;
    check(&loaded, &host).map_err(wrong)?;
    let saved = SavedVm::decode(&loaded.state).map_err(|e| wrong(format!("its state: {e}")))?;
    let manifest = &loaded.manifest;
    let mem_mib = u32::try_from(manifest.mem_mib)
        .map_err(|_| wrong(format!("{} MiB of RAM", manifest.mem_mib)))?;
    // A VM is a child of the snapshot; a zygote is the snapshot.
    let (parent, born) = match &config.run_as {
        Some(_) => (Some(config.restore_from.clone()), 1),
        None => (None, 0),
    };
    let record = VmRecord {
        id: config.id.clone(),
        name: config.run_as.clone().unwrap_or_else(|| config.id.clone()),
        zygote: config.run_as.is_none(),
        pid: std::process::id(),
        vcpus: saved.machine.vcpus,
        mem_mib,
        image: manifest.image.tag.clone().unwrap_or_else(|| manifest.image.digest.clone()),
        image_digest: manifest.image.digest.clone(),
        parent,
        generation: saved.machine.generation.saturating_add(born),
        created_unix_ms: realtime_ns() / 1_000_000,
    };
    dir.write_record(&record)?;
    let blueprint = Blueprint {
        id: saved.machine.id.clone(),
        root: config.root.clone(),
        drives: saved.machine.drives.iter().map(DriveConfig::from).collect(),
        kernel: manifest.kernel.clone(),
        // In a memfd nothing tells which pages were written since.
        base: (config.memory == RestoredMemory::File)
            .then(|| Parent { tag: config.restore_from.clone(), root: manifest.root }),
    };
    let ram = match config.memory {
        RestoredMemory::File => map_ram(&loaded.memory, mem_mib)?,
        RestoredMemory::MemfdShared => copy_ram(&loaded.memory, mem_mib, &config.id)
            .map_err(|error| wrong(format!("its RAM: {error}")))?,
    };
    let machine = Machine::assemble(host, ram, blueprint, dir)?;
    machine.restore_devices(&saved.devices).map_err(|e| wrong(e.to_string()))?;
    for (index, disk) in loaded.disks.iter().enumerate() {
        fill_disk(&machine, index, disk).map_err(|e| wrong(e.to_string()))?;
    }
    Ok((machine, saved.kvm, record))
}

/// Whether the snapshot is for this host. Its kernel is in its RAM; its root image was found by digest.
fn check(loaded: &Loaded, host: &Host) -> Result<(), String> {
    let kvm = super::kvm_of(host).ok_or("it is not known which KVM this host has")?;
    let facts = HostFacts {
        platform: Platform::of_host(kvm).map_err(|e| e.to_string())?,
        kernels: vec![loaded.manifest.kernel.clone()],
        images: vec![loaded.manifest.image.digest.clone()],
    };
    check_host(&loaded.manifest, &facts)
        .map_err(|found| found.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
}

fn map_ram(memory: &Resolved, mem_mib: u32) -> Result<GuestRam, VmmError> {
    let files = memory.files.iter().map(|source| source.file.try_clone());
    let files: Vec<_> =
        files.collect::<io::Result<_>>().map_err(VmmError::io("cannot share the memory's file"))?;
    let extents = memory.extents.iter().map(|e| FileExtent {
        ram_offset: e.offset,
        len: e.len,
        file: e.file,
        file_offset: e.file_offset,
    });
    let extents: Vec<FileExtent> = extents.collect();
    Ok(GuestRam::from_file(mem_mib, &files, &extents).map_err(MachineError::from)?)
}

/// Why a shared memfd could not be had.
#[derive(Debug, thiserror::Error)]
enum CopyError {
    #[error(transparent)]
    Memfd(#[from] MemfdError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error("cannot seek in {0}: {1}")]
    Seek(PathBuf, io::Error),
    #[error("cannot write {len} bytes at {offset:#x} of its memfd: {source}")]
    Write { offset: u64, len: usize, source: io::Error },
}

/// A memfd of this process's own, with the bytes of the files; what is zero there takes no memory.
fn copy_ram(memory: &Resolved, mem_mib: u32, name: &str) -> Result<GuestRam, CopyError> {
    let memfd = create_empty(u64::from(mem_mib) << 20, name, &MemfdOptions::default())?;
    let mut piece = vec![0; PIECE];
    for extent in &memory.extents {
        let source = &memory.files[extent.file];
        let seek = |source_error| CopyError::Seek(source.path.clone(), source_error);
        let end = extent.file_offset + extent.len;
        let mut at = extent.file_offset;
        // Extents take in holes, which would become zeroes that take memory.
        while let Some(data) = next_data(&*source.file, at, end).map_err(seek)? {
            at = data.start;
            while at < data.end {
                // At most PIECE.
                let len = (data.end - at).min(PIECE as u64) as usize;
                let offset = extent.offset + (at - extent.file_offset);
                memory.read_at(offset, &mut piece[..len])?;
                memfd
                    .file()
                    .write_all_at(&piece[..len], offset)
                    .map_err(|source| CopyError::Write { offset, len, source })?;
                at += len as u64;
            }
        }
    }
    Ok(GuestRam::memfd(mem_mib, memfd, Sharing::Shared)?)
}

fn fill_disk(machine: &Machine, index: usize, disk: &Resolved) -> io::Result<()> {
    let data = disk.extents.iter().map(|e| (e.offset..e.offset + e.len, ExtentKind::Data));
    let zero = disk.zeroes.iter().map(|range| (range.clone(), ExtentKind::Zero));
    let mut all: Vec<(Range<u64>, ExtentKind)> = data.chain(zero).collect();
    all.sort_unstable_by_key(|(range, _)| range.start);
    let ranges = all.iter().filter(|(_, kind)| *kind == ExtentKind::Data).map(|(r, _)| r.clone());
    let mut reader = DiskReader { disk, ranges: ranges.collect(), next: 0, at: 0 };
    machine.fill_disk(index, &all, &mut reader).map_err(io::Error::other)
}

/// The data of a disk's extents, one after the other.
struct DiskReader<'a> {
    disk: &'a Resolved,
    ranges: Vec<Range<u64>>,
    next: usize,
    at: u64,
}

impl Read for DiskReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(range) = self.ranges.get(self.next) else { return Ok(0) };
        let left = range.end - range.start - self.at;
        let len = left.min(buffer.len() as u64).min(PAGE_SIZE) as usize;
        self.disk.read_at(range.start + self.at, &mut buffer[..len]).map_err(io::Error::other)?;
        self.at += len as u64;
        if self.at == range.end - range.start {
            (self.next, self.at) = (self.next + 1, 0);
        }
        Ok(len)
    }
}
