//! A VM whose RAM is loaded as the guest touches it.
//!
//! ```text
//!   loaded: what an earlier load recorded is fetched ahead
//!     | the guest is ready, and has had a moment for its first work; or somebody wants to fork or save it
//!   what was touched so far is recorded, and all the rest is loaded, at low priority
//!     | all is there
//!   a plain VM, and who wanted to fork or save it is served
//! ```
//!
//! If RAM can't be loaded the VM has failed, with the reason: its vCPUs stop, those that touch what is missing wait, and
//! none sees wrong memory. The event loop may be one that waits, for a page that a device wanted; then a watchdog ends
//! the process.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use forkd_api::server::RequestId;
use forkd_memory::{LoadStatus, SourceFailure, WorkingSet};
use forkd_snapshot::{Digest, Store};
use forkd_sys::fork::exit_now;
use forkd_sys::reactor::Interest;

use crate::control::{Flow, Serve, tokens};
use crate::machine::Machine;
use crate::requests::{Refusal, VmmAction};
use crate::running::Running;

/// From the agent's acknowledgement to the loading of all the rest: what is touched in that time is recorded, as the
/// first work of a VM is what the next one of the snapshot will do.
const FIRST_WORK: Duration = Duration::from_secs(1);
/// How long the event loop has to take note of a failure.
const NOTICE: Duration = Duration::from_secs(5);
/// File in the snapshot's directory: what its VMs have needed first.
const WORKING_SET: &str = "working-set";

/// Where a VM's RAM is loaded from, and who waits for it.
pub struct Lazy {
    origin: Origin,
    /// What was recorded before.
    known: WorkingSet,
    noticed: Sender<()>,
    stage: Stage,
    waiting: Vec<(RequestId, VmmAction)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The guest starts.
    Starting,
    /// It works; the rest is to be loaded from then on.
    Until(Instant),
    /// All is being loaded.
    Loading,
}

/// The durable snapshot that RAM is loaded from.
#[derive(Debug, Clone)]
pub struct Origin {
    /// Its store's directory.
    pub store: PathBuf,
    /// Its tag.
    pub tag: String,
    /// Its root hash.
    pub root: Digest,
}

impl Origin {
    /// The working set that was recorded, if there is one for RAM of `size` bytes.
    ///
    /// # Errors
    /// One line: there is one, and it can't be used.
    pub fn working_set(&self, size: u64) -> Result<Option<WorkingSet>, String> {
        let path = self.store.join(&self.tag).join(WORKING_SET);
        if !path.exists() {
            return Ok(None);
        }
        let set = WorkingSet::load(&path).map_err(|e| e.to_string())?;
        set.check(size).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(Some(set))
    }

    fn record(&self, set: &WorkingSet) -> Result<(), String> {
        Store::open(&self.store)
            .and_then(|store| {
                store.beside(&self.tag, self.root, |dir| set.save(&dir.join(WORKING_SET)))
            })
            .map_err(|e| e.to_string())?
            .map_err(|e| e.to_string())
    }
}

/// Stands by until the event loop has taken note of a failure; ends the process if it does not.
fn watch(failure: &SourceFailure, noticed: &Receiver<()>, dir: &Path) {
    if noticed.recv_timeout(NOTICE) == Err(RecvTimeoutError::Timeout) {
        crate::log::line(&format!("the VM ends, as its event loop waits for its RAM: {failure}"));
        // A directory that stays is swept later.
        drop(std::fs::remove_dir_all(dir));
        exit_now(1);
    }
}

/// Ends the process if a vCPU may wait for RAM that can't be had: its thread would never end by itself.
pub fn exit_if_stuck(machine: &Machine) {
    if machine.ram().lazy().is_some_and(|ram| matches!(ram.status(), LoadStatus::Failed(_))) {
        exit_now(1);
    }
}

impl Lazy {
    /// For RAM that has just been made; `dir` is the VM's run directory. None if RAM is of another kind.
    pub fn begin(machine: &Machine, origin: Origin, known: WorkingSet, dir: &Path) -> Option<Self> {
        let ram = machine.ram().lazy()?;
        let (noticed, receiver) = mpsc::channel();
        let receiver = Mutex::new(Some(receiver));
        let dir = dir.to_path_buf();
        ram.on_failure(move |failure| {
            let first = receiver.lock().unwrap_or_else(PoisonError::into_inner).take();
            let Some(receiver) = first else { return };
            let (reason, dir) = (failure.clone(), dir.clone());
            // Not here: this thread has other faults to serve.
            let watchdog = std::thread::Builder::new().name("ram-watchdog".to_owned());
            if let Err(error) = watchdog.spawn(move || watch(&reason, &receiver, &dir)) {
                crate::log::line(&format!("no watchdog: {error}; {failure}"));
            }
        });
        Some(Self { origin, known, noticed, stage: Stage::Starting, waiting: Vec::new() })
    }

    /// The agent has acknowledged.
    pub fn guest_is_ready(&mut self) {
        if self.stage == Stage::Starting {
            self.stage = Stage::Until(Instant::now() + FIRST_WORK);
        }
    }

    /// How long the loop may sleep before [`Running::load_rest`] has something to do.
    pub fn next_deadline(&self) -> Option<Duration> {
        match self.stage {
            Stage::Until(then) => Some(then.saturating_duration_since(Instant::now())),
            Stage::Starting | Stage::Loading => None,
        }
    }
}

impl Running {
    /// Takes on RAM that is being loaded.
    ///
    /// # Errors
    /// The reactor fails.
    pub fn adopt_lazy(&mut self, lazy: Option<Lazy>) -> io::Result<()> {
        if let (Some(_), Some(ram)) = (&lazy, self.machine.ram().lazy()) {
            self.control.reactor.add(ram.events(), tokens::RAM, Interest::READ)?;
            self.lazy = lazy;
        }
        Ok(())
    }

    /// Loads all the rest, if it is time to.
    pub(crate) fn load_rest(&mut self) {
        if let Some(Lazy { stage: Stage::Until(then), .. }) = self.lazy
            && then <= Instant::now()
        {
            self.load_all();
        }
    }

    fn load_all(&mut self) {
        let (Some(lazy), Some(ram)) = (&mut self.lazy, self.machine.ram().lazy()) else { return };
        if lazy.stage == Stage::Loading {
            return;
        }
        lazy.stage = Stage::Loading;
        let recorded = ram.recorded();
        ram.load_all();
        if recorded != lazy.known
            && let Err(why) = lazy.origin.record(&recorded)
        {
            crate::log::line(&format!("the next load will not know what this one needed: {why}"));
        }
    }

    /// Gives the action back, unless it has to wait until all RAM is loaded.
    pub(crate) fn unless_loading(&mut self, id: RequestId, action: VmmAction) -> Option<VmmAction> {
        let needs_all = matches!(
            action,
            VmmAction::Fork(_)
                | VmmAction::Zygote(_)
                | VmmAction::Snapshot(_)
                | VmmAction::Persist(_)
        );
        // What is refused anyway is refused at once.
        if !needs_all || self.lazy.is_none() || self.require_ready("forked").is_err() {
            return Some(action);
        }
        self.load_all();
        self.lazy.as_mut()?.waiting.push((id, action));
        None
    }

    /// All RAM is loaded, or can't be.
    ///
    /// # Errors
    /// The reactor fails.
    pub(crate) fn on_ram(&mut self) -> io::Result<Flow> {
        let Some(ram) = self.machine.ram().lazy() else { return Ok(Flow::Go) };
        ram.drain_events()?;
        let status = ram.status();
        if matches!(status, LoadStatus::Loading { .. }) {
            return Ok(Flow::Go);
        }
        self.control.reactor.remove(ram.events())?;
        let Some(lazy) = self.lazy.take() else { return Ok(Flow::Go) };
        let failure = match status {
            LoadStatus::Failed(failure) => failure,
            _ => return self.serve_waiting(lazy.waiting),
        };
        let why = failure.to_string();
        crate::log::line(&format!("the VM has failed: {why}"));
        self.fail(why.clone())?;
        self.engine.vcpus.request_park();
        // A watchdog that has been quicker ends the process.
        drop(lazy.noticed);
        for (id, _) in lazy.waiting {
            self.carry_out(id, Err(Refusal::new(409, why.clone())))?;
        }
        Ok(Flow::Go)
    }

    /// Acts on what has waited.
    ///
    /// # Errors
    /// The reactor fails.
    pub(crate) fn serve_waiting(
        &mut self,
        waiting: Vec<(RequestId, VmmAction)>,
    ) -> io::Result<Flow> {
        for (id, action) in waiting {
            match self.carry_out(id, Ok(action))? {
                Flow::Go => {}
                other => return Ok(other),
            }
        }
        Ok(Flow::Go)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(dir: &Path) -> Origin {
        Origin { store: dir.into(), tag: "py".into(), root: Digest::of(b"another") }
    }

    #[test]
    fn a_working_set_is_a_hint_that_is_checked() {
        let dir = tempfile::tempdir().unwrap();
        let origin = origin(dir.path());
        assert_eq!(origin.working_set(1 << 20), Ok(None));
        let path = dir.path().join("py").join(WORKING_SET);
        std::fs::create_dir(dir.path().join("py")).unwrap();
        WorkingSet::default().save(&path).unwrap();
        assert_eq!(origin.working_set(1 << 20), Ok(Some(WorkingSet::default())));
        std::fs::write(&path, b"?").unwrap();
        let why = origin.working_set(1 << 20).unwrap_err();
        assert!(why.contains(path.to_str().unwrap()), "{why}");
        // Of a snapshot that is not there, none is recorded.
        assert!(origin.record(&WorkingSet::default()).is_err());
    }

    #[test]
    fn the_watchdog_lets_a_loop_be_that_takes_note() {
        let (noticed, receiver) = mpsc::channel();
        let failure = SourceFailure { offset: 0, len: 4096, error: "gone".into() };
        drop(noticed);
        // It would end this process.
        watch(&failure, &receiver, Path::new("/nonexistent"));
    }
}
