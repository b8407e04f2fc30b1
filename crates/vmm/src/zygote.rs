//! The role of a zygote: a forked VM process that never runs, and is forked again for each child.
//!
//! It has no KVM VM and no thread but this one, so it stands still by nature.

#![allow(unsafe_code)]

use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use forkd_api::server::RequestId;
use forkd_api::types::{Action, ChildSpec, PersistRequest, Timing, VmInfo, VmPhase, VmRecord};
use forkd_snapshot::Mode;
use forkd_sys::clock::monotonic_ns;

use crate::control::{Control, Flow, Handled, Serve, instance_info};
use crate::fork::offspring::AnswerAs;
use crate::fork::{Destiny, Forked, Quiesced, SavedKvm, child, crowd_of, fork_all, report_pipes};
use crate::machine::Machine;
use crate::process::{Next, VmmError};
use crate::requests::{Refusal, VmmAction};
use crate::run_dir::RunDir;
use crate::snapshot::{self, Errand, WRITE_TIMEOUT};

/// How long nobody must have asked for anything before the zygote does a piece of work of its own. Who has just had it
/// made wants children of it first, which take a CPU each.
const IDLE: Duration = Duration::from_millis(20);

/// A zygote.
pub struct Zygote {
    pub(crate) control: Control,
    pub(crate) machine: Machine,
    pub(crate) saved: Arc<SavedKvm>,
    pub(crate) dir: RunDir,
    pub(crate) record: VmRecord,
    pub(crate) timing: Timing,
    /// Where the part of the root image begins that is not mapped yet ([`Machine::share_root`]).
    pub(crate) unshared: Option<usize>,
}

impl Zygote {
    /// Serves until it is told to end, or until this process turns out to be a child of it.
    ///
    /// # Errors
    /// The loop itself fails. The run directory is removed then as well.
    pub fn serve(mut self: Box<Self>) -> Result<Next, VmmError> {
        match self.event_loop() {
            Ok(Flow::Child(birth)) => {
                let Self { control, machine, dir, record, .. } = *self;
                drop((control, dir));
                let inherited = child::Inherited::from_zygote(machine, record);
                Ok(Next::Child(birth, Box::new(inherited)))
            }
            Ok(_) => {
                self.dir.remove()?;
                Ok(Next::Exit(ExitCode::SUCCESS))
            }
            Err(error) => {
                self.dir.remove()?;
                Err(VmmError::Setup("the event loop failed", error))
            }
        }
    }

    fn event_loop(&mut self) -> io::Result<Flow> {
        let mut events = Vec::new();
        loop {
            let deadline = self.control.offspring.next_deadline();
            let pause = self.unshared.map(|_| IDLE);
            self.control
                .reactor
                .wait(&mut events, [deadline, pause].into_iter().flatten().min())?;
            if events.is_empty() {
                self.unshared = self.unshared.and_then(|at| self.machine.share_root(at));
            }
            for readiness in events.drain(..) {
                let flow = match self.control.handle(readiness)? {
                    None | Some(Handled::Nothing) => Flow::Go,
                    Some(Handled::Terminate) => Flow::Exit(0),
                    Some(Handled::Requests(requests)) => self.on_requests(requests)?,
                };
                if !matches!(flow, Flow::Go) {
                    return Ok(flow);
                }
            }
            for snapshot in self.control.offspring.take_written() {
                self.machine.set_latest(snapshot);
            }
            self.control.answer_forks()?;
        }
    }
}

impl Serve for Zygote {
    fn control(&mut self) -> &mut Control {
        &mut self.control
    }

    fn act(&mut self, id: RequestId, action: VmmAction) -> io::Result<Result<Flow, Refusal>> {
        match action {
            VmmAction::InstanceInfo => {
                self.control.answer(id, 200, &instance_info(&self.record.id, "Paused"))?;
            }
            VmmAction::VmInfo | VmmAction::WaitReady(_) => {
                let info = VmInfo {
                    record: self.record.clone(),
                    phase: VmPhase::Zygote,
                    error: None,
                    timing: self.timing,
                    kernel_mode: Some(self.machine.kernel_mode()),
                };
                self.control.answer(id, 200, &info)?;
            }
            VmmAction::Metrics => {
                let metrics = self.machine.metrics(None);
                self.control.answer(id, 200, &metrics)?;
            }
            VmmAction::Hot(pages) => {
                if let Err(why) = self.machine.set_hot(pages) {
                    return Ok(Err(Refusal::new(400, why.to_string())));
                }
                self.control.answer_empty(id)?;
            }
            VmmAction::Fork(request) => {
                if let Err(error) = self.machine.ram().check_fork() {
                    return Ok(Err(Refusal::new(409, error.to_string())));
                }
                return self.fork(id, request.children).map(Ok);
            }
            VmmAction::Act(Action::Stop) => {
                self.control.answer_empty(id)?;
                return Ok(Ok(Flow::Exit(0)));
            }
            VmmAction::Persist(request) => return self.persist(id, &request),
            VmmAction::Zygote(_)
            | VmmAction::Written
            | VmmAction::Snapshot(_)
            | VmmAction::SetState(_)
            | VmmAction::Act(_) => {
                let why = "this is a zygote: it never runs; fork it, and ask the child";
                return Ok(Err(Refusal::new(409, why)));
            }
        }
        Ok(Ok(Flow::Go))
    }
}

impl Zygote {
    /// Forks a writer, which makes this zygote durable while it goes on.
    fn persist(
        &mut self,
        id: RequestId,
        request: &PersistRequest,
    ) -> io::Result<Result<Flow, Refusal>> {
        let requested_ns = monotonic_ns();
        let tag = self.record.id.clone();
        let staged = match snapshot::stage(&request.store, &tag) {
            Ok(staged) => staged,
            Err(error) => return Ok(Err(Refusal::new(409, error.to_string()))),
        };
        // SAFETY: this process has one thread, which is here and holds no lock.
        let quiesced = unsafe { Quiesced::vouch(Arc::clone(&self.saved)) };
        let errand = Errand { staged, mode: Mode::Fork };
        match snapshot::fork_writer(&quiesced, &tag, errand, requested_ns) {
            Forked::Child(birth) => Ok(Ok(Flow::Child(birth))),
            Forked::Source(delivered, _) => {
                let offspring = &mut self.control.offspring;
                let to = request.wait.then_some(id);
                let batch = offspring.open_batch(to, AnswerAs::Zygote, 1, Some(WRITE_TIMEOUT));
                offspring.adopt_all(&self.control.reactor, batch, delivered);
                if request.wait {
                    return Ok(Ok(Flow::Go));
                }
                if let Some(why) = offspring.failure(batch) {
                    return Ok(Err(Refusal::new(500, why)));
                }
                self.control.answer_empty(id)?;
                Ok(Ok(Flow::Go))
            }
        }
    }

    fn fork(&mut self, request: RequestId, specs: Vec<ChildSpec>) -> io::Result<Flow> {
        let requested_ns = monotonic_ns();
        let pipes = report_pipes(specs.len());
        let crowd = crowd_of(specs.len(), self.machine.waking_limit());
        // SAFETY: this process has one thread, which is here and holds no lock.
        let quiesced = unsafe { Quiesced::vouch(Arc::clone(&self.saved)) };
        match fork_all(&quiesced, specs, pipes, crowd, Destiny::Vm, requested_ns) {
            Forked::Child(birth) => Ok(Flow::Child(birth)),
            Forked::Source(delivered, _) => {
                let offspring = &mut self.control.offspring;
                let batch =
                    offspring.open_batch(Some(request), AnswerAs::Fork, delivered.len(), None);
                offspring.adopt_all(&self.control.reactor, batch, delivered);
                Ok(Flow::Go)
            }
        }
    }
}
