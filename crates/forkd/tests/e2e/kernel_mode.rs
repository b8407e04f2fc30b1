//! How guests run kernel mode: what is said of it, and what FORKD_PVM makes of it.

use anyhow::{Context, Result, ensure};
use forkd_api::types::KernelMode;
use serde_json::Value;

use crate::fixture::{Suite, WARM};
use crate::runner::{Test, tests};
use crate::vm::Vm;

pub const TESTS: &[Test] = tests!["kernel_mode":
    info_tells_the_mode_and_the_exits 60,
    a_native_snapshot_is_refused_where_native_is_switched_off 60,
    a_word_that_forkd_pvm_does_not_know_is_named 30,
];

fn info(suite: &Suite, vm: &Vm<'_>) -> Result<Value> {
    suite.forkd(["info", &vm.id, "--json"]).ok()?.json()
}

fn mode(info: &Value) -> Result<KernelMode> {
    Ok(serde_json::from_value(info["kernel_mode"].clone())?)
}

fn info_tells_the_mode_and_the_exits(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    let before = info(suite, &vm)?;
    let branch = vm.branch_one()?;
    ensure!(mode(&info(suite, &branch)?)? == mode(&before)?, "a branch has the mode of its source");
    // Linux 5.14 and later.
    let Some(exits) = before["metrics"]["kvm.exits"].as_u64() else { return Ok(()) };
    vm.run("sum(range(10**6))")?;
    let after = info(suite, &vm)?["metrics"]["kvm.exits"].as_u64().context("as before")?;
    ensure!(exits > 0 && after > exits, "{exits} exits, then {after}");
    Ok(())
}

fn a_native_snapshot_is_refused_where_native_is_switched_off(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    let native = mode(&info(suite, &vm)?)? == KernelMode::PvmNative;
    suite.save(WARM)?;
    let load = |choice: &str| {
        suite.forkd(["fork", WARM, "--memory", "file", "--json"]).env("FORKD_PVM", choice)
    };
    if native {
        let said = load("emulated").output()?;
        said.one_line(&[WARM, "pvm-native", "this host has pvm", "FORKD_PVM=emulated"])?;
        load("native").ok()?;
    } else {
        load("emulated").ok()?;
    }
    suite.kill_all()
}

fn a_word_that_forkd_pvm_does_not_know_is_named(suite: &Suite) -> Result<()> {
    let run = suite.forkd(["fork", WARM, "--memory", "file"]).env("FORKD_PVM", "fast");
    suite.save(WARM)?;
    run.output()?.one_line(&["FORKD_PVM", "\"fast\"", "auto, native or emulated"])?;
    Ok(())
}
