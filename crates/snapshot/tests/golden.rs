//! Snapshots of each version of the format, as they were written then, load for ever; and what is
//! written today is, byte for byte, what the current version's golden files say. If that fails, the
//! format has changed: give it a new version, and new golden files beside the old.
//!
//! To write those of a new version: `cargo test -p forkd-snapshot --test golden -- --ignored write`.

#![allow(clippy::expect_used, clippy::single_range_in_vec_init)]

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use forkd_snapshot::*;
use support::*;

fn golden(version: u32) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/v{version}"))
}

fn base() -> (Pages, Pages) {
    (pages([(0, 1), (1, 2), (100, 3)]), pages([(2, 7), (3, 0)]))
}

fn diff() -> (Pages, Pages) {
    (pages([(1, 0), (2, 4), (255, 5)]), pages([(2, 8)]))
}

/// A flat snapshot, a diff over it, and that diff's compacted form.
fn write_all(dir: &Path) {
    let store = Store::open(dir).expect("open");
    let (ram, disk) = base();
    put(&store, "base", None, 1, &ram, &disk).expect("base");
    let (ram, disk) = diff();
    for tag in ["diff", "flat"] {
        let mut staged = store.stage(tag, Some("base")).expect("stage");
        write_pages(&staged.memory(MIB as u64).expect("memory"), &ram).expect("write");
        write_pages(&staged.disk(DISK_BYTES, false).expect("disk"), &disk).expect("write");
        staged.state(b"state").expect("state");
        staged.commit(facts(1, Mode::Diff)).expect("commit");
    }
    store.compact("flat").expect("compact");
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for tag in ["base", "diff", "flat"] {
        for entry in std::fs::read_dir(dir.join(tag)).expect("list") {
            let entry = entry.expect("an entry");
            let name = entry.file_name().into_string().expect("a name");
            if name != "verified.json" {
                let bytes = std::fs::read(entry.path()).expect("read");
                files.insert(format!("{tag}/{name}"), bytes);
            }
        }
    }
    files
}

/// As a checkout has it: without holes, stamps or locks.
fn copy_of(version: u32) -> tempfile::TempDir {
    let dir = temp();
    for (name, bytes) in files(&golden(version)) {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("make");
        std::fs::write(path, bytes).expect("write");
    }
    dir
}

#[test]
fn version_1_loads() {
    let dir = copy_of(1);
    let store = Store::open(dir.path()).expect("open");
    assert_eq!(memory_of(&store, "base"), over(&vec![0; MIB], &base().0));
    let expected = over(&over(&vec![0; MIB], &base().0), &diff().0);
    for tag in ["diff", "flat"] {
        let loaded = store.load(tag, Verification::Always).expect(tag);
        assert!(bytes_of(&loaded.memory) == expected, "{tag}");
        assert_eq!(loaded.state, b"state");
        assert_eq!(loaded.disks[0].zeroes, [3 * 4096..4 * 4096]);
        let disk: Vec<_> = loaded.disks[0].extents.iter().map(|e| (e.offset, e.len)).collect();
        assert_eq!(disk, [(2 * 4096, 4096)]);
        assert_eq!(bytes_of(&loaded.disks[0])[2 * 4096..3 * 4096], page(8));
        assert_eq!(loaded.manifest.platform, platform());
        assert_eq!(loaded.manifest.image.tag.as_deref(), Some("py"));
    }
    let diff = store.get("diff").expect("diff");
    let flat = store.get("flat").expect("flat");
    assert_eq!(diff.manifest().parent.as_ref().map(|p| p.tag.as_str()), Some("base"));
    assert_eq!((flat.manifest().parent.as_ref(), flat.manifest().replaces.is_some()), (None, true));
}

#[test]
fn what_is_written_today_is_the_current_version() {
    let dir = temp();
    write_all(dir.path());
    let (now, then) = (files(dir.path()), files(&golden(FORMAT)));
    assert_eq!(now.keys().collect::<Vec<_>>(), then.keys().collect::<Vec<_>>());
    for (name, bytes) in &now {
        assert!(bytes == &then[name], "{name} is not as format {FORMAT} has it: see above");
    }
}

#[test]
#[ignore = "writes the golden files of a new version"]
fn write() {
    let dir = golden(FORMAT);
    assert!(!dir.exists(), "those of a version never change: {}", dir.display());
    let fresh = temp();
    write_all(fresh.path());
    for (name, bytes) in files(fresh.path()) {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("make");
        std::fs::write(path, bytes).expect("write");
    }
}
