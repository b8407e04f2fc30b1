//! Every system call that a VM's event loop makes from the request of a branch until the VM runs again, failed once each
//! ([`strace`](crate::strace)): whatever fails in a pause, the VM goes on, and nothing is left behind.
//!
//! Each list of calls is recorded from a branch that succeeds. As there are some hundreds, a spread sample of them is
//! failed, unless FORKD_E2E_ALL_FAILURES is set. Left out are [`SPARED`].

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use forkd_api::types::VmInfo;
use forkd_snapshot::{Status, Store, Verification};
use forkd_sys::fork::PidFd;
use forkd_sys::lock::is_held;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, prlimit};
use serde_json::json;

use crate::command::Output;
use crate::fixture::{Suite, WARM, eventually, names};
use crate::leftovers::children;
use crate::runner::{Test, tests};
use crate::strace::{Call, Traced, call_of, delaying, failing, of_first_request};
use crate::vm::Vm;

pub const TESTS: &[Test] = tests!["forced_failures":
    a_writer_killed_before_it_has_begun 60,
    a_tag_that_is_taken_meanwhile 60,
    on_a_full_disk_the_vm_goes_on 120,
    without_descriptors_the_vm_goes_on 120,
    of_each_call_of_mode_live 120,
    of_each_call_of_mode_diff 120,
    of_each_call_of_mode_fork 120,
    of_each_call_of_a_branch 120,
    of_each_call_of_a_branch_of_a_paused_vm 120,
    of_each_call_of_mode_full 120,
];

/// Waits, which the kernel does not refuse, and for which the C library ends the process; what gives back: a failed
/// close(2) has closed (one that was not carried out would be a leak of the test's own); what cannot fail.
const SPARED: [&str; 7] =
    ["epoll_pwait", "epoll_wait", "futex", "close", "munmap", "getpid", "sched_getaffinity"];
/// What is registered can be taken out of an epoll set, and the counter of an eventfd takes one more: neither call has
/// a reason to fail, and a thread that is not woken by it would sleep on.
fn is_spared(call: &Call) -> bool {
    let name = call.name.as_str();
    SPARED.contains(&name)
        || matches!(
            (name, call.on.as_str()),
            ("epoll_ctl", "EPOLL_CTL_DEL") | ("write", "anon_inode")
        )
}

/// Calls of the allocator: whether and when it makes them depends on what went before.
const ALLOCATOR: [&str; 5] = ["brk", "mmap", "mremap", "madvise", "mprotect"];
/// More of the same call, and the next branch may make more or fewer of it.
const FEW: usize = 3;
/// How many calls of each mode are failed, unless all are.
const SAMPLE: usize = 8;
/// Where the sample begins.
const SEED: usize = 5;
/// A call of each pause.
const SAVED: &str = "KVM_GET_CLOCK";
/// How often a call is tried to be met.
const TRIES: usize = 4;
/// How many looks in a row find the event loop where it was.
const QUIET: usize = 4;
/// How long a writer has to end, and the VM to reap it.
const SETTLED: Duration = Duration::from_secs(20);
/// For one call.
const LIMIT: Duration = Duration::from_secs(120);

/// A plausible reason for a call to fail.
fn errno(call: &Call) -> &'static str {
    match call.name.as_str() {
        "clone" | "clone3" | "fork" | "vfork" | "tgkill" => "EAGAIN",
        "openat" | "pipe2" | "pidfd_open" | "fcntl" | "userfaultfd" | "memfd_create" => "EMFILE",
        "mmap" | "brk" | "mremap" | "madvise" | "mprotect" => "ENOMEM",
        "pwrite64" | "write" | "ftruncate" | "fallocate" | "mkdir" | "renameat2" => "ENOSPC",
        "epoll_ctl" => "ENOSPC",
        "ioctl" => "ENOMEM",
        "sendto" => "EPIPE",
        "flock" => "ENOLCK",
        "getrandom" => "ENOSYS",
        "statx" | "newfstatat" | "fstat" => "EACCES",
        _ => "EIO",
    }
}

/// A way to branch.
#[derive(Clone, Copy)]
struct Way {
    name: &'static str,
    /// RAM of its source.
    memory: &'static str,
    options: &'static [&'static str],
    /// It makes a snapshot, not VMs.
    keeps: bool,
    /// Of a VM that is paused.
    paused: bool,
}

const CHILDREN: Way = Way {
    name: "branch",
    memory: "file",
    options: &["-n", "2", "--no-wait", "--json"],
    keeps: false,
    paused: false,
};
const PAUSED: Way = Way { name: "branch of a paused VM", paused: true, ..CHILDREN };
const FORK: Way = Way { name: "mode fork", options: &["--mode", "fork"], keeps: true, ..CHILDREN };
const DIFF: Way = Way { name: "mode diff", options: &["--mode", "diff"], ..FORK };
const FULL: Way = Way { name: "mode full", options: &["--mode", "full"], ..FORK };
const LIVE: Way =
    Way { name: "mode live", memory: "memfd-shared", options: &["--mode", "live"], ..FORK };

/// A VM that is branched again and again, and was never harmed.
struct Subject<'s> {
    suite: &'s Suite,
    way: Way,
    vm: Vm<'s>,
    /// Descriptors it has when nothing is under way.
    fds: Vec<String>,
    /// Where its ring was.
    head: u64,
    rounds: usize,
}

impl<'s> Subject<'s> {
    fn new(suite: &'s Suite, way: Way) -> Result<Self> {
        suite.warm()?;
        suite.save(WARM)?;
        let vm = suite.load(WARM, way.memory)?;
        // Its disk is a file in memory: a device would keep the event loop busy, and it is to make the same calls
        // each time.
        vm.sh("dd if=/dev/zero of=/tmp/disk bs=1M count=1 2>/dev/null")?;
        vm.guest(&["ring", "serve", "/tmp/ring", "/tmp/disk"])?;
        let mut subject = Self { suite, way, vm, fds: Vec::new(), head: 0, rounds: 0 };
        let tag = subject.next_tag();
        let said = subject.branch(&tag)?;
        ensure!(said.status.success(), "{}: {}", way.name, said.stderr_text());
        subject.clear(&said, &tag)?;
        eventually(Instant::now() + SETTLED, "no child is left", || subject.is_alone())?;
        subject.fds = subject.open_fds()?;
        Ok(subject)
    }

    fn next_tag(&mut self) -> String {
        self.rounds += 1;
        format!("ff-{}", self.rounds)
    }

    fn store(&self) -> Result<Store> {
        Ok(Store::open(&self.suite.store())?)
    }

    fn set_paused(&self, paused: bool) -> Result<()> {
        let state = if paused { "Paused" } else { "Resumed" };
        self.vm.api()?.send_json("PATCH", "/vm", &json!({ "state": state }))?;
        Ok(())
    }

    /// Waits until the event loop has nothing to do any more: the rest of an earlier conversation with the guest.
    fn await_quiet(&self) -> Result<()> {
        let (pid, turns) = (self.vm.pid, std::cell::RefCell::new(Vec::<String>::new()));
        eventually(self.suite.deadline(), "its event loop is quiet", || {
            let status = fs::read_to_string(format!("/proc/{pid}/task/{pid}/status"))?;
            let switches = status.lines().filter(|line| line.contains("ctxt_switches"));
            let mut turns = turns.borrow_mut();
            turns.push(switches.collect());
            // It is looked at every 20 ms.
            Ok(turns.iter().rev().take_while(|turn| Some(*turn) == turns.last()).count() > QUIET)
        })
    }

    fn branch(&self, tag: &str) -> Result<Output> {
        let run = self.suite.forkd(["branch", &self.vm.id]).args(self.way.options);
        if self.way.keeps { run.args(["--snapshot", tag]) } else { run }.output()
    }

    /// Branches it under strace, paused if that is the way; what it said, and what strace saw.
    fn traced(&self, options: &[String], tag: &str) -> Result<(Output, Vec<String>)> {
        if self.way.paused {
            self.set_paused(true)?;
        }
        self.await_quiet()?;
        let traced = Traced::attach(self.suite, self.vm.pid, options)?;
        let said = self.branch(tag);
        let lines = traced.detach()?;
        if self.way.paused {
            self.set_paused(false)?;
        }
        Ok((said?, lines))
    }

    /// Removes what a branch has left that went as it should.
    fn clear(&self, said: &Output, tag: &str) -> Result<()> {
        if !self.way.keeps {
            let said: serde_json::Value = match said.stdout.is_empty() {
                true => return Ok(()),
                false => said.json()?,
            };
            for child in said["children"].as_array().context("children")? {
                if child.get("error").is_none() {
                    self.suite.forkd(["kill", child["id"].as_str().context("an id")?]).ok()?;
                }
            }
            return Ok(());
        }
        let in_store = self.store()?.list()?.iter().any(|entry| entry.tag == tag);
        if in_store || self.suite.snapshots_dir().join(tag).exists() {
            self.suite.forkd(["snapshot", "rm", tag]).ok()?;
        }
        Ok(())
    }

    fn is_alone(&self) -> Result<bool> {
        Ok(children(self.vm.pid)?.is_empty())
    }

    fn open_fds(&self) -> Result<Vec<String>> {
        let dir = PathBuf::from(format!("/proc/{}/fd", self.vm.pid));
        let mut open = Vec::new();
        for name in names(&dir)? {
            // Numbers of sockets and pipes are new each time.
            let target = fs::read_link(dir.join(&name)).unwrap_or_default();
            let target = target.to_string_lossy().into_owned();
            open.push(target.split(":[").next().unwrap_or_default().to_string());
        }
        open.sort();
        Ok(open)
    }

    /// All is as it was before the branch, whatever has become of that.
    fn check(&mut self, said: &Output, tag: &str) -> Result<()> {
        let store = self.store()?;
        let status = || -> Result<Option<Status>> {
            Ok(store.list()?.into_iter().find(|entry| entry.tag == tag).map(|entry| entry.status))
        };
        let settled = || Ok(!matches!(status()?, Some(Status::Writing { .. })));
        eventually(Instant::now() + SETTLED, "the snapshot is not writing any more", settled)?;
        let succeeded = said.status.success();
        match (self.way.keeps, status()?) {
            (false, None) => {}
            (true, Some(Status::Ready(_))) => drop(store.load(tag, Verification::Always)?),
            (true, Some(Status::Failed(why))) if !succeeded => {
                ensure!(!why.is_empty(), "no reason")
            }
            (true, None) if !succeeded => {}
            (_, status) => bail!("the snapshot is {status:?}, and the command: {}", said.status),
        }
        let errors = said.stderr_text();
        ensure!(succeeded || errors.starts_with("forkd: "), "it fails, and says {errors:?}");
        ensure!(!self.way.keeps || errors.lines().count() <= 1, "not one line: {errors}");
        self.clear(said, tag)?;
        let info: VmInfo = self.vm.api()?.get_json("/vm")?;
        ensure!(
            format!("{:?}", info.phase) == "Ready",
            "the VM is {:?}: {:?}",
            info.phase,
            info.error
        );
        let until = Instant::now() + SETTLED;
        // It may not have had a turn since it was asked the last time: that is a fraction of a second, as turns are.
        let (before, head) = (self.head, std::cell::Cell::new(0));
        eventually(until, "the ring's writer goes on", || {
            head.set(self.vm.guest(&["ring", "head", "/tmp/ring"])?.parse()?);
            Ok(head.get() > before)
        })?;
        self.head = head.get();
        eventually(until, "the VM has no child, not even a dead one", || self.is_alone())?;
        eventually(until, "RAM is not write-protected", || {
            let smaps = fs::read_to_string(format!("/proc/{}/smaps", self.vm.pid))?;
            Ok(!smaps.lines().any(|line| line.starts_with("VmFlags:") && line.contains(" uw")))
        })?;
        eventually(until, "the descriptors are those it had", || Ok(self.open_fds()? == self.fds))
            .with_context(|| format!("{:?}, not {:?}", self.open_fds(), self.fds))?;
        for hidden in names(store.dir())?.iter().filter(|name| name.starts_with(".staging-")) {
            let lock = store.dir().join(hidden).join("lock");
            ensure!(!is_held(&lock)?, "{hidden} is still held");
        }
        store.sweep()?;
        let left = names(store.dir())?;
        let is_of_it = |name: &&String| {
            let hidden = name.strip_prefix('.').and_then(|name| name.split_once('-'));
            let hidden = hidden.and_then(|(_, rest)| rest.rsplit_once('-'));
            *name == tag || hidden.is_some_and(|(of, _)| of == tag)
        };
        let left: Vec<&String> = left.iter().filter(is_of_it).collect();
        ensure!(left.is_empty(), "left in the store: {left:?}");
        Ok(())
    }

    /// The calls of a branch that succeeds.
    fn record(&mut self) -> Result<Vec<Call>> {
        let tag = self.next_tag();
        let (said, lines) = self.traced(&[], &tag)?;
        ensure!(said.status.success(), "{}: {}", self.way.name, said.stderr_text());
        self.check(&said, &tag)?;
        let mut calls = of_first_request(&lines, &tag, SAVED);
        ensure!(calls.iter().any(|call| call.on == SAVED), "no state was saved: {calls:?}");
        calls.retain(|call| !is_spared(call));
        Ok(calls)
    }

    /// Fails one call of those that were recorded. False if it was not met again.
    fn fail(&mut self, call: &Call, calls: &[Call]) -> Result<bool> {
        let rank = alike(calls, call).position(|other| other == call).context("a recorded call")?;
        let mut call = call.clone();
        for attempt in 0..TRIES {
            self.suite.set_deadline(LIMIT);
            if attempt > 0 {
                // Strace counts by name only, and what the VM keeps of earlier snapshots has its own calls.
                let calls = self.record()?;
                let again = alike(&calls, &call).nth(rank).cloned();
                let Some(again) = again else { continue };
                call = again;
            }
            let tag = self.next_tag();
            let (said, lines) = self.traced(&failing(&call, errno(&call)), &tag)?;
            let met = lines.iter().find(|line| line.contains("(INJECTED)"));
            let outcome = self.check(&said, &tag);
            outcome.with_context(|| format!("{met:?}; the command: {}", said.stderr_text()))?;
            if met.and_then(|line| call_of(line, &tag)).is_some_and(|met| met.on == call.on) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Those of the same name that work on the same.
fn alike<'c>(calls: &'c [Call], call: &Call) -> impl Iterator<Item = &'c Call> {
    calls.iter().filter(|other| other.name == call.name && other.on == call.on)
}

/// Which calls to fail, and whether each is certain to be made again. All of them, or a sample that is spread over them:
/// of more than [`FEW`] that are the same, of which there may be fewer next time, the first, the last and one between.
fn chosen(calls: &[Call]) -> Vec<(Call, bool)> {
    let all = std::env::var_os("FORKD_E2E_ALL_FAILURES").is_some();
    let mut same = BTreeMap::<(&str, &str), Vec<&Call>>::new();
    for call in calls {
        same.entry((&call.name, &call.on)).or_default().push(call);
    }
    let mut candidates = Vec::new();
    // They are counted by name: of those of which there are many, none is certain to be the same next time.
    let steady = |name: &str| same.iter().all(|((n, _), list)| *n != name || list.len() <= FEW);
    for ((name, _), list) in &same {
        let certain = steady(name) && !ALLOCATOR.contains(name);
        match list.len() {
            n if n > FEW && !all => {
                candidates.extend([list[0], list[n / 2], list[n - 1]].map(|c| (c, certain)))
            }
            _ => candidates.extend(list.iter().map(|call| (*call, certain))),
        }
    }
    let step = if all { 1 } else { candidates.len().div_ceil(SAMPLE).max(1) };
    let sample = candidates.into_iter().skip(SEED % step).step_by(step);
    sample.map(|(call, certain)| (call.clone(), certain)).collect()
}

fn sweep(suite: &Suite, way: Way) -> Result<()> {
    let mut subject = Subject::new(suite, way)?;
    let calls = subject.record()?;
    let points = chosen(&calls);
    let (mut missed, mut wrong) = (0, Vec::new());
    for (call, certain) in &points {
        match subject.fail(call, &calls) {
            Ok(true) => {}
            Ok(false) if *certain => wrong.push(format!("{call:?} was not met again")),
            Ok(false) => missed += 1,
            Err(error) => {
                wrong.push(format!("{} {}: {error:#}", errno(call), call.name));
                // The others are failed all the same: of a VM that is whole.
                suite.set_deadline(LIMIT);
                drop(subject.vm.kill());
                subject = Subject::new(suite, way)?;
            }
        }
    }
    ensure!(
        wrong.is_empty(),
        "{} of {} failures do harm:\n{}",
        wrong.len(),
        points.len(),
        wrong.join("\n")
    );
    let (failed, calls) = (points.len() - missed, calls.len());
    println!("    {}: {failed} of {calls} system calls failed, {missed} not met again", way.name);
    subject.vm.kill()
}

fn of_each_call_of_a_branch(suite: &Suite) -> Result<()> {
    sweep(suite, CHILDREN)
}

/// Its state is read by the event loop, not by the vCPU's thread.
fn of_each_call_of_a_branch_of_a_paused_vm(suite: &Suite) -> Result<()> {
    sweep(suite, PAUSED)
}

fn of_each_call_of_mode_fork(suite: &Suite) -> Result<()> {
    sweep(suite, FORK)
}

fn of_each_call_of_mode_diff(suite: &Suite) -> Result<()> {
    sweep(suite, DIFF)
}

fn of_each_call_of_mode_live(suite: &Suite) -> Result<()> {
    sweep(suite, LIVE)
}

fn of_each_call_of_mode_full(suite: &Suite) -> Result<()> {
    sweep(suite, FULL)
}

/// The limit of descriptors with which a process can have so many more than it has.
fn limit_for(pid: u32, more: usize) -> Result<u64> {
    let open = names(&PathBuf::from(format!("/proc/{pid}/fd")))?;
    let free = (0..).filter(|fd: &u64| !open.contains(&fd.to_string()));
    free.take(more).last().map(|fd| fd + 1).context("a limit")
}

/// The limit is one descriptor higher each time, so that each one that is wanted is once the one that is not to be had.
fn without_descriptors_the_vm_goes_on(suite: &Suite) -> Result<()> {
    for way in [CHILDREN, FORK, DIFF, LIVE, FULL] {
        let mut subject = Subject::new(suite, way)?;
        let pid = Pid::from_raw(i32::try_from(subject.vm.pid)?);
        let usual = getrlimit(Resource::Nofile);
        let mut refused = 0;
        // The first place is for the connection over which it is asked.
        for more in 1.. {
            suite.set_deadline(LIMIT);
            let current = Some(limit_for(subject.vm.pid, more)?);
            let limit = Rlimit { current, maximum: usual.maximum };
            let before = prlimit(pid, Resource::Nofile, limit)?;
            let tag = subject.next_tag();
            let said = subject.branch(&tag);
            prlimit(pid, Resource::Nofile, before)?;
            let said = said?;
            subject
                .check(&said, &tag)
                .with_context(|| format!("{}: {more} descriptors", way.name))?;
            if said.status.success() {
                break;
            }
            refused += 1;
            ensure!(refused < 40, "{}: {}", way.name, said.stderr_text());
        }
        ensure!(refused > 0, "{}: it needs no descriptor", way.name);
        println!("    {}: refused with 1 to {refused} descriptors", way.name);
        subject.vm.kill()?;
    }
    Ok(())
}

/// Bytes that it has for more than the warm snapshot.
const ROOM: u64 = 3 << 20;

/// A small disk in the place of the store, with the warm snapshot on it.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn new(suite: &Suite) -> Result<Self> {
        let (store, aside) = (suite.store(), suite.scratch("small")?);
        let used = forkd_snapshot::disk_bytes(&store.join(WARM))?;
        let size = CString::new(format!("size={}", used + ROOM))?;
        mount("none", &aside, "tmpfs", MountFlags::empty(), Some(size.as_c_str()))
            .context("cannot mount")?;
        let disk = Self(store.clone());
        let copied = suite.program("/bin/cp").arg("-a").args([&store.join(WARM), &aside]).ok();
        let placed = copied.and_then(|_| Ok(mount_bind(&aside, &store)?));
        unmount(&aside, UnmountFlags::DETACH)?;
        placed?;
        Ok(disk)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // What is still mounted is found at the end of all tests.
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

fn on_a_full_disk_the_vm_goes_on(suite: &Suite) -> Result<()> {
    for way in [FORK, DIFF, LIVE, FULL] {
        let mut subject = Subject::new(suite, way)?;
        // More than there is room for, also for a diff.
        subject.vm.run("blob = b'forkd' * (2 << 20)")?;
        let disk = SmallDisk::new(suite)?;
        let tag = subject.next_tag();
        let said = subject.branch(&tag)?;
        ensure!(!said.status.success(), "{}: it fits", way.name);
        ensure!(
            said.stderr_text().contains("no space left"),
            "{}: {}",
            way.name,
            said.stderr_text()
        );
        subject.check(&said, &tag).with_context(|| way.name)?;
        drop(disk);
        let tag = subject.next_tag();
        let said = subject.branch(&tag)?;
        ensure!(said.status.success(), "{}: then: {}", way.name, said.stderr_text());
        subject.check(&said, &tag).with_context(|| way.name)?;
        subject.vm.kill()?;
    }
    Ok(())
}

/// Branches while one call of it is held up, and does something meanwhile.
fn meanwhile(
    subject: &mut Subject<'_>,
    call: &Call,
    tag: &str,
    act: impl Fn(&Subject<'_>) -> Result<()>,
) -> Result<Output> {
    let options = delaying(call, 1_500_000);
    let traced = Traced::attach(subject.suite, subject.vm.pid, &options)?;
    let run = subject.suite.forkd(["branch", &subject.vm.id]).args(subject.way.options);
    let watched = run.args(["--snapshot", tag]).spawn()?;
    let acted = act(subject);
    let said = watched.wait();
    traced.detach()?;
    acted?;
    said
}

/// RAM is protected then, and nobody serves it any more.
fn a_writer_killed_before_it_has_begun(suite: &Suite) -> Result<()> {
    let mut subject = Subject::new(suite, LIVE)?;
    let calls = subject.record()?;
    let forked = calls.iter().rposition(|call| call.name == "clone").context("a fork")?;
    let told = calls[forked..].iter().find(|call| (&*call.name, &*call.on) == ("write", "pipe"));
    let told = told.with_context(|| format!("the writer is told to begin: {calls:?}"))?;
    let tag = subject.next_tag();
    let said = meanwhile(&mut subject, told, &tag, |subject| {
        let until = Instant::now() + SETTLED;
        eventually(until, "there is a writer", || Ok(!subject.is_alone()?))?;
        for writer in children(subject.vm.pid)? {
            PidFd::open(writer)?.send_signal(Signal::KILL)?;
        }
        Ok(())
    })?;
    ensure!(!said.status.success(), "it succeeds without a writer");
    subject.check(&said, &tag)?;
    subject.vm.kill()
}

fn a_tag_that_is_taken_meanwhile(suite: &Suite) -> Result<()> {
    let mut subject = Subject::new(suite, FULL)?;
    let calls = subject.record()?;
    let publish = calls.iter().find(|call| call.name == "renameat2").context("it is published")?;
    let tag = subject.next_tag();
    let taken = suite.store().join(&tag);
    let said = meanwhile(&mut subject, publish, &tag, |subject| {
        let written = || {
            let dir = taken.parent().context("a store")?;
            let names = names(dir)?;
            let staging = names.iter().find(|name| name.starts_with(&format!(".staging-{tag}-")));
            let Some(staging) = staging else { return Ok(false) };
            Ok(dir.join(staging).join("snapshot/manifest.json").exists())
        };
        eventually(Instant::now() + SETTLED, "it is about to be published", written)?;
        ensure!(subject.is_alone()?, "mode full has no writer");
        Ok(fs::create_dir(&taken)?)
    })?;
    ensure!(!said.status.success(), "two have one name");
    fs::remove_dir(&taken)?;
    subject.check(&said, &tag)?;
    subject.vm.kill()
}
