//! `forkd snapshot rm`: the process, the files, or both.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;

use anyhow::{Result, bail};
use forkd_snapshot::{Removal, Removed, SnapshotError, Store};
use serde::Serialize;

use crate::cli::OutputArgs;
use crate::paths::Paths;
use crate::registry::Live;
use crate::{durable, output, parallel, registry};

/// Remove snapshots, live and durable
///
/// VMs that were forked from them live on. One that is being written is cancelled. One that others are diffs over is
/// refused, unless those are given too.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd snapshot rm py
  forkd snapshot rm base --cascade    and all that are diffs over it
  forkd snapshot rm --all")]
pub struct Args {
    /// Tags
    #[arg(value_name = "TAG", required_unless_present = "all", conflicts_with = "all")]
    tags: Vec<String>,
    /// All snapshots, live and durable
    #[arg(long)]
    all: bool,
    /// Remove also those that are diffs over them
    #[arg(long, conflicts_with = "force")]
    cascade: bool,
    /// Leave those that are diffs over them without a parent: they can't be used any more
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// What the store says to the removal of each tag: which are orphans by it, or why not.
type Gone = BTreeMap<String, Result<Vec<String>, SnapshotError>>;

/// What became of one snapshot.
#[derive(Debug, Clone, Serialize)]
struct Outcome {
    tag: String,
    /// Those that have lost their parent by it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    orphans: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl Args {
    /// Runs the verb.
    ///
    /// # Errors
    /// A snapshot is not there (then none is removed), has children, or can't be removed.
    pub fn run(self, paths: &Paths) -> Result<ExitCode> {
        for tag in &self.tags {
            forkd_image::check_tag(tag).map_err(anyhow::Error::msg)?;
        }
        let live = registry::snapshots(paths)?;
        let store = durable::existing(paths)?;
        let stored: BTreeSet<String> = match &store {
            Some(store) => store.list()?.into_iter().map(|entry| entry.tag).collect(),
            None => BTreeSet::new(),
        };
        let mut doomed: Vec<String> = Vec::new();
        if self.all {
            doomed = live.iter().map(|live| live.record.id.clone()).chain(stored.clone()).collect();
        }
        for tag in &self.tags {
            if !stored.contains(tag) && live.iter().all(|live| live.record.id != *tag) {
                return Err(registry::no_snapshot(tag));
            }
            doomed.push(tag.clone());
        }
        let removal = match (self.cascade, self.force) {
            (true, _) => Removal::Cascade,
            (_, true) => Removal::Force,
            _ => Removal::Plain,
        };
        let mut gone = Gone::new();
        if let Some(store) = &store {
            let of_store: BTreeSet<String> =
                doomed.iter().filter(|tag| stored.contains(*tag)).cloned().collect();
            gone = remove_all(store, of_store, removal);
        }
        report(end_live(paths, &live, doomed, gone), self.output)
    }
}

/// Removes from the store what was asked for, children before their parents in whatever order they were given. Also has
/// what a cascade took with it.
fn remove_all(store: &Store, mut tags: BTreeSet<String>, removal: Removal) -> Gone {
    let mut gone = Gone::new();
    loop {
        let mut later = BTreeSet::new();
        let before = tags.len();
        for tag in &tags {
            if gone.contains_key(tag) {
                continue;
            }
            match store.remove(tag, removal) {
                Ok(Removed { tags: removed, orphans }) => {
                    gone.extend(removed.into_iter().map(|tag| (tag, Ok(Vec::new()))));
                    gone.insert(tag.clone(), Ok(orphans));
                }
                // Another has removed it since it was listed.
                Err(SnapshotError::NotFound(_)) => {
                    gone.insert(tag.clone(), Ok(Vec::new()));
                }
                Err(SnapshotError::HasChildren { children, .. })
                    if children.iter().all(|child| tags.contains(child)) =>
                {
                    later.insert(tag.clone());
                }
                Err(error) => {
                    gone.insert(tag.clone(), Err(error));
                }
            }
        }
        if later.is_empty() {
            break;
        }
        if later.len() == before {
            // Each has a child among the others: no order is right, and the store says so.
            for tag in later {
                let refused = store.remove(&tag, Removal::Plain).map(|removed| removed.orphans);
                gone.insert(tag, refused);
            }
            break;
        }
        tags = later;
    }
    // Of what was removed as well as by name, it does not matter that it has been an orphan in between.
    let removed: BTreeSet<String> =
        gone.iter().filter(|(_, result)| result.is_ok()).map(|(tag, _)| tag.clone()).collect();
    for orphans in gone.values_mut().flatten() {
        orphans.retain(|orphan| !removed.contains(orphan));
    }
    gone
}

/// Ends the processes of all that is gone from the store, or was never in it: a snapshot that is refused stays whole.
fn end_live(paths: &Paths, live: &[Live], doomed: Vec<String>, mut gone: Gone) -> Vec<Outcome> {
    let tags: BTreeSet<String> = doomed.into_iter().chain(gone.keys().cloned()).collect();
    let removed: Vec<Outcome> = tags
        .into_iter()
        .map(|tag| match gone.remove(&tag).unwrap_or_else(|| Ok(Vec::new())) {
            Ok(orphans) => Outcome { tag, orphans, error: None },
            Err(error) => {
                let error = output::error_line(&durable::explain(paths, error));
                Outcome { tag, orphans: Vec::new(), error: Some(error) }
            }
        })
        .collect();
    parallel::map(&removed, |outcome| {
        let mut outcome = outcome.clone();
        let process = live.iter().find(|live| live.record.id == outcome.tag);
        if let (None, Some(live)) = (&outcome.error, process) {
            let stopped = live.client.stop(live.record.pid);
            outcome.error = stopped.err().map(|e| output::error_line(&e));
        }
        outcome
    })
}

fn report(outcomes: Vec<Outcome>, how: OutputArgs) -> Result<ExitCode> {
    if how.json {
        output::json(&outcomes)?;
    } else {
        for outcome in outcomes.iter().filter(|o| o.error.is_none()) {
            output::line(&outcome.tag)?;
            if !outcome.orphans.is_empty() {
                output::note(&format!(
                    "forkd: {} can't be used any more",
                    outcome.orphans.join(", ")
                ));
            }
        }
    }
    let failed: Vec<&str> = outcomes.iter().filter_map(|o| o.error.as_deref()).collect();
    match failed[..] {
        [] => Ok(ExitCode::SUCCESS),
        [only] if outcomes.len() == 1 => bail!("{only}"),
        _ => bail!(
            "{} of {} snapshots could not be removed: {}",
            failed.len(),
            outcomes.len(),
            failed.join("; ")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::info::tests::put;
    use super::*;

    /// `base`, `mid` over it, `top` over that; `other`.
    fn family() -> (tempfile::TempDir, Store) {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        put(&store, "base", None);
        put(&store, "mid", Some("base"));
        put(&store, "top", Some("mid"));
        put(&store, "other", None);
        (home, store)
    }

    fn left(store: &Store) -> Vec<String> {
        store.list().unwrap().into_iter().map(|entry| entry.tag).collect()
    }

    fn remove(store: &Store, tags: &[&str], removal: Removal) -> Gone {
        remove_all(store, tags.iter().map(|tag| tag.to_string()).collect(), removal)
    }

    #[test]
    fn children_go_before_their_parents() {
        let (_home, store) = family();
        let gone = remove(&store, &["base", "mid", "top"], Removal::Plain);
        assert!(gone.values().all(Result::is_ok), "{gone:?}");
        assert_eq!(left(&store), ["other"]);
    }

    #[test]
    fn a_child_that_stays_is_named_and_all_above_it_stays() {
        let (_home, store) = family();
        let gone = remove(&store, &["base", "mid", "other"], Removal::Plain);
        let line = |tag: &str| gone[tag].as_ref().unwrap_err().to_string();
        assert!(line("mid").contains("children: top") && line("mid").contains("--cascade"));
        assert!(line("base").contains("children: mid"));
        assert!(gone["other"].is_ok());
        assert_eq!(left(&store), ["base", "mid", "top"]);
    }

    #[test]
    fn a_cascade_tells_of_all_that_went() {
        let (_home, store) = family();
        let gone = remove(&store, &["mid", "base"], Removal::Cascade);
        assert_eq!(gone.keys().collect::<Vec<_>>(), ["base", "mid", "top"]);
        assert!(gone.values().all(Result::is_ok), "{gone:?}");
        assert_eq!(left(&store), ["other"]);
    }

    #[test]
    fn force_names_the_orphans_that_are_left() {
        let (_home, store) = family();
        let gone = remove(&store, &["base", "mid"], Removal::Force);
        assert_eq!(gone["base"].as_ref().unwrap(), &Vec::<String>::new());
        assert_eq!(gone["mid"].as_ref().unwrap(), &["top"]);
        assert_eq!(left(&store), ["other", "top"]);
    }

    #[test]
    fn what_is_being_written_stays_deleted() {
        let (_home, store) = family();
        let mut staged = store.stage("next", None).unwrap();
        staged.memory(4 << 20).unwrap();
        assert!(remove(&store, &["next"], Removal::Plain)["next"].is_ok());
        assert!(staged.is_cancelled());
        assert_eq!(left(&store), ["base", "mid", "other", "top"]);
    }
}
