//! Durable snapshots: the store of this host, and its errors in the words of the command line.

use anyhow::{Context, Result, anyhow};
use forkd_snapshot::{Entry, SnapshotError, Status, Store};

use crate::paths::Paths;
use crate::registry;

/// The store, if there is one. Looking makes none, so that lists work in a home that can't be written.
///
/// # Errors
/// It can't be opened.
pub fn existing(paths: &Paths) -> Result<Option<Store>> {
    let dir = paths.snapshot_store();
    match dir.try_exists() {
        Ok(false) => Ok(None),
        Ok(true) => Ok(Some(Store::open(&dir)?)),
        Err(e) => Err(e).with_context(|| format!("cannot look at {}", dir.display())),
    }
}

/// The store, to look for a durable snapshot in that must be there.
///
/// # Errors
/// The tag can't be one; there is no such snapshot, as there is no store; or it can't be opened.
pub fn store_for(paths: &Paths, tag: &str) -> Result<Store> {
    forkd_image::check_tag(tag).map_err(anyhow::Error::msg)?;
    existing(paths)?.ok_or_else(|| missing(paths, tag))
}

/// What has a tag in the store. Of a complete one and an attempt at the same tag that failed, it is the
/// complete one.
///
/// # Errors
/// The store can't be read.
pub fn entry(store: &Store, tag: &str) -> Result<Option<Entry>> {
    let mut entries = store.list()?;
    entries.retain(|entry| entry.tag == tag);
    Ok(entries.into_iter().min_by_key(|entry| rank(&entry.status)))
}

/// The order of what may have the same tag: the lower stands for it.
pub fn rank(status: &Status) -> u8 {
    match status {
        Status::Ready(_) => 0,
        Status::Unreadable(_) => 1,
        Status::Writing { .. } => 2,
        Status::Failed(_) => 3,
    }
}

/// Durable snapshots that need an image, as `snapshot TAG`.
///
/// # Errors
/// The store can't be read.
pub fn users_of_image(paths: &Paths, digest: &str) -> Result<Vec<String>> {
    let Some(store) = existing(paths)? else { return Ok(Vec::new()) };
    let uses = |entry: Entry| match entry.status {
        Status::Ready(manifest) if manifest.image.digest == digest => {
            Some(format!("snapshot {}", entry.tag))
        }
        _ => None,
    };
    Ok(store.list()?.into_iter().filter_map(uses).collect())
}

/// That a tag is not in the store; and if it is live, that this is not enough.
fn missing(paths: &Paths, tag: &str) -> anyhow::Error {
    let live = registry::snapshots(paths).unwrap_or_default();
    if live.iter().any(|live| live.record.id == tag) {
        return anyhow!("snapshot {tag:?} is live only: it lives in memory and has no files");
    }
    registry::no_snapshot(tag)
}

/// An error of the store, with what to do about it.
pub fn explain(paths: &Paths, error: SnapshotError) -> anyhow::Error {
    let advice = match &error {
        SnapshotError::NotFound(tag) => return missing(paths, tag),
        SnapshotError::Writing(tag) => {
            format!("wait until `forkd snapshot ls` shows it as durable, or cancel it with `forkd snapshot rm {tag}`")
        }
        SnapshotError::Failed { tag, .. } => {
            format!("take it again, or forget it with `forkd snapshot rm {tag}`")
        }
        SnapshotError::ParentMissing { child, .. } | SnapshotError::ParentChanged { child, .. } => {
            format!("it cannot be used any more, remove it with `forkd snapshot rm {child} --cascade`")
        }
        SnapshotError::Cycle { tag, .. } => {
            format!("they cannot be used, remove them with `forkd snapshot rm {tag} --cascade`")
        }
        SnapshotError::Damaged { .. } | SnapshotError::DamagedBlocks { .. } => {
            "the snapshot and all that are diffs over it cannot be trusted, remove them and take it again"
                .to_string()
        }
        SnapshotError::Changed(tag) => format!("run `forkd snapshot compact {tag}` again"),
        _ => return error.into(),
    };
    anyhow!("{error}; {advice}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn paths(home: &Path) -> Paths {
        Paths { data: home.to_owned(), run: home.join("run"), cache: home.join("cache") }
    }

    #[test]
    fn looking_makes_no_store() {
        let home = tempfile::tempdir().unwrap();
        let paths = paths(home.path());
        assert!(existing(&paths).unwrap().is_none());
        assert!(users_of_image(&paths, "d").unwrap().is_empty());
        assert!(!paths.snapshot_store().exists());
        let error = store_for(&paths, "gone").unwrap_err().to_string();
        assert!(error.contains("\"gone\"") && error.contains("forkd snapshot ls"), "{error}");
        assert!(store_for(&paths, "a/b").unwrap_err().to_string().contains("\"a/b\""));
    }

    #[test]
    fn errors_say_what_to_do() {
        let home = tempfile::tempdir().unwrap();
        let paths = paths(home.path());
        let tag = || "py".to_string();
        for error in [
            SnapshotError::NotFound(tag()),
            SnapshotError::Writing(tag()),
            SnapshotError::Failed { tag: tag(), reason: "of it".into() },
            SnapshotError::ParentMissing { child: tag(), parent: "base".into() },
            SnapshotError::Cycle { tag: tag(), again: "base".into() },
            SnapshotError::Changed(tag()),
        ] {
            let line = explain(&paths, error).to_string();
            assert!(line.contains("\"py\"") && line.contains("`forkd snapshot "), "{line}");
        }
    }

    #[test]
    fn the_complete_one_stands_for_its_tag() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        assert!(entry(&store, "py").unwrap().is_none());
        drop(store.stage("py", None).unwrap());
        assert!(matches!(entry(&store, "py").unwrap().unwrap().status, Status::Failed(_)));
        assert!(rank(&Status::Writing { parent: None }) < rank(&Status::Failed(String::new())));
    }
}
