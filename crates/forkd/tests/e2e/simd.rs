//! Vector registers survive context switches and forks.

use anyhow::{Result, ensure};

use crate::fixture::Suite;
use crate::runner::{Test, tests};
use crate::vm::Vm;

pub const TESTS: &[Test] = tests!["simd":
    vector_sums_are_right_across_forks_and_context_switches 300,
];

/// How many forks while the loops run.
const FORKS: usize = 20;
/// Rounds in each child after it was forked. A round takes some 20 ms, longer than a time slice.
const ROUNDS: &str = "10";

/// Loops that this CPU can run: name of the result's file, instruction set.
fn loops() -> Result<Vec<(&'static str, &'static str)>> {
    let flags = std::fs::read_to_string("/proc/cpuinfo")?;
    let has = |flag: &str| flags.split_whitespace().any(|f| f == flag);
    let mut loops = Vec::new();
    if has("avx2") {
        loops.extend([("/tmp/avx2-a", "avx2"), ("/tmp/avx2-b", "avx2")]);
    }
    if has("avx512f") && has("avx512bw") {
        loops.extend([("/tmp/avx512-a", "avx512"), ("/tmp/avx512-b", "avx512")]);
    }
    Ok(loops)
}

/// Two processes for each instruction set, with data of their own, on one CPU.
fn vector_sums_are_right_across_forks_and_context_switches(suite: &Suite) -> Result<()> {
    let loops = loops()?;
    if loops.is_empty() {
        println!("    this CPU has neither AVX2 nor AVX-512: nothing to show");
        return Ok(());
    }
    let source = suite.fork_one()?;
    for (file, set) in &loops {
        source.guest(&["simd", "start", file, set])?;
    }
    let check = |vm: &Vm<'_>, rounds: &str| -> Result<()> {
        for (file, _) in &loops {
            vm.guest(&["simd", "check", file, rounds])?;
        }
        Ok(())
    };
    for round in 0..FORKS {
        let branch = source.branch_one()?;
        check(&branch, ROUNDS)?;
        // The loops count a wrong sum for good, so looking at the source now and then misses none.
        if round % 5 == 0 {
            check(&source, "2")?;
        }
        branch.kill()?;
    }
    check(&source, ROUNDS)?;
    // The interpreter's numpy uses them as well, beside the loops.
    ensure!(source.value("int(array.sum())")? == "4999950000");
    Ok(())
}
