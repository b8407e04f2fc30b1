//! Branches of a running VM.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::fixture::Suite;
use crate::runner::{Test, tests};

pub const TESTS: &[Test] = tests!["branch":
    a_branch_of_a_branch_five_deep 120,
    both_go_on_from_the_same_instant 60,
    fifty_branches_verify_and_the_pause_stays_flat 420,
    a_paused_vm_can_be_branched 60,
];

/// How many levels.
const DEPTH: usize = 5;
/// How many branches of one source.
const MANY: usize = 50;
/// What a median of ten pauses may be above twice another, in microseconds: other work on the host.
const PAUSE_SLACK_US: u64 = 2000;

fn a_branch_of_a_branch_five_deep(suite: &Suite) -> Result<()> {
    let mut line = vec![suite.fork_one()?];
    for level in 1..=DEPTH {
        let source = line.last().context("a source")?;
        source.run(&format!("level.append({level})\nopen('/root/level', 'a').write('{level}')"))?;
        let disk =
            format!("printf {level} | dd of=/dev/vda bs=1 seek={level} conv=notrunc,fsync 2>&1");
        source.sh(&disk)?;
        let branch = source.branch_one()?;
        line.push(branch);
    }
    // Each knows what was before it, and nothing of what came after.
    for (depth, vm) in line.iter().enumerate() {
        let known = (depth + 1).min(DEPTH);
        let numbers: Vec<String> = (1..=known).map(|n| n.to_string()).collect();
        ensure!(vm.value("level")? == format!("['warm', {}]", numbers.join(", ")), "depth {depth}");
        ensure!(vm.value("open('/root/level').read()")? == format!("'{}'", numbers.concat()));
        let disk = vm.sh("dd if=/dev/vda bs=1 skip=1 count=5 2>/dev/null | tr '\\0' '-'")?;
        let expected = format!("{:-<5}", numbers.concat());
        ensure!(disk == expected, "depth {depth}: disk {disk:?}, not {expected:?}");
        let info: serde_json::Value = suite.forkd(["info", &vm.id, "--json"]).ok()?.json()?;
        ensure!(
            info["parent"] == line.get(depth.wrapping_sub(1)).map_or("warm", |p| p.id.as_str())
        );
    }
    let generations: Vec<serde_json::Value> =
        suite.forkd(["ls", "--json"]).ok()?.json::<Vec<serde_json::Value>>()?.into_iter().collect();
    let first = generations.first().and_then(|g| g["generation"].as_u64()).context("generation")?;
    for (depth, row) in generations.iter().enumerate() {
        ensure!(row["generation"] == first + depth as u64, "{row}");
    }
    Ok(())
}

fn both_go_on_from_the_same_instant(suite: &Suite) -> Result<()> {
    let source = suite.fork_one()?;
    source.guest(&["count", "start", "/tmp/count", "0"])?;
    let read = |vm: &crate::vm::Vm<'_>, verb| -> Result<u64> {
        let text = vm.guest(&["count", verb, "/tmp/count"])?;
        Ok(text.split(' ').next().unwrap_or_default().parse()?)
    };
    let before = read(&source, "read")?;
    let branched = source.branch(2)?;
    for vm in branched.children.iter().chain([&source]) {
        let first = read(vm, "read")?;
        ensure!(first >= before, "{}: {first} after {before}", vm.id);
        ensure!(read(vm, "advance")? > first, "{} counts on", vm.id);
    }
    Ok(())
}

fn median(pauses: &[u64]) -> u64 {
    let mut sorted = pauses.to_vec();
    sorted.sort_unstable();
    sorted[sorted.len() / 2]
}

fn fifty_branches_verify_and_the_pause_stays_flat(suite: &Suite) -> Result<()> {
    let source = suite.fork_one()?;
    source.guest(&["ring", "serve", "/tmp/ring", "/dev/vda"])?;
    let (mut pauses, mut last) = (Vec::new(), 0);
    for number in 0..MANY {
        let branched = source.branch(1)?;
        pauses.push(branched.pause.context("a pause")?.pause_us);
        let branch = &branched.children[0];
        let head: u64 = branch
            .guest(&["ring", "verify", "/tmp/ring"])
            .with_context(|| format!("branch {number}"))?
            .parse()?;
        ensure!(head > last, "branch {number} stands at record {head}, an older one at {last}");
        last = source.guest(&["ring", "head", "/tmp/ring"])?.parse()?;
        branch.kill()?;
    }
    source.guest(&["ring", "verify", "/tmp/ring"]).context("the source")?;
    let (first, end) = (median(&pauses[..10]), median(&pauses[MANY - 10..]));
    let shown = |us| Duration::from_micros(us);
    println!(
        "    source pause: p50 {:?}, of the first ten {:?}, of the last ten {:?}, longest {:?}",
        shown(median(&pauses)),
        shown(first),
        shown(end),
        shown(pauses.iter().copied().max().unwrap_or(0))
    );
    ensure!(end <= 2 * first + PAUSE_SLACK_US, "the pause grows: {pauses:?}");
    Ok(())
}

fn a_paused_vm_can_be_branched(suite: &Suite) -> Result<()> {
    use forkd_api::types::{DesiredState, VmStateChange};
    let source = suite.fork_one()?;
    source.run("y = 3")?;
    let state = |state| -> Result<()> {
        source.api()?.send_json("PATCH", "/vm", &VmStateChange { state })?;
        Ok(())
    };
    state(DesiredState::Paused)?;
    let info: serde_json::Value = suite.forkd(["info", &source.id, "--json"]).ok()?.json()?;
    ensure!(info["phase"] == "paused", "{}", info["phase"]);
    let branch = source.branch_one()?;
    ensure!(branch.value("y")? == "3", "the branch runs");
    let info: serde_json::Value = suite.forkd(["info", &source.id, "--json"]).ok()?.json()?;
    ensure!(info["phase"] == "paused", "the source stays paused");
    state(DesiredState::Resumed)?;
    ensure!(source.value("y + 1")? == "4", "the source goes on");
    Ok(())
}
