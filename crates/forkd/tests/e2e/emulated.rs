//! What guests do where their kernel mode is emulated, on hosts that could run it natively: a short way through all of it, so
//! that this path does not rot. And the wrong pairs of kernel and host.
//!
//! It needs both flavours of the kernel. FORKD_TEST_STOCK_KERNEL names the stock one (.ci/test.sh sets it), otherwise
//! that of `make kernel FLAVOUR=both` is taken. Hosts without native kernel mode boot the stock kernel in all tests.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::command::Run;
use crate::fixture::{Suite, WARM};
use crate::runner::{Test, tests};
use crate::vm::Vm;

pub const TESTS: &[Test] = tests!["emulated":
    a_stock_kernel_boots_forks_branches_and_is_saved 240,
    a_native_kernel_is_refused_where_native_is_switched_off 30,
    a_stock_kernel_is_refused_where_native_is_asked_for 30,
];

/// Names the stock kernel.
const STOCK_KERNEL: &str = "FORKD_TEST_STOCK_KERNEL";
/// Tag of the emulated guest's snapshot.
const TAG: &str = "emulated";

/// Whether guests of this run are native: what these tests are for.
fn is_native(suite: &Suite) -> Result<bool> {
    suite.warm()?;
    let vm = &suite.fork_of(WARM, 1)?[0];
    let info: Value = suite.forkd(["info", &vm.id, "--json"]).ok()?.json()?;
    vm.kill()?;
    let native = info["kernel_mode"] == "pvm-native";
    if !native {
        println!("    not native here: nothing to show beside the other tests");
    }
    Ok(native)
}

/// Where `make kernel` leaves a flavour.
fn built(link: &str) -> Result<PathBuf> {
    let named = |name| std::env::var_os(name).map(PathBuf::from);
    let cache = named("FORKD_CACHE")
        .or_else(|| named("XDG_CACHE_HOME").map(|cache| cache.join("forkd")))
        .or_else(|| named("HOME").map(|home| home.join(".cache/forkd")))
        .context("HOME is not set")?;
    Ok(cache.join("kernels").join(link).join("vmlinux"))
}

/// The stock kernel. Without one there is nothing to run, which is an error where someone has said where it is, and in CI.
fn stock_kernel() -> Result<Option<PathBuf>> {
    if let Some(path) = std::env::var_os(STOCK_KERNEL) {
        let path = PathBuf::from(path);
        ensure!(path.is_file(), "{STOCK_KERNEL}={}: no such file", path.display());
        return Ok(Some(path));
    }
    let path = built("current")?;
    if path.is_file() {
        return Ok(Some(path));
    }
    ensure!(std::env::var_os("CI").is_none(), "no stock kernel at {}", path.display());
    println!("    SKIPPED: no stock kernel at {}: make kernel FLAVOUR=both", path.display());
    Ok(None)
}

/// The kernel that the other tests boot.
fn native_kernel() -> Result<PathBuf> {
    std::env::var_os("FORKD_KERNEL").map_or_else(|| built("current-pvm"), |path| Ok(path.into()))
}

/// forkd, with kernel mode emulated.
fn emulated(run: Run) -> Run {
    run.env("FORKD_PVM", "emulated").without_env("FORKD_KERNEL")
}

fn a_stock_kernel_boots_forks_branches_and_is_saved(suite: &Suite) -> Result<()> {
    if !is_native(suite)? {
        return Ok(());
    }
    let Some(kernel) = stock_kernel()? else { return Ok(()) };
    let create = ["snapshot", "create", TAG, "--json", "--boot-timeout", "300"];
    emulated(suite.forkd(create))
        .args(["--vcpus", "2", "--warm-code", "import os\nlevel = ['warm']", "--kernel"])
        .arg(&kernel)
        .ok()?;
    let serves = |vm: &Vm<'_>, level: &str| -> Result<()> {
        let info: Value = suite.forkd(["info", &vm.id, "--json"]).ok()?.json()?;
        ensure!(info["kernel_mode"] == "pvm-emulated", "{}", info["kernel_mode"]);
        ensure!(vm.value("level")? == level, "{}: eval", vm.id);
        ensure!(vm.sh("nproc")? == "2", "{}: exec", vm.id);
        Ok(())
    };
    let children = suite.fork_of(TAG, 3)?;
    for child in &children {
        serves(child, "['warm']")?;
    }
    children[0].run("level.append('child')")?;
    let branch = children[0].branch_one()?;
    serves(&branch, "['warm', 'child']").context("a branch")?;
    suite.kill_all()?;
    suite.forkd(["snapshot", "save", TAG]).ok()?;
    // The snapshot says how it was made, so this works whatever the variable says.
    for choice in ["emulated", "auto"] {
        let load = ["fork", TAG, "--memory", "file", "--json"];
        let said = suite.forkd(load).env("FORKD_PVM", choice).output()?;
        for vm in crate::vm::Branched::read(suite, said)?.children {
            serves(&vm, "['warm']").with_context(|| format!("loaded with FORKD_PVM={choice}"))?;
            vm.kill()?;
        }
    }
    suite.forkd(["snapshot", "rm", TAG]).ok().map(drop)
}

fn a_native_kernel_is_refused_where_native_is_switched_off(suite: &Suite) -> Result<()> {
    if !is_native(suite)? {
        return Ok(());
    }
    let kernel = native_kernel()?;
    let args = ["snapshot", "create", "x", "--json", "--kernel"];
    let said = emulated(suite.forkd(args)).arg(&kernel).output()?;
    let words = [&*kernel.to_string_lossy(), "FORKD_PVM=emulated", "`make kernel`"];
    said.one_line(&words)?;
    Ok(())
}

fn a_stock_kernel_is_refused_where_native_is_asked_for(suite: &Suite) -> Result<()> {
    if !is_native(suite)? {
        return Ok(());
    }
    let Some(kernel) = stock_kernel()? else { return Ok(()) };
    let run = suite.forkd(["snapshot", "create", "x", "--json", "--kernel"]).arg(&kernel);
    let said = run.env("FORKD_PVM", "native").without_env("FORKD_KERNEL").output()?;
    let words = [&*kernel.to_string_lossy(), "FORKD_PVM=native", "`make kernel`"];
    said.one_line(&words)?;
    Ok(())
}
