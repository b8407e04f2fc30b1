//! What things are called in the store's directory.
//!
//! ```text
//! .lock                        held for the instant in which names change
//! <tag>/                       a complete snapshot
//! .staging-<tag>-<random>/     one being written: lock, intent.json, snapshot/; or failed.json
//! .compact-<tag>-<random>/     the flat form of <tag> being written
//! .removed-<tag>-<random>/     one being deleted
//! ```

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::SnapshotError;
use crate::manifest::{Parent, read_whole};

pub(crate) const STORE_LOCK: &str = ".lock";
pub(crate) const LOCK: &str = "lock";
pub(crate) const INTENT: &str = "intent.json";
pub(crate) const FAILED: &str = "failed.json";
/// The part of a staging directory that becomes the snapshot's directory.
pub(crate) const SNAPSHOT: &str = "snapshot";

const MAX_TAG: usize = 63;

/// What a hidden directory is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    Staging,
    Compact,
    Removed,
}

impl Purpose {
    fn prefix(self) -> &'static str {
        match self {
            Self::Staging => ".staging-",
            Self::Compact => ".compact-",
            Self::Removed => ".removed-",
        }
    }

    /// A name nobody else has.
    pub(crate) fn name(self, tag: &str) -> Result<String, SnapshotError> {
        let mut random = [0; 8];
        forkd_sys::random::fill(&mut random)
            .map_err(|e| SnapshotError::io("read random numbers for", Path::new(tag), e))?;
        Ok(format!("{}{tag}-{:016x}", self.prefix(), u64::from_le_bytes(random)))
    }

    /// What a name says, if it is one of these.
    pub(crate) fn parse(name: &str) -> Option<(Self, &str)> {
        [Self::Staging, Self::Compact, Self::Removed].into_iter().find_map(|purpose| {
            let (tag, _random) = name.strip_prefix(purpose.prefix())?.rsplit_once('-')?;
            check_tag(tag).ok()?;
            Some((purpose, tag))
        })
    }
}

/// A tag is a plain name, as those of images are.
pub(crate) fn check_tag(tag: &str) -> Result<(), SnapshotError> {
    let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let why = match tag.as_bytes() {
        [] => "it is empty",
        [first, ..] if !plain(*first) => "it must start with a letter a-z or a digit",
        all if !all.iter().all(|c| plain(*c) || b"._-".contains(c)) => {
            "only a-z, 0-9, '.', '_' and '-' are allowed"
        }
        all if all.len() > MAX_TAG => "it is longer than 63 characters",
        _ => return Ok(()),
    };
    Err(SnapshotError::BadTag { tag: tag.to_string(), why })
}

/// What a writer sets out to do; for others to see while it writes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Intent {
    pub parent: Option<Parent>,
}

/// Why a writer gave up.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Failure {
    pub reason: String,
}

/// Reads a small JSON file of a staging directory; nothing if it is not there or torn.
pub(crate) fn read_note<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&read_whole(path, 1 << 16).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back() {
        for purpose in [Purpose::Staging, Purpose::Compact, Purpose::Removed] {
            for tag in ["a", "py-3.11", "a-0123456789abcdef"] {
                let name = purpose.name(tag).expect("a name");
                assert_eq!(Purpose::parse(&name), Some((purpose, tag)));
                assert!(check_tag(&name).is_err());
            }
        }
        for other in ["warm", ".lock", ".staging-x", ".staging--1", ".staging-../a-1"] {
            assert_eq!(Purpose::parse(other), None, "{other}");
        }
    }

    #[test]
    fn tags_are_plain_names() {
        for good in ["a", "0", "py-3.11_numpy", &"a".repeat(63)] {
            assert!(check_tag(good).is_ok(), "{good}");
        }
        for bad in ["", "a/b", "../x", ".a", "-a", "A", "a b", "ä", "a\n", &"a".repeat(64)] {
            let error = check_tag(bad).expect_err(bad);
            assert!(error.to_string().contains(&format!("{bad:?}")), "{error}");
        }
    }
}
