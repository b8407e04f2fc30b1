//! Loading a durable snapshot: a zygote over its files, or a VM.
//!
//! RAM is mapped from the snapshot's files, privately: nothing is read before the guest touches it, and all children of
//! all zygotes of a snapshot share the page cache. RAM in a shared memfd is a copy of them; a private one is a copy that
//! all VMs of a load share; and with a userfaultfd they are read as the guest touches them.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use forkd_api::types::{DriveConfig, RestoreConfig, RestoredMemory, Timing, VmRecord};
use forkd_devices::virtio::block::ExtentKind;
use forkd_memory::backend::FileSource;
use forkd_memory::memfd::create_from_extents;
use forkd_memory::{
    FileExtent, GuestRam, MemfdError, MemfdOptions, MemfdRegion, MemoryError, Sharing, WorkingSet,
};
use forkd_snapshot::{
    Extent, HostFacts, KvmFlavour, Loaded, PAGE_SIZE, Parent, Platform, Resolved, SourceFile,
    Store, Verification, check_host,
};
use forkd_sys::clock::{monotonic_ns, realtime_ns};
use forkd_sys::fds::take_inherited;
use forkd_sys::reactor::Reactor;
use forkd_vm::pvm::native::NotNative;
use forkd_vm::{GuestMode, Host};

use super::state::SavedVm;
use crate::control::Control;
use crate::fork::{SavedKvm, child};
use crate::lazy::{Lazy, Origin};
use crate::machine::{Blueprint, Machine, MachineError, open_host};
use crate::process::{Role, VmmError, tell};
use crate::run_dir::RunDir;
use crate::zygote::Zygote;

/// Why RAM could not be had.
#[derive(Debug, thiserror::Error)]
enum RamError {
    #[error(transparent)]
    Memfd(#[from] MemfdError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("cannot share the memory's file: {0}")]
    Share(io::Error),
    #[error("its memfd was not handed on")]
    NoMemfd,
}

/// Builds a zygote from a durable snapshot, says so on standard output, and lets go of the standard streams; or a VM,
/// which does so once its vCPUs run.
///
/// # Errors
/// The snapshot is damaged, or not for this host; something can't be had. The run directory is removed then.
pub fn restore(config: &RestoreConfig) -> Result<Role, VmmError> {
    let requested_ns = monotonic_ns();
    // SAFETY: this process has opened nothing so far but its standard streams, whose numbers are refused.
    let inherited = config.memfd.map(|number| unsafe { take_inherited(number) }).transpose();
    let inherited =
        inherited.map_err(|e| VmmError::Config(format!("no memfd for its RAM: {e}")))?;
    let dir = RunDir::create(&config.dir)?;
    let Built { machine, kvm, record, lazy } = match build(config, &dir, inherited) {
        Ok(built) => built,
        Err(error) => {
            // The error at hand is the one to tell; a directory that stays is swept later.
            drop(std::fs::remove_dir_all(dir.path()));
            return Err(error);
        }
    };
    let timing = Timing { requested_ns, ..Timing::default() };
    if config.run_as.is_some() {
        let mut running = child::run_loaded(machine, &kvm, dir, record, timing)?;
        running.adopt_lazy(lazy).map_err(VmmError::io("cannot watch the loading of RAM"))?;
        return Ok(Role::Running(running));
    }
    match serve_zygote(&machine, &dir) {
        Ok(control) => {
            let timing = Timing { ready_ns: monotonic_ns(), ..timing };
            let saved = Arc::new(kvm);
            tell(&serde_json::json!({"ok": true}));
            child::detach_stdio(&dir).map_err(VmmError::io("cannot reopen standard streams"))?;
            let unshared = Some(0);
            let zygote = Zygote { control, machine, saved, dir, record, timing, unshared };
            Ok(Role::Zygote(Box::new(zygote)))
        }
        Err(error) => {
            dir.remove()?;
            Err(error)
        }
    }
}

fn serve_zygote(machine: &Machine, dir: &RunDir) -> Result<Control, VmmError> {
    machine.ram().check_fork().map_err(MachineError::from)?;
    let reactor = Reactor::new().map_err(VmmError::io("cannot make an epoll set"))?;
    Control::new(reactor, &dir.file("api.sock"))
}

/// What a snapshot was made into.
struct Built {
    machine: Machine,
    kvm: SavedKvm,
    record: VmRecord,
    lazy: Option<Lazy>,
}

fn build(
    config: &RestoreConfig,
    dir: &RunDir,
    inherited: Option<OwnedFd>,
) -> Result<Built, VmmError> {
    let wrong = |why: String| {
        VmmError::Config(format!("snapshot {} cannot be loaded: {why}", config.restore_from))
    };
    let loaded = Store::open(&config.store)
        .and_then(|store| store.load(&config.restore_from, Verification::Remembered))
        .map_err(|e| VmmError::Config(e.to_string()))?;
    let host = open_host(&config.pvm).map_err(MachineError::from)?;
    check(&loaded, &host).map_err(wrong)?;
    let saved = SavedVm::decode(&loaded.state).map_err(|e| wrong(format!("its state: {e}")))?;
    let manifest = &loaded.manifest;
    check_mode(manifest.platform.kvm, saved.kvm.mode).map_err(wrong)?;
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
    let source = Parent { tag: config.restore_from.clone(), root: manifest.root };
    let blueprint = Blueprint {
        id: saved.machine.id.clone(),
        root: config.root.clone(),
        drives: saved.machine.drives.iter().map(DriveConfig::from).collect(),
        kernel: manifest.kernel.clone(),
        mode: saved.kvm.mode,
        // Of private mappings it can be told which pages were written since.
        base: matches!(config.memory, RestoredMemory::File | RestoredMemory::MemfdPrivate)
            .then(|| source.clone()),
    };
    let memory = &loaded.memory;
    let (store, tag) = (config.store.clone(), config.restore_from.clone());
    let origin = Origin { store, tag, root: manifest.root };
    let mut known = WorkingSet::default();
    let ram = match config.memory {
        RestoredMemory::File => map_ram(memory, loaded.data.clone(), mem_mib),
        RestoredMemory::MemfdShared => copy_ram(memory, mem_mib, &config.id),
        RestoredMemory::MemfdPrivate => share_ram(inherited, mem_mib),
        RestoredMemory::Userfault => {
            known = working_set(&origin, memory.len, dir);
            lazy_ram(memory, mem_mib, known.clone())
        }
    }
    .map_err(|error| wrong(format!("its RAM: {error}")))?;
    let mut machine = Machine::assemble(host, ram, blueprint, dir)?;
    machine.set_latest(source);
    let lazy = Lazy::begin(&machine, origin, known, dir.path());
    machine.restore_devices(&saved.devices).map_err(|e| wrong(e.to_string()))?;
    for (index, disk) in loaded.disks.iter().enumerate() {
        fill_disk(&machine, index, disk).map_err(|e| wrong(e.to_string()))?;
    }
    Ok(Built { machine, kvm: saved.kvm, record, lazy })
}

/// What to fetch ahead. A working set that is no good is as good as none.
fn working_set(origin: &Origin, size: u64, dir: &RunDir) -> WorkingSet {
    origin.working_set(size).map(Option::unwrap_or_default).unwrap_or_else(|why| {
        // Standard error is whoever started this process, as yet.
        let log = std::fs::File::options().create(true).append(true).open(dir.file("vmm.log"));
        // Without a log it stays unsaid.
        let _ = log.and_then(|mut log| writeln!(log, "nothing is fetched ahead: {why}"));
        WorkingSet::default()
    })
}

/// Whether the snapshot is for this host. Its kernel is in its RAM; its root image was found by digest.
fn check(loaded: &Loaded, host: &Host) -> Result<(), String> {
    // Only if it matters: it may take a probe to tell.
    let wants_native = loaded.manifest.platform.kvm == KvmFlavour::PvmNative;
    let native = if wants_native { host.native_pvm() } else { Err(NotNative::SwitchedOff) };
    let mode = match native {
        Ok(()) => GuestMode::PvmNative,
        Err(_) => GuestMode::PvmEmulated,
    };
    let kvm = super::kvm_of(host, mode).ok_or("it is not known which KVM this host has")?;
    let facts = HostFacts {
        platform: Platform::of_host(kvm).map_err(|e| e.to_string())?,
        kernels: vec![loaded.manifest.kernel.clone()],
        images: vec![loaded.manifest.image.digest.clone()],
    };
    check_host(&loaded.manifest, &facts).map_err(|found| {
        let mut all: Vec<String> = found.iter().map(ToString::to_string).collect();
        if let (true, Err(reason)) = (wants_native, native) {
            all.push(reason.to_string());
        }
        all.join("; ")
    })
}

/// Manifest and state must tell the same: neither is run on the other's word.
fn check_mode(manifest: KvmFlavour, state: GuestMode) -> Result<(), String> {
    let same = match manifest {
        KvmFlavour::Pvm => state == GuestMode::PvmEmulated,
        KvmFlavour::PvmNative => state == GuestMode::PvmNative,
        KvmFlavour::Vmx | KvmFlavour::Svm => state == GuestMode::Hardware,
    };
    if same {
        return Ok(());
    }
    Err(format!(
        "its manifest says KVM flavour {manifest}, but its state is of a guest whose kernel mode is {}",
        state.name()
    ))
}

fn map_ram(memory: &Resolved, data: Vec<Range<u64>>, mem_mib: u32) -> Result<GuestRam, RamError> {
    Ok(GuestRam::from_file(mem_mib, &files(memory)?, &extents(memory), data)?)
}

/// The memfd that this process was started with.
fn share_ram(inherited: Option<OwnedFd>, mem_mib: u32) -> Result<GuestRam, RamError> {
    let region = MemfdRegion::immutable_from_fd(inherited.ok_or(RamError::NoMemfd)?)?;
    Ok(GuestRam::memfd(mem_mib, region, Sharing::Private)?)
}

fn lazy_ram(memory: &Resolved, mem_mib: u32, ahead: WorkingSet) -> Result<GuestRam, RamError> {
    let source = FileSource::new(memory.len, files(memory)?, &extents(memory))?;
    Ok(GuestRam::userfault(mem_mib, Box::new(source), Some(ahead))?)
}

fn files(memory: &Resolved) -> Result<Vec<File>, RamError> {
    let files = memory.files.iter().map(|source| source.file.try_clone());
    files.collect::<io::Result<_>>().map_err(RamError::Share)
}

fn extents(memory: &Resolved) -> Vec<FileExtent> {
    let extent = |e: &Extent| FileExtent {
        ram_offset: e.offset,
        len: e.len,
        file: e.file,
        file_offset: e.file_offset,
    };
    memory.extents.iter().map(extent).collect()
}

/// A memfd of this process's own, with the bytes of the files; what is zero there takes no memory.
fn copy_ram(memory: &Resolved, mem_mib: u32, name: &str) -> Result<GuestRam, RamError> {
    let region = populate(memory, name, &MemfdOptions::default())?;
    Ok(GuestRam::memfd(mem_mib, region, Sharing::Shared)?)
}

/// Makes a memfd that has a snapshot's memory, which nobody can change: what children map privately. It is for a process
/// that starts them, and hands it on ([`RestoreConfig::memfd`]).
///
/// # Errors
/// Names the file that can't be read, or what the kernel refuses.
pub fn memory_of(memory: &Resolved, name: &str) -> Result<MemfdRegion, MemfdError> {
    populate(memory, name, &MemfdOptions { immutable: true, ..MemfdOptions::default() })
}

fn populate(
    memory: &Resolved,
    name: &str,
    options: &MemfdOptions,
) -> Result<MemfdRegion, MemfdError> {
    let share = |source: &SourceFile| Ok((source.path.clone(), source.file.try_clone()?));
    let files = memory.files.iter().map(share).collect::<io::Result<Vec<_>>>();
    let files = files.map_err(|source| MemfdError::Create {
        action: "open the files for",
        name: name.to_owned(),
        len: memory.len,
        source,
    })?;
    create_from_extents(memory.len, files, &extents(memory), name, options)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_that_says_another_mode_than_the_state_is_refused() {
        use GuestMode::{Hardware, PvmEmulated, PvmNative};
        let right = [
            (KvmFlavour::Pvm, PvmEmulated),
            (KvmFlavour::PvmNative, PvmNative),
            (KvmFlavour::Vmx, Hardware),
            (KvmFlavour::Svm, Hardware),
        ];
        for (flavour, _) in right {
            for mode in [Hardware, PvmEmulated, PvmNative] {
                match check_mode(flavour, mode) {
                    Ok(()) => assert!(right.contains(&(flavour, mode))),
                    Err(why) => {
                        assert!(!right.contains(&(flavour, mode)));
                        assert!(why.contains(&flavour.to_string()), "{why}");
                        assert!(why.contains(mode.name()), "{why}");
                    }
                }
            }
        }
    }
}
