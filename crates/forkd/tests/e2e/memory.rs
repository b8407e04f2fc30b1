//! All of a guest's RAM is part of a fork.

use anyhow::{Context, Result, ensure};

use crate::fixture::{MEM_MIB, Suite};
use crate::runner::{Test, tests};

pub const TESTS: &[Test] = tests!["memory":
    ram_is_whole_up_to_its_last_page 300,
];

/// What the guest's process leaves to others, in MiB.
const KEEP_MIB: &str = "24";

/// A process holds nearly all memory; every page of it is right in the branch, and the highest page that it got is within
/// the last MiB of RAM.
fn ram_is_whole_up_to_its_last_page(suite: &Suite) -> Result<()> {
    let source = suite.fork_one()?;
    source.guest(&["fill", "start", "/tmp/fill", KEEP_MIB])?;
    let branch = source.branch_one()?;
    let last_frame = (MEM_MIB << 20) / 4096 - 1;
    for vm in [&branch, &source] {
        let text = vm.guest(&["fill", "check", "/tmp/fill"])?;
        let (pages, highest) = text.split_once(' ').context("two numbers")?;
        let (pages, highest): (u64, u64) = (pages.parse()?, highest.parse()?);
        println!("    {pages} pages, the highest at frame {highest} of {last_frame}");
        ensure!(pages > MEM_MIB * 256 / 3, "only {pages} pages were filled");
        ensure!(highest + 256 > last_frame, "frame {highest} is far from the last, {last_frame}");
    }
    Ok(())
}
