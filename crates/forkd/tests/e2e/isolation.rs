//! What one VM writes is seen by no other.

use anyhow::{Result, ensure};

use crate::fixture::Suite;
use crate::runner::{Test, tests};

pub const TESTS: &[Test] = tests!["isolation":
    memory_is_each_childs_own 60,
    files_are_each_childs_own 60,
    disks_are_each_childs_own 60,
    branches_and_sources_do_not_see_each_other 60,
];

fn memory_is_each_childs_own(suite: &Suite) -> Result<()> {
    let children = suite.fork(3)?;
    for (index, child) in children.iter().enumerate() {
        child.run(&format!("array += {index}; base = {index}; level.append({index})"))?;
    }
    for (index, child) in children.iter().enumerate() {
        let sum: usize = (0..100_000).sum::<usize>() + 100_000 * index;
        ensure!(child.value("int(array.sum())")? == sum.to_string());
        ensure!(child.value("(base, level)")? == format!("({index}, ['warm', {index}])"));
    }
    // Neither the zygote: who comes later finds what the warm-up made.
    let later = suite.fork_one()?;
    ensure!(later.value("(base, level, int(array.sum()))")? == "(1000, ['warm'], 4999950000)");
    Ok(())
}

fn files_are_each_childs_own(suite: &Suite) -> Result<()> {
    let children = suite.fork(2)?;
    children[0].sh("echo one > /root/mine; rm /etc/debian_version")?;
    let seen = children[1].sh("ls /root/mine 2>/dev/null; cat /etc/debian_version")?;
    ensure!(!seen.contains("mine") && !seen.is_empty(), "{seen}");
    let later = suite.fork_one()?;
    ensure!(later.sh("ls /root/mine 2>/dev/null; cat /etc/debian_version")? == seen);
    Ok(())
}

/// Writes a mark to the disk's first and last block; reads both.
fn disk_marks(mark: &str) -> String {
    format!(
        "import os\nfd = os.open('/dev/vda', os.O_RDWR)\nend = os.lseek(fd, 0, os.SEEK_END) - 4096\n\
         for at in (0, end): os.pwrite(fd, b'{mark}' * 512, at)\nos.fsync(fd)\nos.close(fd)"
    )
}

/// Reads both marks from the device, not from the page cache.
const READ_DISK: &str = "(lambda fd, end: [os.pread(fd, 8, at) for at in (0, end - 4096)])(\
     *(lambda fd: (os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED), \
     (fd, os.lseek(fd, 0, os.SEEK_END)))[1])(os.open('/dev/vda', os.O_RDONLY)))";

fn disks_are_each_childs_own(suite: &Suite) -> Result<()> {
    let children = suite.fork(2)?;
    children[0].run(&disk_marks("AAAAAAAA"))?;
    let zero = r"[b'\x00\x00\x00\x00\x00\x00\x00\x00', b'\x00\x00\x00\x00\x00\x00\x00\x00']";
    ensure!(children[1].value(READ_DISK)? == zero, "a sibling's disk is empty");
    children[1].run(&disk_marks("BBBBBBBB"))?;
    ensure!(children[0].value(READ_DISK)? == "[b'AAAAAAAA', b'AAAAAAAA']");
    ensure!(children[1].value(READ_DISK)? == "[b'BBBBBBBB', b'BBBBBBBB']");
    let later = suite.fork_one()?;
    ensure!(later.value(READ_DISK)? == zero, "the snapshot's disk is empty");
    Ok(())
}

fn branches_and_sources_do_not_see_each_other(suite: &Suite) -> Result<()> {
    let source = suite.fork_one()?;
    source.run(&format!("x = 'before'\n{}", disk_marks("SSSSSSSS")))?;
    let branch = source.branch_one()?;
    ensure!(branch.value("x")? == "'before'");
    ensure!(
        branch.value(READ_DISK)? == "[b'SSSSSSSS', b'SSSSSSSS']",
        "the disk is part of the fork"
    );
    source.run(&format!("x = 'source'\n{}", disk_marks("TTTTTTTT")))?;
    branch.run(&format!("x = 'branch'\n{}", disk_marks("UUUUUUUU")))?;
    ensure!(
        source.value(&format!("(x, {READ_DISK})"))? == "('source', [b'TTTTTTTT', b'TTTTTTTT'])"
    );
    ensure!(
        branch.value(&format!("(x, {READ_DISK})"))? == "('branch', [b'UUUUUUUU', b'UUUUUUUU'])"
    );
    Ok(())
}
