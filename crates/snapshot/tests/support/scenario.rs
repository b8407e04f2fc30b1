//! A life of a store in steps, and what it may look like after each.

use std::collections::BTreeMap;
use std::path::Path;

use forkd_snapshot::{Removal, SnapshotError, Store, Verification};

use super::{MIB, Pages, bytes_of, over, pages, put};

/// What a tag stands for: memory and disk.
type Content = (Vec<u8>, Vec<u8>);
type View = BTreeMap<&'static str, Content>;

pub const STEPS: usize = 8;
const TAGS: [&str; 3] = ["base", "diff", "leaf"];

fn base() -> (Pages, Pages) {
    (pages([(0, 1), (1, 2), (5, 3), (200, 4)]), pages([(0, 1), (9, 2)]))
}

fn diff() -> (Pages, Pages) {
    (pages([(1, 0), (2, 5), (200, 6)]), pages([(9, 3)]))
}

fn leaf() -> (Pages, Pages) {
    (pages([(0, 7), (255, 8)]), pages([(1, 4)]))
}

fn second_base() -> (Pages, Pages) {
    (pages([(0, 9), (7, 9)]), pages([(3, 5)]))
}

/// Does one step.
pub fn step(store: &Store, index: usize) -> Result<(), SnapshotError> {
    let write = |tag, parent, (memory, disk): (Pages, Pages)| {
        put(store, tag, parent, 1, &memory, &disk).map(drop)
    };
    match index {
        0 => write("base", None, base()),
        1 => write("diff", Some("base"), diff()),
        2 => write("leaf", Some("diff"), leaf()),
        3 => store.compact("diff").map(drop),
        4 => store.remove("base", Removal::Plain).map(drop),
        5 => write("base", None, second_base()),
        6 => store.remove("diff", Removal::Cascade).map(drop),
        7 => store.sweep().map(drop),
        _ => unreachable!("there are {STEPS} steps"),
    }
}

/// Whether a step writes a tag that was not there.
pub fn publishes(index: usize) -> Option<&'static str> {
    [Some("base"), Some("diff"), Some("leaf"), None, None, Some("base"), None, None][index]
}

fn content(under: &[u8], (memory, disk): (Pages, Pages)) -> Content {
    (over(under, &memory), over(&vec![0; super::DISK_BYTES as usize], &disk))
}

/// What there is after so many steps.
pub fn view(steps: usize) -> View {
    let nothing = vec![0; MIB];
    let base_1 = content(&nothing, base());
    let diff = content(&base_1.0, diff());
    let leaf = content(&diff.0, leaf());
    let base_2 = content(&nothing, second_base());
    match steps {
        0 => View::new(),
        1 => [("base", base_1)].into(),
        2 => [("base", base_1), ("diff", diff)].into(),
        3 | 4 => [("base", base_1), ("diff", diff), ("leaf", leaf)].into(),
        5 => [("diff", diff), ("leaf", leaf)].into(),
        6 => [("base", base_2), ("diff", diff), ("leaf", leaf)].into(),
        _ => [("base", base_2)].into(),
    }
}

/// What a tag stands for now; nothing if it is not there or failed. All else is an error that a crash
/// must not lead to.
pub fn found(store: &Store, tag: &str) -> Option<Content> {
    match store.load(tag, Verification::Remembered) {
        Ok(loaded) => {
            assert_eq!(loaded.state, format!("state of {tag}").as_bytes());
            store.verify(tag).expect("what loads can be verified");
            Some((bytes_of(&loaded.memory), bytes_of(&loaded.disks[0])))
        }
        Err(SnapshotError::NotFound(_) | SnapshotError::Failed { .. }) => None,
        Err(error) => panic!("{tag}: {error}"),
    }
}

/// After a crash in the step behind `acknowledged`: each tag is the old or the new, and the store can
/// be used.
pub fn check(dir: &Path, acknowledged: usize, place: &str) {
    let store = Store::open(dir).expect("open");
    let (old, new) = (view(acknowledged), view(acknowledged + 1));
    let assert_old_or_new = |when: &str| {
        for tag in TAGS {
            let found = found(&store, tag);
            let fits = found.as_ref() == old.get(tag) || found.as_ref() == new.get(tag);
            let has = if found.is_some() { "wrong content" } else { "nothing" };
            assert!(fits, "{place}, {when}: {tag} has {has} after {acknowledged} steps");
        }
    };
    assert_old_or_new("reopened");
    store.list().expect("list");
    store.sweep().expect("sweep");
    assert_old_or_new("swept");
    put(&store, "again", None, 1, &base().0, &base().1).expect("the store takes a new one");
    for tag in ["again", "leaf", "diff", "base"] {
        match store.remove(tag, Removal::Cascade) {
            Ok(_) | Err(SnapshotError::NotFound(_)) => {}
            Err(error) => panic!("{place}: removing {tag}: {error}"),
        }
    }
    let left: Vec<_> = std::fs::read_dir(dir).expect("list").flatten().collect();
    let left: Vec<_> = left.iter().map(|e| e.file_name()).filter(|n| n != ".lock").collect();
    assert!(left.is_empty(), "{place}: {left:?} is left");
}
