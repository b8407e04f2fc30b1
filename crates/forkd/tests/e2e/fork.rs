//! Children of a snapshot: what they find, how many there may be.

use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use crate::fixture::{Suite, eventually, names};
use crate::leftovers::{self, Before};
use crate::runner::{Test, tests};
use crate::vm::Vm;

/// How many are alive at once.
const MANY: usize = 100;
/// Threads that ask them.
const ASKERS: usize = 8;

pub const TESTS: &[Test] = tests!["fork":
    a_child_finds_what_the_parent_made 60,
    time_marks_follow_one_another 60,
    a_hundred_children_answer_at_once 300,
    one_failed_child_does_not_fail_the_rest 60,
    children_are_named_as_asked 60,
];

fn a_child_finds_what_the_parent_made(suite: &Suite) -> Result<()> {
    let child = suite.fork_one()?;
    ensure!(child.value("base + 1")? == "1001");
    ensure!(child.value("int(array.sum())")? == "4999950000");
    ensure!(
        child.value("int(array[::-1] @ array)")? == dot().to_string(),
        "numpy computes in the child"
    );
    ensure!(child.value("level")? == "['warm']");
    ensure!(child.sh("cat /proc/uptime && test -b /dev/vda && echo disk")?.ends_with("disk"));
    Ok(())
}

/// Sum of i * (n - 1 - i) for i below 100,000.
fn dot() -> i64 {
    (0..100_000i64).map(|i| i * (99_999 - i)).sum()
}

fn time_marks_follow_one_another(suite: &Suite) -> Result<()> {
    let boot = &suite.warm()?["boot"];
    let mark = |name: &str| boot[name].as_u64().with_context(|| format!("no {name} in {boot}"));
    let boot_marks = [
        "requested_ns",
        "vm_created_ns",
        "restored_ns",
        "running_ns",
        "agent_hello_ns",
        "ready_ns",
    ];
    for pair in boot_marks.windows(2) {
        let (before, after) = (mark(pair[0])?, mark(pair[1])?);
        ensure!(0 < before && before <= after, "{} {before}, {} {after}", pair[0], pair[1]);
    }
    let child = suite.fork_one()?;
    let t = child.timing;
    let marks = [
        t.requested_ns,
        t.fork_begin_ns,
        t.fork_end_ns,
        t.vm_created_ns,
        t.restored_ns,
        t.running_ns,
        t.ready_ns,
    ];
    ensure!(marks[0] > 0 && marks.is_sorted(), "{t:?}");
    Ok(())
}

fn a_hundred_children_answer_at_once(suite: &Suite) -> Result<()> {
    let first = suite.fork_one()?;
    first.kill()?;
    let processes = leftovers::processes_of(&suite.home())?;
    let before = Before::look()?;

    let begun = Instant::now();
    let children = suite.fork(MANY)?;
    let forked = begun.elapsed();
    ask_all(&children)?;
    let answered = begun.elapsed();
    ensure!(suite.ls()?.len() == MANY, "all are alive at once");
    println!(
        "    {MANY} children ready after {:.2} s, all answered after {:.2} s",
        forked.as_secs_f64(),
        answered.as_secs_f64()
    );
    suite.kill_all()?;
    ensure!(suite.ls()?.is_empty(), "all are gone");
    ensure!(names(&suite.vms_dir())?.is_empty());
    let deadline = Instant::now() + Duration::from_secs(20);
    eventually(deadline, "the process table is back", || {
        Ok(leftovers::processes_of(&suite.home())? == processes && zombies_of(&processes)? == 0)
    })?;
    before.check()
}

/// Every child tells a number of its own.
fn ask_all(children: &[Vm<'_>]) -> Result<()> {
    let next = Mutex::new(0..children.len());
    thread::scope(|scope| {
        let ask = || -> Result<()> {
            loop {
                let index = next.lock().map_err(|_| anyhow!("another asker panicked"))?.next();
                let Some(index) = index else { return Ok(()) };
                let child = &children[index];
                let value = child.value(&format!("base + int(array[{index}]) * 3"))?;
                ensure!(value == (1000 + index * 3).to_string(), "{}: {value}", child.id);
            }
        };
        let askers: Vec<_> = (0..ASKERS).map(|_| scope.spawn(ask)).collect();
        askers.into_iter().try_for_each(|a| a.join().map_err(|_| anyhow!("an asker panicked"))?)
    })
}

/// How many zombies these processes have as children.
fn zombies_of(parents: &[u32]) -> Result<usize> {
    let mut count = 0;
    for name in names(std::path::Path::new("/proc"))? {
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{name}/stat")) else { continue };
        let Some((_, rest)) = stat.rsplit_once(") ") else { continue };
        let mut fields = rest.split(' ');
        let (state, parent) = (fields.next(), fields.next().and_then(|p| p.parse::<u32>().ok()));
        if state == Some("Z") && parent.is_some_and(|p| parents.contains(&p)) {
            count += 1;
        }
    }
    Ok(count)
}

/// By the API: one child's directory is taken already.
fn one_failed_child_does_not_fail_the_rest(suite: &Suite) -> Result<()> {
    use forkd_api::client::Client;
    use forkd_api::types::{ChildSpec, ForkRequest, ForkResponse};

    suite.warm()?;
    let spec = |id: &str| ChildSpec {
        id: id.to_string(),
        name: id.to_string(),
        dir: suite.vms_dir().join(id),
    };
    let taken = spec("vm-taken00000");
    std::fs::create_dir_all(&taken.dir)?;
    std::fs::write(taken.dir.join("mine"), "not forkd's")?;
    let request = ForkRequest {
        children: vec![spec("vm-first00000"), taken.clone(), spec("vm-third00000")],
        max_pause_us: None,
    };
    let socket = suite.snapshots_dir().join(crate::fixture::WARM).join("api.sock");
    let answer: ForkResponse = Client::connect(&socket)?.post_json("/fork", &request)?;
    ensure!(answer.children.len() == 3, "one result each");
    let errors: Vec<_> = answer.children.iter().map(|c| c.error.as_deref()).collect();
    ensure!(errors[0].is_none() && errors[2].is_none(), "{errors:?}");
    let error = errors[1].context("the second fails")?;
    ensure!(error.contains("vm-taken00000") && error.contains("exists"), "{error}");
    ensure!(taken.dir.join("mine").exists(), "what was there is there still");
    std::fs::remove_dir_all(&taken.dir)?;
    for id in ["vm-first00000", "vm-third00000"] {
        let said = suite.forkd(["eval", id, "base"]).ok()?.text();
        ensure!(said == "1000", "{id}: {said}");
    }
    Ok(())
}

fn children_are_named_as_asked(suite: &Suite) -> Result<()> {
    suite.warm()?;
    suite.forkd(["fork", "warm", "-n", "2", "--name", "web"]).ok()?;
    for name in ["web-1", "web-2"] {
        ensure!(suite.forkd(["exec", name, "--", "hostname"]).ok()?.text() == name);
    }
    let again = suite.forkd(["fork", "warm", "-n", "2", "--name", "web"]).output()?;
    again.one_line(&["web-1", "--name"])?;
    ensure!(suite.ls()?.len() == 2, "the refused ones are not there");
    Ok(())
}
