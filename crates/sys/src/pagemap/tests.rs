//! On real memory of this process.

use super::*;
use crate::mmap::{AnonymousOptions, Mapping, page_size};
use crate::testing::turn;
use crate::userfaultfd::{Features, Mode, Userfaultfd};
use proptest::prelude::*;
use std::collections::BTreeSet;

const HUGE: usize = 2 << 20;

fn anonymous(len: usize, huge: bool) -> Mapping {
    let options = AnonymousOptions { align: HUGE, huge_pages: huge, noreserve: true };
    let mapping = Mapping::anonymous(len, options).expect("mapping");
    if !huge {
        mapping.advise_small_pages().expect("small pages");
    }
    mapping
}

fn memfd(len: usize, private: bool) -> Mapping {
    let fd = rustix::fs::memfd_create("scan", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
    rustix::fs::ftruncate(&fd, len as u64).expect("size");
    let mapping = if private {
        Mapping::file_private(&fd, 0, len)
    } else {
        Mapping::file_shared(&fd, 0, len)
    };
    mapping.expect("mapping")
}

fn range(mapping: &Mapping) -> Range<u64> {
    mapping.address() as u64..(mapping.address() + mapping.len()) as u64
}

fn watch(mapping: &Mapping) -> Userfaultfd {
    let uffd = Userfaultfd::new(Features::WP_ASYNC, Features::WP_HUGETLBFS_SHMEM).expect("uffd");
    uffd.register(range(mapping), Mode::WRITE_PROTECT).expect("register");
    uffd.write_protect(range(mapping)).expect("protect");
    uffd
}

/// The indices of the pages that the query tells.
fn pages(pagemap: &mut Pagemap, mapping: &Mapping, query: Query) -> BTreeSet<usize> {
    let mut found = BTreeSet::new();
    let mut last = mapping.address() as u64;
    let all = range(mapping);
    pagemap
        .scan(all.clone(), query, |pages| {
            assert!(pages.range.start >= last && pages.range.end <= all.end, "ascending, inside");
            assert!(pages.categories.contains(query.tell));
            last = pages.range.end;
            let first = (pages.range.start - all.start) as usize / page_size();
            let end = (pages.range.end - all.start) as usize / page_size();
            found.extend(first..end);
        })
        .expect("scan");
    found
}

#[test]
fn written_pages_are_told_once() {
    let _turn = turn();
    for mapping in [anonymous(HUGE, false), memfd(HUGE, false), memfd(HUGE, true)] {
        mapping.write_at(3 * page_size(), &[1]).expect("write");
        let _uffd = watch(&mapping);
        let mut pagemap = Pagemap::own().expect("pagemap");
        assert_eq!(pages(&mut pagemap, &mapping, Query::WRITTEN), BTreeSet::new());
        // One that was there, and two that were not.
        for index in [3, 4, 511] {
            mapping.write_at(index * page_size(), &[2]).expect("write");
        }
        let written = BTreeSet::from([3, 4, 511]);
        assert_eq!(pages(&mut pagemap, &mapping, Query::WRITTEN), written);
        assert_eq!(pages(&mut pagemap, &mapping, Query::TAKE_WRITTEN), written);
        assert_eq!(pages(&mut pagemap, &mapping, Query::WRITTEN), BTreeSet::new());
        mapping.write_at(4 * page_size(), &[3]).expect("write");
        let by_pid = &mut Pagemap::of(std::process::id()).expect("pagemap");
        assert_eq!(pages(by_pid, &mapping, Query::TAKE_WRITTEN), BTreeSet::from([4]));
    }
}

#[test]
fn more_regions_than_fit_the_buffer_are_all_told() {
    let _turn = turn();
    let count = 5 * REGIONS;
    let mapping = anonymous(count * page_size(), false);
    let _uffd = watch(&mapping);
    // Every other page, so that none can be joined with its neighbour.
    for index in (0..count).step_by(2) {
        mapping.write_at(index * page_size(), &[1]).expect("write");
    }
    let mut pagemap = Pagemap::own().expect("pagemap");
    let expected: BTreeSet<usize> = (0..count).step_by(2).collect();
    assert_eq!(pages(&mut pagemap, &mapping, Query::TAKE_WRITTEN), expected);
    assert_eq!(pages(&mut pagemap, &mapping, Query::TAKE_WRITTEN), BTreeSet::new());
}

#[test]
fn categories_are_asked_for_and_told() {
    let _turn = turn();
    let mapping = memfd(8 * page_size(), false);
    mapping.write_at(page_size(), &[1]).expect("write");
    let query = Query {
        all_of: Categories::PRESENT,
        tell: Categories::PRESENT | Categories::FILE,
        ..Query::default()
    };
    let mut pagemap = Pagemap::own().expect("pagemap");
    assert_eq!(pages(&mut pagemap, &mapping, query), BTreeSet::from([1]));
    let absent = Query { none_of: Categories::PRESENT, ..Query::default() };
    assert_eq!(pages(&mut pagemap, &mapping, absent), BTreeSet::from([0, 2, 3, 4, 5, 6, 7]));
    let either = Query { any_of: Categories::SWAPPED | Categories::PRESENT, ..Query::default() };
    assert_eq!(pages(&mut pagemap, &mapping, either), BTreeSet::from([1]));
}

#[test]
fn memory_that_is_not_watched_is_an_error_not_a_silent_gap() {
    let _turn = turn();
    let mapping = anonymous(4 * page_size(), false);
    let mut pagemap = Pagemap::own().expect("pagemap");
    let error = pagemap.scan(range(&mapping), Query::TAKE_WRITTEN, |_| {}).expect_err("refused");
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    let unaligned = range(&mapping).start + 1..range(&mapping).end;
    let error = pagemap.scan(unaligned, Query::WRITTEN, |_| {}).expect_err("refused");
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    assert!(Pagemap::of(0).is_err());
}

#[test]
fn one_write_into_a_huge_page_is_one_small_page() {
    let _turn = turn();
    let mapping = anonymous(2 * HUGE, true);
    mapping.write_at(0, &[1]).expect("write");
    mapping.write_at(HUGE, &[1]).expect("write");
    let huge = Query { all_of: Categories::HUGE, tell: Categories::HUGE, ..Query::default() };
    let mut pagemap = Pagemap::own().expect("pagemap");
    if pages(&mut pagemap, &mapping, huge).len() < 1024 {
        return; // No huge pages to be had at the moment.
    }
    let _uffd = watch(&mapping);
    mapping.write_at(HUGE + 7 * page_size(), &[1]).expect("write");
    assert_eq!(pages(&mut pagemap, &mapping, Query::TAKE_WRITTEN), BTreeSet::from([512 + 7]));
    let left = pages(&mut pagemap, &mapping, huge);
    assert_eq!(left, (0..512).collect(), "the one was split, the other stays huge");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn what_is_told_is_what_was_written(
        rounds in proptest::collection::vec(proptest::collection::btree_set(0usize..600, 0..60), 1..6),
        kind in 0..3,
    ) {
        let _turn = turn();
        let len = 600 * page_size();
        let mapping = match kind {
            0 => anonymous(len, false),
            1 => memfd(len, false),
            _ => memfd(len, true),
        };
        let _uffd = watch(&mapping);
        let mut pagemap = Pagemap::own().expect("pagemap");
        for round in rounds {
            for &index in &round {
                mapping.write_at(index * page_size() + 9, &[1]).expect("write");
            }
            prop_assert_eq!(pages(&mut pagemap, &mapping, Query::TAKE_WRITTEN), round);
        }
    }
}
