//! What has to hold for all backends alike.

use std::fs::File;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::*;
use crate::memfd::{MemfdOptions, create_and_populate};
use crate::testing::{MIB, PAGE, fork_with, pattern};
use crate::{AnonOptions, GuestRam};

/// RAM of each kind with the same bytes: those of a file that is written by `fill`.
fn each(mem_mib: u32, fill: impl Fn(&File)) -> Vec<GuestRam> {
    let source = tempfile::NamedTempFile::new().expect("a file");
    let len = u64::from(mem_mib) * MIB;
    source.as_file().set_len(len).expect("size");
    fill(source.as_file());
    let memfd = |sharing| {
        let region = create_and_populate(source.path(), "each", &MemfdOptions::default());
        GuestRam::memfd(mem_mib, region.expect("a memfd"), sharing).expect("RAM")
    };
    let anonymous = GuestRam::anonymous(mem_mib, AnonOptions::default()).expect("RAM");
    copy_in(source.as_file(), &anonymous);
    let whole = FileExtent { ram_offset: 0, len, file: 0, file_offset: 0 };
    let file = source.reopen().expect("open");
    let file = GuestRam::from_file(mem_mib, &[file], &[whole], Vec::new()).expect("RAM");
    let lazily = || {
        let files = vec![source.reopen().expect("open")];
        let source = Box::new(FileSource::new(len, files, &[whole]).expect("a source"));
        GuestRam::userfault(mem_mib, source, None).expect("RAM")
    };
    let loaded = lazily();
    loaded.lazy().expect("its controls").complete().expect("loaded");
    vec![anonymous, file, memfd(Sharing::Shared), memfd(Sharing::Private), lazily(), loaded]
}

fn copy_in(file: &File, ram: &GuestRam) {
    let mut offset = 0;
    for region in ram.regions() {
        let end = offset + region.len;
        let mut at = offset;
        while let Some(data) = forkd_sys::memfd::next_data(file, at, end).expect("seek") {
            let mut bytes = vec![0; usize::try_from(data.end - data.start).expect("small")];
            file.read_exact_at(&mut bytes, data.start).expect("read");
            let gpa = GuestAddress(region.gpa + (data.start - offset));
            ram.guest().write_slice(&bytes, gpa).expect("write");
            at = data.end;
        }
        offset = end;
    }
}

fn page_at(ram: &GuestRam, gpa: u64) -> Vec<u8> {
    let mut page = vec![0; PAGE];
    ram.guest().read_slice(&mut page, GuestAddress(gpa)).expect("within RAM");
    page
}

#[test]
fn ram_in_two_regions() {
    const LEN: u64 = 3 * 1024 * MIB + 64 * MIB;
    const HOLE: u64 = 3 << 30;
    let page = PAGE as u64;
    // Pages at both sides of the hole, and at both ends, by offset and by guest-physical address.
    let places = [
        (0, 0),
        (HOLE - page, HOLE - page),
        (HOLE, 4 << 30),
        (LEN - page, (4 << 30) + 64 * MIB - page),
    ];
    let all = each(3 * 1024 + 64, |file| {
        for (seed, (offset, _)) in (1..).zip(places) {
            file.write_all_at(&pattern(PAGE, seed), offset).expect("write");
        }
    });
    for ram in all {
        let name = ram.backend_name();
        assert_eq!(ram.regions().len(), 2, "{name}");
        for (seed, (_, gpa)) in (1..).zip(places) {
            assert!(page_at(&ram, gpa) == pattern(PAGE, seed), "{name} {gpa:#x}");
        }
        assert!(page_at(&ram, 1 << 30) == [0; PAGE], "{name}");
        ram.guest().write_slice(&[7; PAGE], GuestAddress(4 << 30)).expect("write");
        ram.populate_write((4 << 30) + MIB, 8192).expect("populate");
        ram.discard(HOLE - 2 * page, 2 * page).expect("discard");
        ram.discard((4 << 30) + 64 * MIB - page, page).expect("discard");
        assert!(page_at(&ram, HOLE - page) == [0; PAGE], "{name}");
        assert!(page_at(&ram, places[3].1) == [0; PAGE], "{name}");
        assert!(page_at(&ram, 4 << 30) == [7; PAGE], "{name}: the neighbour stays");
        assert!(ram.discard(HOLE - page, 2 * page).is_err(), "{name}: not over the hole");
    }
}

#[test]
fn the_right_memory_is_seen_by_devices() {
    for ram in each(4, |_| {}) {
        use vm_memory::GuestMemoryRegion;
        let shared = ram.kind() == MemoryBackend::MemfdShared;
        assert_eq!(ram.memfd_region().is_some(), ram.backend_name().starts_with("memfd"));
        assert_eq!(ram.branch_modes().contains(&BranchMode::Live), shared);
        let loading = ram.fork_behaviour() == ForkBehaviour::Incomplete;
        assert_eq!(ram.check_fork().is_err(), shared || loading);
        assert!(!loading || ram.lazy().is_some());
        for region in ram.guest().iter() {
            let flags = region.get_mmap().flags();
            assert_eq!(flags & libc::MAP_SHARED != 0, shared, "{}", ram.backend_name());
            assert_eq!(flags & libc::MAP_PRIVATE == 0, shared, "{}", ram.backend_name());
            assert_eq!(region.len(), 4 * MIB);
        }
    }
}

#[test]
fn advice_is_taken_or_ignored_but_changes_no_bytes() {
    let bytes = pattern(4 << 20, 5);
    for ram in each(4, |file| file.write_all_at(&bytes, 0).expect("write")) {
        ram.prefer_huge_pages().expect("huge");
        ram.populate_write(5, 3 * MIB).expect("populate");
        ram.prefer_small_pages().expect("small");
        ram.discard(MIB, 0).expect("nothing");
        let mut seen = vec![0; bytes.len()];
        ram.guest().read_slice(&mut seen, GuestAddress(0)).expect("read");
        assert!(seen == bytes, "{}", ram.backend_name());
    }
}

/// What the modes need of the kernel: `live` that writes are reported and wait, `diff` that the kernel
/// notes them by itself.
#[test]
fn the_modes_that_are_offered_can_be_armed() {
    use forkd_sys::userfaultfd::{Features, Mode, Userfaultfd};
    let mut all = each(4, |file| file.write_all_at(&pattern(4 << 20, 6), 0).expect("write"));
    // Of several mappings, of a file and of none.
    let file = tempfile::tempfile().expect("a file");
    file.set_len(MIB).expect("size");
    let piece = FileExtent { ram_offset: MIB, len: MIB, file: 0, file_offset: 0 };
    all.push(GuestRam::from_file(4, &[file], &[piece], Vec::new()).expect("RAM"));
    for ram in all {
        let name = ram.backend_name();
        let arm = |features| {
            let watch = Userfaultfd::new(features, Features::NONE).expect("userfaultfd");
            ram.regions().try_for_each(|region| {
                let range = region.host_addr..region.host_addr + region.len;
                watch.register(range.clone(), Mode::WRITE_PROTECT)?;
                watch.write_protect(range)
            })
        };
        let diff = arm(Features::WP_ASYNC);
        assert_eq!(ram.why_not(BranchMode::Diff).is_none(), diff.is_ok(), "{name}: {diff:?}");
        if ram.why_not(BranchMode::Live).is_none() {
            arm(Features::WP_HUGETLBFS_SHMEM).expect(name);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn a_balloon_gets_zeroes_and_nobody_else_does(
        steps in proptest::collection::vec((any::<bool>(), 0u64..2 * MIB, 1u64..100_000), 1..20),
        seed: u64,
    ) {
        let bytes = pattern(2 << 20, seed);
        for mut ram in each(2, |file| file.write_all_at(&bytes, 0).expect("write")) {
            let mut model = bytes.clone();
            for (number, &(write, at, len)) in steps.iter().enumerate() {
                let len = len.min(2 * MIB - at);
                if write {
                    let data = pattern(usize::try_from(len).expect("small"), number as u64);
                    ram.guest().write_slice(&data, GuestAddress(at)).expect("write");
                    model[usize::try_from(at).expect("small")..][..data.len()].copy_from_slice(&data);
                } else {
                    ram.discard(at, len).expect("discard");
                    let page = PAGE as u64;
                    let (start, end) = (at.next_multiple_of(page), (at + len) / page * page);
                    if start < end {
                        let range = usize::try_from(start).expect("small")..usize::try_from(end).expect("small");
                        model[range].fill(0);
                    }
                }
            }
            let is = |ram: &GuestRam, model: &[u8]| {
                let mut seen = vec![0; model.len()];
                ram.guest().read_slice(&mut seen, GuestAddress(0)).is_ok() && seen == model
            };
            prop_assert!(is(&ram, &model), "{}", ram.backend_name());
            if ram.check_fork().is_ok() {
                let mut child = fork_with(|| {
                    let own = ram.detach_child().is_ok() && is(&ram, &model);
                    let changed = ram.guest().write_slice(&[1; 9000], GuestAddress(100)).is_ok();
                    let gone = ram.discard(MIB, MIB).is_ok();
                    i32::from(!(own && changed && gone))
                });
                prop_assert_eq!(child.wait().expect("wait").code(), Some(0));
                prop_assert!(is(&ram, &model), "{}: a child's writes are its own", ram.backend_name());
            }
        }
    }
}
