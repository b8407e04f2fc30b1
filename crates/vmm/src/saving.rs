//! A running VM writes durable snapshots of itself.

use std::io;

use forkd_api::server::RequestId;
use forkd_api::types::{
    ForkResponse, PersistRequest, SnapshotMode, SnapshotReceipt, SnapshotRequest,
};
use forkd_snapshot::Mode;
use forkd_sys::clock::monotonic_ns;
use forkd_sys::reactor::Interest;

use crate::control::{Flow, tokens};
use crate::fork::offspring::AnswerAs;
use crate::fork::{Forked, PauseClock};
use crate::requests::Refusal;
use crate::running::Running;
use crate::snapshot::{self, Errand, WRITE_TIMEOUT, live};

impl Running {
    /// Acts on `POST /snapshot`.
    ///
    /// # Errors
    /// The reactor fails.
    pub(crate) fn save(
        &mut self,
        id: RequestId,
        request: &SnapshotRequest,
    ) -> io::Result<Result<(), Refusal>> {
        let requested_ns = monotonic_ns();
        if let Err(refusal) = self.require_ready("saved") {
            return Ok(Err(refusal));
        }
        if let Some(other) = &self.capture {
            let why = format!(
                "snapshot {} of this VM is being written: ask again when it is ready or has failed",
                other.tag
            );
            return Ok(Err(Refusal::new(409, why)));
        }
        match request.mode {
            SnapshotMode::Full => self.save_full(id, request, requested_ns),
            SnapshotMode::Live => self.save_live(id, request, requested_ns),
        }
    }

    /// Writes all of it with the vCPUs parked.
    fn save_full(
        &mut self,
        id: RequestId,
        request: &SnapshotRequest,
        requested_ns: u64,
    ) -> io::Result<Result<(), Refusal>> {
        let mut staged = match snapshot::stage(&request.store, &request.tag) {
            Ok(staged) => staged,
            Err(error) => return Ok(Err(Refusal::new(409, error.to_string()))),
        };
        let mut clock = PauseClock::start();
        let quiesced = match self.pause(&mut clock, "saved") {
            Ok(quiesced) => quiesced,
            Err(refusal) => {
                // The refusal tells, and so does the list.
                drop(staged.fail(&refusal.message));
                return Ok(Err(refusal));
            }
        };
        let (machine, record) = (&self.machine, &self.record);
        let filled = snapshot::fill(machine, quiesced.saved(), record, &mut staged);
        clock.forked();
        self.go_on();
        let source = clock.stop();
        match snapshot::finish(machine, record, staged, Mode::Full, filled) {
            Ok(written) => self.machine.set_latest(written),
            Err(error) => return Ok(Err(Refusal::new(500, error.to_string()))),
        }
        let ready_us = monotonic_ns().saturating_sub(requested_ns) / 1000;
        let receipt = SnapshotReceipt { source, ready_us, ..SnapshotReceipt::default() };
        self.control.answer(id, 200, &receipt)?;
        Ok(Ok(()))
    }

    /// Forks a writer, which saves what changed since the last durable snapshot of this VM, or the one that it came from
    /// (mode `diff`).
    ///
    /// # Errors
    /// The reactor fails.
    pub(crate) fn save_diff(
        &mut self,
        id: RequestId,
        request: &PersistRequest,
    ) -> io::Result<Result<Flow, Refusal>> {
        let requested_ns = monotonic_ns();
        let refuse = |why: String| Ok(Err(Refusal::new(409, why)));
        if let Err(refusal) = self.require_ready("saved") {
            return Ok(Err(refusal));
        }
        let Some(tag) = &request.tag else {
            return refuse("a VM that runs is no snapshot: give the tag of the diff".to_owned());
        };
        let staged = match snapshot::stage_diff(&self.machine, &request.store, tag) {
            Ok(staged) => staged,
            Err(why) => return refuse(why),
        };
        let mut clock = PauseClock::start();
        let quiesced = match self.pause(&mut clock, "saved") {
            Ok(quiesced) => quiesced,
            Err(refusal) => {
                // The refusal tells, and so does the list.
                drop(staged.fail(&refusal.message));
                return Ok(Err(refusal));
            }
        };
        let errand = Errand { staged, mode: Mode::Diff };
        let delivered = match snapshot::fork_writer(&quiesced, tag, errand, requested_ns) {
            Forked::Child(birth) => return Ok(Ok(Flow::Child(birth))),
            Forked::Source(delivered, _) => delivered,
        };
        clock.forked();
        self.go_on();
        let pause = clock.stop();
        let offspring = &mut self.control.offspring;
        let to = request.wait.then_some(id);
        let batch = offspring.open_batch(to, AnswerAs::Fork, 1, Some(WRITE_TIMEOUT));
        offspring.set_source_pause(batch, pause);
        offspring.adopt_all(&self.control.reactor, batch, delivered);
        if request.wait {
            return Ok(Ok(Flow::Go));
        }
        if let Some(why) = offspring.failure(batch) {
            return Ok(Err(Refusal::new(500, why)));
        }
        let response = ForkResponse { children: Vec::new(), source: Some(pause) };
        self.control.answer(id, 200, &response)?;
        Ok(Ok(Flow::Go))
    }

    /// Write-protects RAM with the vCPUs parked; a writer does the rest while they run.
    fn save_live(
        &mut self,
        id: RequestId,
        request: &SnapshotRequest,
        requested_ns: u64,
    ) -> io::Result<Result<(), Refusal>> {
        let (machine, record) = (&self.machine, &self.record);
        let prepared = match live::prepare(machine, record, &request.store, &request.tag) {
            Ok(prepared) => prepared,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let mut clock = PauseClock::start();
        let quiesced = match self.pause(&mut clock, "saved") {
            Ok(quiesced) => quiesced,
            Err(refusal) => {
                prepared.fail(&refusal.message);
                return Ok(Err(refusal));
            }
        };
        let armed = prepared.arm(machine, &self.engine, &quiesced, record.generation, &mut clock);
        drop(quiesced);
        self.go_on();
        let pause = clock.stop();
        let waiting = request.wait.then_some(id);
        let armed = armed.map_err(|unarmed| unarmed.clear());
        let capturing = match armed.and_then(|armed| armed.go(waiting, requested_ns, pause)) {
            Ok(capturing) => capturing,
            Err(why) => return Ok(Err(Refusal::new(500, why))),
        };
        let watched = self.control.reactor.add(capturing.pidfd(), tokens::CAPTURE, Interest::READ);
        if let Err(error) = watched {
            let why = format!("cannot watch the writer: {error}");
            capturing.give_up(&why);
            return Ok(Err(Refusal::new(500, why)));
        }
        if !request.wait {
            let receipt = SnapshotReceipt { source: pause, ..SnapshotReceipt::default() };
            self.control.answer(id, 200, &receipt)?;
        }
        self.capture = Some(capturing);
        Ok(Ok(()))
    }

    /// The writer of a live snapshot has ended.
    ///
    /// # Errors
    /// The reactor fails.
    pub(crate) fn after_capture(&mut self) -> io::Result<()> {
        let Some(mut capturing) = self.capture.take() else { return Ok(()) };
        let Some(outcome) = capturing.outcome() else {
            self.capture = Some(capturing);
            return Ok(());
        };
        self.control.reactor.remove(capturing.pidfd())?;
        let tag = &capturing.tag;
        match (outcome, capturing.request) {
            (Ok(receipt), Some(request)) => self.control.answer(request, 200, &receipt),
            (Ok(_), None) => Ok(()),
            (Err(why), request) => {
                crate::log::line(&format!("no snapshot {tag}: {why}"));
                match request {
                    Some(request) => self.control.answer_fault(request, 500, why),
                    None => Ok(()),
                }
            }
        }
    }
}
