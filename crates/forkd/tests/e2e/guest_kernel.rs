//! The guest's kernel: what keeps user mode out of it, all its CPUs, its clocks, and forks under all that it can do.
//!
//! Where kernel mode runs natively on PVM, page tables alone separate user mode from the kernel, and the entry code is ours
//! (docs/pvm.md); so this asks of it what others take for granted. It asks the same of guests on VT-x and SVM.
//! Emulated guests are let off: what is new there is KVM's, and it would take hours.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use forkd_api::types::KernelMode;

use crate::fixture::{MEM_MIB, SMP, Suite, WARM};
use crate::runner::{Test, tests};
use crate::vm::Vm;

pub const TESTS: &[Test] = tests!["guest_kernel":
    user_mode_reaches_nothing_of_the_kernel_on_one_cpu 90,
    user_mode_reaches_nothing_of_the_kernel_on_two_cpus 120,
    two_four_and_sixteen_cpus_work 180,
    clocks_are_right_and_monotonic 60,
    forks_under_load_are_right 300,
];

/// Forks of a guest under load, unless FORKD_FORKS says how many.
const FORKS: usize = 20;
/// How many of them at once.
const BATCH: usize = 4;
/// How far the guest's wall clock may be off the host's.
const WALL_CLOCK_SLACK: Duration = Duration::from_millis(50);
/// What the kernel says when something is wrong with it. Its lines on processes that a signal ended say none of that.
const COMPLAINTS: [&str; 7] = [
    "WARNING:",
    "BUG:",
    "Call Trace",
    "Oops",
    "Kernel panic",
    "rcu: INFO",
    "blocked for more than",
];

/// The kernel has nothing to complain about, and the guest answers.
pub fn kernel_is_content(vm: &Vm<'_>) -> Result<()> {
    let log = vm.sh("dmesg").with_context(|| format!("{} does not answer any more", vm.id))?;
    for (number, line) in log.lines().enumerate() {
        if COMPLAINTS.iter().any(|words| line.contains(words)) {
            let around: Vec<&str> = log.lines().skip(number.saturating_sub(3)).take(40).collect();
            anyhow::bail!("{}: the kernel complains:\n{}", vm.id, around.join("\n"));
        }
    }
    Ok(())
}

/// Whether it is emulated; then it says that the test has nothing to show.
fn is_emulated(suite: &Suite, vm: &Vm<'_>) -> Result<bool> {
    let info: serde_json::Value = suite.forkd(["info", &vm.id, "--json"]).ok()?.json()?;
    let emulated = serde_json::from_value::<KernelMode>(info["kernel_mode"].clone())?
        == KernelMode::PvmEmulated;
    if emulated {
        println!("    kernel mode is emulated: not tried");
    }
    Ok(emulated)
}

/// All probes of tests/guest/probes, then the guest is as well as before.
fn probe(suite: &Suite, vm: &Vm<'_>) -> Result<()> {
    if is_emulated(suite, vm)? {
        return Ok(());
    }
    vm.install(&suite.programs()?.join("probes"))?;
    let said = vm.exec(&["/tmp/probes"]).output()?;
    ensure!(said.status.success(), "{}: {}\n{}", vm.id, said.text(), said.stderr_text());
    println!("    {}", said.text());
    kernel_is_content(vm)?;
    ensure!(vm.sh("echo well")? == "well");
    Ok(())
}

fn user_mode_reaches_nothing_of_the_kernel_on_one_cpu(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    probe(suite, &vm)?;
    // The interpreter that was warm before is no worse for it, nor is a branch.
    ensure!(vm.value("int(array.sum())")? == "4999950000");
    ensure!(vm.branch_one()?.value("int(array.sum())")? == "4999950000");
    Ok(())
}

fn user_mode_reaches_nothing_of_the_kernel_on_two_cpus(suite: &Suite) -> Result<()> {
    probe(suite, &suite.fork_smp()?)
}

fn two_four_and_sixteen_cpus_work(suite: &Suite) -> Result<()> {
    const SUM: u64 = 100_000_000;
    if is_emulated(suite, &suite.fork_smp()?)? {
        return Ok(());
    }
    for cpus in [2, 4, 16] {
        let tag = format!("cpus-{cpus}");
        let tag = if cpus == 2 { SMP } else { &tag };
        if cpus != 2 {
            suite.create_with(tag, cpus, MEM_MIB, "import os")?;
        }
        let vm = suite.fork_of(tag, 1)?.pop().context("one child")?;
        let online = vm.sh("cat /sys/devices/system/cpu/online; nproc")?;
        ensure!(online == format!("0-{}\n{cpus}", cpus - 1), "{cpus} CPUs: {online}");
        let right = format!("{cpus} {}", SUM * (SUM + 1) / 2);
        for vm in [&vm, &vm.branch_one()?] {
            let sum = vm.guest(&["sum", &SUM.to_string()])?;
            ensure!(sum == right, "{}: {sum} instead of {right}", vm.id);
            vm.guest(&["clocks", "500"])?;
            kernel_is_content(vm)?;
        }
        suite.kill_all()?;
        if cpus != 2 {
            suite.forkd(["snapshot", "rm", tag]).ok()?;
        }
    }
    Ok(())
}

fn since_epoch() -> Result<Duration> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?)
}

fn clocks_are_right(vm: &Vm<'_>) -> Result<()> {
    let looks = vm.guest(&["clocks", "1000"])?;
    let count: u64 = looks.split(' ').nth(1).unwrap_or_default().parse()?;
    ensure!(count > 1000, "{}: {looks}", vm.id);
    let before = since_epoch()?;
    let told = Duration::from_micros(vm.guest(&["now"])?.parse()?);
    let after = since_epoch()?;
    ensure!(
        told + WALL_CLOCK_SLACK >= before && told <= after + WALL_CLOCK_SLACK,
        "{}: it is {told:?} between {before:?} and {after:?}",
        vm.id
    );
    let slept: u64 = vm.guest(&["sleep", "200"])?.parse()?;
    ensure!((200_000..300_000).contains(&slept), "{}: slept for {slept} us", vm.id);
    Ok(())
}

fn clocks_are_right_and_monotonic(suite: &Suite) -> Result<()> {
    let vm = suite.fork_smp()?;
    if is_emulated(suite, &vm)? {
        return Ok(());
    }
    clocks_are_right(&vm).context("a child of the snapshot")?;
    let branch = vm.branch_one()?;
    clocks_are_right(&branch).context("a branch")?;
    let deeper = branch.branch_one()?;
    branch.kill()?;
    clocks_are_right(&deeper).context("a branch of a branch")?;
    clocks_are_right(&vm).context("the source")?;
    // One CPU is scheduled in another way.
    suite.warm()?;
    clocks_are_right(&suite.fork_of(WARM, 1)?[0]).context("one CPU")
}

fn forks_under_load_are_right(suite: &Suite) -> Result<()> {
    let source = suite.fork_smp()?;
    if is_emulated(suite, &source)? {
        return Ok(());
    }
    let forks = std::env::var("FORKD_FORKS").map_or(Ok(FORKS), |n| n.parse())?;
    source.guest(&["load", "start", "/tmp/load"])?;
    let check = |vm: &Vm<'_>| -> Result<u64> {
        Ok(vm.guest(&["load", "check", "/tmp/load", "2"])?.parse()?)
    };
    let (mut done, mut last) = (0, check(&source)?);
    while done < forks {
        let children = source.branch(BATCH.min(forks - done))?.children;
        for child in &children {
            let rounds = check(child).with_context(|| format!("fork {done}"))?;
            ensure!(rounds > last, "fork {done} goes on at {rounds}, its source was at {last}");
            done += 1;
            if done % 10 == 0 {
                kernel_is_content(child)?;
            }
            child.kill()?;
        }
        let rounds = check(&source).with_context(|| format!("the source after {done} forks"))?;
        ensure!(rounds > last, "the source went from {last} to {rounds}");
        last = rounds;
    }
    println!("    {done} forks, {last} rounds in the source");
    kernel_is_content(&source)
}
