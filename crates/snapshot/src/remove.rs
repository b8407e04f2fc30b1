//! Removes snapshots without orphaning their children.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::manifest::{Manifest, Parent, guess_parent};
use crate::names::check_tag;
use crate::store::{Hidden, Store};
use crate::{SnapshotError, tree};

/// What to do with the children of what is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removal {
    /// Refuse if there are any.
    Plain,
    /// Remove them too, and theirs.
    Cascade,
    /// Leave them without a parent: they cannot be loaded any more.
    Force,
}

/// What was removed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Removed {
    /// The tags, in the order in which they went.
    pub tags: Vec<String>,
    /// Children that lost their parent.
    pub orphans: Vec<String>,
}

/// Who is a child of whom.
struct Family {
    /// By tag; none for what cannot be read.
    ready: BTreeMap<String, Option<Manifest>>,
    /// Parents of what cannot be read, as far as can be told.
    guessed: BTreeMap<String, String>,
    /// Being written, compacted, or failed.
    hidden: Vec<Hidden>,
    /// Parents of what is being written.
    intended: Vec<(String, Parent)>,
}

impl Family {
    fn of(store: &Store) -> Result<Self, SnapshotError> {
        let (tags, hidden) = store.scan()?;
        let (mut ready, mut guessed) = (BTreeMap::new(), BTreeMap::new());
        for tag in tags {
            let dir = store.dir().join(&tag);
            let manifest = store.manifest_in(&dir, &tag).ok();
            if let (None, Some(parent)) = (&manifest, guess_parent(&dir)) {
                guessed.insert(tag.clone(), parent);
            }
            ready.insert(tag, manifest);
        }
        let mut intended = Vec::new();
        for writer in &hidden {
            let parent = writer.intent().and_then(|intent| intent.parent);
            let Some(parent) = parent.filter(|_| !ready.contains_key(&writer.tag)) else {
                continue;
            };
            if writer.is_alive()? {
                intended.push((writer.tag.clone(), parent));
            }
        }
        Ok(Self { ready, guessed, hidden, intended })
    }

    /// Sorted. A child that names another root has lost its parent already; where the root is not
    /// known, the name is enough.
    fn children(&self, tag: &str) -> Vec<String> {
        let this = self.ready.get(tag).and_then(Option::as_ref);
        let names_this = |parent: &Parent| {
            parent.tag == tag && this.is_none_or(|this| this.answers_to(parent.root))
        };
        let ready = self.ready.iter().filter(|(_, manifest)| {
            manifest.as_ref().and_then(|m| m.parent.as_ref()).is_some_and(names_this)
        });
        let mut children: Vec<String> = ready.map(|(tag, _)| tag.clone()).collect();
        let guessed = self.guessed.iter().filter(|(_, parent)| *parent == tag);
        children.extend(guessed.map(|(child, _)| child.clone()));
        let intended = self.intended.iter().filter(|(_, parent)| names_this(parent));
        children.extend(intended.map(|(child, _)| child.clone()));
        children.sort_unstable();
        children
    }

    /// Appends a tag behind all that descend from it.
    fn last_of_its_line(&self, tag: &str, order: &mut Vec<String>, open: &mut Vec<String>) {
        // Forged parents may go round.
        if order.iter().chain(open.iter()).any(|seen| seen == tag) {
            return;
        }
        open.push(tag.to_string());
        for child in self.children(tag) {
            self.last_of_its_line(&child, order, open);
        }
        order.push(tag.to_string());
    }
}

impl Store {
    /// Removes a snapshot: a complete one, one being written, whose writer is then refused, or a
    /// failed one.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`]; [`SnapshotError::HasChildren`], which names them; or it cannot be
    /// removed. Of a cascade, children go before their parents, so none is orphaned by an error.
    pub fn remove(&self, tag: &str, removal: Removal) -> Result<Removed, SnapshotError> {
        check_tag(tag)?;
        let mut removed = Removed::default();
        let mut trash = Vec::new();
        {
            let _names = self.lock_names()?;
            let family = Family::of(self)?;
            let children = family.children(tag);
            let mut order = vec![tag.to_string()];
            match removal {
                Removal::Plain if !children.is_empty() => {
                    return Err(SnapshotError::HasChildren { tag: tag.to_string(), children });
                }
                Removal::Plain => {}
                Removal::Cascade => {
                    order.clear();
                    family.last_of_its_line(tag, &mut order, &mut Vec::new());
                }
                Removal::Force => removed.orphans = children,
            }
            for tag in order {
                let dirs = self.directories_of(&family, &tag);
                if dirs.is_empty() {
                    return Err(SnapshotError::NotFound(tag));
                }
                for dir in dirs {
                    match self.discard(&dir, &tag) {
                        Ok(dir) => trash.push(dir),
                        // A writer that has just committed clears away its staging directory.
                        Err(error) if error.is_missing_file() => {}
                        Err(error) => return Err(error),
                    }
                }
                removed.tags.push(tag);
            }
        }
        for dir in trash {
            tree::remove(&**self.io(), &dir)?;
        }
        Ok(removed)
    }

    /// Those that stand for a tag: its own, and those of its writers and compactions.
    fn directories_of(&self, family: &Family, tag: &str) -> Vec<PathBuf> {
        let ready = family.ready.contains_key(tag).then(|| self.dir().join(tag));
        let hidden = family
            .hidden
            .iter()
            .filter(|hidden| hidden.tag == tag && hidden.purpose != crate::names::Purpose::Removed);
        ready.into_iter().chain(hidden.map(|hidden| hidden.dir.clone())).collect()
    }
}
