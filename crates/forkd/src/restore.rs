//! Many VMs from one durable snapshot, each in a process that loads it: what `forkd fork --memory` does.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use forkd_api::types::{MAX_CHILDREN, PvmConfig, RestoreConfig, RestoredMemory, VmInfo};
use forkd_memory::{MemfdRegion, MemoryBackend};
use forkd_snapshot::{Store, Verification};

use crate::boot::{self, Booted, Launch};
use crate::paths::Paths;
use crate::{host, id, output, parallel, persist};

/// Most bytes of a tag that a memfd's name has: with what else is in the name, the kernel's limit is far.
const TAG_SHOWN: usize = 64;

/// VMs could not be had from a durable snapshot. None of them stays.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// There is no such durable snapshot, or what it needs is not here.
    #[error("{reason}")]
    Snapshot {
        /// What is missing, in one line.
        reason: String,
    },
    /// No number of VMs that one call makes.
    #[error("{count} VMs: one request makes 1 to {MAX_CHILDREN}")]
    Count {
        /// What was asked for.
        count: usize,
    },
    /// RAM of that kind cannot be loaded from a snapshot.
    #[error("RAM of a snapshot cannot be {memory}: there are {known}", known = known())]
    Memory {
        /// What was asked for.
        memory: MemoryBackend,
    },
    /// A name is not valid, or taken; or ids could not be had.
    #[error("{reason}")]
    Name {
        /// Which, and why.
        reason: String,
    },
    /// A VM could not be started or was not ready in time. All that were started are gone.
    #[error("child #{number} of {count} of {tag}: {reason}")]
    Child {
        /// Which, from 1.
        number: usize,
        /// Of how many.
        count: usize,
        /// The snapshot.
        tag: String,
        /// Why, in one line; names the file that is bad or missing, if that is it.
        reason: String,
    },
}

/// The kinds of RAM that a snapshot can be loaded to, and what they are to a VM process.
const KINDS: [(MemoryBackend, RestoredMemory); 4] = [
    (MemoryBackend::File, RestoredMemory::File),
    (MemoryBackend::MemfdShared, RestoredMemory::MemfdShared),
    (MemoryBackend::MemfdPrivate, RestoredMemory::MemfdPrivate),
    (MemoryBackend::Userfault, RestoredMemory::Userfault),
];

fn known() -> String {
    KINDS.map(|(memory, _)| memory.name()).join(", ")
}

/// How long things may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// From a process's start to its vCPUs running. Of a `memfd-shared` VM that has the copy of its RAM in it.
    pub start: Duration,
    /// From its vCPUs running to its agent's answer; `None`: that is not waited for.
    pub ready: Option<Duration>,
}

impl Default for Limits {
    /// 60 s, and 120 s.
    fn default() -> Self {
        Self { start: boot::START, ready: Some(Duration::from_secs(120)) }
    }
}

/// What VMs are to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForkOptions {
    /// How many: 1 to 1024.
    pub count: usize,
    /// The name of one, the start of the names of more; without it their ids are their names.
    pub name: Option<String>,
    /// Where their RAM comes from: any but [`MemoryBackend::Anonymous`], which is for VMs that boot.
    ///
    /// | | what it costs | branches |
    /// |---|---|---|
    /// | `file` | mappings of the snapshot's files; all VMs share the page cache | fork, diff, full |
    /// | `memfd-private` | one copy in memory for all VMs of the call: the files may be on a slow disk, or go | fork, diff, full |
    /// | `memfd-shared` | a copy for each VM | live, full |
    /// | `userfault` | reads what is touched, and the rest when the VM is ready | full; fork once all is loaded |
    pub memory: MemoryBackend,
    /// How long things may take.
    pub limits: Limits,
    /// The `forkd` to run VMs with. Right for forkd itself is the default, the program that calls this.
    pub forkd: PathBuf,
}

impl Default for ForkOptions {
    /// One VM with RAM of `file`, named by its id.
    fn default() -> Self {
        Self {
            count: 1,
            name: None,
            memory: MemoryBackend::File,
            limits: Limits::default(),
            forkd: PathBuf::from(boot::THIS_PROGRAM),
        }
    }
}

/// A durable snapshot that is there, with the root image it needs.
#[derive(Debug, Clone)]
pub struct Snapshot {
    tag: String,
    store: PathBuf,
    root: PathBuf,
    pvm: PvmConfig,
}

/// A VM that runs. It ends when this is dropped, unless it is kept.
#[derive(Debug)]
pub struct Restored {
    /// Its id, which its run directory is named by.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// Its run directory, with the socket of its API.
    pub dir: PathBuf,
    booted: Booted,
}

impl Restored {
    /// Waits until its agent serves.
    ///
    /// # Errors
    /// It failed or was not ready in time: one line.
    pub fn wait_ready(&self, timeout: Duration) -> Result<VmInfo, String> {
        self.booted.wait_ready(timeout).map_err(|error| output::error_line(&error))
    }

    /// Lets it live on when this is dropped, and when this process ends.
    pub fn keep(self) {
        self.booted.keep();
    }
}

impl Snapshot {
    /// Finds a durable snapshot by its tag, and its root image.
    ///
    /// # Errors
    /// [`RestoreError::Snapshot`].
    pub fn open(paths: &Paths, tag: &str) -> Result<Self, RestoreError> {
        let found = persist::durable_with_root(paths, tag);
        let root = found.map_err(|e| RestoreError::Snapshot { reason: output::error_line(&e) })?;
        let pvm = host::pvm(paths);
        let pvm = pvm.map_err(|e| RestoreError::Snapshot { reason: output::error_line(&e) })?;
        Ok(Self { tag: tag.to_string(), store: paths.snapshot_store(), root, pvm })
    }

    /// Starts `options.count` VMs, whose run directories are made in `work_dir`, as many at a time as there are CPUs.
    /// All of them run, and their agents serve if that is waited for, when this returns.
    ///
    /// # Errors
    /// [`RestoreError`]; [`RestoreError::Child`] says which VM failed and why. Every process that was started is gone
    /// then, and so is its run directory.
    pub fn restore_many_with(
        &self,
        options: &ForkOptions,
        work_dir: &Path,
    ) -> Result<Vec<Restored>, RestoreError> {
        let count = options.count;
        if !(1..=MAX_CHILDREN).contains(&count) {
            return Err(RestoreError::Count { count });
        }
        let wanted = options.memory;
        let kind = KINDS.iter().find(|(memory, _)| *memory == wanted);
        let (_, memory) = kind.ok_or(RestoreError::Memory { memory: wanted })?;
        let name = |error: anyhow::Error| RestoreError::Name { reason: output::error_line(&error) };
        let ids =
            (0..count).map(|_| id::new()).collect::<anyhow::Result<Vec<_>>>().map_err(name)?;
        let names = id::child_names(options.name.as_deref(), &ids).map_err(name)?;
        require_free(work_dir, &names).map_err(|reason| RestoreError::Name { reason })?;
        // The first one cannot be had without it.
        let shared = match memory {
            RestoredMemory::MemfdPrivate => {
                Some(self.populate().map_err(|reason| self.failed(1, count, reason))?)
            }
            _ => None,
        };
        let configs = ids.into_iter().zip(&names).map(|(id, name)| RestoreConfig {
            restore_from: self.tag.clone(),
            store: self.store.clone(),
            dir: work_dir.join(&id),
            id,
            root: self.root.clone(),
            memory: *memory,
            run_as: Some(name.clone()),
            memfd: None,
            pvm: self.pvm.clone(),
        });
        let configs: Vec<_> = configs.collect();
        let launch = Launch { program: &options.forkd, start: options.limits.start };
        let one = |config: &RestoreConfig| start(config, launch, shared.as_ref(), options.limits);
        // To load one keeps a CPU busy.
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let started = parallel::map_by(cpus, &configs, one);
        let numbered = (1..).zip(started);
        numbered.map(|(n, one)| one.map_err(|why| self.failed(n, count, why))).collect()
    }

    fn failed(&self, number: usize, count: usize, reason: String) -> RestoreError {
        RestoreError::Child { number, count, tag: self.tag.clone(), reason }
    }

    /// The snapshot's memory in a memfd, for all VMs.
    fn populate(&self) -> Result<MemfdRegion, String> {
        let loaded = Store::open(&self.store)
            .and_then(|store| store.load(&self.tag, Verification::Remembered))
            .map_err(|e| e.to_string())?;
        let shown = self.tag.get(..TAG_SHOWN).unwrap_or(&self.tag);
        forkd_vmm::snapshot::memory_of(&loaded.memory, &format!("forkd-{shown}"))
            .map_err(|e| e.to_string())
    }
}

fn start(
    config: &RestoreConfig,
    launch: Launch<'_>,
    memfd: Option<&MemfdRegion>,
    limits: Limits,
) -> Result<Restored, String> {
    let booted = boot::restore_with(config, launch, memfd.map(AsFd::as_fd))
        .map_err(|error| output::error_line(&error))?;
    let record = forkd_vmm::run_dir::read_record(&config.dir).map_err(|e| e.to_string())?;
    let name = config.run_as.clone().unwrap_or_default();
    let dir = config.dir.clone();
    let vm = Restored { id: config.id.clone(), name, pid: record.pid, dir, booted };
    if let Some(timeout) = limits.ready {
        vm.wait_ready(timeout)?;
    }
    Ok(vm)
}

/// Whether no VM in `work_dir` has one of these names.
fn require_free(work_dir: &Path, names: &[String]) -> Result<(), String> {
    let living = crate::registry::living(work_dir).map_err(|e| output::error_line(&e))?;
    match crate::registry::first_taken(&living, names) {
        Some(live) => Err(crate::registry::name_taken(&live.record)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One that is not there.
    fn snapshot(home: &Path) -> Snapshot {
        let (store, root) = (home.join("store"), home.join("root"));
        Snapshot { tag: "py".into(), store, root, pvm: PvmConfig::default() }
    }

    #[test]
    fn what_cannot_be_asked_for_starts_nothing() {
        let (work_dir, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let refused = |options: ForkOptions| {
            let error =
                snapshot(home.path()).restore_many_with(&options, work_dir.path()).unwrap_err();
            assert_eq!(std::fs::read_dir(work_dir.path()).unwrap().count(), 0);
            error.to_string()
        };
        let options = ForkOptions::default;
        for count in [0, 1025] {
            let said = refused(ForkOptions { count, ..options() });
            assert!(said.contains(&count.to_string()) && said.contains("1 to 1024"), "{said}");
        }
        let said = refused(ForkOptions { memory: MemoryBackend::Anonymous, ..options() });
        assert!(said.contains("anonymous") && said.contains("memfd-private"), "{said}");
        let said = refused(ForkOptions { name: Some("A b".into()), ..options() });
        assert!(said.contains("\"A b\""), "{said}");
    }

    #[test]
    fn each_failure_names_the_child() {
        let (work_dir, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let forkd = PathBuf::from("/nonexistent/forkd");
        let options = ForkOptions { count: 3, forkd, ..ForkOptions::default() };
        let error = snapshot(home.path()).restore_many_with(&options, work_dir.path()).unwrap_err();
        assert!(matches!(error, RestoreError::Child { number: 1, count: 3, .. }), "{error:?}");
        let said = error.to_string();
        assert!(
            said.contains("child #1 of 3 of py") && said.contains("/nonexistent/forkd"),
            "{said}"
        );
        let memory = MemoryBackend::MemfdPrivate;
        let options = ForkOptions { memory, ..ForkOptions::default() };
        let error = snapshot(home.path()).restore_many_with(&options, work_dir.path()).unwrap_err();
        assert!(error.to_string().contains("child #1 of 1 of py"), "{error}");
        assert_eq!(std::fs::read_dir(work_dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_snapshot_that_is_not_there_is_named() {
        let home = tempfile::tempdir().unwrap();
        let home = home.path();
        let paths = Paths { data: home.into(), run: home.join("run"), cache: home.join("cache") };
        let error = Snapshot::open(&paths, "gone").unwrap_err().to_string();
        assert!(error.contains("\"gone\""), "{error}");
    }
}
