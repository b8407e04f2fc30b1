//! Chains against a model: whatever layers are written, what is resolved is what a plain byte array
//! would hold, and what the compacted snapshot holds.

#![allow(clippy::expect_used)]

mod support;

use forkd_snapshot::*;
use proptest::prelude::*;
use support::*;

const MIB_OF_RAM: usize = 5;
const RAM_PAGES: usize = MIB_OF_RAM * MIB / PAGE;
const DISK_PAGES: usize = 48;

#[derive(Debug, Clone)]
enum Op {
    Pages { first: usize, bytes: Vec<u8> },
    Zero { first: usize, count: usize },
}

fn op(pages: usize) -> impl Strategy<Value = Op> {
    let first = 0..pages;
    prop_oneof![
        (first.clone(), proptest::collection::vec(0u8..4, 1..12))
            .prop_map(|(first, bytes)| Op::Pages { first, bytes }),
        (first, 1usize..700).prop_map(|(first, count)| Op::Zero { first, count }),
    ]
}

#[derive(Debug, Clone)]
struct Layer {
    memory: Vec<Op>,
    disk: Vec<Op>,
    whole_disk: bool,
}

fn layers() -> impl Strategy<Value = Vec<Layer>> {
    let ops = |pages| proptest::collection::vec(op(pages), 0..8);
    let layer = (ops(RAM_PAGES), ops(DISK_PAGES), any::<bool>())
        .prop_map(|(memory, disk, whole_disk)| Layer { memory, disk, whole_disk });
    proptest::collection::vec(layer, 1..6)
}

fn apply(op: &Op, writer: &PageWriter, model: &mut [Option<u8>]) {
    match op {
        Op::Pages { first, bytes } => {
            let bytes = &bytes[..bytes.len().min(model.len() - first)];
            let content: Vec<u8> = bytes.iter().flat_map(|byte| page(*byte)).collect();
            writer.write((first * PAGE) as u64, &content).expect("write");
            for (at, byte) in bytes.iter().enumerate() {
                model[first + at] = Some(*byte);
            }
        }
        Op::Zero { first, count } => {
            let end = (first + count).min(model.len());
            writer.write_zero((first * PAGE) as u64..(end * PAGE) as u64).expect("zero");
            model[*first..end].fill(Some(0));
        }
    }
}

/// Pages of a disk: data, zero, or the base image's.
fn disk_of(resolved: &Resolved) -> Vec<Option<u8>> {
    let mut found = vec![None; DISK_PAGES];
    let bytes = bytes_of(resolved);
    for extent in &resolved.extents {
        for at in (extent.offset..extent.offset + extent.len).step_by(PAGE) {
            found[at as usize / PAGE] = Some(bytes[at as usize]);
            assert_eq!(bytes[at as usize..][..PAGE], page(bytes[at as usize]));
        }
    }
    for zero in &resolved.zeroes {
        for at in zero.clone().step_by(PAGE) {
            assert_eq!(found[at as usize / PAGE].replace(0), None, "in both");
        }
    }
    found
}

fn assert_tidy(resolved: &Resolved) {
    for extent in &resolved.extents {
        assert_eq!(extent.offset, extent.file_offset);
        assert!(extent.len > 0 && extent.offset + extent.len <= resolved.len);
    }
    for pair in resolved.extents.windows(2) {
        let end = pair[0].offset + pair[0].len;
        assert!(end <= pair[1].offset, "sorted and apart");
        assert!(end < pair[1].offset || pair[0].file != pair[1].file, "joined");
    }
    assert!(resolved.zeroes.windows(2).all(|pair| pair[0].end < pair[1].start));
}

/// Outside of what is told to be data, RAM is zero; within, some of it is not, or the telling would be of no use.
fn assert_no_other_data(loaded: &Loaded, model: &[u8]) {
    assert!(loaded.data.windows(2).all(|pair| pair[0].end <= pair[1].start), "sorted and apart");
    for (page, bytes) in model.chunks(PAGE).enumerate() {
        let at = (page * PAGE) as u64;
        let told = loaded.data.iter().any(|range| range.contains(&at));
        assert_eq!(told, bytes.iter().any(|byte| *byte != 0), "page {page}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn a_chain_is_the_model_and_its_compaction(layers in layers()) {
        let dir = temp();
        let store = Store::open(dir.path()).expect("open");
        let mut memory = vec![Some(0u8); RAM_PAGES];
        let mut disk = vec![None; DISK_PAGES];
        let mut tag = String::new();
        for (index, layer) in layers.iter().enumerate() {
            let parent = (index > 0).then(|| tag.clone());
            tag = format!("s{index}");
            let mut staged = store.stage(&tag, parent.as_deref()).expect("stage");
            let writer = staged.memory((RAM_PAGES * PAGE) as u64).expect("memory");
            layer.memory.iter().for_each(|op| apply(op, &writer, &mut memory));
            let whole = layer.whole_disk || index == 0;
            if whole {
                disk.fill(None);
            }
            let writer = staged.disk((DISK_PAGES * PAGE) as u64, whole).expect("disk");
            layer.disk.iter().for_each(|op| apply(op, &writer, &mut disk));
            staged.state(tag.as_bytes()).expect("state");
            staged.commit(facts(MIB_OF_RAM as u64, Mode::Diff)).expect("commit");
        }
        let model: Vec<u8> = memory.iter().flat_map(|byte| page(byte.unwrap_or(0))).collect();
        let chain = store.load(&tag, Verification::Always).expect("load");
        assert_tidy(&chain.memory);
        assert_tidy(&chain.disks[0]);
        assert_no_other_data(&chain, &model);
        prop_assert!(bytes_of(&chain.memory) == model);
        prop_assert_eq!(disk_of(&chain.disks[0]), disk.clone());
        store.compact(&tag).expect("compact");
        let flat = store.load(&tag, Verification::Always).expect("load");
        prop_assert_eq!(flat.parents.len(), 0);
        assert_no_other_data(&flat, &model);
        prop_assert!(bytes_of(&flat.memory) == model);
        prop_assert_eq!(disk_of(&flat.disks[0]), disk);
        prop_assert_eq!(flat.state, chain.state);
    }
}

#[test]
fn a_read_may_begin_and_end_anywhere() {
    let dir = temp();
    let store = Store::open(dir.path()).expect("open");
    put(&store, "base", None, 1, &pages([(1, 1), (2, 2), (9, 3)]), &pages([])).expect("base");
    put(&store, "top", Some("base"), 1, &pages([(2, 0), (3, 4)]), &pages([])).expect("top");
    let memory = store.load("top", Verification::Always).expect("load").memory;
    let model = over(&vec![0; MIB], &pages([(1, 1), (3, 4), (9, 3)]));
    for (from, len) in [(0, 1), (4095, 2), (5000, 9000), (12287, 4098), (MIB - 3, 3), (MIB, 0)] {
        let mut bytes = vec![7; len];
        memory.read_at(from as u64, &mut bytes).expect("read");
        assert_eq!(bytes, model[from..from + len], "{from}+{len}");
    }
    assert!(memory.read_at(MIB as u64, &mut [0]).is_err());
    assert!(memory.read_at(u64::MAX, &mut [0]).is_err());
}

/// The bar of the issue: 8 MiB dirty in 1 GiB are at most 12 MiB on the disk, also where every dirty
/// page stands alone.
#[test]
fn a_diff_takes_the_room_of_what_is_dirty() {
    // On a real file system if there is one: its blocks count.
    let dir = tempfile::tempdir().expect("a directory");
    let store = Store::open(dir.path()).expect("open");
    put(&store, "base", None, 1024, &pages([(1, 1)]), &pages([])).expect("base");
    let scattered = Pages::from_iter((0..2048).map(|index| (index * 128 + 5, 1 + index as u8 % 9)));
    put(&store, "diff", Some("base"), 1024, &scattered, &pages([])).expect("diff");
    let info = store.info("diff").expect("info");
    assert!(info.disk_bytes <= 12 << 20, "{} bytes", info.disk_bytes);
    assert!(info.disk_bytes >= 8 << 20, "{} bytes", info.disk_bytes);
    assert!(info.memory_extents <= 2 * 2048 + 1, "{}", info.memory_extents);
    store.verify("diff").expect("verify");
}

/// Of 64 MiB: data, a hole of 2 MiB less a page, data, a hole of 2 MiB, data, and nothing up to the end.
#[test]
fn the_large_holes_of_a_flat_memory_file_are_not_mapped() {
    const LARGE: u64 = 512;
    let dir = temp();
    let store = Store::open(dir.path()).expect("open");
    let mut staged = store.stage("flat", None).expect("stage");
    let writer = staged.memory(64 << 20).expect("memory");
    let at = |page: u64| page * PAGE as u64;
    let data = [3, 3 + LARGE, 4 + 2 * LARGE];
    data.iter().for_each(|first| writer.write(at(*first), &page(9)).expect("write"));
    staged.state(b"state").expect("state");
    staged.commit(facts(64, Mode::Full)).expect("commit");
    let loaded = store.load("flat", Verification::Always).expect("load");
    let extents: Vec<_> = loaded.memory.extents.iter().map(|e| (e.offset, e.len)).collect();
    assert_eq!(extents, [(at(3), at(1 + LARGE)), (at(data[2]), at(1))]);
    assert_eq!(loaded.data, data.map(|first| at(first)..at(first + 1)));
    let model: Vec<u8> =
        (0..64 << 8).flat_map(|n| page(if data.contains(&n) { 9 } else { 0 })).collect();
    assert!(bytes_of(&loaded.memory) == model);
}
