//! BRANCH mode `live`: snapshots of a VM whose RAM is a shared memfd, written while it runs.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use forkd_api::types::SnapshotReceipt;
use rustix::process::Signal;
use serde::Deserialize;

use crate::fixture::{SMP, Suite, WARM, eventually, names};
use crate::runner::{Test, tests};
use crate::vm::{Branched, Vm};

pub const TESTS: &[Test] = tests!["live":
    ram_and_disk_of_each_snapshot_are_of_one_instant 180,
    so_they_are_with_two_vcpus 180,
    it_needs_shared_memory_which_cannot_be_forked 60,
    a_vm_that_ends_leaves_no_snapshot_half_done 90,
    a_bad_memory_file_names_the_child_and_the_file 60,
];

/// How many snapshots of one source.
const MANY: usize = 10;

#[derive(Deserialize)]
struct Kept {
    status: String,
    receipt: SnapshotReceipt,
}

/// Directory of the durable snapshots.
pub fn store(suite: &Suite) -> PathBuf {
    suite.store()
}

/// Makes the warm snapshot durable, once; its tag.
pub fn durable(suite: &Suite) -> Result<&'static str> {
    suite.warm()?;
    save(suite, WARM)
}

fn save(suite: &Suite, tag: &'static str) -> Result<&'static str> {
    suite.save(tag)?;
    Ok(tag)
}

/// A child of the warm snapshot whose RAM is a shared memfd.
pub fn shared_child(suite: &Suite) -> Result<Vm<'_>> {
    shared_child_of(suite, durable(suite)?)
}

fn shared_child_of<'s>(suite: &'s Suite, tag: &str) -> Result<Vm<'s>> {
    suite.load(tag, "memfd-shared")
}

fn take(suite: &Suite, vm: &Vm<'_>, tag: &str) -> Result<Kept> {
    let args = ["branch", &vm.id, "--snapshot", tag, "--mode", "live", "--json"];
    suite.forkd(args).ok()?.json()
}

/// Unloads a snapshot, and takes it from the disk.
pub fn forget(suite: &Suite, tag: &str) -> Result<()> {
    suite.forkd(["snapshot", "rm", tag]).ok().map(drop)
}

fn ram_and_disk_of_each_snapshot_are_of_one_instant(suite: &Suite) -> Result<()> {
    snapshots_agree(&shared_child(suite)?, suite)
}

fn so_they_are_with_two_vcpus(suite: &Suite) -> Result<()> {
    suite.smp()?;
    snapshots_agree(&shared_child_of(suite, save(suite, SMP)?)?, suite)
}

fn snapshots_agree(source: &Vm<'_>, suite: &Suite) -> Result<()> {
    source.guest(&["ring", "serve", "/tmp/ring", "/dev/vda"])?;
    let mut heads: Vec<(u64, u64)> = Vec::new();
    let mut receipts = Vec::new();
    let head = || -> Result<u64> { Ok(source.guest(&["ring", "head", "/tmp/ring"])?.parse()?) };
    for number in 0..MANY {
        let before = head()?;
        let kept = take(suite, source, &format!("live-{number}"))?;
        ensure!(kept.status == "durable", "{}", kept.status);
        heads.push((before, head()?));
        receipts.push(kept.receipt);
    }
    source.guest(&["ring", "verify", "/tmp/ring"]).context("the source")?;
    source.kill()?;
    let caught: u64 = receipts.iter().map(|r| r.pages_by_handler).sum();
    ensure!(caught > 0, "the guest writes all the time, and no write was caught");
    for (number, (before, after)) in heads.into_iter().enumerate() {
        let tag = format!("live-{number}");
        let vm = suite.fork_of(&tag, 1)?.pop().context("one child")?;
        // It shows where the ring stood before it lets the writer go on.
        let stood: u64 = vm.guest(&["ring", "head", "/tmp/ring"])?.parse()?;
        ensure!(stood >= before, "{tag} stands at {stood}, its source had been at {before}");
        let verified: u64 =
            vm.guest(&["ring", "verify", "/tmp/ring"]).with_context(|| tag.clone())?.parse()?;
        ensure!(verified > stood, "{tag} goes on");
        ensure!(after > before, "the source ran on while {tag} was written");
        vm.kill()?;
        forget(suite, &tag)?;
    }
    let mut pauses: Vec<u64> = receipts.iter().map(|r| r.source.pause_us).collect();
    pauses.sort_unstable();
    let us = Duration::from_micros;
    println!(
        "    source pause: p50 {:?}, longest {:?}; longest stall {:?}; {caught} pages by the handler",
        us(pauses[MANY / 2]),
        us(pauses[MANY - 1]),
        us(receipts.iter().map(|r| r.longest_stall_us).max().unwrap_or(0)),
    );
    Ok(())
}

fn it_needs_shared_memory_which_cannot_be_forked(suite: &Suite) -> Result<()> {
    let plain = suite.fork_one()?;
    let args = ["branch", &plain.id, "--snapshot", "none", "--mode", "live"];
    suite.forkd(args).output()?.status_is(1)?.one_line(&["--memory memfd-shared"])?;
    ensure!(!store(suite).join("none").exists(), "a refused snapshot is not there");
    ensure!(plain.value("1 + 1")? == "2", "it goes on");
    let shared = shared_child(suite)?;
    shared.run("level.append('shared')")?;
    let args = ["branch", &shared.id];
    suite.forkd(args).output()?.status_is(1)?.one_line(&["--mode live"])?;
    let args = ["branch", &shared.id, "--snapshot", "none"];
    suite.forkd(args).output()?.status_is(1)?.one_line(&["--mode live"])?;
    ensure!(shared.value("level[-1]")? == "'shared'", "it goes on");
    Ok(())
}

/// The directory of a snapshot that is being written or has failed.
fn staging(suite: &Suite, tag: &str) -> Result<Option<PathBuf>> {
    let start = format!(".staging-{tag}-");
    let found = names(&store(suite))?.into_iter().find(|name| name.starts_with(&start));
    Ok(found.map(|name| store(suite).join(name)))
}

fn a_vm_that_ends_leaves_no_snapshot_half_done(suite: &Suite) -> Result<()> {
    let mut cut = 0;
    for (number, by_force) in [false, true, false, true].into_iter().enumerate() {
        let tag = format!("cut-{number}");
        let vm = shared_child(suite)?;
        let args = ["branch", &vm.id, "--snapshot", &tag, "--mode", "live", "--no-wait", "--json"];
        let kept: Kept = suite.forkd(args).ok()?.json()?;
        ensure!(kept.status == "writing", "{}", kept.status);
        let at_once = ["branch", &vm.id, "--snapshot", "second", "--mode", "live"];
        if number == 0 {
            // Either it is refused as there is one already, or that one was done by then.
            let second = suite.forkd(at_once).output()?;
            let refused = second.stderr_text().contains(&tag);
            ensure!(refused || second.success().is_ok(), "a second one at the same time");
            if !refused {
                forget_from_disk(suite, "second")?;
            }
        }
        if by_force {
            let process = forkd_sys::fork::PidFd::open(vm.pid)?;
            process.send_signal(Signal::KILL)?;
            process.wait(Some(Duration::from_secs(10)))?;
        } else {
            vm.kill()?;
        }
        // The writer ends with its source: its lock gets free, which is how the store sees that it has failed.
        let free = || -> Result<bool> {
            let Some(dir) = staging(suite, &tag)? else { return Ok(true) };
            Ok(!forkd_sys::lock::is_held(&dir.join("lock"))?)
        };
        eventually(suite.deadline(), "the writer is gone", free)?;
        if store(suite).join(&tag).exists() {
            // It was quicker than the kill; then it is whole.
            let child = suite.fork_of(&tag, 1)?.pop().context("one child")?;
            ensure!(child.value("level")? == "['warm']", "a snapshot that is there is whole");
            child.kill()?;
            forget(suite, &tag)?;
            continue;
        }
        cut += 1;
        let dir = staging(suite, &tag)?.context("a snapshot that was cut off has failed")?;
        if !by_force {
            let why = fs::read_to_string(dir.join("failed.json"))?;
            ensure!(why.contains("the VM ended"), "{why}");
        }
        fs::remove_dir_all(dir)?;
    }
    ensure!(cut > 0, "none of the snapshots was cut off");
    Ok(())
}

fn forget_from_disk(suite: &Suite, tag: &str) -> Result<()> {
    Ok(fs::remove_dir_all(store(suite).join(tag))?)
}

fn a_bad_memory_file_names_the_child_and_the_file(suite: &Suite) -> Result<()> {
    durable(suite)?;
    let memory = store(suite).join(WARM).join("memory");
    let aside = suite.scratch("aside")?.join("memory");
    fs::rename(&memory, &aside)?;
    let path = memory.display().to_string();
    let refused = || -> Result<()> {
        for kind in crate::backends::KINDS {
            let said = suite.forkd(["fork", WARM, "-n", "3", "--memory", kind]).output()?;
            said.status_is(1)?.one_line(&["child #1 of 3", &path])?;
            ensure!(suite.ls()?.is_empty(), "all that was started is gone");
            ensure!(names(&suite.vms_dir())?.is_empty(), "nothing is left of it");
        }
        Ok(())
    };
    let outcome = refused();
    fs::rename(&aside, &memory)?;
    outcome?;
    let said = suite.forkd(["fork", WARM, "-n", "3", "--memory", "memfd-shared", "--json"]);
    let children = Branched::read(suite, said.output()?)?.children;
    ensure!(children.len() == 3, "three VMs");
    for (number, vm) in children.iter().enumerate() {
        vm.run(&format!("level.append({number})"))?;
    }
    for (number, vm) in children.iter().enumerate() {
        ensure!(vm.value("level")? == format!("['warm', {number}]"), "RAM is each one's own");
    }
    Ok(())
}
