use super::*;

use std::os::fd::AsRawFd;

use forkd_sys::mmap::page_size;
use proptest::prelude::*;

use crate::testing::{PAGE, fork_with, maps_in, pattern};

fn file_of(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().expect("a file");
    file.write_all_at(bytes, 0).expect("write");
    // RAM needs no more than reading.
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("open again")
}

fn extent(ram: usize, pages: usize, file: usize, at: usize) -> FileExtent {
    let bytes = |pages: usize| (pages * PAGE) as u64;
    FileExtent { ram_offset: bytes(ram), len: bytes(pages), file, file_offset: bytes(at) }
}

fn bytes_of(ram: &FileBacked) -> Vec<u8> {
    let mut bytes = vec![0; ram.mapping.len()];
    ram.mapping.read_at(0, &mut bytes).expect("all of it");
    bytes
}

fn maps_of(ram: &FileBacked) -> usize {
    let start = ram.mapping.address() as u64;
    maps_in(start..start + ram.mapping.len() as u64).len()
}

#[test]
fn neighbours_are_one_mapping() {
    let file = file_of(&pattern(64 * PAGE, 1));
    let extents: Vec<_> = (0..64).rev().map(|page| extent(page, 1, 0, page)).collect();
    let ram = FileBacked::new(64 * PAGE, &[file], &extents, Vec::new()).expect("RAM");
    assert_eq!(maps_of(&ram), 1);
    assert_eq!(ram.mapping.address() % HUGE, 0, "aligned for huge pages");
    assert!(bytes_of(&ram) == pattern(64 * PAGE, 1));
}

const HUGE: usize = 2 << 20;

/// The extents' places in the file go down as those in RAM go up: nothing can be merged.
#[test]
fn of_very_many_extents_the_small_ones_are_read() {
    const PAIRS: usize = 12_000;
    let bytes = pattern(2 * PAIRS * PAGE, 2);
    let file = file_of(&bytes);
    let mut extents = Vec::new();
    let mut model = vec![0; 3 * PAIRS * PAGE];
    for pair in 0..PAIRS {
        // A third of the extents have two pages, the others one; a page without one is between.
        let pages = if pair % 3 == 0 { 2 } else { 1 };
        let (ram, at) = (pair * 3, (PAIRS - 1 - pair) * 2);
        extents.push(extent(ram, pages, 0, at));
        model[ram * PAGE..][..pages * PAGE].copy_from_slice(&bytes[at * PAGE..][..pages * PAGE]);
    }
    let ram = FileBacked::new(model.len(), &[file], &extents, Vec::new()).expect("RAM");
    assert!(bytes_of(&ram) == model);
    let maps = maps_of(&ram);
    assert!((MAX_MAPPED..=2 * MAX_MAPPED + 1).contains(&maps), "{maps}");
}

#[test]
fn discards_beyond_the_allowance_still_read_as_zeroes() {
    let pages = 64;
    let file = file_of(&pattern(pages * PAGE, 3));
    let mut ram =
        FileBacked::new(pages * PAGE, &[file], &[extent(0, pages, 0, 0)], Vec::new()).expect("RAM");
    ram.holes = Holes::at_most(4, &ram.mapping);
    ram.mapping.write_at(PAGE * 20, &[9; PAGE]).expect("write");
    let mut model = pattern(pages * PAGE, 3);
    for page in (0..pages).step_by(2) {
        ram.discard(page * PAGE, PAGE).expect("discard");
        model[page * PAGE..][..PAGE].fill(0);
    }
    assert!(bytes_of(&ram) == model);
    assert_eq!(maps_of(&ram), 8, "four holes, and what is between and behind them");
    // A balloon that takes the same pages again and again uses up nothing, and gets them back.
    ram.mapping.write_at(PAGE * 2, &[9; PAGE]).expect("write");
    ram.discard(PAGE * 2, PAGE).expect("discard");
    assert!(bytes_of(&ram) == model);
    assert_eq!(maps_of(&ram), 8);
    ram.discard(0, 0).expect("nothing");
    for (offset, len) in
        [(100, PAGE), (0, 100), (pages * PAGE, PAGE), (usize::MAX - PAGE + 1, PAGE)]
    {
        assert!(ram.discard(offset, len).is_err(), "{offset:#x} {len:#x}");
    }
    assert!(bytes_of(&ram) == model);
}

#[test]
fn a_file_that_is_too_short_is_named() {
    let file = file_of(&pattern(8 * PAGE, 4));
    let error = FileBacked::new(64 * PAGE, &[file], &[extent(0, 9, 0, 0)], Vec::new())
        .expect_err("too short");
    assert!(error.to_string().contains("extent #0"), "{error}");
    assert!(error.to_string().contains("memory file #0 (/"), "{error}");
}

/// One access of a guest.
#[derive(Debug, Clone)]
enum Step {
    Write(usize, usize, u64),
    Discard(usize, usize),
}

const RAM_PAGES: usize = 96;
const FILE_PAGES: usize = 40;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0..RAM_PAGES * PAGE, 1..3 * PAGE, any::<u64>()).prop_map(|(a, n, s)| Step::Write(a, n, s)),
        (0..RAM_PAGES, 1..9usize).prop_map(|(page, pages)| Step::Discard(page, pages)),
    ];
    proptest::collection::vec(step, 0..12)
}

fn extents() -> impl Strategy<Value = Vec<FileExtent>> {
    let piece = (0..4usize, 1..10usize, 0..3usize, 0..FILE_PAGES - 10, any::<bool>());
    let placed = proptest::collection::vec(piece, 0..20).prop_map(|pieces| {
        let mut placed: Vec<FileExtent> = Vec::new();
        let mut next = 0;
        for (gap, pages, file, at, go_on) in pieces {
            // Some go on where the one before ended, so that there is something to merge.
            let end = |e: &FileExtent| usize::try_from(e.file_offset + e.len).unwrap_or(0) / PAGE;
            let (gap, file, at) = match placed.last() {
                Some(last) if go_on && end(last) + pages <= FILE_PAGES => (0, last.file, end(last)),
                _ => (gap, file, at),
            };
            if next + gap + pages > RAM_PAGES {
                break;
            }
            placed.push(extent(next + gap, pages, file, at));
            next += gap + pages;
        }
        placed
    });
    placed.prop_shuffle()
}

fn run(ram: &FileBacked, model: &mut [u8], steps: &[Step]) -> io::Result<()> {
    for step in steps {
        match *step {
            Step::Write(at, len, seed) => {
                let data = pattern(len.min(model.len() - at), seed);
                ram.mapping.write_at(at, &data)?;
                model[at..][..data.len()].copy_from_slice(&data);
            }
            Step::Discard(page, pages) => {
                let pages = pages.min(RAM_PAGES - page);
                ram.discard(page * PAGE, pages * PAGE)?;
                model[page * PAGE..][..pages * PAGE].fill(0);
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn ram_is_its_extents_and_then_what_was_written(
        extents in extents(),
        mappings in 0usize..24,
        before in steps(),
        in_child in steps(),
        in_parent in steps(),
        seed: u64,
    ) {
        let contents: Vec<Vec<u8>> = (0..3).map(|n| pattern(FILE_PAGES * PAGE, seed ^ n << 8)).collect();
        let files: Vec<File> = contents.iter().map(|bytes| file_of(bytes)).collect();
        let mut model = vec![0u8; RAM_PAGES * PAGE];
        for e in &extents {
            let [ram, at, len] = [e.ram_offset, e.file_offset, e.len].map(|n| usize::try_from(n).expect("small"));
            model[ram..][..len].copy_from_slice(&contents[e.file][at..][..len]);
        }
        prop_assert_eq!(page_size(), PAGE);
        let mut ram = FileBacked::with_at_most(mappings, model.len(), &files, &extents).expect("RAM");
        drop(files);
        prop_assert!(bytes_of(&ram) == model, "before any write");
        run(&ram, &mut model, &before).expect("steps");
        prop_assert!(bytes_of(&ram) == model, "after writes");

        // The parent writes while the child waits; neither may see the other's.
        let (mut go, mut tell) = std::io::pipe().expect("a pipe");
        let childs = model.clone();
        let mut child = fork_with(|| {
            use std::io::Read;
            let mut childs = childs;
            if ram.detach_child().is_err() || go.read_exact(&mut [0]).is_err() {
                return 1;
            }
            if bytes_of(&ram) != childs {
                return 2;
            }
            if run(&ram, &mut childs, &in_child).is_err() {
                return 3;
            }
            i32::from(bytes_of(&ram) != childs) * 4
        });
        run(&ram, &mut model, &in_parent).expect("steps");
        {
            use std::io::Write;
            tell.write_all(&[1]).expect("the child waits");
        }
        prop_assert_eq!(child.wait().expect("wait").code(), Some(0));
        prop_assert!(bytes_of(&ram) == model, "the child's writes are its own");
    }
}
