//! Deaths: of a zygote, a source, a child, a guest, by SIGKILL and otherwise.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use forkd_api::types::{Action, ChildResult, ZygoteRequest};
use forkd_sys::fork::PidFd;
use rustix::process::Signal;
use serde_json::Value;

use crate::fixture::{Suite, eventually, names};
use crate::runner::{Test, tests};
use crate::vm::Vm;

pub const TESTS: &[Test] = tests!["lifecycle":
    children_outlive_a_killed_zygote 90,
    branches_outlive_a_killed_source 60,
    a_killed_child_leaves_nothing 60,
    a_panic_of_the_guest_ends_its_vm 60,
    a_reboot_of_the_guest_ends_its_vm 60,
    a_stop_by_the_api_ends_it 60,
    snapshots_are_removed_while_their_children_live 60,
    a_removed_name_can_be_used_again 60,
];

/// Kills a process as nothing can be ignored or cleaned up, and waits until it is gone.
fn kill_9(pid: u32) -> Result<()> {
    let process = PidFd::open(pid)?;
    process.send_signal(Signal::KILL)?;
    ensure!(process.wait(Some(Duration::from_secs(20)))?, "{pid} survives SIGKILL");
    Ok(())
}

/// Makes a snapshot of a running VM, by the API: no further boot is needed.
fn snapshot_of(suite: &Suite, vm: &Vm<'_>, tag: &str) -> Result<u32> {
    let request = ZygoteRequest {
        tag: tag.to_string(),
        dir: suite.snapshots_dir().join(tag),
        rehearse: true,
        max_pause_us: None,
    };
    let result: ChildResult = vm.api()?.post_json("/zygote", &request)?;
    ensure!(result.error.is_none(), "{result:?}");
    result.pid.context("a pid")
}

fn tags(suite: &Suite) -> Result<Vec<String>> {
    // Not records: of a snapshot that failed, there is little more to list than its tag.
    let rows: Vec<Value> = suite.forkd(["snapshot", "ls", "--json"]).ok()?.json()?;
    rows.iter().map(|row| Ok(row["tag"].as_str().context("a tag")?.to_string())).collect()
}

fn children_outlive_a_killed_zygote(suite: &Suite) -> Result<()> {
    let parent = suite.fork_one()?;
    parent.run("z = 'of the zygote'")?;
    let zygote = snapshot_of(suite, &parent, "doomed")?;
    parent.kill()?;
    let children = suite.fork_of("doomed", 3)?;
    ensure!(tags(suite)?.contains(&"doomed".to_string()));
    kill_9(zygote)?;
    for child in &children {
        ensure!(child.value("z")? == "'of the zygote'", "{} is unharmed", child.id);
        ensure!(child.sh("echo on")? == "on");
    }
    ensure!(suite.ls()?.len() == children.len());
    ensure!(!tags(suite)?.contains(&"doomed".to_string()), "it is not listed any more");
    ensure!(!suite.snapshots_dir().join("doomed").exists(), "its directory is swept");
    suite.forkd(["fork", "doomed"]).output()?.one_line(&["doomed", "snapshot"])?;
    // Its orphans can be branched and ended as any other.
    ensure!(children[0].branch_one()?.value("z")? == "'of the zygote'");
    children.iter().try_for_each(Vm::kill)
}

fn branches_outlive_a_killed_source(suite: &Suite) -> Result<()> {
    let source = suite.fork_one()?;
    source.run("s = 11")?;
    let branches = source.branch(2)?.children;
    let deeper = branches[0].branch_one()?;
    kill_9(source.pid)?;
    kill_9(branches[0].pid)?;
    for vm in [&branches[1], &deeper] {
        ensure!(vm.value("s * 2")? == "22", "{} is unharmed", vm.id);
    }
    let mut expected = [branches[1].id.clone(), deeper.id.clone()];
    let mut listed = suite.ls()?;
    expected.sort();
    listed.sort();
    ensure!(listed == expected, "{listed:?}");
    ensure!(!source.dir().exists() && !branches[0].dir().exists(), "their directories are swept");
    Ok(())
}

fn a_killed_child_leaves_nothing(suite: &Suite) -> Result<()> {
    let children = suite.fork(2)?;
    let stream = children[0].exec(&["/bin/sh", "-c", "echo begun; exec sleep 1000"]).spawn()?;
    stream.wait_stdout("sign of life", |out| out.starts_with(b"begun"))?;
    kill_9(children[0].pid)?;
    // Who was talking to it is told.
    stream.wait()?.one_line(&[&children[0].id])?;
    ensure!(suite.ls()? == [children[1].id.clone()]);
    ensure!(names(&suite.vms_dir())? == [children[1].id.clone()]);
    suite.forkd(["eval", &children[0].id, "1"]).output()?.one_line(&[&children[0].id])?;
    ensure!(children[1].value("base")? == "1000", "its sibling is unharmed");
    Ok(())
}

/// The VM's process ends by itself, and with it its directory.
fn has_ended(suite: &Suite, vm: &Vm<'_>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    eventually(deadline, "the VM has ended", || Ok(!vm.dir().exists()))?;
    ensure!(suite.ls()?.is_empty());
    suite.forkd(["eval", &vm.id, "1"]).output()?.one_line(&[&vm.id])?;
    Ok(())
}

fn a_panic_of_the_guest_ends_its_vm(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    let said = vm.guest_output(&["crash-init"])?;
    said.one_line(&[&vm.id])?;
    has_ended(suite, &vm)
}

fn a_reboot_of_the_guest_ends_its_vm(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    // reboot(2), RB_AUTOBOOT: at once, without any service's doing.
    let code = "import ctypes; ctypes.CDLL(None).reboot(0x1234567)";
    let said = suite.forkd(["eval", &vm.id, code]).output()?;
    said.one_line(&[&vm.id])?;
    has_ended(suite, &vm)
}

fn a_stop_by_the_api_ends_it(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    let process = PidFd::open(vm.pid)?;
    vm.api()?.send_json("PUT", "/actions", &Action::Stop)?;
    ensure!(process.wait(Some(Duration::from_secs(20)))?, "it goes on");
    ensure!(!vm.dir().exists() && suite.ls()?.is_empty());
    Ok(())
}

fn snapshots_are_removed_while_their_children_live(suite: &Suite) -> Result<()> {
    let parent = suite.fork_one()?;
    snapshot_of(suite, &parent, "brief")?;
    let child = suite.fork_of("brief", 1)?.pop().context("a child")?;
    suite.forkd(["snapshot", "rm", "brief"]).ok()?;
    ensure!(!suite.snapshots_dir().join("brief").exists());
    ensure!(child.value("base")? == "1000" && parent.value("base")? == "1000");
    suite.forkd(["snapshot", "rm", "brief"]).output()?.one_line(&["brief"])?;
    Ok(())
}

fn a_removed_name_can_be_used_again(suite: &Suite) -> Result<()> {
    suite.warm()?;
    for _ in 0..2 {
        suite.forkd(["fork", "warm", "--name", "again"]).ok()?;
        ensure!(suite.forkd(["eval", "again", "base"]).ok()?.text() == "1000");
        suite.forkd(["kill", "again"]).ok()?;
    }
    Ok(())
}
