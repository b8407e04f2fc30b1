//! A child is someone else than its parent and its siblings, and knows what time it is; until it does, nobody is served.

use std::collections::HashSet;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::fixture::{Suite, eventually};
use crate::runner::{Test, tests};
use crate::vm::Vm;

pub const TESTS: &[Test] = tests!["identity":
    siblings_differ_in_all_that_must_be_unique 90,
    branches_differ_from_their_source 60,
    the_wall_clock_is_right_in_every_child 60,
    clocks_never_go_back 90,
    a_guest_that_does_not_acknowledge_is_not_served 150,
];

/// How far a guest's wall clock may be off, in seconds.
const WALL_CLOCK: f64 = 1.0;

/// What must differ between any two VMs. The interpreter's two generators were seeded with a constant by the warm-up.
const WHO: &str = "dict(crng=os.getrandom(16).hex(), random=random.getrandbits(64), \
                   numpy=np.random.bytes(8).hex(), uuid=str(uuid.uuid4()), \
                   machine=open('/etc/machine-id').read().strip(), host=socket.gethostname(), \
                   kernel=open('/proc/sys/kernel/random/uuid').read().strip())";

fn all_differ(who: &[Value]) -> Result<()> {
    let keys = who.first().and_then(Value::as_object).context("an object")?.keys();
    for key in keys {
        let values: HashSet<String> = who.iter().map(|w| w[key].to_string()).collect();
        ensure!(values.len() == who.len(), "{key} is the same in two VMs: {values:?}");
    }
    Ok(())
}

fn siblings_differ_in_all_that_must_be_unique(suite: &Suite) -> Result<()> {
    let children = suite.fork(10)?;
    let who = children.iter().map(|c| c.json(WHO)).collect::<Result<Vec<_>>>()?;
    all_differ(&who)?;
    for (child, who) in children.iter().zip(&who) {
        ensure!(who["host"] == child.name.as_str(), "{} is called {}", child.name, who["host"]);
        let machine = who["machine"].as_str().unwrap_or_default();
        ensure!(machine.len() == 32 && machine.bytes().all(|b| b.is_ascii_hexdigit()), "{machine}");
    }
    // New processes of the guest draw from the kernel's generator as well.
    let drawn = "od -An -N16 -tx1 /dev/urandom";
    let drawn = children.iter().map(|c| c.sh(drawn)).collect::<Result<HashSet<_>>>()?;
    ensure!(drawn.len() == children.len(), "{drawn:?}");
    Ok(())
}

fn branches_differ_from_their_source(suite: &Suite) -> Result<()> {
    let source = suite.fork_one()?;
    source.run("random.seed(1); np.random.seed(1)")?;
    let branches = source.branch(3)?.children;
    let vms: Vec<&Vm<'_>> = branches.iter().chain([&source]).collect();
    let who = vms.iter().map(|c| c.json(WHO)).collect::<Result<Vec<_>>>()?;
    all_differ(&who)
}

fn wall_clock_s() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64())
}

fn the_wall_clock_is_right_in_every_child(suite: &Suite) -> Result<()> {
    let check = |vm: &Vm<'_>| -> Result<()> {
        let before = wall_clock_s()?;
        let guest: f64 = vm.value("time.time()")?.parse()?;
        let after = wall_clock_s()?;
        ensure!(
            (before - WALL_CLOCK..=after + WALL_CLOCK).contains(&guest),
            "{}: {guest} where the host has {before} to {after}",
            vm.id
        );
        Ok(())
    };
    let children = suite.fork(2)?;
    children.iter().try_for_each(check)?;
    check(&children[0].branch_one()?)?;
    check(&children[0])
}

fn clocks_never_go_back(suite: &Suite) -> Result<()> {
    let source = suite.fork_one()?;
    // Since the warm-up: not before what it saw.
    ensure!(source.value("time.monotonic() >= before[0] and time.time() >= before[1]")? == "True");
    source.guest(&["clock", "watch", "/tmp/clock"])?;
    let read = |vm: &Vm<'_>| -> Result<Vec<u64>> {
        let text = vm.guest(&["clock", "check", "/tmp/clock"])?;
        Ok(text.split(' ').map(str::parse).collect::<Result<_, _>>()?)
    };
    let mut last = read(&source)?;
    for _ in 0..5 {
        let branch = source.branch_one()?;
        let (in_branch, in_source) = (read(&branch)?, read(&source)?);
        for now in [&in_branch, &in_source] {
            ensure!(now[2] > last[2] && now[3] > last[3], "{now:?} after {last:?}");
        }
        // A branch does not stand still for longer than the test has waited.
        ensure!(in_branch[1] < 20_000_000_000, "a gap of {} ns", in_branch[1]);
        last = in_source;
        branch.kill()?;
    }
    Ok(())
}

/// PID 1 of the source is frozen, so that of a branch is as well: it never acknowledges who it is.
fn a_guest_that_does_not_acknowledge_is_not_served(suite: &Suite) -> Result<()> {
    let source = suite.fork_one()?;
    source.guest(&["freeze-init"])?;
    let console = source.dir().join("console.log");
    eventually(Instant::now() + Duration::from_secs(30), "PID 1 is frozen", || {
        let text = std::fs::read(&console)?;
        Ok(String::from_utf8_lossy(&text).contains("PID 1 IS FROZEN"))
    })?;

    let refused = suite.forkd(["branch", &source.id, "--timeout", "3", "--json"]).output()?;
    ensure!(refused.status.code() == Some(1), "{:?}", refused.status);
    let said: Value = refused.json()?;
    let error = said["children"][0]["error"].as_str().context("the child's error")?.to_string();
    ensure!(error.contains("agent"), "{error}");
    ensure!(suite.ls()? == [source.id.clone()], "the refused branch is gone");

    // One that nobody waits for: its ports are closed to the host, first held, then refused.
    let begun = Instant::now();
    let said: Value = suite.forkd(["branch", &source.id, "--no-wait", "--json"]).ok()?.json()?;
    let id = said["children"][0]["id"].as_str().context("the child's id")?.to_string();
    let line = suite.forkd(["exec", &id, "--", "/bin/true"]).output()?.one_line(&["agent"])?;
    println!("    refused after {:.0} s: {line}", begun.elapsed().as_secs_f64());
    let info: Value = suite.forkd(["info", &id, "--json"]).ok()?.json()?;
    ensure!(info["phase"] == "failed", "{}", info["phase"]);
    suite.forkd(["eval", &id, "1"]).output()?.one_line(&["agent"])?;
    Ok(())
}
