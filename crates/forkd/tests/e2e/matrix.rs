//! Each way to branch a VM, on each kind of RAM: what comes of it is of one instant.
//!
//! In the guest four writers fill rings in memory and on the disk as fast as they can (`guest ring`). Every branch has to
//! show rings without a torn page, and disks that agree with them. By default each cell gets a few branches, at
//! 512 MiB; with `FORKD_MATRIX=N` each gets N, at 4 GiB (RAM in two regions) too: `make matrix`.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::fixture::{SMP, Suite, WARM};
use crate::runner::{Test, tests};
use crate::vm::Vm;

pub const TESTS: &[Test] = tests!["matrix":
    with_one_vcpu 3600,
    with_two_vcpus 3600,
    of_4_gib_with_one_vcpu 7200,
    of_4_gib_with_two_vcpus 7200,
];

/// Branches of each cell, unless it is said otherwise.
const FEW: usize = 1;
/// RAM beyond the hole below 4 GiB, in MiB.
const LARGE_MIB: u64 = 4096;
/// Threads that write.
const WRITERS: &str = "4";

/// `ring verify` of tests/guest/ring.c, in the interpreter that is warm: to start a program in a guest whose writers want
/// all of its CPU takes three seconds, to ask Python half of one. Places of the words are those of `struct ring`.
const VERIFY: &str = "
import mmap, struct, time
ring = mmap.mmap(os.open('/tmp/ring', os.O_RDWR), 0)
SIZE = 4096 + 64 * 32768
def word(at):
    return struct.unpack_from('<Q', ring, at)[0]
def heads():
    return [word(i * SIZE) for i in range(word(24))]
def until(holds, what):
    end = time.monotonic() + 90
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.01)
def verify():
    # They go on; each has to end its record, and the disk the write of it, before it stops.
    first = sum(heads())
    until(lambda: word(40) or sum(heads()) > first + 2, 'the writers stand still')
    for i in range(word(24)):
        struct.pack_into('<Q', ring, i * SIZE + 8, 1)
    until(lambda: word(40), 'a writer does not stop')
    assert word(40) == 1, ring[48:304]
    return sum(heads())
heads()
";

/// Kinds of RAM: `anonymous` is that of children in memory, the others are for `--memory`.
const CELLS: [(&str, &[&str]); 5] = [
    ("anonymous", &["fork", "diff", "full"]),
    ("file", &["fork", "diff", "full"]),
    ("memfd-private", &["fork", "diff", "full"]),
    ("memfd-shared", &["live", "diff", "full"]),
    ("userfault", &["fork", "diff", "full"]),
];

fn with_one_vcpu(suite: &Suite) -> Result<()> {
    suite.warm()?;
    all_cells(suite, WARM, branches().unwrap_or(FEW))
}

fn with_two_vcpus(suite: &Suite) -> Result<()> {
    suite.smp()?;
    all_cells(suite, SMP, branches().unwrap_or(FEW))
}

fn of_4_gib_with_one_vcpu(suite: &Suite) -> Result<()> {
    large(suite, "large", 1)
}

fn of_4_gib_with_two_vcpus(suite: &Suite) -> Result<()> {
    large(suite, "large-smp", 2)
}

/// What `FORKD_MATRIX` says.
fn branches() -> Option<usize> {
    std::env::var("FORKD_MATRIX").ok()?.parse().ok()
}

fn large(suite: &Suite, tag: &str, vcpus: u32) -> Result<()> {
    let Some(branches) = branches() else {
        println!("    not without FORKD_MATRIX");
        return Ok(());
    };
    suite.create_with(tag, vcpus, LARGE_MIB, "import base64, os")?;
    all_cells(suite, tag, branches)?;
    suite.forkd(["snapshot", "rm", tag]).ok().map(drop)
}

fn all_cells(suite: &Suite, tag: &str, branches: usize) -> Result<()> {
    suite.save(tag)?;
    for (memory, modes) in CELLS {
        let vm = source(suite, tag, memory)?;
        // They take all that is left of the guest's CPUs, but who asks how they are gets an answer at once.
        let serve = ["/tmp/guest", "ring", "serve", "/tmp/ring", "/dev/vda", WRITERS];
        vm.exec(&[&["/usr/bin/nice", "-n", "19"], serve.as_slice()].concat()).ok()?;
        vm.run(VERIFY)?;
        for mode in modes {
            let cell = || format!("{tag}, {memory}, {mode}");
            let pauses = one_cell(suite, &vm, mode, branches).with_context(cell)?;
            let (p50, longest) = (pauses[pauses.len() / 2], pauses[pauses.len() - 1]);
            println!("    {}: {branches} agree; paused {p50} us, longest {longest} us", cell());
        }
        vm.value("verify()").context("the source")?;
        suite.kill_all()?;
    }
    Ok(())
}

fn source<'s>(suite: &'s Suite, tag: &str, memory: &str) -> Result<Vm<'s>> {
    if memory == "anonymous" {
        return suite.fork_of(tag, 1)?.pop().context("one child");
    }
    suite.load(tag, memory)
}

/// The pauses of that many branches, sorted, in microseconds.
fn one_cell(suite: &Suite, vm: &Vm<'_>, mode: &str, branches: usize) -> Result<Vec<u64>> {
    let mut pauses = Vec::new();
    let before = head(vm)?;
    for number in 0..branches {
        let tag = format!("cell-{number}");
        let (branch, pause) = match mode {
            "fork" => {
                let branched = vm.branch(1)?;
                let pause = branched.pause.context("a running VM pauses")?;
                (branched.children.into_iter().next().context("one branch")?, pause.pause_us)
            }
            _ => {
                let args = ["branch", &vm.id, "--snapshot", &tag, "--mode", mode, "--json"];
                let said: Value = suite.forkd(args).ok()?.json()?;
                let pause = said["receipt"]["source"]["pause_us"].as_u64().context("a pause")?;
                (suite.fork_of(&tag, 1)?.pop().context("one child")?, pause)
            }
        };
        // It goes on until here; while the branch is looked at it would only take CPU from that.
        vm.set_running(false)?;
        let written: u64 =
            branch.value("verify()").with_context(|| format!("branch {number}"))?.parse()?;
        ensure!(written > before, "branch {number} has {written} records, its source had {before}");
        branch.kill()?;
        vm.set_running(true)?;
        pauses.push(pause);
    }
    let after = head(vm)?;
    ensure!(after > before, "the source's writers stand still at {after}");
    if mode != "fork" {
        // Diffs are over one another.
        for number in (0..branches).rev() {
            suite.forkd(["snapshot", "rm", &format!("cell-{number}")]).ok()?;
        }
    }
    pauses.sort_unstable();
    Ok(pauses)
}

fn head(vm: &Vm<'_>) -> Result<u64> {
    Ok(vm.value("sum(heads())")?.parse()?)
}
