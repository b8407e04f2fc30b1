//! All of a guest's RAM is part of a fork.

use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};

use crate::fixture::{MEM_MIB, Suite};
use crate::runner::{Test, tests};

pub const TESTS: &[Test] = tests!["memory":
    ram_is_whole_up_to_its_last_page 300,
];

/// What the guest's process leaves to others, in MiB.
const KEEP_MIB: &str = "24";

const PAGE: u64 = 4096;

/// A process holds most of memory, and every page of it is right in the branch. The last page of RAM is the kernel's
/// own (it allocates from the top when it boots): that one is compared from outside.
fn ram_is_whole_up_to_its_last_page(suite: &Suite) -> Result<()> {
    let source = suite.fork_one()?;
    source.guest(&["fill", "start", "/tmp/fill", KEEP_MIB])?;
    let branch = source.branch_one()?;
    for vm in [&branch, &source] {
        let pages: u64 = vm.guest(&["fill", "check", "/tmp/fill"])?.trim().parse()?;
        println!("    {pages} pages of {}", MEM_MIB * 256);
        ensure!(pages > MEM_MIB * 256 * 2 / 3, "only {pages} pages were filled");
    }
    let (ours, theirs) = (last_page(source.pid)?, last_page(branch.pid)?);
    ensure!(ours.iter().any(|b| *b != 0), "the last page of RAM is empty, so it shows nothing");
    ensure!(ours == theirs, "the last page of RAM differs in the branch");
    Ok(())
}

/// The last page of guest RAM, read out of the VM's process: RAM is its one anonymous mapping of that size.
fn last_page(pid: u32) -> Result<Vec<u8>> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let end = maps.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let (start, end) =
            (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
        (words.count() == 4 && end - start == MEM_MIB << 20).then_some(end)
    });
    let end = end.context("no mapping of the size of RAM")?;
    let mut page = vec![0; PAGE as usize];
    std::fs::File::open(format!("/proc/{pid}/mem"))?.read_exact_at(&mut page, end - PAGE)?;
    Ok(page)
}
