//! A running VM forks children: branches, or a zygote.

use std::io;

use forkd_api::server::RequestId;
use forkd_api::types::ChildSpec;
use forkd_snapshot::Digest;

use crate::collapsing::{Before, Then};
use crate::control::Flow;
use crate::fork::offspring::AnswerAs;
use crate::fork::{Destiny, Forked, PauseClock, crowd_of, fork_all, report_pipes};
use crate::machine::past::Forebear;
use crate::pause::{Limit, SHORTER_THAN_FORK};
use crate::requests::Refusal;
use crate::running::Running;
use forkd_sys::clock::monotonic_ns;

/// Children that are wanted.
pub(crate) struct Wanted {
    /// Who waits for them.
    pub request: RequestId,
    /// Who they are to be.
    pub specs: Vec<ChildSpec>,
    /// What they become.
    pub destiny: Destiny,
    /// How long the pause may be.
    pub limit: Limit,
    /// When they were asked for.
    pub requested_ns: u64,
}

impl Running {
    /// Forks children off the running VM: now, or once RAM is in huge pages.
    ///
    /// # Errors
    /// The reactor fails.
    pub(crate) fn fork(
        &mut self,
        request: RequestId,
        specs: Vec<ChildSpec>,
        destiny: Destiny,
        limit: Limit,
    ) -> io::Result<Result<Flow, Refusal>> {
        let requested_ns = monotonic_ns();
        if let Err(refusal) = self.require_ready("forked") {
            return Ok(Err(refusal));
        }
        if let Err(error) = self.machine.ram().check_fork() {
            return Ok(Err(Refusal::new(409, error.to_string())));
        }
        let wanted = Wanted { request, specs, destiny, limit, requested_ns };
        self.fork_after_collapse(Then::Fork(wanted))
    }

    /// The pause of a fork.
    ///
    /// # Errors
    /// The reactor fails.
    pub(crate) fn fork_now(
        &mut self,
        wanted: Wanted,
        before: Before,
    ) -> io::Result<Result<Flow, Refusal>> {
        let Wanted { request, specs, destiny, limit, requested_ns } = wanted;
        let work = before.work();
        let patience = match limit.check(&self.costs.expect(work), SHORTER_THAN_FORK) {
            Ok(patience) => patience,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let form = match destiny {
            Destiny::Vm => AnswerAs::Fork,
            Destiny::Zygote | Destiny::Writer(_) => AnswerAs::Zygote,
        };
        if let (Destiny::Zygote, [spec]) = (&destiny, specs.as_slice()) {
            // Before the fork, so that the zygote and its children know it, too.
            let mut instant = [0; 32];
            if let Err(error) = forkd_sys::random::fill(&mut instant) {
                let why = format!("no random numbers to name the instant by: {error}");
                return Ok(Err(Refusal::new(500, why)));
            }
            let (tag, instant) = (spec.id.clone(), Digest(instant));
            self.machine.past_mut().add(Forebear::Zygote { tag, instant });
        }
        let pipes = report_pipes(specs.len());
        let crowd = crowd_of(specs.len(), self.machine.waking_limit());
        let mut clock = PauseClock::start();
        let quiesced = match self.pause(&mut clock, patience, "forked") {
            Ok(quiesced) => quiesced,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let delivered = match fork_all(&quiesced, specs, pipes, crowd, destiny, requested_ns) {
            Forked::Child(birth) => return Ok(Ok(Flow::Child(birth))),
            Forked::Source(delivered, _) => delivered,
        };
        let pause = before.tell(self.end_pause(clock, limit, work));
        let offspring = &mut self.control.offspring;
        let batch = offspring.open_batch(Some(request), form, delivered.len(), None);
        offspring.set_source_pause(batch, pause);
        offspring.adopt_all(&self.control.reactor, batch, delivered);
        Ok(Ok(Flow::Go))
    }
}
