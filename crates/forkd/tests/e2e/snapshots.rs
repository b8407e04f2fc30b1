//! Durable snapshots: what is on disk goes on as what was in memory.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::fixture::{Suite, WARM, eventually};
use crate::runner::{Test, tests};

pub const TESTS: &[Test] = tests!["snapshots":
    a_saved_snapshot_outlives_its_zygote 120,
    a_running_vm_is_kept_by_fork 180,
    a_running_vm_is_kept_by_copying 240,
    diffs_of_diffs_verify 240,
    what_cannot_be_saved_is_named 60,
];

/// A zygote of its own, so that the suite's own is left alone.
fn keep(suite: &Suite, tag: &str, code: &str) -> Result<()> {
    let source = suite.fork_one()?;
    source.run(code)?;
    suite.forkd(["branch", &source.id, "--snapshot", tag]).ok()?;
    source.kill()
}

/// Ends the zygote as a restart of the host would.
fn kill_zygote(suite: &Suite, tag: &str) -> Result<()> {
    let info: Value = suite.forkd(["snapshot", "info", tag, "--json"]).ok()?.json()?;
    let pid = info["pid"].as_u64().or_else(|| info["live"]["pid"].as_u64()).context("a pid")?;
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid)?).context("a pid")?;
    rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
    eventually(suite.deadline(), "the zygote is gone", || {
        Ok(rustix::process::test_kill_process(pid).is_err())
    })
}

fn remove(suite: &Suite, tag: &str) -> Result<()> {
    suite.forkd(["snapshot", "rm", tag]).ok().map(drop)
}

/// Loaded from disk, a snapshot has its interpreter's objects, its files and its disk, and each child is someone else.
fn a_saved_snapshot_outlives_its_zygote(suite: &Suite) -> Result<()> {
    suite.warm()?;
    keep(
        suite,
        "kept",
        "import random; kept = list(range(1000))\nopen('/root/kept', 'w').write('kept')\n\
         import os; d = os.open('/dev/vda', os.O_RDWR); os.pwrite(d, b'on disk', 4096 * 5); os.fsync(d)",
    )?;
    kill_zygote(suite, "kept")?;
    let children = suite.fork_of("kept", 3)?;
    let mut drawn = Vec::new();
    for child in &children {
        ensure!(child.value("sum(kept)")? == "499500", "the interpreter lost its object");
        ensure!(child.value("open('/root/kept').read()")? == "'kept'", "the file is lost");
        ensure!(child.value("os.pread(d, 7, 4096 * 5)")? == "b'on disk'", "the disk is lost");
        drawn.push(child.value("random.random()")?);
        drawn.push(child.value("os.urandom(8).hex()")?);
    }
    drawn.sort();
    drawn.dedup();
    ensure!(drawn.len() == 6, "random numbers repeat: {drawn:?}");
    // Once more: the second generation comes of the same files.
    kill_zygote(suite, "kept")?;
    ensure!(suite.fork_of("kept", 1)?[0].value("kept[-1]")? == "999", "the second load differs");
    suite.kill_all()?;
    remove(suite, "kept")
}

/// A guest that writes checksummed records to RAM and disk: each snapshot of it verifies, and so does the guest.
fn ring(suite: &Suite, mode: &str, rounds: u32) -> Result<()> {
    let source = suite.fork_one()?;
    source.guest(&["ring", "serve", "/tmp/ring", "/dev/vda"])?;
    let mut last = 0;
    for round in 0..rounds {
        let tag = format!("ring{round}");
        let said: Value = suite
            .forkd(["branch", &source.id, "--snapshot", &tag, "--mode", mode, "--json"])
            .ok()?
            .json()?;
        ensure!(said["status"] == "durable", "{said}");
        if let Some(pause) = said["receipt"]["source"]["pause_us"].as_u64() {
            println!("    paused for {pause} us");
        }
        if mode == "fork" {
            kill_zygote(suite, &tag)?;
        }
        let loaded = suite.fork_of(&tag, 1)?;
        let head: u64 = loaded[0]
            .guest(&["ring", "verify", "/tmp/ring"])
            .with_context(|| format!("snapshot {round}"))?
            .parse()?;
        ensure!(head > last, "snapshot {round} stands at record {head}, an older one at {last}");
        last = source.guest(&["ring", "head", "/tmp/ring"])?.parse()?;
        loaded[0].kill()?;
        remove(suite, &tag)?;
    }
    source.guest(&["ring", "verify", "/tmp/ring"]).context("the source")?;
    source.kill()
}

fn a_running_vm_is_kept_by_fork(suite: &Suite) -> Result<()> {
    ring(suite, "fork", 4)
}

fn a_running_vm_is_kept_by_copying(suite: &Suite) -> Result<()> {
    ring(suite, "full", 3)
}

/// Three generations of diffs, each over the one before, of a guest that writes to RAM and disk all the time.
fn diffs_of_diffs_verify(suite: &Suite) -> Result<()> {
    suite.warm()?;
    keep(suite, "base", "generation = [0]")?;
    let (mut parent, mut last) = ("base".to_string(), 0);
    for round in 1..=3 {
        kill_zygote(suite, &parent)?;
        let source = suite.fork_of(&parent, 1)?.remove(0);
        source.run(&format!("generation.append({round})"))?;
        if round == 1 {
            source.guest(&["ring", "serve", "/tmp/ring", "/dev/vda"])?;
        }
        // Some of RAM changes between the generations, and most does not.
        source.run("filler = bytes(range(256)) * 4096")?;
        // The child above went on after it was loaded; this VM has it to catch up with.
        eventually(suite.deadline(), "the ring's writer goes on", || {
            Ok(source.guest(&["ring", "head", "/tmp/ring"])?.parse::<u64>()? > last)
        })?;
        let tag = format!("diff{round}");
        let said: Value = suite
            .forkd(["branch", &source.id, "--snapshot", &tag, "--mode", "diff", "--json"])
            .ok()?
            .json()?;
        println!("    paused for {} us", said["receipt"]["source"]["pause_us"]);
        source.guest(&["ring", "verify", "/tmp/ring"]).context("the source")?;
        suite.kill_all()?;
        let on_disk = std::fs::metadata(suite.store().join(&tag).join("memory"))?;
        let on_disk = std::os::unix::fs::MetadataExt::blocks(&on_disk) * 512;
        println!("    {tag} has {} KiB of RAM on disk", on_disk >> 10);
        ensure!(on_disk < 32 << 20, "a diff of {on_disk} bytes");
        let loaded = suite.fork_of(&tag, 1)?.remove(0);
        let head: u64 = loaded
            .guest(&["ring", "verify", "/tmp/ring"])
            .with_context(|| format!("diff {round}"))?
            .parse()?;
        ensure!(head > last, "diff {round} stands at record {head}, an older one at {last}");
        last = head;
        ensure!(loaded.value("generation")? == format!("{:?}", (0..=round).collect::<Vec<_>>()));
        suite.kill_all()?;
        parent = tag;
    }
    // What is in between cannot go, and the flat copy is the same.
    suite.forkd(["snapshot", "rm", "diff1"]).output()?.one_line(&["diff2"])?;
    suite.forkd(["snapshot", "verify", "diff3"]).ok()?;
    kill_zygote(suite, "diff3")?;
    suite.forkd(["snapshot", "compact", "diff3"]).ok()?;
    let flat = suite.fork_of("diff3", 1)?.remove(0);
    flat.guest(&["ring", "verify", "/tmp/ring"]).context("the compacted one")?;
    ensure!(flat.value("generation")? == "[0, 1, 2, 3]");
    suite.kill_all()?;
    suite.forkd(["snapshot", "rm", "diff3"]).ok()?;
    suite.forkd(["snapshot", "rm", "base", "--cascade"]).ok().map(drop)
}

/// One line that names the snapshot, and nothing stays.
fn what_cannot_be_saved_is_named(suite: &Suite) -> Result<()> {
    suite.warm()?;
    keep(suite, "twice", "pass")?;
    let refused = |args: &[&str], word: &str| -> Result<()> {
        let output = suite.forkd(args.iter().copied()).output()?.status_is(1)?;
        output.one_line(&[word]).map(drop).with_context(|| format!("{args:?}"))
    };
    refused(&["snapshot", "save", "twice"], "twice")?;
    refused(&["snapshot", "save", "no-such"], "no-such")?;
    let source = suite.fork_one()?;
    refused(&["branch", &source.id, "--snapshot", "twice"], "twice")?;
    refused(&["branch", &source.id, "--snapshot", "a/b"], "a/b")?;
    refused(&["branch", &source.id, "--snapshot", WARM], WARM)?;
    ensure!(source.value("1 + 1")? == "2", "the source does not go on");
    // A snapshot whose RAM is damaged is not run.
    kill_zygote(suite, "twice")?;
    let memory = suite.store().join("twice/memory");
    let state = suite.store().join("twice/state");
    let mut bytes = std::fs::read(&state)?;
    bytes[100] ^= 1;
    std::fs::write(&state, &bytes)?;
    refused(&["fork", "twice"], "state")?;
    bytes[100] ^= 1;
    std::fs::write(&state, &bytes)?;
    let kept = std::fs::rename(&memory, memory.with_extension("away"));
    kept.context("the memory's file")?;
    refused(&["fork", "twice"], "memory")?;
    std::fs::rename(memory.with_extension("away"), &memory)?;
    suite.kill_all()?;
    let listed: Value = suite.forkd(["snapshot", "ls", "--json"]).ok()?.json()?;
    ensure!(listed.to_string().contains("twice"), "the list lacks it: {listed}");
    remove(suite, "twice")
}
