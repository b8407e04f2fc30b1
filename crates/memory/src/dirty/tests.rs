//! On real memory of this process.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use forkd_sys::fork::{Fork, exit_now, fork};
use forkd_sys::mmap::{AnonymousOptions, Mapping};
use proptest::prelude::*;

use super::*;

const PAGE: usize = 4096;
const HUGE: usize = 2 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Memory {
    Anonymous,
    Huge,
    Shared,
    Private,
}

const ALL: [Memory; 4] = [Memory::Anonymous, Memory::Huge, Memory::Shared, Memory::Private];

impl Memory {
    fn map(self, len: usize) -> Mapping {
        let fd = rustix::fs::memfd_create("dirty", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
        rustix::fs::ftruncate(&fd, len as u64).expect("size");
        // Data to be read from the file, so that reading is not the same as finding a hole.
        for page in 0..len / PAGE {
            let byte = page as u8 | 1;
            rustix::io::pwrite(&fd, &[byte], (page * PAGE) as u64).expect("write");
        }
        let options =
            AnonymousOptions { align: HUGE, huge_pages: self == Self::Huge, noreserve: true };
        match self {
            Self::Anonymous => {
                let mapping = Mapping::anonymous(len, options).expect("mapping");
                mapping.advise_small_pages().expect("small pages");
                mapping
            }
            Self::Huge => Mapping::anonymous(len, options).expect("mapping"),
            Self::Shared => Mapping::file_shared(&fd, 0, len).expect("mapping"),
            Self::Private => Mapping::file_private(&fd, 0, len).expect("mapping"),
        }
    }

    fn kind(self) -> Kind {
        match self {
            Self::Anonymous | Self::Huge => Kind::Anonymous,
            Self::Shared | Self::Private => Kind::File,
        }
    }

    fn track(self, mapping: &Mapping) -> DirtyTracker {
        DirtyTracker::start(vec![Tracked { range: range(mapping), kind: self.kind() }])
            .expect("start")
    }
}

fn range(mapping: &Mapping) -> Range<u64> {
    mapping.address() as u64..(mapping.address() + mapping.len()) as u64
}

fn write(mapping: &Mapping, page: usize) {
    mapping.write_at(page * PAGE + 17, &[0xee]).expect("write");
}

fn read(mapping: &Mapping, page: usize) {
    mapping.read_at(page * PAGE, &mut [0; 8]).expect("read");
}

fn pages(mapping: &Mapping, range: &Range<u64>) -> Range<usize> {
    let page = |address: u64| (address as usize - mapping.address()) / PAGE;
    page(range.start)..page(range.end)
}

fn collect(tracker: &mut DirtyTracker, mapping: &Mapping) -> BTreeSet<usize> {
    let mut found = BTreeSet::new();
    let peeked = tracker.peek().expect("peek");
    let mut end = 0;
    let told = tracker.collect(|range| {
        assert!(range.start >= end, "ascending, not overlapping");
        end = range.end;
        found.extend(pages(mapping, &range));
    });
    assert_eq!(told.expect("collect"), peeked, "peek says what collect tells");
    assert_eq!(peeked as usize, found.len() * PAGE);
    found
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    /// Rounds of writes, reads and discards, against a set. Of small pages what is told is exactly
    /// what was written; that is the point of a diff. Of huge ones it is at least that.
    #[test]
    fn what_is_told_is_what_was_written(
        kind in 0..4usize,
        before in proptest::collection::btree_set(0usize..1100, 0..40),
        rounds in proptest::collection::vec(
            proptest::collection::vec((0usize..1100, 0..8u8), 0..60), 1..6),
    ) {
        let memory = ALL[kind];
        let mapping = memory.map(3 * HUGE);
        for page in before {
            write(&mapping, page);
        }
        let mut tracker = memory.track(&mapping);
        for round in rounds {
            let mut model = BTreeSet::new();
            for (page, what) in round {
                match what {
                    0..4 => {
                        write(&mapping, page);
                        model.insert(page);
                    }
                    4..7 => read(&mapping, page),
                    _ if memory != Memory::Huge => {
                        // Shared memory's pages stay in the file; this only drops them from here.
                        mapping.discard(page * PAGE, PAGE).expect("discard");
                        let start = (mapping.address() + page * PAGE) as u64;
                        tracker.mark(start + 5..start + 6);
                        model.insert(page);
                    }
                    _ => {}
                }
            }
            let told = collect(&mut tracker, &mapping);
            if memory == Memory::Huge {
                prop_assert!(told.is_superset(&model), "{:?}", model.difference(&told));
            } else {
                prop_assert_eq!(told, model, "{:?}", memory);
            }
        }
        tracker.stop().expect("stop");
        write(&mapping, 0);
    }
}

#[test]
fn huge_pages_that_were_there_are_told_by_small_ones() {
    let mapping = Memory::Huge.map(3 * HUGE);
    (0..2).for_each(|index| write(&mapping, index * 512));
    let smaps = || {
        let text = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
        let from = text.find(&format!("{:x}-", mapping.address())).expect("the mapping");
        let line =
            text[from..].lines().find(|line| line.starts_with("AnonHugePages")).expect("line");
        line.split_whitespace().nth(1).expect("kB").parse::<usize>().expect("number") / 2048
    };
    if smaps() != 2 {
        return; // None to be had at the moment.
    }
    let mut tracker = Memory::Huge.track(&mapping);
    assert_eq!(collect(&mut tracker, &mapping), BTreeSet::new());
    write(&mapping, 7);
    assert_eq!(collect(&mut tracker, &mapping), BTreeSet::from([7]));
    // The third was never touched, and can still become a huge page: told whole, once.
    write(&mapping, 1024 + 5);
    assert_eq!(smaps(), 2, "one was split, one is untouched, one is new");
    assert_eq!(collect(&mut tracker, &mapping), (1024..1536).collect());
    write(&mapping, 1024 + 6);
    assert_eq!(collect(&mut tracker, &mapping), BTreeSet::from([1024 + 6]));
}

/// Why discards have to be told: the kernel does not.
#[test]
fn a_marked_range_is_cut_and_widened() {
    let mapping = Memory::Anonymous.map(HUGE);
    let mut tracker = Memory::Anonymous.track(&mapping);
    let all = range(&mapping);
    tracker.mark(all.start + PAGE as u64 + 1..all.start + 2 * PAGE as u64 + 1);
    tracker.mark(all.end - 1..all.end + 10 * PAGE as u64);
    tracker.mark(0..PAGE as u64);
    assert_eq!(collect(&mut tracker, &mapping), BTreeSet::from([1, 2, 511]));
    assert_eq!(collect(&mut tracker, &mapping), BTreeSet::new(), "told once");
    tracker.mark_all();
    assert_eq!(tracker.peek().expect("peek"), HUGE as u64);
    tracker.restart().expect("restart");
    assert_eq!(collect(&mut tracker, &mapping), BTreeSet::new());
}

#[test]
fn the_parent_is_tracked_over_a_fork_and_the_child_is_not() {
    for memory in ALL {
        let mapping = memory.map(HUGE);
        (0..512).for_each(|page| write(&mapping, page));
        let mut tracker = memory.track(&mapping);
        write(&mapping, 1);
        // SAFETY: the child writes memory, makes system calls, and ends by _exit.
        #[allow(unsafe_code)]
        let forked = unsafe { fork() }.expect("fork");
        match forked {
            Fork::Child => {
                tracker.abandon_in_child();
                write(&mapping, 2);
                exit_now(0);
            }
            Fork::Parent(mut child) => {
                assert_eq!(child.wait().expect("wait").code(), Some(0));
                write(&mapping, 3);
                assert_eq!(collect(&mut tracker, &mapping), BTreeSet::from([1, 3]), "{memory:?}");
                write(&mapping, 1);
                assert_eq!(collect(&mut tracker, &mapping), BTreeSet::from([1]), "{memory:?}");
            }
        }
    }
}

#[test]
fn several_ranges_and_what_cannot_be_tracked() {
    let (a, b) = (Memory::Shared.map(16 * PAGE), Memory::Anonymous.map(16 * PAGE));
    let of = |mapping: &Mapping, kind| Tracked { range: range(mapping), kind };
    let both = vec![of(&a, Kind::File), of(&b, Kind::Anonymous)];
    let mut tracker = DirtyTracker::start(both.clone()).expect("start");
    assert_eq!(tracker.tracked(), both);
    write(&a, 3);
    write(&b, 4);
    let mut told = Vec::new();
    tracker.collect(|range| told.push(range)).expect("collect");
    told.sort_by_key(|range| range.start);
    let page = |mapping: &Mapping, page: usize| (mapping.address() + page * PAGE) as u64;
    let mut expected = [page(&a, 3), page(&b, 4)];
    expected.sort_unstable();
    assert_eq!(told, expected.map(|start| start..start + PAGE as u64));

    let error = DirtyTracker::start(vec![of(&a, Kind::File)]).expect_err("tracked already");
    assert!(matches!(error, DirtyError::Range { action: "register", .. }), "{error}");
    let nowhere = vec![Tracked { range: 1 << 46..(1 << 46) + 4096, kind: Kind::File }];
    assert!(DirtyTracker::start(nowhere).is_err());
    // A failed start leaves nothing behind, a dropped one neither.
    drop(tracker);
    DirtyTracker::start(both).expect("again");
}

fn limits(max_pause: Option<Duration>) -> Limits {
    Limits { max_pause, fixed: Duration::ZERO, max_rounds: 5 }
}

/// The pages of a result, checked to be as RAM is now.
fn result(staging: &Staging, ram: &Mapping) -> BTreeSet<usize> {
    let mut found = BTreeSet::new();
    let same: Result<(), u64> = staging.each_run(|offset, bytes| {
        let mut now = vec![0; bytes.len()];
        ram.read_at(offset as usize, &mut now).expect("read");
        found.extend((0..bytes.len() / PAGE).map(|page| offset as usize / PAGE + page));
        if now == bytes { Ok(()) } else { Err(offset) }
    });
    same.expect("the latest version of each");
    found
}

#[test]
fn only_the_latest_version_of_a_page_counts() {
    for memory in [Memory::Anonymous, Memory::Shared, Memory::Private] {
        let ram = memory.map(HUGE);
        let mut tracker = memory.track(&ram);
        let mut precopy =
            PreCopy::new(&mut tracker, &ram, limits(Some(Duration::from_secs(1)))).expect("new");
        (0..100).for_each(|page| ram.write_at(page * PAGE, &[1; 64]).expect("write"));
        let next = precopy.round().expect("round");
        assert!(matches!(next, Next::Fits(Estimate { dirty_bytes: 0, .. })), "{next:?}");
        (50..60).for_each(|page| ram.write_at(page * PAGE, &[2; 64]).expect("write"));
        (200..201).for_each(|page| ram.write_at(page * PAGE, &[2; 64]).expect("write"));
        let (staging, receipt) = precopy.final_round().expect("the pause");
        assert_eq!(result(&staging, &ram), (0..100).chain(200..201).collect());
        assert_eq!(receipt.last.bytes, 11 * PAGE as u64);
        assert_eq!(receipt.rounds.len(), 1);
        assert_eq!(receipt.copied_bytes, 111 * PAGE as u64);
        assert_eq!(receipt.result_bytes, 101 * PAGE as u64);
        assert_eq!(tracker.peek().expect("peek"), 0, "the next diff begins here");
    }
}

#[test]
fn a_pause_that_would_be_too_long_is_refused_and_nothing_is_lost() {
    let ram = Memory::Shared.map(4 * HUGE);
    let mut tracker = Memory::Shared.track(&ram);
    write(&ram, 1);
    let limits =
        Limits { fixed: Duration::from_micros(1), ..limits(Some(Duration::from_millis(1))) };
    let mut precopy = PreCopy::new(&mut tracker, &ram, limits).expect("new");
    let estimate = precopy.run().expect("one page fits");
    assert!(estimate.pause >= Duration::from_micros(1), "what is fixed counts: {estimate:?}");
    // Then, before the pause, 8 MiB more: at the 1 GiB/s that is assumed, 8 ms.
    (0..2048).for_each(|page| write(&ram, page));
    let error = precopy.final_round().expect_err("refused");
    let PreCopyError::TooLong { estimate, allowed } = error else { panic!("{error}") };
    assert_eq!((estimate.dirty_bytes, allowed), (8 << 20, Duration::from_millis(1)));
    assert!(estimate.pause > allowed);
    assert_eq!(collect(&mut tracker, &ram), (0..2048).collect(), "page 1, too");
}

#[test]
fn a_guest_that_writes_too_fast_is_found_out() {
    let ram = Memory::Shared.map(16 * HUGE);
    let mut tracker = Memory::Shared.track(&ram);
    (0..16 * 512).for_each(|page| write(&ram, page));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                (0..16 * 512).for_each(|page| write(&ram, page));
            }
        });
        // Nothing at all is allowed, and there is always something.
        let mut precopy =
            PreCopy::new(&mut tracker, &ram, limits(Some(Duration::ZERO))).expect("new");
        let error = precopy.run().expect_err("hopeless");
        stop.store(true, Ordering::Relaxed);
        let PreCopyError::TooLong { estimate, .. } = &error else { panic!("{error}") };
        assert!(estimate.pause > Duration::ZERO);
        assert!(error.to_string().contains("bytes/s"), "{error}");
        drop(precopy);
    });
    // Dropped, it has given back what it took in the first round: the next diff has every page.
    assert_eq!(tracker.peek().expect("peek"), 16 * HUGE as u64);
}

#[test]
fn without_a_limit_it_ends_all_the_same() {
    let ram = Memory::Anonymous.map(HUGE);
    let mut tracker = Memory::Anonymous.track(&ram);
    tracker.mark_all();
    let mut precopy = PreCopy::new(&mut tracker, &ram, limits(None)).expect("new");
    precopy.run().expect("ends");
    let (staging, receipt) = precopy.final_round().expect("the pause");
    assert_eq!(result(&staging, &ram).len(), 512, "all was marked: a full image");
    assert!(receipt.rounds.len() <= 5);
}
