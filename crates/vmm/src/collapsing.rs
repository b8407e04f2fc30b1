//! Before a fork of a running VM: its RAM is made huge pages, if the fork would take long.
//!
//! ```text
//!   a request that forks: few pages, or the limit allows for them ------------------> pause
//!     | many
//!   a thread counts what is small, and collapses it while the guest runs
//!     | few enough are left, nothing can be done, or the time is up
//!   the thread is joined, as at a fork nobody is there but parked vCPUs ------------> pause, or a refusal (`--max-pause`)
//!     |
//!   requests that came meanwhile, and fork or save
//! ```
//!
//! Nothing depends on its success: whatever fails, the fork goes on with the pages that there are.

use std::io;
use std::time::Duration;

use forkd_api::server::RequestId;
use forkd_api::types::{SnapshotRequest, SourcePause};
use forkd_memory::collapse::{CollapseAhead, CollapseGoal, Collapsed};
use forkd_sys::reactor::Interest;

use crate::control::{Flow, tokens};
use crate::forking::Wanted;
use crate::pause::{Costs, Limit, Resident, Tables, Work};
use crate::requests::{Refusal, VmmAction};
use crate::running::Running;

/// A fork that takes longer is worth it, where no limit was given.
const LONG_US: f64 = 4000.0;
/// What is aimed at then: half of it, or the next fork would have to wait again.
const AIM_US: f64 = LONG_US / 2.0;
/// How long it may take. 1.5 GiB take 0.4 s (0.57 ms for each huge page, crates/memory/src/collapse.rs), and several
/// times that on a busy host, or a virtual one. What is left is taken by a later fork, once the branches of this one are
/// gone or the pages are written to.
const TIME: Duration = Duration::from_secs(2);
/// What the host is to keep available, in MiB: what a few small VMs need to start.
const RESERVE_MIB: u64 = 512;

/// In so few pages of private memory, 64 MiB, it makes little difference to a fork whether they are huge ones.
const FEW: u64 = 16_384;

/// What waits for RAM to be huge pages.
pub(crate) enum Then {
    /// Children.
    Fork(Wanted),
    /// A diff.
    Diff {
        /// Who asked for it.
        id: RequestId,
        /// What was asked.
        request: SnapshotRequest,
        /// When.
        requested_ns: u64,
    },
}

impl Then {
    fn limit(&self) -> Limit {
        match self {
            Self::Fork(wanted) => wanted.limit,
            Self::Diff { request, .. } => Limit::from_us(request.max_pause_us),
        }
    }

    /// Processes that are forked.
    fn count(&self) -> u64 {
        match self {
            Self::Fork(wanted) => wanted.specs.len() as u64,
            Self::Diff { .. } => 1,
        }
    }

    fn id(&self) -> RequestId {
        match self {
            Self::Fork(wanted) => wanted.request,
            Self::Diff { id, .. } => *id,
        }
    }
}

/// A fork that waits until RAM is in huge pages.
pub(crate) struct Collapsing {
    ahead: CollapseAhead,
    then: Then,
    waiting: Vec<(RequestId, VmmAction)>,
}

/// What was found, and done, before the pause of a fork.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Before {
    /// What the fork copies for each child.
    tables: Tables,
    /// Children.
    count: u64,
    collapse: Collapsed,
}

impl Before {
    /// What the pause holds.
    pub(crate) fn work(self) -> Work {
        let Tables { small, huge, rough } = self.tables;
        Work::Fork { tables: Tables { small: small * self.count, huge: huge * self.count, rough } }
    }

    /// Has a pause tell what was done before it.
    pub(crate) fn tell(self, pause: SourcePause) -> SourcePause {
        let Collapsed { made, took, .. } = self.collapse;
        let collapse_us = if made == 0 { 0 } else { took.as_micros() as u64 };
        SourcePause { collapse_us, pages_collapsed: made, ..pause }
    }
}

/// Small pages of which a fork may copy so many: above the first, it is collapsed down to the second. None if that would
/// not help: even without them the pause does not fit.
fn bounds(costs: &Costs, limit: Limit, count: u64) -> Option<(u64, u64)> {
    let each = |us: f64| costs.small_pages_within(us) / count.max(1);
    let Some(allowed) = limit.0 else { return Some((each(LONG_US), each(AIM_US))) };
    let fixed = costs.expect(Work::Fork { tables: Tables::default() });
    if !limit.allows(&fixed) {
        return None;
    }
    // What parking and saving leave for the fork.
    let fork_us = (allowed.saturating_sub(fixed.before_last())).as_secs_f64() * 1e6;
    let most = each(fork_us);
    Some((most, most / 2))
}

impl Running {
    /// Collapses RAM, if that is worth it, and then does what forks.
    ///
    /// # Errors
    /// The reactor fails.
    pub(crate) fn fork_after_collapse(&mut self, then: Then) -> io::Result<Result<Flow, Refusal>> {
        let ram = self.machine.ram();
        let private = Resident::now().private(ram);
        let count = then.count();
        let can = ram.can_collapse();
        let tables = Tables { small: private, huge: 0, rough: false };
        let mut before = Before { tables, count, ..Before::default() };
        let bounds = bounds(&self.costs, then.limit(), count).filter(|_| can);
        let Some((most, enough)) = bounds.filter(|(most, _)| private > *most) else {
            // Most of a VM that is small are small pages.
            before.tables.rough = can && private > FEW;
            return self.go_and_fork(then, before);
        };
        let goal = CollapseGoal { most, enough, time: TIME, reserve_mib: RESERVE_MIB };
        let ahead = CollapseAhead::start(ram, goal).and_then(|ahead| {
            self.control.reactor.add(ahead.told_fd(), tokens::COLLAPSE, Interest::READ)?;
            Ok(ahead)
        });
        match ahead {
            Ok(ahead) => {
                self.collapsing = Some(Collapsing { ahead, then, waiting: Vec::new() });
                Ok(Ok(Flow::Go))
            }
            Err(error) => {
                crate::log::line(&format!("RAM stays as it is before a fork: {error}"));
                before.tables.rough = true;
                self.go_and_fork(then, before)
            }
        }
    }

    fn go_and_fork(&mut self, then: Then, before: Before) -> io::Result<Result<Flow, Refusal>> {
        match then {
            Then::Fork(wanted) => self.fork_now(wanted, before),
            Then::Diff { id, request, requested_ns } => {
                self.save_diff(id, &request, requested_ns, before)
            }
        }
    }

    /// Gives the action back, unless it has to wait for the fork that waits.
    pub(crate) fn unless_collapsing(
        &mut self,
        id: RequestId,
        action: VmmAction,
    ) -> Option<VmmAction> {
        let pauses =
            matches!(action, VmmAction::Fork(_) | VmmAction::Zygote(_) | VmmAction::Snapshot(_));
        match &mut self.collapsing {
            Some(collapsing) if pauses => {
                collapsing.waiting.push((id, action));
                None
            }
            _ => Some(action),
        }
    }

    /// RAM is in huge pages, as far as it gets: forks, and serves who has waited for that.
    ///
    /// # Errors
    /// The reactor fails.
    pub(crate) fn after_collapse(&mut self) -> io::Result<Flow> {
        let Some(Collapsing { ahead, then, waiting }) = self.collapsing.take() else {
            return Ok(Flow::Go);
        };
        self.control.reactor.remove(ahead.told_fd())?;
        let (id, count) = (then.id(), then.count());
        let collapse = ahead.finish();
        let private = Resident::now().private(self.machine.ram());
        let before = match collapse {
            Ok(collapse) => {
                // What is no RAM is in small pages.
                let huge = collapse.huge;
                let small = private.saturating_sub(huge * 512).max(collapse.small);
                Before { tables: Tables { small, huge, rough: false }, count, collapse }
            }
            Err(error) => {
                crate::log::line(&format!("RAM stays as it is before a fork: {error}"));
                let tables = Tables { small: private, huge: 0, rough: true };
                Before { tables, count, ..Before::default() }
            }
        };
        // The VM may have failed meanwhile.
        let outcome = match self.require_ready("forked") {
            Ok(()) => self.go_and_fork(then, before)?,
            Err(refusal) => Err(refusal),
        };
        match outcome {
            Ok(Flow::Go) => {}
            Ok(flow) => return Ok(flow),
            Err(Refusal { status, message }) => self.control.answer_fault(id, status, message)?,
        }
        match self.after_rehearsal()? {
            Flow::Go => self.serve_waiting(waiting),
            flow => Ok(flow),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(us: u64) -> Limit {
        Limit::from_us(Some(us))
    }

    #[test]
    fn small_pages_are_collapsed_where_the_fork_is_long_or_does_not_fit() {
        let costs = Costs::default();
        let (most, enough) = bounds(&costs, Limit(None), 1).expect("it helps");
        let fork = |small| {
            let tables = Tables { small, ..Tables::default() };
            costs.expect(Work::Fork { tables })
        };
        // 210 us are parking and saving. Pages at their dearest, 0.1 us, and 380 us for all else take 4 ms.
        assert!(fork(most).total() <= Duration::from_micros(4210));
        assert!((36_100..36_300).contains(&most), "{most}");
        assert!(fork(enough).total() <= Duration::from_micros(2210) && enough > 0);
        // Four children have a quarter each.
        assert_eq!(bounds(&costs, Limit(None), 4), Some((most / 4, enough / 4)));
        // What the limit allows for is left alone, whatever that is; half of it is aimed at.
        let (most, enough) = bounds(&costs, limit(10_000_000), 1).expect("it helps");
        assert!(most > 90_000_000 && enough == most / 2);
        let (most, _) = bounds(&costs, limit(2000), 1).expect("it helps");
        assert!(limit(2000).allows(&fork(most)) && most > 10_000, "{most}");
        // Nothing helps: it is refused at once.
        assert_eq!(bounds(&costs, limit(500), 1), None);
    }

    #[test]
    fn what_was_done_is_told_and_priced() {
        let tables = Tables { small: 100, huge: 7, rough: false };
        let before = Before { tables, count: 3, ..Before::default() };
        let all = Tables { small: 300, huge: 21, rough: false };
        assert_eq!(before.work(), Work::Fork { tables: all });
        let pause = SourcePause { pause_us: 5, ..SourcePause::default() };
        assert_eq!(before.tell(pause), pause, "nothing was made");
        let collapse =
            Collapsed { made: 2, took: Duration::from_millis(3), ..Collapsed::default() };
        let told = Before { collapse, ..before }.tell(pause);
        assert_eq!((told.pages_collapsed, told.collapse_us, told.pause_us), (2, 3000, 5));
    }
}
