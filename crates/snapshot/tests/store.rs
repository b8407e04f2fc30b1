//! The life of snapshots in a store: who sees what when, and who may remove what.

#![allow(clippy::expect_used, clippy::single_range_in_vec_init)]

mod support;

use std::path::Path;

use forkd_snapshot::*;
use support::*;

fn status(store: &Store, tag: &str) -> Option<Status> {
    let found: Vec<Entry> =
        store.list().expect("list").into_iter().filter(|entry| entry.tag == tag).collect();
    assert!(found.len() <= 1, "{found:?}");
    found.into_iter().next().map(|entry| entry.status)
}

fn simple(store: &Store, tag: &str, parent: Option<&str>, byte: u8) -> Snapshot {
    put(store, tag, parent, 1, &pages([(3, byte)]), &pages([(0, byte)])).expect(tag)
}

fn hidden(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).expect("list").map(|e| e.expect("entry").file_name());
    let names = names.map(|name| name.into_string().expect("a name"));
    names.filter(|name| name.starts_with('.') && name != ".lock").collect()
}

fn setup() -> (tempfile::TempDir, Store) {
    let dir = temp();
    let store = Store::open(&dir.path().join("snapshots")).expect("open");
    (dir, store)
}

#[test]
fn a_snapshot_is_writing_then_ready_and_reads_back() {
    let (_dir, store) = setup();
    let mut staged = store.stage("warm", None).expect("stage");
    assert_eq!(status(&store, "warm"), Some(Status::Writing { parent: None }));
    assert!(matches!(store.get("warm"), Err(SnapshotError::Writing(t)) if t == "warm"));
    assert!(matches!(store.stage("warm", None), Err(SnapshotError::Writing(_))));
    let (ram, disk) = (pages([(0, 1), (7, 2), (8, 0), (255, 3)]), pages([(5, 9), (6, 0)]));
    fill(&mut staged, 1, &ram, &disk).expect("fill");
    let snapshot = staged.commit(facts(1, Mode::Live)).expect("commit");
    assert!(matches!(status(&store, "warm"), Some(Status::Ready(m)) if *m == *snapshot.manifest()));
    assert_eq!(hidden(store.dir()), [""; 0]);
    let loaded = store.load("warm", Verification::Always).expect("load");
    assert_eq!(loaded.state, b"state of warm");
    assert_eq!(bytes_of(&loaded.memory), over(&vec![0; MIB], &ram));
    assert_eq!(loaded.memory.extents.len(), 1, "small holes are mapped with what is around them");
    let extents: Vec<_> = loaded.disks[0].extents.iter().map(|e| (e.offset, e.len)).collect();
    assert_eq!(extents, [(5 * 4096, 4096)]);
    assert_eq!(loaded.disks[0].zeroes, [6 * 4096..7 * 4096], "zero is not the same as absent");
    assert_eq!(snapshot.manifest().memory.data_bytes, 3 * 4096);
    assert!(matches!(store.stage("warm", None), Err(SnapshotError::Exists(_))));
}

#[test]
fn the_later_write_of_a_page_counts() {
    let (_dir, store) = setup();
    let mut staged = store.stage("a", None).expect("stage");
    let memory = staged.memory(MIB as u64).expect("memory");
    let all = Pages::from_iter((0..8).map(|index| (index, 7)));
    write_pages(&memory, &all).expect("write");
    memory.write_zero(4096..3 * 4096).expect("zero");
    memory.write(5 * 4096, &[page(0), page(9)].concat()).expect("write");
    memory.write(2 * 4096, &page(4)).expect("write");
    staged.state(b"").expect("state");
    staged.commit(facts(1, Mode::Full)).expect("commit");
    let mut expected = all;
    expected.extend([(1, 0), (2, 4), (5, 0), (6, 9)]);
    assert_eq!(memory_of(&store, "a"), over(&vec![0; MIB], &expected));
    let file = std::fs::read(store.dir().join("a/memory")).expect("read");
    assert_eq!(file, over(&vec![0; MIB], &expected), "the file reads as it means");
}

#[test]
fn what_is_published_is_not_written_any_more() {
    let (_dir, store) = setup();
    let mut staged = store.stage("a", None).expect("stage");
    let memory = staged.memory(MIB as u64).expect("memory");
    memory.write(0, &page(1)).expect("write");
    staged.state(b"").expect("state");
    staged.commit(facts(1, Mode::Live)).expect("commit");
    assert!(matches!(memory.write(0, &page(2)), Err(SnapshotError::Misuse { .. })));
    assert!(matches!(memory.write_zero(0..4096), Err(SnapshotError::Misuse { .. })));
    assert_eq!(memory_of(&store, "a"), over(&vec![0; MIB], &pages([(0, 1)])));
}

#[test]
fn threads_write_at_once() {
    let (_dir, store) = setup();
    let mut staged = store.stage("a", None).expect("stage");
    let memory = staged.memory(8 * MIB as u64).expect("memory");
    let all: Pages = (0..2048).map(|index| (index, (index % 7) as u8)).collect();
    std::thread::scope(|scope| {
        for part in 0..4 {
            let (memory, all) = (memory.clone(), &all);
            scope.spawn(move || {
                let mine: Pages =
                    all.iter().filter(|(i, _)| *i % 4 == part).map(|(i, b)| (*i, *b)).collect();
                write_pages(&memory, &mine).expect("write");
            });
        }
    });
    staged.state(b"").expect("state");
    staged.commit(facts(8, Mode::Live)).expect("commit");
    assert_eq!(memory_of(&store, "a"), over(&vec![0; 8 * MIB], &all));
}

#[test]
fn what_cannot_be_written_is_refused() {
    let (_dir, store) = setup();
    let misuse = |result: Result<(), SnapshotError>, word: &str| {
        let error = result.expect_err(word);
        assert!(matches!(error, SnapshotError::Misuse { .. }), "{error}");
        assert!(error.to_string().contains(word), "{error}");
    };
    let mut staged = store.stage("a", None).expect("stage");
    misuse(staged.memory(MIB as u64 + 1).map(drop), "1048577");
    let memory = staged.memory(MIB as u64).expect("memory");
    misuse(staged.memory(MIB as u64).map(drop), "memory");
    misuse(memory.write(100, &page(1)), "whole pages");
    misuse(memory.write(0, &[1; 100]), "whole pages");
    misuse(memory.write(MIB as u64, &page(1)), "within");
    misuse(memory.write(!0xfff, &page(1)), "0x");
    misuse(memory.write_zero(0..2 * MIB as u64), "within");
    misuse(staged.disk(4096, false).map(drop), "whole");
    misuse(staged.commit(facts(1, Mode::Full)).map(drop), "state");
    assert!(matches!(status(&store, "a"), Some(Status::Failed(why)) if why.contains("state")));
    let mut staged = store.stage("b", None).expect("stage");
    fill(&mut staged, 1, &pages([]), &pages([])).expect("fill");
    misuse(staged.commit(facts(2, Mode::Full)).map(drop), "2 MiB");
    assert!(matches!(store.stage("../x", None), Err(SnapshotError::BadTag { .. })));
    assert!(matches!(store.get("none"), Err(SnapshotError::NotFound(_))));
    assert!(matches!(store.remove("none", Removal::Plain), Err(SnapshotError::NotFound(_))));
    assert!(matches!(store.stage("c", Some("none")), Err(SnapshotError::NotFound(_))));
}

#[test]
fn failed_says_why_until_it_is_removed_or_tried_again() {
    let (_dir, store) = setup();
    let mut staged = store.stage("a", None).expect("stage");
    fill(&mut staged, 1, &pages([(0, 1)]), &pages([])).expect("fill");
    staged.fail("the guest fell over").expect("fail");
    drop(staged);
    assert_eq!(status(&store, "a"), Some(Status::Failed("the guest fell over".into())));
    let error = store.load("a", Verification::Skip).expect_err("failed").to_string();
    assert!(error.contains("fell over"), "{error}");
    assert_eq!(store.sweep().expect("sweep"), Swept::default(), "kept");
    store.remove("a", Removal::Plain).expect("remove");
    assert_eq!(status(&store, "a"), None);
    // Dropped without a word, as when the writer dies.
    let mut staged = store.stage("b", None).expect("stage");
    fill(&mut staged, 1, &pages([(0, 1)]), &pages([])).expect("fill");
    drop(staged);
    assert!(matches!(status(&store, "b"), Some(Status::Failed(why)) if why.contains("ended")));
    assert_eq!(store.sweep().expect("sweep").failed, ["b"]);
    assert!(matches!(status(&store, "b"), Some(Status::Failed(why)) if why.contains("ended")));
    simple(&store, "b", None, 5);
    assert!(matches!(status(&store, "b"), Some(Status::Ready(_))));
    assert_eq!(hidden(store.dir()), [""; 0]);
}

#[test]
fn deleted_while_writing_stays_deleted() {
    let (_dir, store) = setup();
    let mut staged = store.stage("a", None).expect("stage");
    fill(&mut staged, 1, &pages([(0, 1)]), &pages([])).expect("fill");
    assert!(!staged.is_cancelled());
    // As another process does, with a store of its own.
    let other = Store::open(store.dir()).expect("open");
    assert_eq!(other.remove("a", Removal::Plain).expect("remove").tags, ["a"]);
    assert!(staged.is_cancelled());
    assert!(matches!(staged.disk(4096, true), Err(SnapshotError::Cancelled(_))));
    assert!(matches!(staged.fail("late"), Err(SnapshotError::Cancelled(_))));
    let committed = staged.commit(facts(1, Mode::Live));
    assert!(matches!(committed, Err(SnapshotError::Cancelled(tag)) if tag == "a"));
    assert_eq!(status(&store, "a"), None);
    // A new one under the same tag is none of the old writer's business.
    let mut old = store.stage("a", None).expect("stage");
    fill(&mut old, 1, &pages([(0, 1)]), &pages([])).expect("fill");
    other.remove("a", Removal::Plain).expect("remove");
    simple(&store, "a", None, 2);
    assert!(matches!(old.commit(facts(1, Mode::Live)), Err(SnapshotError::Cancelled(_))));
    assert_eq!(memory_of(&store, "a"), over(&vec![0; MIB], &pages([(3, 2)])));
    assert_eq!(hidden(store.dir()), [""; 0]);
}

#[test]
fn a_long_write_notices_that_it_was_deleted() {
    let (_dir, store) = setup();
    let mut staged = store.stage("a", None).expect("stage");
    let memory = staged.memory(64 * MIB as u64).expect("memory");
    store.remove("a", Removal::Plain).expect("remove");
    let zeroes = vec![0; MIB];
    let stopped = (0..64).position(|mib| memory.write(mib * MIB as u64, &zeroes).is_err());
    assert_eq!(stopped, Some(15), "at 16 MiB");
    staged.cancel().expect("nothing is left to cancel");
}

#[test]
fn a_writer_may_cancel() {
    let (_dir, store) = setup();
    let mut staged = store.stage("a", None).expect("stage");
    fill(&mut staged, 1, &pages([(0, 1)]), &pages([])).expect("fill");
    staged.cancel().expect("cancel");
    assert_eq!(hidden(store.dir()), [""; 0]);
}

#[test]
fn children_keep_their_parents() {
    let (_dir, store) = setup();
    simple(&store, "base", None, 1);
    simple(&store, "b", Some("base"), 2);
    simple(&store, "a", Some("base"), 3);
    simple(&store, "leaf", Some("a"), 4);
    let error = store.remove("base", Removal::Plain).expect_err("children");
    assert!(
        matches!(&error, SnapshotError::HasChildren { children, .. } if *children == ["a", "b"])
    );
    assert!(error.to_string().contains("a, b"), "{error}");
    assert!(matches!(status(&store, "base"), Some(Status::Ready(_))));
    store.remove("b", Removal::Plain).expect("no children");
    let removed = store.remove("a", Removal::Force).expect("force");
    assert_eq!((removed.tags, removed.orphans), (vec!["a".into()], vec!["leaf".into()]));
    let error = store.load("leaf", Verification::Skip).expect_err("orphan");
    assert!(matches!(&error, SnapshotError::ParentMissing { .. }));
    assert!(error.to_string().contains("leaf") && error.to_string().contains("\"a\""), "{error}");
    // Another under the parent's tag is not the parent.
    simple(&store, "a", Some("base"), 9);
    let error = store.load("leaf", Verification::Skip).expect_err("another parent");
    assert!(matches!(&error, SnapshotError::ParentChanged { .. }), "{error}");
    simple(&store, "c", Some("a"), 4);
    let removed = store.remove("base", Removal::Cascade).expect("cascade");
    assert_eq!(removed.tags, ["c", "a", "base"], "children first; leaf is nobody's child");
    assert_eq!(removed.orphans, [""; 0]);
    store.remove("leaf", Removal::Plain).expect("an orphan can be removed");
    assert_eq!(store.list().expect("list"), []);
}

#[test]
fn a_child_being_written_counts() {
    let (_dir, store) = setup();
    simple(&store, "base", None, 1);
    let mut staged = store.stage("child", Some("base")).expect("stage");
    assert_eq!(staged.parent().map(|p| p.tag.as_str()), Some("base"));
    fill(&mut staged, 1, &pages([(0, 1)]), &pages([])).expect("fill");
    let error = store.remove("base", Removal::Plain).expect_err("a child");
    assert!(
        matches!(&error, SnapshotError::HasChildren { children, .. } if *children == ["child"])
    );
    store.remove("base", Removal::Force).expect("force");
    let error = staged.commit(facts(1, Mode::Diff)).expect_err("no parent");
    assert!(matches!(error, SnapshotError::ParentMissing { .. }));
    assert!(matches!(status(&store, "child"), Some(Status::Failed(why)) if why.contains("base")));
    simple(&store, "base", None, 1);
    let _staged = store.stage("late", Some("base")).expect("stage");
    let removed = store.remove("base", Removal::Cascade).expect("cascade");
    assert_eq!(removed.tags, ["late", "base"]);
}

#[test]
fn a_child_that_cannot_be_read_counts() {
    let (_dir, store) = setup();
    simple(&store, "base", None, 1);
    simple(&store, "child", Some("base"), 2);
    let path = store.dir().join("child/manifest.json");
    let text = std::fs::read_to_string(&path).expect("read");
    std::fs::write(&path, text.replace("\"format\": 1", "\"format\": 2")).expect("write");
    assert!(
        matches!(status(&store, "child"), Some(Status::Unreadable(why)) if why.contains("format 2"))
    );
    let error = store.remove("base", Removal::Plain).expect_err("a child");
    assert!(
        matches!(&error, SnapshotError::HasChildren { children, .. } if *children == ["child"])
    );
    store.remove("child", Removal::Plain).expect("remove what cannot be read");
    store.remove("base", Removal::Plain).expect("remove");
}

#[test]
fn compaction_keeps_content_and_children() {
    let (_dir, store) = setup();
    let (base, mid) = (pages([(0, 1), (1, 2), (300, 3)]), pages([(1, 0), (2, 5), (511, 6)]));
    put(&store, "base", None, 2, &base, &pages([(1, 1)])).expect("base");
    let old = put(&store, "mid", Some("base"), 2, &mid, &pages([(2, 2), (3, 0)])).expect("mid");
    put(&store, "leaf", Some("mid"), 2, &pages([(0, 0), (9, 9)]), &pages([])).expect("leaf");
    let mut late = store.stage("late", Some("mid")).expect("stage");
    fill(&mut late, 2, &pages([(4, 4)]), &pages([])).expect("fill");
    let (before_mid, before_leaf) = (memory_of(&store, "mid"), memory_of(&store, "leaf"));
    let held = store.load("mid", Verification::Skip).expect("load");

    let flat = store.compact("mid").expect("compact");
    assert_eq!(flat.manifest().parent, None);
    assert_eq!(flat.manifest().replaces, Some(old.manifest().root));
    assert_eq!(flat.manifest().created_unix_ms, old.manifest().created_unix_ms);
    late.commit(facts(2, Mode::Diff)).expect("its parent is still the same");
    store.remove("base", Removal::Plain).expect("nobody needs it");
    assert_eq!(memory_of(&store, "mid"), before_mid);
    assert_eq!(memory_of(&store, "leaf"), before_leaf);
    assert_eq!(memory_of(&store, "late"), over(&before_mid, &pages([(4, 4)])));
    assert_eq!(bytes_of(&held.memory), before_mid, "what was loaded stays");
    let disk = &store.load("mid", Verification::Always).expect("load").disks[0];
    assert_eq!((disk.extents.len(), disk.extents[0].offset), (1, 2 * 4096));
    assert_eq!(disk.zeroes, [3 * 4096..4 * 4096]);
    // Children name it whichever root they know.
    let error = store.remove("mid", Removal::Plain).expect_err("children");
    assert!(error.to_string().contains("late, leaf"), "{error}");
    assert_eq!(store.compact("mid").expect("no change").manifest().root, flat.manifest().root);
    assert_eq!(hidden(store.dir()), [""; 0]);
    let info = store.info("leaf").expect("info");
    assert_eq!(info.parents, ["mid"]);
    assert!(info.disk_bytes > 0 && info.chain_disk_bytes > info.disk_bytes, "{info:?}");
}

#[test]
fn compaction_launders_no_damage() {
    let (_dir, store) = setup();
    put(&store, "base", None, 1, &pages([(0, 1), (9, 2)]), &pages([])).expect("base");
    simple(&store, "child", Some("base"), 2);
    flip(&store.dir().join("base/memory"), 9 * 4096 + 5);
    let error = store.compact("child").expect_err("damaged");
    assert!(matches!(error, SnapshotError::DamagedBlocks { block: 0, .. }), "{error}");
    assert_eq!(hidden(store.dir()), [""; 0]);
    assert!(store.get("child").expect("still there").manifest().parent.is_some());
}

fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).expect("read");
    bytes[at] ^= 4;
    std::fs::write(path, bytes).expect("write");
    // Clocks of file systems are coarse: two changes in one tick would look like one.
    let file = std::fs::File::options().write(true).open(path).expect("open");
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).expect("set the time");
}

#[test]
fn a_chain_has_at_most_64_parents() {
    let (_dir, store) = setup();
    let none = Pages::new();
    let put = |depth: usize| {
        let parent = depth.checked_sub(1).map(|above| format!("s{above}"));
        let pages = pages([(depth, depth as u8 + 1)]);
        put(&store, &format!("s{depth}"), parent.as_deref(), 1, &pages, &none)
    };
    for depth in 0..=MAX_DEPTH {
        put(depth).expect("within the limit");
    }
    let error = put(MAX_DEPTH + 1).expect_err("too deep");
    assert!(matches!(&error, SnapshotError::TooDeep { limit: 64, .. }), "{error}");
    let all: Pages = (0..=MAX_DEPTH).map(|depth| (depth, depth as u8 + 1)).collect();
    let deepest = format!("s{MAX_DEPTH}");
    assert_eq!(memory_of(&store, &deepest), over(&vec![0; MIB], &all));
    assert_eq!(store.info(&deepest).expect("info").parents.len(), 64);
    store.compact("s63").expect("compact");
    put(MAX_DEPTH + 1).expect("two parents now");
}

#[test]
fn a_forged_circle_is_an_error_and_not_for_ever() {
    let (_dir, store) = setup();
    simple(&store, "base", None, 1);
    simple(&store, "a", Some("base"), 2);
    let b = simple(&store, "b", Some("a"), 3);
    // `a` becomes a child of `b`, and says it answers to the root that `b` knows.
    let mut forged = store.get("a").expect("a").manifest().clone();
    forged.replaces = Some(forged.root);
    forged.parent = Some(Parent { tag: "b".into(), root: b.manifest().root });
    forged.root = forged.root_of();
    let text = serde_json::to_vec(&forged).expect("json");
    std::fs::write(store.dir().join("a/manifest.json"), text).expect("write");
    for tag in ["a", "b"] {
        let error = store.load(tag, Verification::Skip).expect_err("a circle");
        assert!(matches!(&error, SnapshotError::Cycle { again, .. } if again == tag), "{error}");
        assert!(matches!(store.stage("c", Some(tag)), Err(SnapshotError::Cycle { .. })));
        assert!(matches!(
            store.remove(tag, Removal::Plain),
            Err(SnapshotError::HasChildren { .. })
        ));
    }
    assert_eq!(store.remove("a", Removal::Cascade).expect("remove").tags, ["b", "a"]);
}

#[test]
fn verification_is_remembered_until_a_file_changes() {
    let (_dir, store) = setup();
    simple(&store, "base", None, 1);
    simple(&store, "child", Some("base"), 2);
    let stamp = store.dir().join("base/verified.json");
    assert!(stamp.exists(), "it was hashed as it was written");
    std::fs::remove_file(&stamp).expect("remove");
    store.load("child", Verification::Skip).expect("load");
    assert!(!stamp.exists());
    store.load("child", Verification::Remembered).expect("load");
    assert!(stamp.exists());
    // Without the stamp being void this would be missed.
    flip(&store.dir().join("base/memory"), 3 * 4096);
    let error = store.load("child", Verification::Remembered).expect_err("damaged");
    assert!(error.to_string().contains("base/memory"), "{error}");
    flip(&store.dir().join("base/memory"), 3 * 4096);
    store.load("child", Verification::Remembered).expect("mended");
    // Another boot voids it. That it is then read again shows in the stamp being that of this boot.
    let text = std::fs::read_to_string(&stamp).expect("read");
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("boot id");
    std::fs::write(&stamp, text.replace(boot.trim(), "another")).expect("write");
    store.load("child", Verification::Remembered).expect("load");
    assert_eq!(std::fs::read_to_string(&stamp).expect("read"), text);
    std::fs::write(&stamp, "torn {").expect("write");
    store.load("child", Verification::Remembered).expect("a torn stamp is none");
    let verified = store.verify("child").expect("verify");
    assert_eq!((verified.layers, verified.blocks), (2, 4));
}

#[test]
fn sweep_takes_the_rests_of_the_dead_and_only_those() {
    let (_dir, store) = setup();
    simple(&store, "base", None, 1);
    let _alive = store.stage("alive", None).expect("stage");
    for name in [".removed-x-1/snapshot", ".compact-base-2/snapshot", ".staging-y-3"] {
        std::fs::create_dir_all(store.dir().join(name)).expect("make");
    }
    std::fs::write(store.dir().join(".removed-x-1/snapshot/memory"), "x").expect("write");
    let swept = store.sweep().expect("sweep");
    assert_eq!((swept.deleted.len(), swept.failed.len()), (3, 0), "{swept:?}");
    let left = hidden(store.dir());
    assert!(left.len() == 1 && left[0].starts_with(".staging-alive-"), "{left:?}");
    assert!(matches!(status(&store, "alive"), Some(Status::Writing { .. })));
}

#[test]
fn a_drop_deletes_nothing() {
    // A forked child drops what its parent goes on with.
    let (_dir, store) = setup();
    drop(store.stage("a", None).expect("stage"));
    assert_eq!(hidden(store.dir()).len(), 1);
}

#[test]
fn what_is_being_written_can_be_waited_for() {
    use std::time::{Duration, Instant};
    let long = Duration::from_secs(60);
    type End = fn(Staged, &Store);
    type Expected = fn(Result<Snapshot, SnapshotError>) -> bool;
    let ends: [(End, Expected); 4] = [
        (|staged, _| drop(staged.commit(facts(1, Mode::Live)).expect("commit")), |r| r.is_ok()),
        (
            |staged, _| staged.fail("no more").expect("fail"),
            |r| matches!(r, Err(SnapshotError::Failed { reason, .. }) if reason == "no more"),
        ),
        (
            // As if it died.
            |staged, _| drop(staged),
            |r| matches!(r, Err(SnapshotError::Failed { reason, .. }) if reason.contains("ended")),
        ),
        (
            |_staged, store| drop(store.remove("a", Removal::Plain).expect("remove")),
            |r| matches!(r, Err(SnapshotError::NotFound(_))),
        ),
    ];
    for (end, expected) in ends {
        let (_dir, store) = setup();
        let mut staged = store.stage("a", None).expect("stage");
        fill(&mut staged, 1, &pages([(0, 1)]), &pages([])).expect("fill");
        let soon = store.wait("a", Duration::from_millis(5));
        assert!(matches!(soon, Err(SnapshotError::Writing(_))), "the time is up");
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| store.wait("a", long));
            let start = Instant::now();
            end(staged, &store);
            assert!(expected(waiter.join().expect("no panic")));
            assert!(start.elapsed() < long / 2, "it did not wait for the limit");
        });
    }
}

#[test]
fn a_diff_keeps_what_differs_from_its_parent() {
    let dir = temp();
    let store = Store::open(dir.path()).expect("open");
    let base = pages([(0, 1), (1, 2), (2, 3), (5, 5)]);
    put(&store, "base", None, 1, &base, &pages([(0, 1), (1, 0), (4, 4)])).expect("base");
    let mut staged = store.stage("diff", Some("base")).expect("stage");
    let memory = staged.memory(MIB as u64).expect("memory");
    // As they are, but for page 2, which becomes zero; page 3 was zero before. One write.
    write_pages(&memory, &pages([(0, 1), (1, 2), (2, 0), (3, 0)])).expect("write");
    // Back and forth: what this layer has once had, it has.
    write_pages(&memory, &pages([(5, 9)])).expect("another");
    write_pages(&memory, &pages([(5, 5)])).expect("the parent's again");
    memory.write_zero(16 * PAGE as u64..20 * PAGE as u64).expect("zero over zero");
    let disk = staged.disk(DISK_BYTES, false).expect("disk");
    write_pages(&disk, &pages([(0, 1), (1, 0), (4, 0), (7, 0)])).expect("write");
    staged.state(b"s").expect("state");
    staged.commit(facts(1, Mode::Diff)).expect("commit");
    let loaded = store.load("diff", Verification::Always).expect("load");
    assert_eq!(loaded.manifest.memory.data_bytes, PAGE as u64, "page 5 alone");
    assert_eq!(loaded.manifest.disks[0].data_bytes, 0);
    let mut right = over(&vec![0; MIB], &base);
    right[2 * PAGE..3 * PAGE].fill(0);
    assert_eq!(bytes_of(&loaded.memory), right);
    // Page 7 is the base image's in the parent, and zero here.
    let page = |n: u64| n * PAGE as u64..(n + 1) * PAGE as u64;
    assert_eq!(loaded.disks[0].zeroes, [page(1), page(4), page(7)]);
    assert_eq!(loaded.disks[0].extents.len(), 1);
}

#[test]
fn a_diff_over_what_is_known_by_root() {
    let dir = temp();
    let store = Store::open(dir.path()).expect("open");
    let base = simple(&store, "base", None, 1);
    let known = Parent { tag: "base".into(), root: base.manifest().root };
    simple(&store, "mid", Some("base"), 2);
    let mid = store.get("mid").expect("mid").manifest().root;
    let mid = Parent { tag: "mid".into(), root: mid };
    store.compact("mid").expect("compact");
    let staged = store.stage_over("leaf", &mid).expect("the compacted one answers");
    assert_ne!(staged.parent().expect("a parent").root, mid.root, "by its own root");
    drop(staged);
    store.remove("base", Removal::Plain).expect("nobody needs it");
    let missing = store.stage_over("x", &known).expect_err("gone");
    assert!(matches!(missing, SnapshotError::ParentMissing { .. }), "{missing}");
    simple(&store, "base", None, 7);
    let changed = store.stage_over("x", &known).expect_err("another");
    assert!(matches!(changed, SnapshotError::ParentChanged { .. }), "{changed}");
}

#[test]
fn what_is_beside_a_snapshot_is_no_part_of_it() {
    let (_dir, store) = setup();
    let snapshot = simple(&store, "warm", None, 1);
    let root = snapshot.manifest().root;
    let write = |dir: &Path| std::fs::write(dir.join("hint"), b"a hint");
    store.beside("warm", root, write).expect("beside").expect("write");
    assert!(snapshot.dir().join("hint").exists());
    store.verify("warm").expect("as it was");
    store.compact("warm").expect("compact");
    store.beside("warm", root, write).expect("it stands for what it replaces").expect("write");
    store.remove("warm", Removal::Plain).expect("remove");
    assert!(matches!(store.beside("warm", root, write), Err(SnapshotError::NotFound(_))));
    simple(&store, "warm", None, 2);
    let another = store.beside("warm", root, write);
    assert!(matches!(another, Err(SnapshotError::NotFound(_))), "another of the same tag");
}

/// It names an instant of a VM, which has the same bytes in one layer or in many.
#[test]
fn a_compacted_snapshot_is_of_the_same_instant() {
    let (_dir, store) = setup();
    put(&store, "base", None, 1, &pages([(0, 1)]), &pages([])).expect("base");
    let instant = Some(Digest([7; 32]));
    let mut staged = store.stage("diff", Some("base")).expect("stage");
    fill(&mut staged, 1, &pages([(1, 2)]), &pages([])).expect("fill");
    staged.commit(Facts { instant, ..facts(1, Mode::Fork) }).expect("commit");
    assert_eq!(store.get("diff").expect("get").manifest().instant, instant);
    store.compact("diff").expect("compact");
    let flat = store.get("diff").expect("get");
    assert_eq!((flat.manifest().parent.is_none(), flat.manifest().instant), (true, instant));
    assert_eq!(store.get("base").expect("get").manifest().instant, None);
}
