//! The measures themselves.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use forkd_sys::clock::monotonic_ns;

use super::stats::Samples;
use crate::cleanup::Guard;
use crate::commands::fork::{Child, Forked, Request, fork};
use crate::guest::Guest;
use crate::paths::Paths;
use crate::process_memory::ProcessMemory;
use crate::progress::Step;
use crate::registry::Live;
use crate::vm_client::VmClient;
use crate::{output, parallel};

/// How long a child's agent has to answer.
pub const WAIT: Duration = Duration::from_secs(120);
/// Children of one batch of the sustained measure, and how long it goes on.
const BATCH: usize = 10;
const SUSTAIN: Duration = Duration::from_secs(10);
/// How often many children are forked at once: it takes seconds, and 100 children are many samples already.
const MANY_ROUNDS: usize = 3;
/// What the source of branches is busy with.
const BUSY: &str = "import threading\n\
                    def _count():\n    global n\n    n = 0\n    while True:\n        n += 1\n\
                    threading.Thread(target=_count, daemon=True).start()\n";

/// All samples.
#[derive(Debug, Default)]
pub struct Measures {
    /// What a running source felt of a branch, in ms.
    pub pause_ms: Samples,
    /// Request for a branch to its vCPUs running, in ms.
    pub branch_ms: Samples,
    /// Request to vCPUs running, in ms.
    pub running_ms: Samples,
    /// Request to the agent's answer, in ms.
    pub ready_ms: Samples,
    /// Request to the first eval's answer, in ms.
    pub answer_ms: Samples,
    /// How many children at once.
    pub many: usize,
    /// Request to the last of many children's agents answering, in s.
    pub many_ready_s: Samples,
    /// Request to the last of many children's eval answered, in s.
    pub many_s: Samples,
    /// Children forked, answering and ended per second.
    pub per_second: Samples,
    /// The same, each with an eval.
    pub evaluated_per_second: Samples,
    /// Memory of a child, in MiB.
    pub pss_before: Samples,
    /// After its first eval.
    pub pss_after: Samples,
    /// Memory that is the child's alone, in MiB.
    pub uss_before: Samples,
    /// After its first eval.
    pub uss_after: Samples,
}

impl Measures {
    /// Takes all measures of a snapshot.
    ///
    /// # Errors
    /// A child failed. None stays.
    pub fn take(
        paths: &Paths,
        source: &Live,
        rounds: u32,
        many: usize,
        quiet: bool,
    ) -> Result<Self> {
        let mut measures = Self { many, ..Self::default() };
        let mut step = Step::begin("one child at a time", quiet);
        for round in 0..rounds {
            step.at(&format!("{} of {rounds}", round + 1));
            measures.one_child(paths, source)?;
        }
        step.done("");
        let mut step = Step::begin("branches of a busy VM", quiet);
        measures.branches(paths, source, rounds, &mut step)?;
        step.done("");
        let mut step = Step::begin(&format!("{many} children at once"), quiet);
        for round in 0..MANY_ROUNDS {
            step.at(&format!("{} of {MANY_ROUNDS}", round + 1));
            measures.many_agents(paths, source)?;
            measures.many_children(paths, source)?;
        }
        step.done("");
        let step = Step::begin("sustained", quiet);
        measures.sustained(paths, source)?;
        step.done("");
        Ok(measures)
    }

    fn one_child(&mut self, paths: &Paths, source: &Live) -> Result<()> {
        let brood = Brood::fork(paths, source, 1, Some(WAIT))?;
        let child = brood.first()?;
        let pid = child.pid.context("a child has no process")?;
        push_ms(&mut self.running_ms, child.to_running());
        push_ms(&mut self.ready_ms, child.to_ready());
        let before = ProcessMemory::of(pid)?;
        // The walk of page tables above is not part of the time to the answer.
        let begun = monotonic_ns();
        ask_number(brood.client()?, 7)?;
        let answered = Duration::from_nanos(monotonic_ns().saturating_sub(begun));
        push_ms(&mut self.answer_ms, child.to_ready().map(|ready| ready + answered));
        let after = ProcessMemory::of(pid)?;
        self.pss_before.push(mib(before.pss));
        self.uss_before.push(mib(before.uss));
        self.pss_after.push(mib(after.pss));
        self.uss_after.push(mib(after.uss));
        brood.end()
    }

    fn branches(
        &mut self,
        paths: &Paths,
        source: &Live,
        rounds: u32,
        step: &mut Step,
    ) -> Result<()> {
        let parents = Brood::fork(paths, source, 1, Some(WAIT))?;
        let parent = parents.first()?;
        let live = parents.live(paths, parent)?;
        let begun = Guest::of(&live.client).eval(BUSY, Some(WAIT), &mut |_, _| Ok(()))?;
        if let Some(error) = begun.error {
            bail!("{} can't be kept busy: {}", parent.id, error.summary());
        }
        for round in 0..rounds {
            step.at(&format!("{} of {rounds}", round + 1));
            // Nobody uses the branch: the source's pause is over when its vCPUs run.
            let branches = Brood::fork(paths, &live, 1, None)?;
            push_ms(&mut self.branch_ms, branches.first()?.to_running());
            if let Some(pause) = &branches.forked.pause {
                self.pause_ms.push(pause.pause_us as f64 / 1e3);
            }
            branches.end()?;
        }
        parents.end()
    }

    fn many_agents(&mut self, paths: &Paths, source: &Live) -> Result<()> {
        let begun = Instant::now();
        let brood = Brood::fork(paths, source, self.many, Some(WAIT))?;
        self.many_ready_s.push(begun.elapsed().as_secs_f64());
        brood.end()
    }

    fn many_children(&mut self, paths: &Paths, source: &Live) -> Result<()> {
        let begun = Instant::now();
        // All are alive; twice as many as the host has CPUs are asked at once. More would take CPU time from each other:
        // where kernel mode is emulated, a guest that shares its CPU with a hundred spends it on timer ticks.
        let askers = 2 * std::thread::available_parallelism().map_or(1, usize::from);
        let brood = Brood::fork(paths, source, self.many, None)?;
        let numbered: Vec<(usize, &(VmClient, u32))> = brood.clients.iter().enumerate().collect();
        let answers = parallel::map_by(askers, &numbered, |(n, (client, _))| {
            client.wait_ready(WAIT).with_context(|| client.who().to_string())?;
            ask_number(client, *n)
        });
        answers.into_iter().collect::<Result<()>>()?;
        self.many_s.push(begun.elapsed().as_secs_f64());
        brood.end()
    }

    fn sustained(&mut self, paths: &Paths, source: &Live) -> Result<()> {
        let begun = Instant::now();
        while begun.elapsed() < SUSTAIN {
            let batch = Instant::now();
            Brood::fork(paths, source, BATCH, Some(WAIT))?.end()?;
            self.per_second.push(BATCH as f64 / batch.elapsed().as_secs_f64());
            let batch = Instant::now();
            let brood = Brood::fork(paths, source, BATCH, Some(WAIT))?;
            let answers = parallel::map(&brood.clients, |(client, _)| ask_number(client, 7));
            answers.into_iter().collect::<Result<()>>()?;
            brood.end()?;
            self.evaluated_per_second.push(BATCH as f64 / batch.elapsed().as_secs_f64());
        }
        Ok(())
    }
}

/// Lets a child compute a number of its own.
fn ask_number(client: &VmClient, number: usize) -> Result<()> {
    let code = format!("{number} + 1");
    let answer = Guest::of(client).eval(&code, Some(WAIT), &mut |_, _| Ok(()))?;
    if answer.result.as_deref() != Some((number + 1).to_string().as_str()) {
        bail!("{} answered {:?} to {code}", client.who(), answer.result);
    }
    Ok(())
}

/// Children that end with this value.
pub struct Brood {
    /// What came of the fork.
    pub forked: Forked,
    clients: Vec<(VmClient, u32)>,
    guard: Guard,
}

impl Brood {
    /// Forks them.
    ///
    /// # Errors
    /// One failed; none stays.
    pub fn fork(
        paths: &Paths,
        source: &Live,
        count: usize,
        wait: Option<Duration>,
    ) -> Result<Self> {
        Self::adopt(paths, fork(paths, source, &Request { count, name: None, wait })?)
    }

    /// Takes children into care that were made otherwise.
    ///
    /// # Errors
    /// One failed; none stays.
    pub fn adopt(paths: &Paths, forked: Forked) -> Result<Self> {
        let clients: Vec<(VmClient, u32)> = forked
            .living()
            .filter_map(|c| Some((VmClient::new(&paths.vm(&c.id), &c.id), c.pid?)))
            .collect();
        let guard = Guard::new({
            let clients = clients.clone();
            move || {
                if let Err(e) = end_all(&clients) {
                    output::note(&format!("forkd: {}", output::error_line(&e)));
                }
            }
        });
        let brood = Self { forked, clients, guard };
        brood.forked.require_all()?;
        Ok(brood)
    }

    /// The first.
    ///
    /// # Errors
    /// There is none.
    pub fn first(&self) -> Result<&Child> {
        self.forked.children.first().context("a fork gave no child")
    }

    fn client(&self) -> Result<&VmClient> {
        Ok(&self.clients.first().context("a fork gave no child")?.0)
    }

    /// One of them, to be branched.
    ///
    /// # Errors
    /// It has ended.
    pub fn live(&self, paths: &Paths, child: &Child) -> Result<Live> {
        crate::registry::vm(paths, &child.id)
    }

    /// Ends them.
    ///
    /// # Errors
    /// One does not end.
    pub fn end(self) -> Result<()> {
        self.guard.disarm();
        end_all(&self.clients)
    }
}

fn end_all(clients: &[(VmClient, u32)]) -> Result<()> {
    parallel::map(clients, |(client, pid)| client.stop(*pid)).into_iter().collect()
}

fn push_ms(samples: &mut Samples, time: Option<Duration>) {
    if let Some(time) = time {
        samples.push(time.as_secs_f64() * 1e3);
    }
}

/// Bytes in MiB.
pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
