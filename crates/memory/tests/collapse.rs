//! Collapsing real RAM. In a process of its own: a fork by another test would make pages shared.

#![allow(unsafe_code)]
#![allow(clippy::expect_used, reason = "a test")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use forkd_memory::collapse::{CollapseAhead, CollapseGoal, Collapsed};
use forkd_memory::{AnonOptions, GuestRam};
use forkd_sys::fork::{Child, Fork, exit_now, fork};
use forkd_sys::pagemap::{Categories, Pagemap, Query};
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 1 << 20;
const PAGE: usize = 4096;
/// Huge pages that one call makes.
const BATCH: u64 = 4;
const ALL: CollapseGoal =
    CollapseGoal { most: 0, enough: 0, time: Duration::from_secs(30), reserve_mib: 0 };
const RANGE: usize = 2 << 20;

/// One test at a time.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes without a zero page, the same for the same seed.
fn pattern(len: usize, seed: u64) -> Vec<u8> {
    (0..len as u64 / 8).flat_map(|n| ((n << 8 | 1) * (seed | 1)).to_ne_bytes()).collect()
}

/// A child that has what this process has, until it is told to end; then it says whether `holds`.
struct Witness {
    child: Child,
    tell: std::io::PipeWriter,
}

impl Witness {
    fn fork(holds: impl FnOnce() -> bool) -> Self {
        let (until, tell) = std::io::pipe().expect("a pipe");
        // SAFETY: the child reads its pipe and RAM, allocates, takes no lock of another thread, and ends by _exit.
        match unsafe { fork() }.expect("fork") {
            Fork::Parent(child) => Self { child, tell },
            Fork::Child => {
                use std::io::Read;
                drop(tell);
                // It ends as well if the test does.
                let told = (&until).read(&mut [0]).is_ok();
                exit_now(i32::from(!(told && holds())))
            }
        }
    }

    fn ends_well(mut self) {
        drop(self.tell);
        assert_eq!(self.child.wait().expect("wait").code(), Some(0), "the child has what it had");
    }
}

/// RAM in small pages as it is after a fork: huge pages were advised against.
fn small_ram(mem_mib: u32) -> GuestRam {
    let ram = GuestRam::anonymous(mem_mib, AnonOptions::default()).expect("RAM");
    ram.prefer_small_pages().expect("small pages");
    ram
}

fn collapse(ram: &GuestRam, goal: CollapseGoal) -> Collapsed {
    assert!(ram.can_collapse());
    let ahead = CollapseAhead::start(ram, goal).expect("start");
    let told = forkd_sys::reactor::wait_readable(ahead.told_fd(), Some(Duration::from_secs(60)));
    assert!(told.expect("poll"), "it tells");
    ahead.finish().expect("finish")
}

fn huge_pages(ram: &GuestRam) -> u64 {
    let mut pagemap = Pagemap::own().expect("pagemap");
    let region = ram.regions().next().expect("a region");
    let (query, mut bytes) = (Query { all_of: Categories::HUGE, ..Query::default() }, 0);
    let all = region.host_addr..region.host_addr + region.len;
    pagemap.scan(all, query, |p| bytes += p.range.end - p.range.start).expect("scan");
    bytes / (2 * MIB)
}

fn read(ram: &GuestRam, at: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.guest().read_slice(&mut bytes, GuestAddress(at as u64)).expect("read");
    bytes
}

#[test]
fn small_pages_become_huge_ones_with_the_same_bytes() {
    let _turn = turn();
    let ram = small_ram(16);
    let bytes = pattern(8 * RANGE, 7);
    ram.guest().write_slice(&bytes, GuestAddress(0)).expect("write");
    assert_eq!(huge_pages(&ram), 0);
    let done = collapse(&ram, ALL);
    assert_eq!((done.made, done.huge, done.small), (8, 8, 0), "{done:?}");
    assert_eq!(huge_pages(&ram), 8);
    assert!(read(&ram, 0, bytes.len()) == bytes, "the bytes are the same");
    // Again, there is nothing to do.
    assert_eq!(collapse(&ram, ALL).made, 0);
}

#[test]
fn what_is_half_empty_is_left_alone_and_so_is_the_advice() {
    let _turn = turn();
    let ram = small_ram(16);
    // One page less than half, half with a hole in the midst, and nothing.
    ram.guest().write_slice(&pattern(255 * PAGE, 1), GuestAddress(0)).expect("write");
    for page in (0..512).step_by(2) {
        let at = GuestAddress((RANGE + page * PAGE) as u64);
        ram.guest().write_obj(page as u64 + 1, at).expect("write");
    }
    let done = collapse(&ram, ALL);
    assert_eq!((done.made, done.huge, done.small), (1, 1, 255), "{done:?}");
    for page in 0..512 {
        let word: u64 =
            ram.guest().read_obj(GuestAddress((RANGE + page * PAGE) as u64)).expect("read");
        assert_eq!(word, if page % 2 == 0 { page as u64 + 1 } else { 0 });
    }
    // The first touch of another range is a small page still.
    ram.guest().write_obj(1u8, GuestAddress(4 * RANGE as u64)).expect("write");
    assert_eq!(huge_pages(&ram), 1);
    assert!(ram.prefers_small_pages());
}

#[test]
fn pages_that_others_have_are_taken_only_where_half_are_own() {
    let _turn = turn();
    let ram = small_ram(16);
    let bytes = pattern(4 * RANGE, 3);
    ram.guest().write_slice(&bytes, GuestAddress(0)).expect("write");
    let child = Witness::fork(|| read(&ram, 0, bytes.len()) == bytes);
    // All are shared; of the first range all but a few are written, of the second a few.
    ram.guest().write_slice(&pattern(500 * PAGE, 4), GuestAddress(0)).expect("write");
    ram.guest().write_slice(&pattern(9 * PAGE, 5), GuestAddress(RANGE as u64)).expect("write");
    let done = collapse(&ram, ALL);
    assert_eq!((done.made, done.huge, done.small), (1, 1, 3 * 512), "{done:?}");
    assert!(read(&ram, 0, 500 * PAGE) == pattern(500 * PAGE, 4));
    assert!(read(&ram, 500 * PAGE, 12 * PAGE) == bytes[500 * PAGE..512 * PAGE]);
    child.ends_well();
    // It is gone: all are own ones.
    assert_eq!(collapse(&ram, ALL).made, 3);
}

#[test]
fn a_huge_page_that_a_fork_and_a_write_have_split_is_made_again() {
    let _turn = turn();
    let ram = GuestRam::anonymous(16, AnonOptions::default()).expect("RAM");
    ram.populate_write(0, 4 * RANGE as u64).expect("populate");
    if huge_pages(&ram) != 4 {
        return; // No huge pages to be had at the moment.
    }
    let child = Witness::fork(|| read(&ram, 0, 4 * RANGE).iter().all(|byte| *byte == 0));
    for at in (0..4 * RANGE).step_by(PAGE) {
        ram.guest().write_obj(at as u64, GuestAddress(at as u64)).expect("write");
    }
    assert_eq!(huge_pages(&ram), 0, "all are split");
    let done = collapse(&ram, ALL);
    assert_eq!((done.made, done.small), (4, 0), "also while the child has them: {done:?}");
    child.ends_well();
    for at in (0..4 * RANGE).step_by(PAGE) {
        assert_eq!(ram.guest().read_obj::<u64>(GuestAddress(at as u64)).expect("read"), at as u64);
    }
}

#[test]
fn it_stops_where_it_is_told_to() {
    let _turn = turn();
    let ram = small_ram(256);
    ram.populate_write(0, 200 * MIB).expect("populate");
    let nothing = [
        CollapseGoal { most: 100 * 512, ..ALL },
        CollapseGoal { time: Duration::ZERO, ..ALL },
        CollapseGoal { reserve_mib: u64::MAX / 2, ..ALL },
    ];
    for goal in nothing {
        let done = collapse(&ram, goal);
        assert_eq!((done.made, done.small), (0, 100 * 512), "{goal:?}");
    }
    let done = collapse(&ram, CollapseGoal { enough: 50 * 512, ..ALL });
    assert!(done.small <= 50 * 512 && done.small > (50 - BATCH) * 512, "{done:?}");
    // Dropped at once it leaves RAM as RAM.
    drop(CollapseAhead::start(&ram, ALL).expect("start"));
    assert_eq!(read(&ram, 0, PAGE), vec![0; PAGE]);
}

#[test]
fn writers_lose_nothing_meanwhile() {
    let _turn = turn();
    const WORDS: usize = 4;
    let ram = small_ram(64);
    ram.populate_write(0, 64 * MIB).expect("populate");
    let stop = AtomicBool::new(false);
    let rounds = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..2)
            .map(|me: usize| {
                let (ram, stop, rounds) = (&ram, &stop, &rounds);
                scope.spawn(move || {
                    let mut value = 0u64;
                    while !stop.load(Ordering::Relaxed) {
                        value += 1;
                        for page in (me..64 * 256).step_by(2 * WORDS) {
                            let at = GuestAddress((page * PAGE + me * 8) as u64);
                            let was: u64 = ram.guest().read_obj(at).expect("read");
                            assert_eq!(was, value - 1, "page {page}");
                            ram.guest().write_obj(value, at).expect("write");
                        }
                        rounds.fetch_add(1, Ordering::Relaxed);
                    }
                    value
                })
            })
            .collect();
        let done = collapse(&ram, ALL);
        assert_eq!((done.made, done.small), (32, 0), "{done:?}");
        let seen = rounds.load(Ordering::Relaxed);
        while rounds.load(Ordering::Relaxed) < seen + 4 {
            std::thread::yield_now();
        }
        stop.store(true, Ordering::Relaxed);
        for (me, writer) in writers.into_iter().enumerate() {
            let value = writer.join().expect("a writer");
            for page in (me..64 * 256).step_by(2 * WORDS) {
                let at = GuestAddress((page * PAGE + me * 8) as u64);
                assert_eq!(ram.guest().read_obj::<u64>(at).expect("read"), value);
            }
        }
    });
}
