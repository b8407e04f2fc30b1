//! `--max-pause`: a pause is as long as was allowed, or is not, or is told.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use forkd_api::types::{SnapshotReceipt, SourcePause};
use serde::Deserialize;
use serde_json::Value;

use crate::command::Output;
use crate::fixture::{Suite, names};
use crate::live::{forget, shared_child, store};
use crate::runner::{Test, tests};
use crate::vm::Vm;

pub const TESTS: &[Test] = tests!["max_pause":
    what_cannot_be_is_refused_with_the_estimate_and_the_vm_goes_on 120,
    a_live_snapshot_keeps_to_it_or_tells 180,
    other_requests_are_served_while_ram_is_protected_ahead 120,
    a_vm_that_ends_meanwhile_leaves_nothing 90,
];

#[derive(Deserialize)]
struct Kept {
    status: String,
    receipt: SnapshotReceipt,
}

#[derive(Deserialize)]
struct Branched {
    pause: SourcePause,
}

fn branch(suite: &Suite, vm: &Vm<'_>, more: &[&str]) -> Result<Output> {
    let args = ["branch", vm.id.as_str(), "--json"].into_iter().chain(more.iter().copied());
    suite.forkd(args).output()
}

/// That what a command said on standard error is what the receipt says.
fn told(said: &Output, pause: &SourcePause) -> Result<()> {
    let limit = pause.max_pause_us.context("the receipt has the limit")?;
    ensure!(pause.exceeded == (pause.pause_us > limit), "{pause:?}");
    let warned = said.stderr_text().contains("longer than --max-pause");
    ensure!(warned == pause.exceeded, "{pause:?}, and said {:?}", said.stderr_text());
    Ok(())
}

fn what_cannot_be_is_refused_with_the_estimate_and_the_vm_goes_on(suite: &Suite) -> Result<()> {
    let (plain, shared) = (suite.fork_one()?, shared_child(suite)?);
    for vm in [&plain, &shared] {
        vm.guest(&["ring", "serve", "/tmp/ring", "/dev/vda"])?;
    }
    let none = ["--snapshot", "none", "--max-pause", "1us"];
    let of_mode = |mode| [none.as_slice(), &["--mode", mode]].concat();
    let cases = [
        (&plain, vec!["--max-pause", "1us"], "fork"),
        (&plain, of_mode("fork"), "fork"),
        (&plain, of_mode("full"), "copying"),
        (&shared, of_mode("full"), "copying"),
        (&shared, of_mode("live"), "write protection"),
    ];
    for (vm, args, part) in &cases {
        let said = branch(suite, vm, args)?;
        said.status_is(1)?.one_line(&["the pause would take about", part, "1µs are allowed"])?;
    }
    ensure!(!store(suite).join("none").exists(), "a refused snapshot is not there");
    ensure!(!names(&suite.snapshots_dir())?.contains(&"none".to_string()), "nor in memory");
    ensure!(suite.ls()?.len() == 2, "no branch was made");
    for vm in [&plain, &shared] {
        vm.guest(&["ring", "verify", "/tmp/ring"]).context("it goes on")?;
    }
    // With room for it, all work; the receipt of each has the same shape.
    let said = branch(suite, &plain, &["--max-pause", "10s"])?.success()?;
    let pause = said.json::<Branched>()?.pause;
    ensure!(pause.max_pause_us == Some(10_000_000) && !pause.exceeded, "{pause:?}");
    for (vm, mode) in [(&plain, "fork"), (&plain, "full"), (&shared, "full"), (&shared, "live")] {
        let args = ["--snapshot", "roomy", "--mode", mode, "--max-pause", "10s"];
        let said = branch(suite, vm, &args)?.success()?;
        let Kept { status, receipt } = said.json()?;
        ensure!(status == "durable" && receipt.ready_us > 0, "{mode}: {status}, {receipt:?}");
        ensure!(
            receipt.source.pause_us > 0 && receipt.source.quiesce_us > 0,
            "{mode}: {receipt:?}"
        );
        told(&said, &receipt.source).with_context(|| format!("mode {mode}"))?;
        forget(suite, "roomy")?;
    }
    Ok(())
}

fn a_live_snapshot_keeps_to_it_or_tells(suite: &Suite) -> Result<()> {
    let source = shared_child(suite)?;
    source.guest(&["ring", "serve", "/tmp/ring", "/dev/vda"])?;
    let (mut taken, mut refused, mut exceeded, mut rearmed) = (0, 0, 0, 0);
    let mut pauses = Vec::new();
    for number in 0..10 {
        let tag = format!("limited-{number}");
        let args = ["--snapshot", &tag, "--mode", "live", "--max-pause", "5ms"];
        let said = branch(suite, &source, &args)?;
        if said.status.code() == Some(1) {
            // A host so busy that the vCPU does not park in time, five times, or that the guest outruns it.
            let message = said.stderr_text();
            let why = ["did not park", "the pause would take"];
            ensure!(why.iter().any(|why| message.contains(why)), "{message}");
            ensure!(!store(suite).join(&tag).exists(), "a refused snapshot is not there");
            refused += 1;
            continue;
        }
        let receipt = said.json::<Kept>()?.receipt;
        told(&said, &receipt.source)?;
        taken += 1;
        exceeded += u32::from(receipt.source.exceeded);
        rearmed += receipt.pages_rearmed;
        ensure!(receipt.prearm_us > 0, "it is protected ahead: {receipt:?}");
        pauses.push(receipt.source.pause_us);
        let vm = suite.fork_of(&tag, 1)?.pop().context("one child")?;
        vm.guest(&["ring", "verify", "/tmp/ring"]).with_context(|| tag.clone())?;
        vm.kill()?;
        forget(suite, &tag)?;
    }
    source.guest(&["ring", "verify", "/tmp/ring"]).context("the source")?;
    ensure!(taken > 0, "5 ms are enough now and then");
    pauses.sort_unstable();
    println!(
        "    {taken} taken, {exceeded} of them over 5 ms, {refused} refused; p50 {:?}, {rearmed} pages protected again",
        Duration::from_micros(pauses[pauses.len() / 2])
    );
    Ok(())
}

fn other_requests_are_served_while_ram_is_protected_ahead(suite: &Suite) -> Result<()> {
    let vm = shared_child(suite)?;
    vm.guest(&["ring", "serve", "/tmp/ring", "/dev/vda"])?;
    for number in 0..5 {
        let tag = format!("meanwhile-{number}");
        let args = ["branch", &vm.id, "--snapshot", &tag, "--mode", "live", "--json"];
        let first = suite.forkd(args).spawn()?;
        // At any moment of the first: while RAM is protected, in its pause, or while it is written.
        let second = branch(suite, &vm, &["--snapshot", "second", "--mode", "live"])?;
        if second.status.success() {
            forget(suite, "second")?;
        } else {
            second.status_is(1)?.one_line(&["is being written"])?;
        }
        ensure!(vm.value("1 + 1")? == "2", "it is served");
        let first = first.wait()?;
        if first.status.success() {
            forget(suite, &tag)?;
        } else {
            first.status_is(1)?.one_line(&["second", "is being written"])?;
        }
    }
    vm.guest(&["ring", "verify", "/tmp/ring"]).context("the source")?;
    Ok(())
}

fn a_vm_that_ends_meanwhile_leaves_nothing(suite: &Suite) -> Result<()> {
    for number in 0..4 {
        let vm = shared_child(suite)?;
        vm.guest(&["ring", "serve", "/tmp/ring", "/dev/vda"])?;
        let tag = format!("ended-{number}");
        let args = ["branch", &vm.id, "--snapshot", &tag, "--mode", "live", "--json"];
        let first = suite.forkd(args).spawn()?;
        vm.kill()?;
        let said = first.wait()?;
        // It was quicker, or there is none; had the writing begun, its failure is told until someone removes it.
        ensure!(
            said.status.success() == store(suite).join(&tag).exists(),
            "{}",
            said.stderr_text()
        );
        let info = suite.forkd(["snapshot", "info", &tag, "--json"]).output()?;
        if !info.status.success() {
            info.one_line(&[&tag])?;
            continue;
        }
        let info: Value = info.json()?;
        let expected = if said.status.success() { "durable" } else { "failed" };
        ensure!(info["status"] == expected, "{info}");
        ensure!(info["durable"]["reason"].is_string() == (expected == "failed"), "{info}");
        forget(suite, &tag)?;
    }
    ensure!(suite.ls()?.is_empty(), "all are gone");
    Ok(())
}
