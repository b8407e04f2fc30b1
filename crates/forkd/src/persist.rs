//! Live snapshots become durable, and durable ones live.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use forkd_api::types::{RestoreConfig, RestoredMemory};
use forkd_image::ImageStore;
use forkd_snapshot::{ImageRef, Snapshot, SnapshotError, Status};

use crate::paths::Paths;
use crate::registry::{self, Live};
use crate::{boot, durable, host, output};

/// Seconds to wait for a snapshot that is being written, unless something else is said.
pub const WAIT_WRITING_S: u32 = 60;

/// A wait that is longer than this is told of.
const MOMENT: Duration = Duration::from_millis(500);

/// Writes a live snapshot to the store, under its tag. Without `wait` the writing has begun when this returns.
///
/// # Errors
/// The tag is in the store already, or writing failed.
pub fn save(paths: &Paths, live: &Live, wait: bool) -> Result<()> {
    let store = store_dir(paths)?;
    let saved = live.client.persist(&store, wait);
    saved.with_context(|| format!("snapshot {} did not become durable", live.record.id))
}

/// Checks that no snapshot, live or durable, has a tag.
///
/// # Errors
/// One has.
pub fn require_free_tag(paths: &Paths, tag: &str) -> Result<()> {
    forkd_image::check_tag(tag).map_err(anyhow::Error::msg)?;
    let live = is_live(paths, tag)?;
    let durable = match durable::existing(paths)? {
        Some(store) => durable::entry(&store, tag)?
            .is_some_and(|entry| !matches!(entry.status, Status::Failed(_))),
        None => false,
    };
    if live || durable {
        bail!("snapshot {tag} exists already: pick another tag, or `forkd snapshot rm {tag}`");
    }
    Ok(())
}

/// The store's directory, made if there is none.
///
/// # Errors
/// It can't be made.
pub fn store_dir(paths: &Paths) -> Result<PathBuf> {
    let dir = paths.snapshot_store();
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

/// Waits for a snapshot that is being written, as long as `patience`, and says so if it takes more than a moment. What
/// is wrong with one that is not being written is for whoever uses it to find.
///
/// # Errors
/// It is still being written, or writing it has failed meanwhile; the store can't be read.
pub fn await_written(paths: &Paths, tag: &str, patience: Duration) -> Result<()> {
    forkd_image::check_tag(tag).map_err(anyhow::Error::msg)?;
    let Some(store) = durable::existing(paths)? else { return Ok(()) };
    if !matches!(store.get(tag), Err(SnapshotError::Writing(_))) {
        return Ok(());
    }
    let seconds = patience.as_secs();
    let moment = MOMENT.min(patience);
    let mut written = store.wait(tag, moment);
    if matches!(written, Err(SnapshotError::Writing(_))) && moment < patience {
        let at_most = format!("waiting, at most {seconds} s (--wait-writing)");
        output::note(&format!("forkd: snapshot {tag} is still being written: {at_most}"));
        written = store.wait(tag, patience.saturating_sub(moment));
    }
    match written {
        Ok(_) => Ok(()),
        Err(error @ SnapshotError::Writing(_)) => bail!(
            "{error} after {seconds} s: wait longer with --wait-writing, or cancel it with `forkd snapshot rm {tag}`"
        ),
        Err(error) => Err(durable::explain(paths, error)),
    }
}

/// Whether there is a live snapshot of a tag.
///
/// # Errors
/// The run directory can't be read.
pub fn is_live(paths: &Paths, tag: &str) -> Result<bool> {
    Ok(registry::snapshots(paths)?.iter().any(|live| live.record.id == tag))
}

/// Finds a snapshot to fork from: a live one, or a durable one, which is loaded.
///
/// # Errors
/// There is none of that tag, or it can't be loaded here.
pub fn find(paths: &Paths, tag: &str) -> Result<Live> {
    forkd_image::check_tag(tag).map_err(anyhow::Error::msg)?;
    let store = paths.snapshot_store();
    let live =
        || registry::snapshots(paths).map(|all| all.into_iter().find(|l| l.record.id == tag));
    if let Some(found) = live()? {
        return Ok(found);
    }
    let snapshot = match on_disk(paths, tag)? {
        Ok(snapshot) => snapshot,
        Err(SnapshotError::NotFound(_)) => return registry::snapshot(paths, tag),
        Err(error) => return Err(durable::explain(paths, error)),
    };
    let root = root_image(paths, tag, &snapshot.manifest().image)?;
    paths.prepare_run()?;
    let config = RestoreConfig {
        restore_from: tag.to_string(),
        store,
        id: tag.to_string(),
        dir: paths.snapshot(tag),
        root,
        memory: RestoredMemory::File,
        run_as: None,
        memfd: None,
        pvm: host::pvm(paths)?,
    };
    match boot::restore(&config) {
        Ok(zygote) => zygote.keep(),
        // Another command may have loaded it at the same time; then there is one.
        Err(error) => return live()?.ok_or(error),
    }
    live()?.with_context(|| format!("snapshot {tag} was loaded, and has ended since"))
}

/// The root image of a durable snapshot that is there.
///
/// # Errors
/// There is no such durable snapshot, or its image is not here.
pub fn durable_with_root(paths: &Paths, tag: &str) -> Result<PathBuf> {
    forkd_image::check_tag(tag).map_err(anyhow::Error::msg)?;
    let snapshot = match on_disk(paths, tag)? {
        Ok(snapshot) => snapshot,
        Err(SnapshotError::NotFound(_)) => {
            let live = registry::snapshot(paths, tag)?;
            let tag = live.record.id;
            bail!(
                "--memory is for snapshots on disk, and {tag} is not: `forkd snapshot save {tag}` first"
            );
        }
        Err(error) => return Err(error.into()),
    };
    root_image(paths, tag, &snapshot.manifest().image)
}

/// Whether there is a complete durable snapshot of a tag.
///
/// # Errors
/// The store can't be read.
pub fn is_durable(paths: &Paths, tag: &str) -> Result<bool> {
    Ok(on_disk(paths, tag)?.is_ok())
}

/// The durable snapshot of a tag. Without a store there is none; the outer error is that of one that can't be opened.
fn on_disk(paths: &Paths, tag: &str) -> Result<Result<Snapshot, SnapshotError>> {
    Ok(match durable::existing(paths)? {
        Some(store) => store.get(tag),
        None => Err(SnapshotError::NotFound(tag.to_string())),
    })
}

fn root_image(paths: &Paths, tag: &str, image: &ImageRef) -> Result<PathBuf> {
    let digest = &image.digest;
    let images = ImageStore::open(&paths.data)?;
    let found = images.list()?.into_iter().find(|i| i.record.digest == *digest);
    let Some(found) = found else {
        let name = image.tag.as_ref().map(|tag| format!(" ({tag})")).unwrap_or_default();
        bail!(
            "snapshot {tag} needs root image {digest}{name}, which is not here: build or copy it to {}",
            paths.data.join("images").display()
        );
    };
    images.check(&found).with_context(|| format!("image {digest}"))?;
    Ok(found.path)
}
