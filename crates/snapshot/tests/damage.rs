//! A flipped bit in any file is found, and the error names the file, and the block if it has blocks.

#![allow(clippy::expect_used)]

mod support;

use std::os::unix::fs::FileExt;
use std::path::Path;

use forkd_snapshot::*;
use support::*;

fn setup() -> (tempfile::TempDir, Store) {
    let dir = temp();
    let store = Store::open(dir.path()).expect("open");
    let ram = pages([(0, 1), (1, 2), (700, 3), (1023, 4)]);
    put(&store, "base", None, 4, &ram, &pages([(1, 1), (63, 2)])).expect("base");
    let dirty = pages([(1, 0), (2, 5), (700, 6)]);
    put(&store, "child", Some("base"), 4, &dirty, &pages([(3, 3), (4, 0)])).expect("child");
    (dir, store)
}

fn flip(path: &Path, at: u64, bit: u32) {
    let file = std::fs::File::options().read(true).write(true).open(path).expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ (1 << bit)], at).expect("write");
    // Clocks of file systems are coarse: two changes in one tick would look like one.
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).expect("set the time");
}

fn assert_names(error: &SnapshotError, path: &Path) {
    let text = error.to_string();
    assert!(text.contains(&path.display().to_string()), "{path:?} in {text:?}");
}

/// Of the small files, every byte; found by every load.
#[test]
fn in_small_files_it_is_found_by_load_and_verify() {
    let (_dir, store) = setup();
    for tag in ["base", "child"] {
        for name in ["manifest.json", "state", "extents"] {
            let path = store.dir().join(tag).join(name);
            let len = std::fs::metadata(&path).expect("stat").len();
            for at in 0..len {
                let bit = (at % 8) as u32;
                flip(&path, at, bit);
                let verified = store.verify("child").expect_err("verify");
                assert_names(&verified, &path);
                // The state of a parent is not what is run.
                if (tag, name) != ("base", "state") {
                    let loaded = store.load("child", Verification::Skip).expect_err("load");
                    assert_names(&loaded, &path);
                }
                flip(&path, at, bit);
            }
            assert!(len > 10, "{path:?} was looked at");
        }
    }
    store.verify("child").expect("all is mended");
}

#[test]
fn in_big_files_the_block_is_named() {
    let (_dir, store) = setup();
    let p = PAGE as u64;
    // First, middle and last bytes; of data pages, of holes, of zero pages, and of lone pages.
    let cases = [
        ("base", "memory", 0, 0),
        ("base", "memory", 2 * p - 1, 0),
        ("base", "memory", 700 * p + 99, 1),
        ("base", "memory", 1024 * p - 1, 1),
        ("base", "memory", 300 * p, 0),
        ("base", "memory", 600 * p, 1),
        ("base", "disk-0", p, 0),
        ("base", "disk-0", 64 * p - 1, 0),
        ("child", "memory", 2 * p + 7, 0),
        ("child", "memory", p, 0),
        ("child", "memory", 700 * p, 1),
        ("child", "disk-0", 3 * p, 0),
        ("child", "disk-0", 4 * p, 0),
    ];
    for (tag, name, at, block) in cases {
        let path = store.dir().join(tag).join(name);
        for bit in [0, 7] {
            flip(&path, at, bit);
            for found in [
                store.verify("child").map(drop),
                store.load("child", Verification::Remembered).map(drop),
            ] {
                let error = found.expect_err("damaged");
                assert_names(&error, &path);
                let named = matches!(error, SnapshotError::DamagedBlocks { block: b, count: 1, .. } if b == block);
                assert!(named, "{tag}/{name} at {at}: {error}");
            }
            flip(&path, at, bit);
        }
    }
    store.verify("child").expect("all is mended");
}

#[test]
fn a_file_that_is_missing_or_of_another_length_is_named() {
    let (_dir, store) = setup();
    for tag in ["base", "child"] {
        for name in ["memory", "disk-0", "extents", "state", "manifest.json"] {
            if (tag, name) == ("base", "state") {
                continue;
            }
            let path = store.dir().join(tag).join(name);
            let aside = path.with_extension("aside");
            std::fs::rename(&path, &aside).expect("rename");
            let error = store.load("child", Verification::Skip).expect_err("missing");
            assert_names(&error, &path);
            std::fs::rename(&aside, &path).expect("rename");
            let len = std::fs::metadata(&path).expect("stat").len();
            let file = std::fs::File::options().write(true).open(&path).expect("open");
            for wrong in [len + 4096, len - 2] {
                let whole = std::fs::read(&path).expect("read");
                file.set_len(wrong).expect("set the length");
                let error = store.load("child", Verification::Skip).expect_err("another length");
                assert_names(&error, &path);
                std::fs::write(&path, whole).expect("mend");
            }
        }
    }
    store.verify("child").expect("all is mended");
}

#[test]
fn files_of_another_snapshot_are_not_taken() {
    let (_dir, store) = setup();
    put(&store, "other", None, 4, &pages([(0, 9)]), &pages([])).expect("other");
    for name in ["extents", "state"] {
        let path = store.dir().join("base").join(name);
        let own = std::fs::read(&path).expect("read");
        std::fs::copy(store.dir().join("other").join(name), &path).expect("copy");
        assert_names(&store.verify("base").expect_err("another's"), &path);
        std::fs::write(&path, own).expect("mend");
    }
    let moved = store.dir().join("moved");
    std::fs::rename(store.dir().join("other"), &moved).expect("rename");
    let error = store.load("moved", Verification::Skip).expect_err("another tag");
    assert_names(&error, &moved);
    assert!(error.to_string().contains("other"), "{error}");
}
