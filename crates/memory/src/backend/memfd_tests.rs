use super::*;

use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};

use crate::backend::BranchMode;
use crate::memfd::{MemfdOptions, create_empty};
use crate::testing::{MIB, PAGE, fork_with, pattern};

const LEN: usize = 16 << 20;

fn region(name: &str, len: usize) -> MemfdRegion {
    create_empty(len as u64, name, &MemfdOptions::default()).expect("a memfd")
}

fn read(ram: &Memfd, at: usize) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    ram.mapping.read_at(at, &mut page).expect("within RAM");
    page
}

#[test]
fn shared_writes_reach_the_memfd_and_back() {
    let region = region("shared", LEN);
    let seen = region.try_clone().expect("clone");
    let ram = Memfd::new(LEN, region, Sharing::Shared).expect("RAM");
    assert_eq!(ram.mapping.address() % HUGE_PAGE, 0);
    ram.mapping.write_at(LEN - PAGE, &[3; PAGE]).expect("write");
    let mut page = [0; PAGE];
    seen.file().read_exact_at(&mut page, (LEN - PAGE) as u64).expect("read");
    assert_eq!(page, [3; PAGE]);
    seen.file().write_all_at(&[4; PAGE], 0).expect("write");
    assert_eq!(read(&ram, 0), [4; PAGE]);
}

#[test]
fn private_writes_stay() {
    let region = region("private", LEN);
    region.file().write_all_at(&pattern(LEN, 1), 0).expect("write");
    let seen = region.try_clone().expect("clone");
    let ram = Memfd::new(LEN, region, Sharing::Private).expect("RAM");
    assert!(read(&ram, PAGE)[..] == pattern(LEN, 1)[PAGE..2 * PAGE]);
    ram.mapping.write_at(PAGE, &[3; PAGE]).expect("write");
    ram.discard(2 * PAGE, PAGE).expect("discard");
    assert_eq!((read(&ram, PAGE), read(&ram, 2 * PAGE)), ([3; PAGE], [0; PAGE]));
    let mut bytes = vec![0; LEN];
    seen.file().read_exact_at(&mut bytes, 0).expect("read");
    assert!(bytes == pattern(LEN, 1), "the snapshot is as it was");
}

/// To touch a hole costs the process a page, and not all others one as well.
#[test]
fn large_holes_are_the_processs_own() {
    let region = region("holes", LEN);
    let data = |at: usize| region.file().write_all_at(&pattern(PAGE, at as u64), at as u64);
    // The last hole is one page short of what is left out.
    for at in [PAGE, 6 << 20, (6 << 20) + HUGE_PAGE, LEN - PAGE] {
        data(at).expect("write");
    }
    let seen = region.try_clone().expect("clone");
    let used = || seen.file().metadata().expect("stat").blocks() * 512;
    let ram = Memfd::new(LEN, region, Sharing::Private).expect("RAM");
    for at in [PAGE, 6 << 20, (6 << 20) + HUGE_PAGE, LEN - PAGE] {
        assert!(read(&ram, at)[..] == pattern(PAGE, at as u64)[..], "{at:#x}");
    }
    ram.mapping.write_at(4 << 20, &[5; PAGE]).expect("write");
    ram.mapping.write_at(12 << 20, &[6; PAGE]).expect("write");
    assert_eq!((read(&ram, 4 << 20), read(&ram, 12 << 20)), ([5; PAGE], [6; PAGE]));
    assert_eq!(read(&ram, 0), [0; PAGE]);
    assert_eq!(used(), 4 * PAGE as u64, "no hole was filled");
    assert_eq!(read(&ram, 7 << 20), [0; PAGE]);
    assert_eq!(used(), 5 * PAGE as u64, "but for a small one");
    assert_eq!(least_hole(64 << 30), 8 << 20);
}

#[test]
fn a_shared_discard_frees_memory_for_all() {
    let region = region("discarded", LEN);
    let other = region.try_clone().expect("clone");
    let other = Memfd::new(LEN, other, Sharing::Shared).expect("RAM");
    let ram = Memfd::new(LEN, region, Sharing::Shared).expect("RAM");
    ram.mapping.write_at(0, &pattern(LEN, 2)).expect("write");
    let used = || ram.region.file().metadata().expect("stat").blocks() * 512;
    assert_eq!(used(), LEN as u64);
    ram.discard(PAGE, LEN - 2 * PAGE).expect("discard");
    assert_eq!(used(), 2 * PAGE as u64);
    assert_eq!((read(&ram, PAGE), read(&other, LEN - 2 * PAGE)), ([0; PAGE], [0; PAGE]));
    assert_eq!(read(&other, 0)[..], pattern(LEN, 2)[..PAGE]);
    assert_eq!(read(&other, LEN - PAGE)[..], pattern(LEN, 2)[LEN - PAGE..]);
    ram.discard(0, 0).expect("nothing");
    for (offset, len) in [(LEN, PAGE), (0, LEN + PAGE), (usize::MAX, 2)] {
        assert!(ram.discard(offset, len).is_err(), "{offset:#x} {len:#x}");
    }
}

#[test]
fn shared_ram_is_not_forked() {
    let mut ram = Memfd::new(LEN, region("no fork", LEN), Sharing::Shared).expect("RAM");
    assert_eq!(ram.fork_behaviour(), ForkBehaviour::Shared);
    let error = ram.check_fork().expect_err("refused").to_string();
    assert!(error.contains("memfd-shared") && error.contains("--mode live"), "{error}");
    let mut child = fork_with(|| i32::from(ram.detach_child().is_ok()));
    assert_eq!(child.wait().expect("wait").code(), Some(0), "nor does a child get away with it");
    assert!(ram.why_not(BranchMode::Live).is_none());
}

#[test]
fn regions_that_do_not_fit_are_refused() {
    for sharing in [Sharing::Shared, Sharing::Private] {
        let error = Memfd::new(LEN, region("small", LEN - PAGE), sharing).expect_err("too small");
        assert!(error.to_string().contains(&(LEN - PAGE).to_string()), "{error}");
        assert!(Memfd::new(LEN, region("large", LEN + PAGE), sharing).is_err());
    }
}

/// The host need not have huge pages for this: nothing is touched.
#[test]
fn huge_pages_are_for_sharing_only() {
    let huge = |len: usize| {
        let memfd = forkd_sys::memfd::create("huge", true).expect("a memfd");
        memfd.set_len(len as u64).expect("size");
        forkd_sys::memfd::seal_size(&memfd).expect("seal");
        MemfdRegion::from_fd(memfd.into()).expect("a region")
    };
    assert!(huge(LEN).has_huge_pages());
    let error = Memfd::new(LEN, huge(LEN), Sharing::Private).expect_err("private").to_string();
    assert!(error.contains("privately"), "{error}");
    assert!(Memfd::new(LEN - (1 << 20), huge(LEN), Sharing::Shared).is_err(), "not all of it");
    // More than any host has: the pool is asked at mmap.
    let more = 1 << 45;
    assert!(Memfd::new(more, huge(more), Sharing::Shared).is_err());
}

/// Proportional set size of a memfd in a process, in bytes: pages that n processes map count 1/n.
fn pss(pid: u32, name: &str) -> u64 {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).expect("smaps");
    let mut ours = false;
    let mut total = 0;
    for line in smaps.lines() {
        if let Some(rest) = line.strip_prefix("Pss:") {
            let kib: u64 = rest.trim().trim_end_matches(" kB").parse().expect("a number");
            total += if ours { kib << 10 } else { 0 };
        } else if line.split(' ').next().is_some_and(|word| word.contains('-')) {
            ours = line.contains(&format!("/memfd:{name} "));
        }
    }
    total
}

/// Each child opens the one memfd by its path, as a child of a snapshot does.
#[test]
fn children_of_one_memfd_cost_one_copy() {
    const CHILDREN: usize = 5;
    let owner = region("counted-once", LEN);
    owner.file().write_all_at(&pattern(LEN, 3), 0).expect("write");
    let path = owner.backend_path();
    let (mut ready, tell_ready) = std::io::pipe().expect("a pipe");
    let (wait_end, mut end) = std::io::pipe().expect("a pipe");
    let mut children: Vec<_> = (0..CHILDREN)
        .map(|_| {
            fork_with(|| {
                let Ok(region) = MemfdRegion::open(&path) else { return 1 };
                let Ok(ram) = Memfd::new(LEN, region, Sharing::Private) else { return 2 };
                let mut bytes = vec![0; LEN];
                // All is read, and a MiB of it written.
                if ram.mapping.read_at(0, &mut bytes).is_err() || bytes != pattern(LEN, 3) {
                    return 3;
                }
                if ram.mapping.write_at(0, &bytes[1..=1 << 20]).is_err() {
                    return 4;
                }
                let (mut tell_ready, mut wait_end) = (&tell_ready, &wait_end);
                let told = tell_ready.write_all(&[1]).and_then(|()| wait_end.read_exact(&mut [0]));
                i32::from(told.is_err()) * 5
            })
        })
        .collect();
    let mut all_ready = [0; CHILDREN];
    ready.read_exact(&mut all_ready).expect("the children are ready");
    let total: u64 = children.iter().map(|child| pss(child.pid(), "counted-once")).sum();
    end.write_all(&all_ready).expect("the children wait");
    for child in &mut children {
        assert_eq!(child.wait().expect("wait").code(), Some(0));
    }
    // One copy for all, and a MiB of its own for each; the smallest number rules out a wrong count.
    let (least, most) = (LEN as u64 - MIB, LEN as u64 + CHILDREN as u64 * (MIB + MIB / 8));
    assert!((least..=most).contains(&total), "{total} is not within {least}..={most}");
}

#[test]
fn what_the_memfd_has_is_told() {
    let region = region("told", LEN);
    for at in [PAGE, 3 * PAGE, 4 * PAGE, LEN - PAGE] {
        region.file().write_all_at(&[1; PAGE], at as u64).expect("write");
    }
    let told = region.try_clone().expect("clone");
    let pages = |range: Range<usize>| (range.start * PAGE) as u64..(range.end * PAGE) as u64;
    let expected = [pages(1..2), pages(3..5), pages(LEN / PAGE - 1..LEN / PAGE)];
    let ram = Memfd::new(LEN, region, Sharing::Private).expect("RAM");
    ram.mapping.write_at(8 * PAGE, &[2; PAGE]).expect("write");
    assert_eq!(ram.backed().expect("ranges"), expected, "not what is the process's own");
    let ram = Memfd::new(LEN, told, Sharing::Shared).expect("RAM");
    ram.mapping.write_at(8 * PAGE, &[2; PAGE]).expect("write");
    assert_eq!(ram.backed().expect("ranges").len(), 4, "what is written is in the memfd");
}

#[test]
fn of_very_many_runs_the_rest_is_one() {
    let len = 2 * (MAX_RUNS + 8) * PAGE;
    let region = region("runs", len);
    for page in (0..len / PAGE).step_by(2) {
        region.file().write_all_at(&[1], (page * PAGE) as u64).expect("write");
    }
    let ram = Memfd::new(len, region, Sharing::Shared).expect("RAM");
    let told = ram.backed().expect("ranges");
    assert_eq!(told.len(), MAX_RUNS + 1);
    assert_eq!(told[MAX_RUNS], (2 * MAX_RUNS * PAGE) as u64..len as u64);
}
