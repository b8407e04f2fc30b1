//! `forkd fork`, and what `forkd branch` shares with it.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use forkd_api::types::{ChildResult, ChildSpec, MAX_CHILDREN, SourcePause, Timing};
use forkd_memory::MemoryBackend;
use serde::Serialize;

use crate::cleanup::{self, Guard};
use crate::cli::OutputArgs;
use crate::paths::Paths;
use crate::registry::Live;
use crate::restore::{ForkOptions, Limits, Snapshot};
use crate::vm_client::VmClient;
use crate::{id, output, parallel, persist, registry};

/// Fork VMs from a snapshot
///
/// All N are forked by one request. Each has its own identity, and finds the snapshot's memory, interpreter
/// and disks as they were; what it writes is its own.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd fork py
  forkd fork py -n 100 --name worker
  forkd fork py --memory memfd-shared --name web
  forkd fork py -n 10 --json | jq -r '.children[].id'")]
pub struct Args {
    /// Tag of the snapshot
    tag: String,
    /// Load the snapshot from disk for each of them, with RAM of this kind; without it they are forked from the
    /// snapshot in memory, which is quicker. `file`: the files, mapped; `memfd-private`: one copy for all of them;
    /// `memfd-shared`: a copy for each, which `forkd branch --mode live` needs; `userfault`: read as it is touched
    #[arg(long, value_name = "KIND")]
    memory: Option<Memory>,
    /// Seconds to wait for a snapshot that is still being written, 0 to 3600. One that is in memory meanwhile
    /// (`forkd branch --mode fork`) is forked at once
    #[arg(long, default_value_t = persist::WAIT_WRITING_S, value_name = "S", value_parser = clap::value_parser!(u32).range(0..=3600))]
    wait_writing: u32,
    #[command(flatten)]
    fork: ForkArgs,
}

/// RAM of VMs that are loaded from disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Memory {
    File,
    MemfdShared,
    MemfdPrivate,
    Userfault,
}

impl From<Memory> for MemoryBackend {
    fn from(memory: Memory) -> Self {
        match memory {
            Memory::File => Self::File,
            Memory::MemfdShared => Self::MemfdShared,
            Memory::MemfdPrivate => Self::MemfdPrivate,
            Memory::Userfault => Self::Userfault,
        }
    }
}

/// What fork and branch have in common.
#[derive(Debug, clap::Args)]
pub struct ForkArgs {
    /// How many, 1 to 1024
    #[arg(
        short = 'n',
        long = "count",
        default_value_t = 1,
        value_name = "N",
        allow_negative_numbers = true
    )]
    count: i64,
    /// Name; of more than one, the start of their names
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Return once their vCPUs run, before their agents answer
    #[arg(long)]
    no_wait: bool,
    /// Seconds their agents have to answer
    #[arg(long, default_value_t = 120, value_name = "S", value_parser = clap::value_parser!(u32).range(1..=3600))]
    timeout: u32,
    #[command(flatten)]
    output: OutputArgs,
}

/// What a fork is to give.
#[derive(Debug, Clone)]
pub struct Request {
    /// How many children.
    pub count: usize,
    /// Their name, or the start of their names.
    pub name: Option<String>,
    /// How long to wait for their agents; none: not at all.
    pub wait: Option<Duration>,
}

/// One child.
#[derive(Debug, Clone, Serialize)]
pub struct Child {
    /// Id.
    pub id: String,
    /// Name.
    pub name: String,
    /// Host process id.
    pub pid: Option<u32>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Time marks.
    pub timing: Timing,
}

/// What came of a fork.
#[derive(Debug, Serialize)]
pub struct Forked {
    /// Tag or id of the source.
    pub source: String,
    /// What a running source felt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pause: Option<SourcePause>,
    /// The children, in order.
    pub children: Vec<Child>,
    /// From the request to the last child's answer, in microseconds.
    pub elapsed_us: u64,
}

impl Args {
    /// Runs the verb.
    ///
    /// # Errors
    /// The request as a whole failed; children that failed are told one by one.
    pub fn run(self, paths: &Paths) -> Result<ExitCode> {
        let request = self.fork.request()?;
        cleanup::watch_signals().context("cannot watch signals")?;
        if self.memory.is_some() || !persist::is_live(paths, &self.tag)? {
            let patience = Duration::from_secs(self.wait_writing.into());
            persist::await_written(paths, &self.tag, patience)?;
        }
        if let Some(memory) = self.memory {
            return load(paths, &self.tag, &request, memory.into())?.print(self.fork.output);
        }
        let source = persist::find(paths, &self.tag)?;
        let forked = fork(paths, &source, &request)?;
        forked.print(self.fork.output)
    }
}

impl ForkArgs {
    /// Checks the numbers and names.
    ///
    /// # Errors
    /// One line that says what is out of range.
    pub fn request(&self) -> Result<Request> {
        let count = usize::try_from(self.count).ok().filter(|n| (1..=MAX_CHILDREN).contains(n));
        let count = count.with_context(|| {
            format!("-n {}: one request makes 1 to {MAX_CHILDREN} VMs", self.count)
        })?;
        let wait = (!self.no_wait).then(|| Duration::from_secs(self.timeout.into()));
        Ok(Request { count, name: self.name.clone(), wait })
    }

    /// Whether to wait until all is done.
    pub fn waits(&self) -> bool {
        !self.no_wait
    }

    /// How to print the result.
    pub fn output(&self) -> OutputArgs {
        self.output
    }
}

/// Forks children of a snapshot or a running VM, and waits for them. If this is interrupted or fails as a whole,
/// none of them stays; a child that failed does not either.
///
/// # Errors
/// The request as a whole failed.
pub fn fork(paths: &Paths, source: &Live, request: &Request) -> Result<Forked> {
    let specs = specs(paths, request)?;
    let guard = guard_children(specs.clone());
    let begun = Instant::now();
    let answer = source
        .client
        .fork(specs.clone())
        .with_context(|| format!("cannot fork {}", source.record.id))?;
    if answer.children.len() != specs.len() {
        bail!(
            "{} was asked for {} children and told of {}",
            source.record.id,
            specs.len(),
            answer.children.len()
        );
    }
    let pairs: Vec<(ChildSpec, ChildResult)> = specs.into_iter().zip(answer.children).collect();
    let children = parallel::map(&pairs, |(spec, result)| settle(spec, result, request.wait));
    guard.disarm();
    Ok(Forked {
        source: source.record.id.clone(),
        pause: answer.source,
        children,
        elapsed_us: u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX),
    })
}

/// Who the children are to be.
fn specs(paths: &Paths, request: &Request) -> Result<Vec<ChildSpec>> {
    paths.prepare_run()?;
    let ids = (0..request.count).map(|_| id::new()).collect::<Result<Vec<_>>>()?;
    let names = id::child_names(request.name.as_deref(), &ids)?;
    registry::require_free_names(paths, &names)?;
    let spec = |(id, name): (String, String)| ChildSpec { dir: paths.vm(&id), id, name };
    Ok(ids.into_iter().zip(names).map(spec).collect())
}

/// Starts VMs from a durable snapshot, each in a process that loads it, and waits for them. If one can't be started,
/// none of them stays.
///
/// # Errors
/// Names the child that can't be started, by its number, and why.
pub fn load(paths: &Paths, tag: &str, request: &Request, memory: MemoryBackend) -> Result<Forked> {
    let begun = Instant::now();
    paths.prepare_run()?;
    // One that does not answer is told of by itself, and the others stay.
    let limits = Limits { ready: None, ..Limits::default() };
    let (count, name) = (request.count, request.name.clone());
    let options = ForkOptions { count, name, memory, limits, ..ForkOptions::default() };
    let started = Snapshot::open(paths, tag)?.restore_many_with(&options, &paths.vms())?;
    let children = parallel::map(&started, |vm| {
        let spec = ChildSpec { id: vm.id.clone(), name: vm.name.clone(), dir: vm.dir.clone() };
        let (id, pid) = (vm.id.clone(), Some(vm.pid));
        let result = ChildResult { id, pid, error: None, root: None, timing: Timing::default() };
        settle(&spec, &result, request.wait)
    });
    for (vm, child) in started.into_iter().zip(&children) {
        // A child that failed is ended with its guard, if `settle` has not done so.
        if child.error.is_none() {
            vm.keep();
        }
    }
    let elapsed_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
    Ok(Forked { source: tag.to_string(), pause: None, children, elapsed_us })
}

/// Waits for one child; ends it if it fails.
fn settle(spec: &ChildSpec, result: &ChildResult, wait: Option<Duration>) -> Child {
    let mut child = Child {
        id: spec.id.clone(),
        name: spec.name.clone(),
        pid: result.pid,
        error: result.error.clone(),
        timing: result.timing,
    };
    let client = VmClient::new(&spec.dir, &spec.id);
    if let (None, Some(timeout)) = (&child.error, wait) {
        match client.wait_ready(timeout) {
            Ok(info) => child.timing = info.timing,
            Err(e) => child.error = Some(output::error_line(&e)),
        }
    }
    if let (Some(error), Some(pid)) = (&mut child.error, child.pid)
        && let Err(e) = client.stop(pid)
    {
        error.push_str(&format!("; and it can't be ended: {}", output::error_line(&e)));
    }
    child
}

/// Ends all children that have come to be.
fn guard_children(specs: Vec<ChildSpec>) -> Guard {
    Guard::new(move || {
        parallel::map(&specs, |spec| {
            let Ok(record) = forkd_vmm::run_dir::read_record(&spec.dir) else { return };
            if let Err(e) = VmClient::new(&spec.dir, &spec.id).stop(record.pid) {
                output::note(&format!("forkd: {}", output::error_line(&e)));
            }
        });
    })
}

impl Child {
    /// From the request to its vCPUs running.
    pub fn to_running(&self) -> Option<Duration> {
        output::between(self.timing.requested_ns, self.timing.running_ns)
    }

    /// From the request to its agent's answer.
    pub fn to_ready(&self) -> Option<Duration> {
        output::between(self.timing.requested_ns, self.timing.ready_ns)
    }
}

impl Forked {
    /// The children that live.
    pub fn living(&self) -> impl Iterator<Item = &Child> {
        self.children.iter().filter(|c| c.error.is_none())
    }

    /// The first failure as an error, if there was one.
    ///
    /// # Errors
    /// Names the child and why it failed.
    pub fn require_all(&self) -> Result<()> {
        match self.children.iter().find_map(|c| Some((&c.id, c.error.as_ref()?))) {
            Some((id, error)) => bail!("{id}: {error}"),
            None => Ok(()),
        }
    }

    /// Prints it; the status is a failure if a child failed.
    ///
    /// # Errors
    /// Standard output can't be written.
    pub fn print(&self, how: OutputArgs) -> Result<ExitCode> {
        let failed = self.children.iter().filter(|c| c.error.is_some()).count();
        if how.json {
            output::json(self)?;
        } else {
            let rows = self.living().map(|c| {
                vec![
                    c.id.clone(),
                    c.name.clone(),
                    c.pid.map_or("-".to_string(), |p| p.to_string()),
                    output::maybe_duration(c.to_running()),
                    output::maybe_duration(c.to_ready()),
                ]
            });
            if failed < self.children.len() {
                output::line(&output::table(&["id", "name", "pid", "running", "ready"], rows))?;
            }
            if let Some(pause) = &self.pause {
                let us = |n: u64| output::duration(Duration::from_micros(n));
                output::line(&format!(
                    "source paused {} (quiesce {}, save {}, fork {}){}",
                    us(pause.pause_us),
                    us(pause.quiesce_us),
                    us(pause.save_us),
                    us(pause.fork_us),
                    collapsed(pause)
                ))?;
            }
            for child in &self.children {
                if let Some(error) = &child.error {
                    output::note(&format!("forkd: {}: {error}", child.id));
                }
            }
        }
        if failed > 0 {
            bail!("{failed} of {} children of {} failed", self.children.len(), self.source);
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// What was done to memory before a pause, to be said after it; empty if nothing was.
pub fn collapsed(pause: &SourcePause) -> String {
    match pause.pages_collapsed {
        0 => String::new(),
        made => {
            let took = output::duration(Duration::from_micros(pause.collapse_us));
            format!(", {made} huge pages made ahead in {took}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(count: i64) -> ForkArgs {
        ForkArgs { count, name: None, no_wait: false, timeout: 1, output: OutputArgs::default() }
    }

    #[test]
    fn counts_out_of_range_are_named() {
        for bad in [i64::MIN, -1, 0, 1025, 100_000] {
            let error = args(bad).request().unwrap_err().to_string();
            assert!(error.contains(&bad.to_string()) && error.contains("1 to 1024"), "{error}");
        }
        assert_eq!(args(1024).request().unwrap().count, 1024);
    }
}
