//! Guests with two vCPUs.

use anyhow::{Context, Result, ensure};

use crate::fixture::Suite;
use crate::runner::{Test, tests};
use crate::vm::Vm;

pub const TESTS: &[Test] = tests!["smp":
    both_cpus_go_on_in_the_child_and_the_source 120,
    a_hundred_and_twenty_eight_is_no_number_of_cpus 10,
];

/// Each process stays on its CPU, and counts on.
fn both_count(vm: &Vm<'_>) -> Result<()> {
    for cpu in ["0", "1"] {
        let said = vm.guest(&["count", "advance", &format!("/tmp/count{cpu}")])?;
        ensure!(said.ends_with(&format!(" {cpu}")), "{}: CPU {cpu} counts as {said}", vm.id);
    }
    let online = vm.sh("cat /sys/devices/system/cpu/online; nproc")?;
    ensure!(online == "0-1\n2", "{}: {online}", vm.id);
    Ok(())
}

fn both_cpus_go_on_in_the_child_and_the_source(suite: &Suite) -> Result<()> {
    let source = suite.fork_smp().context("a child of the 2-vCPU snapshot")?;
    let info: serde_json::Value = suite.forkd(["info", &source.id, "--json"]).ok()?.json()?;
    ensure!(info["vcpus"] == 2, "{info}");
    for cpu in ["0", "1"] {
        source.guest(&["count", "start", &format!("/tmp/count{cpu}"), cpu])?;
    }
    both_count(&source)?;
    for _ in 0..5 {
        let branch = source.branch_one()?;
        both_count(&branch)?;
        both_count(&source)?;
        let deeper = branch.branch_one()?;
        both_count(&deeper)?;
        deeper.kill()?;
        branch.kill()?;
    }
    Ok(())
}

fn a_hundred_and_twenty_eight_is_no_number_of_cpus(suite: &Suite) -> Result<()> {
    for bad in ["0", "128"] {
        let args = ["snapshot", "create", "x", "--vcpus", bad, "--json"];
        suite.forkd(args).output()?.one_line(&["--vcpus", bad, "16"])?;
    }
    Ok(())
}
