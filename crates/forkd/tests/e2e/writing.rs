//! Snapshots that are being written: forked, deleted, and cut off meanwhile. Their writers are stopped (SIGSTOP), so that
//! what is tried comes while they write, however quick they are.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use forkd_snapshot::{Status, Store, Verification};
use forkd_sys::fork::PidFd;
use forkd_vmm::run_dir::read_record;
use rustix::process::Signal;

use crate::command::{Output, Watched};
use crate::fixture::{Suite, WARM, eventually, names};
use crate::leftovers::children;
use crate::runner::{Test, tests};
use crate::vm::{Branched, Vm};

pub const TESTS: &[Test] = tests!["writing":
    one_that_is_in_memory_is_forked_at_once 90,
    others_are_waited_for 120,
    the_wait_has_an_end 90,
    what_is_deleted_meanwhile_stays_deleted 150,
    a_killed_writer_leaves_it_failed 120,
    with_its_vm_killed_it_is_whole_or_failed 120,
];

/// The modes that have a writer of their own.
const WITH_WRITER: [&str; 3] = ["fork", "diff", "live"];
/// How often it is tried to stop a writer before it is done.
const TRIES: usize = 20;
/// How long what must happen at once may take.
const SOON: Duration = Duration::from_secs(60);

/// A snapshot whose writing stands still.
struct Stopped<'s> {
    suite: &'s Suite,
    vm: Vm<'s>,
    tag: String,
    /// Who writes it: a process of its own or, in mode `full`, the VM's.
    writer: PidFd,
    /// The command, if it is not done before the snapshot is.
    command: Option<Watched>,
}

/// A VM that has much to write.
fn source<'s>(suite: &'s Suite, mode: &str) -> Result<Vm<'s>> {
    suite.warm()?;
    suite.save(WARM)?;
    let memory = if mode == "live" { "memfd-shared" } else { "file" };
    let vm = suite.load(WARM, memory)?;
    vm.run(&format!("blob = b'forkd' * (1 << 18)\nlevel.append({mode:?})"))?;
    Ok(vm)
}

fn store(suite: &Suite) -> Result<Store> {
    Ok(Store::open(&suite.store())?)
}

fn status(suite: &Suite, tag: &str) -> Result<Option<Status>> {
    let entries = store(suite)?.list()?;
    Ok(entries.into_iter().find(|entry| entry.tag == tag).map(|entry| entry.status))
}

fn is_writing(suite: &Suite, tag: &str) -> Result<bool> {
    Ok(matches!(status(suite, tag)?, Some(Status::Writing { .. })))
}

/// Whether a process that has been told to stop has, and not in the moment in which it holds the store's lock: who asks the store
/// would wait for it then.
fn stands_aside(suite: &Suite, pid: u32) -> Result<bool> {
    let state = || -> Option<char> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(") ")?.1.chars().next()
    };
    let settled = || Ok(!matches!(state(), Some('R' | 'S' | 'D')));
    eventually(Instant::now() + SOON, "it stops, or has ended", settled)?;
    let lock = crate::live::store(suite).join(".lock");
    Ok(state() == Some('T') && !forkd_sys::lock::is_held(&lock)?)
}

impl<'s> Stopped<'s> {
    fn new(suite: &'s Suite, mode: &str) -> Result<Self> {
        let vm = source(suite, mode)?;
        for number in 0..TRIES {
            let tag = format!("wr-{mode}-{number}");
            let branch = suite.forkd(["branch", &vm.id, "--snapshot", &tag, "--mode", mode]);
            let mut command = None;
            if mode == "full" {
                command = Some(branch.spawn()?);
                let begun = || Ok(status(suite, &tag)?.is_some());
                eventually(Instant::now() + SOON, "it is being written", begun)?;
            } else {
                branch.arg("--no-wait").ok()?;
            }
            let writers = match mode {
                "full" => vec![vm.pid],
                "fork" => children(read_record(&suite.snapshots_dir().join(&tag))?.pid)?,
                _ => children(vm.pid)?,
            };
            if let [pid] = writers[..]
                && let Ok(writer) = PidFd::open(pid)
            {
                // One that is gone by now was too quick.
                let stopped = writer.send_signal(Signal::STOP).is_ok();
                if stopped && stands_aside(suite, pid)? && is_writing(suite, &tag)? {
                    return Ok(Self { suite, vm, tag, writer, command });
                }
                let _gone_by_now = writer.send_signal(Signal::CONT);
            }
            command.map(Watched::wait).transpose()?;
            suite.forkd(["snapshot", "rm", &tag]).ok()?;
        }
        bail!("mode {mode}: each of {TRIES} was written before it could be stopped")
    }

    fn fork(&self, options: &[&str]) -> Result<Output> {
        self.suite.forkd(["fork", &self.tag, "--json"]).args(options).output()
    }

    fn go_on(&self) -> Result<()> {
        Ok(self.writer.send_signal(Signal::CONT)?)
    }

    fn kill_writer(&self) -> Result<()> {
        self.writer.send_signal(Signal::KILL)?;
        ensure!(self.writer.wait(Some(SOON))?, "the writer does not end");
        Ok(())
    }

    /// A child of it has what its source had.
    fn check_child(&self, said: Output) -> Result<()> {
        let child = Branched::read(self.suite, said)?.children.pop().context("one child")?;
        let expected = self.vm.value("level[-1]")?;
        ensure!(child.value("level[-1]")? == expected, "the child of {} is another", self.tag);
        ensure!(child.value("len(blob)")? == (5 << 18).to_string());
        child.kill()
    }

    fn becomes_ready(&self) -> Result<()> {
        let written = || Ok(!is_writing(self.suite, &self.tag)?);
        eventually(Instant::now() + SOON, "it is written", written)?;
        drop(store(self.suite)?.load(&self.tag, Verification::Always)?);
        Ok(())
    }

    /// Takes all of it away; its VM has not been harmed.
    fn end(self) -> Result<()> {
        self.vm.run("level.append('it goes on')")?;
        let alone = || Ok(children(self.vm.pid)?.is_empty());
        if status(self.suite, &self.tag)?.is_some() {
            self.suite.forkd(["snapshot", "rm", &self.tag]).ok()?;
        }
        eventually(Instant::now() + SOON, "the VM has no child any more", alone)?;
        self.vm.kill()
    }
}

/// The last line of standard error, if the command has failed.
fn reason(said: &Output) -> Result<String> {
    ensure!(!said.status.success(), "it succeeds");
    let errors = said.stderr_text();
    Ok(errors.lines().last().context("it says nothing")?.to_string())
}

fn one_that_is_in_memory_is_forked_at_once(suite: &Suite) -> Result<()> {
    let stopped = Stopped::new(suite, "fork")?;
    let said = stopped.fork(&[])?;
    ensure!(is_writing(suite, &stopped.tag)?, "it was written meanwhile");
    ensure!(said.stderr_text().is_empty(), "{}", said.stderr_text());
    stopped.check_child(said)?;
    // From the disk it cannot be had yet.
    let said = stopped.fork(&["--memory", "file", "--wait-writing", "0"])?;
    ensure!(reason(&said)?.contains("still being written"), "{}", said.stderr_text());
    stopped.go_on()?;
    stopped.becomes_ready()?;
    stopped.check_child(stopped.fork(&["--memory", "file"])?)?;
    stopped.end()
}

fn others_are_waited_for(suite: &Suite) -> Result<()> {
    for mode in ["diff", "live", "full"] {
        let mut stopped = Stopped::new(suite, mode)?;
        let fork = suite.forkd(["fork", &stopped.tag, "--json"]).spawn()?;
        let told = || Ok(fork.stderr_text().contains("waiting, at most 60 s"));
        eventually(Instant::now() + SOON, "it says that it waits", told)?;
        ensure!(!fork.has_ended()?, "{mode}: it does not wait");
        stopped.go_on()?;
        if let Some(command) = stopped.command.take() {
            command.wait()?.success()?;
        }
        stopped.check_child(fork.wait()?).with_context(|| format!("mode {mode}"))?;
        stopped.becomes_ready()?;
        stopped.end()?;
    }
    Ok(())
}

fn the_wait_has_an_end(suite: &Suite) -> Result<()> {
    let stopped = Stopped::new(suite, "diff")?;
    let said = stopped.fork(&["--wait-writing", "0"])?;
    said.status_is(1)?.one_line(&["still being written after 0 s", "--wait-writing"])?;
    let begun = Instant::now();
    let said = stopped.fork(&["--wait-writing", "2"])?;
    ensure!(begun.elapsed() >= Duration::from_secs(2), "it waits {:?}", begun.elapsed());
    ensure!(reason(&said)?.contains("after 2 s"), "{}", said.stderr_text());
    // Writing it fails while it is waited for.
    let fork = suite.forkd(["fork", &stopped.tag]).spawn()?;
    let told = || Ok(fork.stderr_text().contains("waiting"));
    eventually(Instant::now() + SOON, "it says that it waits", told)?;
    stopped.kill_writer()?;
    let said = fork.wait()?;
    ensure!(reason(&said)?.contains("failed: its writer ended"), "{}", said.stderr_text());
    stopped.end()
}

fn what_is_deleted_meanwhile_stays_deleted(suite: &Suite) -> Result<()> {
    for mode in ["fork", "diff", "live", "full"] {
        let mut stopped = Stopped::new(suite, mode)?;
        let tag = stopped.tag.clone();
        suite.forkd(["snapshot", "rm", &tag]).ok()?;
        ensure!(status(suite, &tag)?.is_none(), "mode {mode}: it is still there");
        stopped.go_on()?;
        match stopped.command.take() {
            None => ensure!(stopped.writer.wait(Some(SOON))?, "mode {mode}: the writer goes on"),
            Some(command) => {
                command.wait()?.status_is(1)?.one_line(&[&tag, "deleted"])?;
            }
        }
        ensure!(status(suite, &tag)?.is_none(), "mode {mode}: it is back");
        ensure!(!suite.snapshots_dir().join(&tag).exists(), "mode {mode}: it is in memory");
        stopped.end().with_context(|| format!("mode {mode}"))?;
        store(suite)?.sweep()?;
        let left = names(&suite.store())?;
        ensure!(!left.iter().any(|name| name.contains(&tag)), "mode {mode} leaves {left:?}");
    }
    Ok(())
}

fn a_killed_writer_leaves_it_failed(suite: &Suite) -> Result<()> {
    for mode in WITH_WRITER {
        let stopped = Stopped::new(suite, mode)?;
        stopped.kill_writer()?;
        let failed = || Ok(matches!(status(suite, &stopped.tag)?, Some(Status::Failed(_))));
        eventually(Instant::now() + SOON, "it has failed", failed)?;
        let rows: Vec<serde_json::Value> =
            suite.forkd(["snapshot", "ls", "--json"]).ok()?.json()?;
        let row = rows.iter().find(|row| row["tag"] == *stopped.tag).context("it is listed")?;
        ensure!(row.to_string().contains("failed"), "mode {mode}: {row}");
        if mode != "fork" {
            let said = stopped.fork(&[])?;
            said.status_is(1)?.one_line(&[&stopped.tag, "failed"])?;
        }
        stopped.end()?;
    }
    Ok(())
}

fn with_its_vm_killed_it_is_whole_or_failed(suite: &Suite) -> Result<()> {
    for mode in ["fork", "diff", "full"] {
        for writer_too in [true, false] {
            let stopped = Stopped::new(suite, mode)?;
            let tag = &stopped.tag;
            let owner = match mode {
                "fork" => read_record(&suite.snapshots_dir().join(tag))?.pid,
                _ => stopped.vm.pid,
            };
            if writer_too {
                stopped.writer.send_signal(Signal::KILL)?;
            }
            let owner = PidFd::open(owner)?;
            owner.send_signal(Signal::KILL)?;
            ensure!(owner.wait(Some(SOON))?, "a killed process does not end");
            if !writer_too && mode != "full" {
                stopped.go_on()?;
            }
            ensure!(stopped.writer.wait(Some(SOON))?, "mode {mode}: the writer does not end");
            match status(suite, tag)? {
                Some(Status::Failed(_)) => {}
                // A writer that lives has all that it needs.
                Some(Status::Ready(_)) if !writer_too && mode != "full" => {
                    drop(store(suite)?.load(tag, Verification::Always)?);
                }
                other => bail!("mode {mode}, the writer killed: {writer_too}: {other:?}"),
            }
            suite.forkd(["snapshot", "rm", tag]).ok()?;
            ensure!(status(suite, tag)?.is_none());
            if mode == "fork" {
                stopped.vm.run("level.append('it goes on')")?;
                stopped.vm.kill()?;
            }
        }
    }
    Ok(())
}
