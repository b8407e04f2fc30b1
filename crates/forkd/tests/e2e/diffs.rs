//! Diffs of a VM that goes on: each over the one before.

use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, ensure};
use forkd_snapshot::{Digest, Resolved, Store, Verification};
use serde_json::Value;

use crate::fixture::{Suite, WARM};
use crate::runner::{Test, tests};
use crate::vm::Vm;

pub const TESTS: &[Test] = tests!["diffs":
    a_chain_of_eight_is_the_flat_one 240,
    any_durable_snapshot_of_a_vm_can_have_diffs 120,
    so_can_one_that_was_forked_off_and_saved_later 120,
    a_parent_that_is_gone_is_not_needed 60,
];

/// Length of the chain over its base.
const DEPTH: usize = 8;
/// MiB that are written between two diffs.
const DIRTY_MIB: u64 = 8;
/// Most MiB of a diff on the disk.
const LARGEST_MIB: u64 = 12;

/// The warm snapshot on the disk, and a VM that has its files for RAM.
fn loaded(suite: &Suite) -> Result<Vm<'_>> {
    suite.warm()?;
    suite.save(WARM)?;
    suite.load(WARM, "file")
}

fn take(suite: &Suite, vm: &Vm<'_>, tag: &str, mode: &str) -> Result<Value> {
    suite.forkd(["branch", &vm.id, "--snapshot", tag, "--mode", mode, "--json"]).ok()?.json()
}

fn parent(suite: &Suite, tag: &str) -> Result<Option<String>> {
    let store = Store::open(&suite.store())?;
    Ok(store.get(tag)?.manifest().parent.as_ref().map(|parent| parent.tag.clone()))
}

/// Bytes that a snapshot's own RAM takes on the disk.
fn on_disk(suite: &Suite, tag: &str) -> Result<u64> {
    Ok(fs::metadata(suite.store().join(tag).join("memory"))?.blocks() * 512)
}

/// A digest of all bytes.
fn digest(bytes: &Resolved) -> Result<Digest> {
    let mut all = vec![0; usize::try_from(bytes.len)?];
    bytes.read_at(0, &mut all)?;
    Ok(Digest::of(&all))
}

fn digests(suite: &Suite, tag: &str) -> Result<Vec<Digest>> {
    let loaded = Store::open(&suite.store())?.load(tag, Verification::Always)?;
    [&loaded.memory].into_iter().chain(&loaded.disks).map(digest).collect()
}

/// One VM, a diff after each 8 MiB that it has written, while it writes records to RAM and disk. Each goes on as it
/// was; the whole chain has the bytes of the flat snapshot that is made of it.
fn a_chain_of_eight_is_the_flat_one(suite: &Suite) -> Result<()> {
    let vm = loaded(suite)?;
    // The room is there before, so that what changes is what is said to.
    vm.run(&format!("room = np.ones(({DIRTY_MIB} << 8, 4096), dtype=np.uint8)"))?;
    vm.guest(&["ring", "serve", "/tmp/ring", "/dev/vda"])?;
    let mut heads = Vec::new();
    for number in 1..=DEPTH {
        // A byte of each page.
        vm.run(&format!("room[:, {number}] = {number}0"))?;
        let head: u64 = vm.guest(&["ring", "head", "/tmp/ring"])?.parse()?;
        let tag = format!("link{number}");
        take(suite, &vm, &tag, "diff")?;
        heads.push((tag, head));
    }
    vm.guest(&["ring", "verify", "/tmp/ring"]).context("the source")?;
    vm.kill()?;
    let mut over = WARM.to_string();
    for (tag, head) in &heads {
        ensure!(parent(suite, tag)?.as_ref() == Some(&over), "{tag} is not over {over}");
        let bytes = on_disk(suite, tag)?;
        println!("    {tag}: {} KiB", bytes >> 10);
        ensure!(bytes <= LARGEST_MIB << 20, "{tag} takes {bytes} bytes");
        let vm = suite.fork_of(tag, 1)?.remove(0);
        let number = tag.trim_start_matches("link").parse::<usize>()?;
        let bytes = (1..=DEPTH).map(|column| if column <= number { column * 10 } else { 1 });
        let bytes: Vec<usize> = bytes.collect();
        let right = vm.value(&format!("bool((room[:, 1:{}] == {bytes:?}).all())", DEPTH + 1))?;
        ensure!(right == "True", "{tag} has other bytes");
        let stood: u64 = vm.guest(&["ring", "head", "/tmp/ring"])?.parse()?;
        ensure!(stood >= *head, "{tag} stands at {stood}, its source had been at {head}");
        vm.guest(&["ring", "verify", "/tmp/ring"]).with_context(|| tag.clone())?;
        vm.kill()?;
        over.clone_from(tag);
    }
    let chained = digests(suite, &over)?;
    suite.forkd(["snapshot", "compact", &over]).ok()?;
    ensure!(parent(suite, &over)?.is_none(), "it was compacted");
    ensure!(digests(suite, &over)? == chained, "the flat one has other bytes than the chain");
    let refused = suite.forkd(["snapshot", "rm", "link3"]).output()?.status_is(1)?;
    refused.one_line(&["link4"])?;
    suite.forkd(["snapshot", "rm", &over]).ok()?;
    suite.forkd(["snapshot", "rm", "link1", "--cascade"]).ok().map(drop)
}

/// Once a VM was kept in whatever mode, it has something to be a diff of.
fn any_durable_snapshot_of_a_vm_can_have_diffs(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    take(suite, &vm, "whole", "full")?;
    vm.run("level.append('changed')")?;
    take(suite, &vm, "part", "diff")?;
    ensure!(parent(suite, "part")?.as_deref() == Some("whole"), "a diff over the full one");
    let (whole, part) = (on_disk(suite, "whole")?, on_disk(suite, "part")?);
    println!("    full: {} KiB, diff: {} KiB", whole >> 10, part >> 10);
    ensure!(part < whole / 4, "the diff takes {part} bytes, all of it {whole}");
    // Its branch goes on from there.
    let branch = vm.branch_one()?;
    branch.run("level.append('branched')")?;
    take(suite, &branch, "branched", "diff")?;
    ensure!(parent(suite, "branched")?.as_deref() == Some("part"), "a branch has its source's");
    suite.kill_all()?;
    let levels = [("part", "['warm', 'changed']"), ("branched", "['warm', 'changed', 'branched']")];
    for (tag, level) in levels {
        let vm = suite.fork_of(tag, 1)?.remove(0);
        ensure!(vm.value("level")? == level, "{tag}: {}", vm.value("level")?);
        vm.kill()?;
    }
    suite.forkd(["snapshot", "rm", "branched"]).ok()?;
    suite.forkd(["snapshot", "rm", "part"]).ok()?;
    suite.forkd(["snapshot", "rm", "whole"]).ok().map(drop)
}

/// Nobody tells a VM that what was forked off it has become durable: it finds out. Nor its children, nor the zygote's.
fn so_can_one_that_was_forked_off_and_saved_later(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    let before = vm.branch_one()?;
    // Whoever was forked of it before it is saved, is of the same past.
    suite.save(WARM)?;
    take(suite, &before, "of-warm", "diff")?;
    ensure!(parent(suite, "of-warm")?.as_deref() == Some(WARM), "a branch of a child of it");
    vm.run("level.append('whole')")?;
    take(suite, &vm, "whole", "fork")?;
    let sibling = suite.fork_of("whole", 1)?.remove(0);
    for (vm, tag) in [(&vm, "source"), (&sibling, "sibling")] {
        vm.run(&format!("level.append('{tag}')"))?;
        take(suite, vm, tag, "diff")?;
        ensure!(parent(suite, tag)?.as_deref() == Some("whole"), "{tag} is over it");
        ensure!(on_disk(suite, tag)? < on_disk(suite, "whole")? / 4, "{tag} is a whole one");
    }
    // Compacted or not, it is that instant; under its tag another one is not.
    suite.kill_all()?;
    for tag in ["source", "sibling"] {
        let vm = suite.fork_of(tag, 1)?.remove(0);
        let level = vm.value("level")?;
        ensure!(level == format!("['warm', 'whole', '{tag}']"), "{tag}: {level}");
        vm.kill()?;
        suite.forkd(["snapshot", "rm", tag]).ok()?;
    }
    suite.forkd(["snapshot", "rm", "of-warm"]).ok()?;
    suite.forkd(["snapshot", "rm", "whole"]).ok()?;
    let (first, other) = (suite.fork_one()?, suite.fork_one()?);
    take(suite, &first, "taken", "fork")?;
    suite.forkd(["snapshot", "rm", "taken"]).ok()?;
    take(suite, &other, "taken", "fork")?;
    take(suite, &first, "after", "diff")?;
    ensure!(parent(suite, "after")?.as_deref() == Some(WARM), "another has its tag now");
    suite.forkd(["snapshot", "rm", "after"]).ok()?;
    suite.forkd(["snapshot", "rm", "taken"]).ok().map(drop)
}

/// The last diff was removed, or is another now: then the next is over what the VM was loaded from.
fn a_parent_that_is_gone_is_not_needed(suite: &Suite) -> Result<()> {
    let vm = loaded(suite)?;
    vm.run("level.append('one')")?;
    take(suite, &vm, "gone", "diff")?;
    suite.forkd(["snapshot", "rm", "gone"]).ok()?;
    vm.run("level.append('two')")?;
    take(suite, &vm, "after", "diff")?;
    ensure!(parent(suite, "after")?.as_deref() == Some(WARM), "what is gone is no parent");
    // Another snapshot under the tag of the last one is not the last one.
    suite.forkd(["snapshot", "rm", "after"]).ok()?;
    let other = suite.fork_one()?;
    take(suite, &other, "after", "full")?;
    take(suite, &vm, "again", "diff")?;
    ensure!(parent(suite, "again")?.as_deref() == Some(WARM), "another is no parent");
    // With none of them there is no diff, and the VM goes on.
    let (home, aside) = (suite.store().join(WARM), suite.scratch("aside")?.join(WARM));
    fs::rename(&home, &aside)?;
    suite.forkd(["snapshot", "rm", "after"]).ok()?;
    let refused =
        suite.forkd(["branch", &vm.id, "--snapshot", "none", "--mode", "diff"]).output()?;
    fs::rename(&aside, &home)?;
    refused.status_is(1)?.one_line(&[WARM, "mode fork"])?;
    ensure!(vm.value("level[-1]")? == "'two'", "it does not go on");
    suite.kill_all()?;
    let vm = suite.fork_of("again", 1)?.remove(0);
    ensure!(vm.value("level")? == "['warm', 'one', 'two']", "it has both");
    vm.kill()?;
    suite.forkd(["snapshot", "rm", "again"]).ok().map(drop)
}
