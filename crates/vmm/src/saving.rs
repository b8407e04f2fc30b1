//! A running VM writes durable snapshots of itself.

use std::io;
use std::time::Duration;

use forkd_api::server::RequestId;
use forkd_api::types::{SnapshotMode, SnapshotReceipt, SnapshotRequest, SourcePause};
use forkd_memory::capture::{Ahead, PreArm};
use forkd_snapshot::{Mode, Staged};
use forkd_sys::clock::monotonic_ns;
use forkd_sys::reactor::Interest;

use crate::collapsing::{Before, Then};
use crate::control::{Flow, tokens};
use crate::fork::offspring::AnswerAs;
use crate::fork::{Forked, PauseClock, Quiesced};
use crate::pause::{Limit, Resident, SHORTER_THAN_FORK, Work};
use crate::requests::Refusal;
use crate::running::Running;
use crate::snapshot::live::{Armed, Prepared, Preparing};
use crate::snapshot::{self, Errand, WRITE_TIMEOUT, live};

/// As few pages written since are left to the pause.
const ENOUGH: usize = 64;
/// How often RAM is protected again because the pause would not fit its limit.
const TRIES: u32 = 5;
/// What is shorter than mode `full`.
const SHORTER_THAN_FULL: &str = "mode fork or live keeps the VM paused for less";
/// What helps where nothing is shorter.
const LONGER: &str = "no mode is quicker; allow more";

impl Running {
    /// Acts on `POST /snapshot`.
    ///
    /// # Errors
    /// The reactor fails.
    pub(crate) fn save(
        &mut self,
        id: RequestId,
        request: &SnapshotRequest,
    ) -> io::Result<Result<Flow, Refusal>> {
        let requested_ns = monotonic_ns();
        if let Err(refusal) = self.require_ready("saved") {
            return Ok(Err(refusal));
        }
        let preparing = self.preparing.as_ref().map(|preparing| &preparing.tag);
        if let Some(tag) = self.capture.as_ref().map(|capture| &capture.tag).or(preparing) {
            let why = format!(
                "snapshot {tag} of this VM is being written: ask again when it is ready or has failed"
            );
            return Ok(Err(Refusal::new(409, why)));
        }
        match request.mode {
            SnapshotMode::Diff if self.machine.ram().check_fork().is_ok() => {
                let then = Then::Diff { id, request: request.clone(), requested_ns };
                return self.fork_after_collapse(then);
            }
            SnapshotMode::Full => self.save_full(id, request, requested_ns),
            SnapshotMode::Live | SnapshotMode::Diff => self.save_live(id, request, requested_ns),
        }
        .map(|saved| saved.map(|()| Flow::Go))
    }

    /// Quiesces the VM to save it. If that fails, the store says why there is no snapshot.
    fn pause_for(
        &self,
        staged: &Staged,
        clock: &mut PauseClock,
        patience: Option<Duration>,
    ) -> Result<Quiesced, Refusal> {
        self.pause(clock, patience, "saved").inspect_err(|refusal| {
            // The refusal tells, and so does the list.
            drop(staged.fail(&refusal.message));
        })
    }

    /// Writes all of it with the vCPUs parked.
    fn save_full(
        &mut self,
        id: RequestId,
        request: &SnapshotRequest,
        requested_ns: u64,
    ) -> io::Result<Result<(), Refusal>> {
        let limit = Limit::from_us(request.max_pause_us);
        let work = Work::Copy { bytes: snapshot::bytes_to_fill(&self.machine) };
        let patience = match limit.check(&self.costs.expect(work), SHORTER_THAN_FULL) {
            Ok(patience) => patience,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let mut staged = match snapshot::stage(&request.store, &request.tag) {
            Ok(staged) => staged,
            Err(error) => return Ok(Err(Refusal::new(409, error.to_string()))),
        };
        let mut clock = PauseClock::start();
        let quiesced = match self.pause_for(&staged, &mut clock, patience) {
            Ok(quiesced) => quiesced,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let (machine, record) = (&self.machine, &self.record);
        let filled = snapshot::fill(machine, quiesced.saved(), record, &mut staged);
        let source = self.end_pause(clock, limit, work);
        let (machine, record) = (&self.machine, &self.record);
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
        request: &SnapshotRequest,
        requested_ns: u64,
        before: Before,
    ) -> io::Result<Result<Flow, Refusal>> {
        let tag = &request.tag;
        let limit = Limit::from_us(request.max_pause_us);
        let work = before.work();
        let patience = match limit.check(&self.costs.expect(work), SHORTER_THAN_FORK) {
            Ok(patience) => patience,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let staged = match snapshot::stage_diff(&mut self.machine, &request.store, tag) {
            Ok(staged) => staged,
            Err(why) => return Ok(Err(Refusal::new(409, why))),
        };
        let mut clock = PauseClock::start();
        let quiesced = match self.pause_for(&staged, &mut clock, patience) {
            Ok(quiesced) => quiesced,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let errand = Errand { staged, mode: Mode::Diff };
        let delivered = match snapshot::fork_writer(&quiesced, tag, errand, requested_ns) {
            Forked::Child(birth) => return Ok(Ok(Flow::Child(birth))),
            Forked::Source(delivered, _) => delivered,
        };
        let pause = before.tell(self.end_pause(clock, limit, work));
        let offspring = &mut self.control.offspring;
        let to = request.wait.then_some(id);
        let batch = offspring.open_batch(to, AnswerAs::Receipt, 1, Some(WRITE_TIMEOUT));
        offspring.set_source_pause(batch, pause);
        offspring.adopt_all(&self.control.reactor, batch, delivered);
        if request.wait {
            return Ok(Ok(Flow::Go));
        }
        if let Some(why) = offspring.failure(batch) {
            return Ok(Err(Refusal::new(500, why)));
        }
        let receipt = SnapshotReceipt { source: pause, ..SnapshotReceipt::default() };
        self.control.answer(id, 200, &receipt)?;
        Ok(Ok(Flow::Go))
    }

    /// Has RAM protected ahead of the pause; in it, what was written since; a writer does the rest while the vCPUs run.
    fn save_live(
        &mut self,
        id: RequestId,
        request: &SnapshotRequest,
        requested_ns: u64,
    ) -> io::Result<Result<(), Refusal>> {
        let limit = Limit::from_us(request.max_pause_us);
        let private = Resident::now().private(self.machine.ram());
        let least = self.costs.expect(Work::Arm { noted: 0, private });
        if let Err(refusal) = limit.check(&least, LONGER) {
            return Ok(Err(refusal));
        }
        let prepared = match live::prepare(&mut self.machine, &self.record, request) {
            Ok(prepared) => prepared,
            Err(refusal) => return Ok(Err(refusal)),
        };
        match prepared.start_ahead(&self.machine, self.costs.room(limit, private, ENOUGH)) {
            Ok(ahead) => {
                let watched =
                    self.control.reactor.add(ahead.told_fd(), tokens::AHEAD, Interest::READ);
                if let Err(error) = watched {
                    drop(ahead);
                    let why = format!("cannot watch the thread that protects RAM: {error}");
                    prepared.fail(&why);
                    return Ok(Err(Refusal::new(500, why)));
                }
                let (tag, wait) = (request.tag.clone(), request.wait);
                let preparing = Preparing {
                    prepared,
                    ahead,
                    tag,
                    request: id,
                    wait,
                    requested_ns,
                    limit,
                    in_vain: 0,
                };
                self.preparing = Some(preparing);
                Ok(Ok(()))
            }
            Err(why) => {
                prepared.fail(&why);
                Ok(Err(Refusal::new(500, why)))
            }
        }
    }

    /// The thread that protects RAM ahead of a pause has something to say: now is the time, or it could not go on.
    ///
    /// # Errors
    /// The reactor fails.
    pub(crate) fn after_ahead(&mut self) -> io::Result<()> {
        let Some(mut preparing) = self.preparing.take() else { return Ok(()) };
        let private = Resident::now().private(self.machine.ram());
        let patience = match preparing.ahead.look() {
            Ahead::Working => {
                self.preparing = Some(preparing);
                return Ok(());
            }
            Ahead::Ended => {
                self.control.reactor.remove(preparing.ahead.told_fd())?;
                let Preparing { prepared, ahead, request, .. } = preparing;
                // Nothing is protected any more, and finishing says why.
                let why = match ahead.finish() {
                    Err(error) => error.to_string(),
                    Ok(_) => "RAM could not be protected ahead of the pause".to_owned(),
                };
                prepared.fail(&why);
                return self.control.answer_fault(request, 500, why);
            }
            Ahead::Ready { noted } => {
                let expected = self.costs.expect(Work::Arm { noted: noted as u64, private });
                match preparing.limit.check(&expected, "the guest writes too fast; allow more") {
                    Ok(patience) => patience,
                    Err(_) if preparing.in_vain < TRIES => {
                        preparing.in_vain += 1;
                        let enough = self.costs.room(preparing.limit, private, ENOUGH);
                        preparing.ahead.again(enough);
                        self.preparing = Some(preparing);
                        return Ok(());
                    }
                    Err(refusal) => {
                        self.control.reactor.remove(preparing.ahead.told_fd())?;
                        let request = preparing.request;
                        preparing.give_up(&refusal.message);
                        return self.control.answer_fault(request, refusal.status, refusal.message);
                    }
                }
            }
        };
        self.control.reactor.remove(preparing.ahead.told_fd())?;
        let Preparing { prepared, ahead, request, wait, requested_ns, limit, .. } = preparing;
        let taken = self.take_live(prepared, ahead, private, (limit, patience));
        let outcome = match taken {
            Ok((armed, pause)) => {
                self.go_live(armed, pause, request, wait.then_some(request), requested_ns)?
            }
            Err(refusal) => Err(refusal),
        };
        match outcome {
            Ok(()) => Ok(()),
            Err(Refusal { status, message }) => self.control.answer_fault(request, status, message),
        }
    }

    /// The pause of a live snapshot. The VM goes on after it in any case.
    fn take_live(
        &mut self,
        prepared: Prepared,
        ahead: PreArm,
        private: u64,
        (limit, patience): (Limit, Option<Duration>),
    ) -> Result<(Armed, SourcePause), Refusal> {
        let (machine, generation) = (&self.machine, self.record.generation);
        let mut clock = PauseClock::start();
        let stands = self.pause_and(&mut clock, patience, "saved", |saved, clock| {
            let state = snapshot::encode(machine, saved, generation).map_err(|e| e.to_string())?;
            clock.saved();
            // From here on to the fork nobody serves a write to RAM, and there is none.
            let protected = ahead.finish().map_err(|e| e.to_string())?;
            clock.armed();
            Ok((state, protected))
        });
        let (quiesced, (state, protected)) = match stands {
            Ok(stands) => stands,
            Err(refusal) => {
                prepared.fail(&refusal.message);
                return Err(refusal);
            }
        };
        let work = Work::Arm { noted: protected.report.left, private };
        let armed = prepared.arm(machine, &self.engine, &quiesced, state, protected, &mut clock);
        drop(quiesced);
        self.go_on();
        let pause = clock.stop(limit);
        let armed = armed.map_err(|unarmed| Refusal::new(500, unarmed.clear()))?;
        self.costs.learn(work, &pause);
        Ok((armed, pause))
    }

    /// The VM runs again: the writer copies RAM from here on.
    fn go_live(
        &mut self,
        armed: Armed,
        pause: SourcePause,
        id: RequestId,
        waiting: Option<RequestId>,
        requested_ns: u64,
    ) -> io::Result<Result<(), Refusal>> {
        let capturing = match armed.go(waiting, requested_ns, pause) {
            Ok(capturing) => capturing,
            Err(why) => return Ok(Err(Refusal::new(500, why))),
        };
        let watched = self.control.reactor.add(capturing.pidfd(), tokens::CAPTURE, Interest::READ);
        if let Err(error) = watched {
            let why = format!("cannot watch the writer: {error}");
            capturing.give_up(&why);
            return Ok(Err(Refusal::new(500, why)));
        }
        if waiting.is_none() {
            self.control.answer(id, 200, &capturing.receipt_so_far())?;
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
            (Ok(receipt), request) => {
                if let Some(written) = capturing.written() {
                    self.machine.set_latest(written);
                }
                match request {
                    Some(request) => self.control.answer(request, 200, &receipt),
                    None => Ok(()),
                }
            }
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
