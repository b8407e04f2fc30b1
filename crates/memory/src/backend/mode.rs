//! Names of backends and of the ways to BRANCH, and which go together.

use std::fmt;
use std::str::FromStr;

/// How a running VM is branched: made into a snapshot that children start from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BranchMode {
    /// fork(2) of the VM process: RAM is shared copy-on-write at once.
    Fork,
    /// RAM is write-protected in the pause and copied while the source runs on.
    Live,
    /// What differs from the last durable snapshot is kept: by a fork, or as `live` does it.
    Diff,
    /// All RAM is copied in the pause.
    Full,
}

impl BranchMode {
    /// All modes, the default first.
    pub const ALL: [Self; 4] = [Self::Fork, Self::Live, Self::Diff, Self::Full];

    /// Its name, as users write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fork => "fork",
            Self::Live => "live",
            Self::Diff => "diff",
            Self::Full => "full",
        }
    }
}

/// Where guest RAM comes from, by the name that users choose it with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum MemoryBackend {
    /// Private anonymous memory ([`super::Anonymous`]).
    Anonymous,
    /// Private mappings of a snapshot's memory files ([`super::FileBacked`]).
    File,
    /// A memfd, mapped shared ([`super::Memfd`]).
    MemfdShared,
    /// A memfd, mapped privately ([`super::Memfd`]).
    MemfdPrivate,
    /// Anonymous memory that is filled as the guest touches it ([`super::Userfault`]).
    Userfault,
}

const LIVE_NEEDS_SHARED: &str = "mode live needs RAM that the process which captures it can see; start the sandbox with --memory memfd-shared, or branch with --mode fork";
const SHARED_CANNOT_FORK: &str = "fork(2) would leave parent and child writing the same RAM, as it is a shared memfd; branch with --mode live, or start the sandbox with --memory anonymous";

impl MemoryBackend {
    /// All backends.
    pub const ALL: [Self; 5] =
        [Self::Anonymous, Self::File, Self::MemfdShared, Self::MemfdPrivate, Self::Userfault];

    /// Its name, as users write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Anonymous => "anonymous",
            Self::File => "file",
            Self::MemfdShared => "memfd-shared",
            Self::MemfdPrivate => "memfd-private",
            Self::Userfault => "userfault",
        }
    }

    /// The modes in which a VM with such RAM can be branched, the preferred one first. RAM of
    /// [`Self::Userfault`] can do less until it is loaded ([`super::Backend::branch_modes`]).
    pub const fn branch_modes(self) -> &'static [BranchMode] {
        match self {
            Self::MemfdShared => &[BranchMode::Live, BranchMode::Diff, BranchMode::Full],
            _ => &[BranchMode::Fork, BranchMode::Diff, BranchMode::Full],
        }
    }

    /// Why a VM with such RAM cannot be branched in that mode, and what to do instead; `None` if it
    /// can.
    pub const fn why_not(self, mode: BranchMode) -> Option<&'static str> {
        match (self, mode) {
            (Self::MemfdShared, BranchMode::Fork) => Some(SHARED_CANNOT_FORK),
            (Self::MemfdShared, BranchMode::Live)
            | (_, BranchMode::Fork | BranchMode::Diff | BranchMode::Full) => None,
            (_, BranchMode::Live) => Some(LIVE_NEEDS_SHARED),
        }
    }
}

/// A name that is none of those that can be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no such {what}: {name:?}; there are {known}")]
pub struct UnknownName {
    what: &'static str,
    name: String,
    known: String,
}

fn find<T: Copy>(
    what: &'static str,
    all: &[T],
    name_of: impl Fn(T) -> &'static str,
    name: &str,
) -> Result<T, UnknownName> {
    all.iter().copied().find(|&value| name_of(value) == name).ok_or_else(|| {
        let known: Vec<_> = all.iter().map(|&value| name_of(value)).collect();
        UnknownName { what, name: name.to_owned(), known: known.join(", ") }
    })
}

impl FromStr for BranchMode {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        find("branch mode", &Self::ALL, Self::name, name)
    }
}

impl fmt::Display for BranchMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for MemoryBackend {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        find("memory backend", &Self::ALL, Self::name, name)
    }
}

impl fmt::Display for MemoryBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        let modes = BranchMode::ALL.map(|mode| mode.to_string());
        assert_eq!(modes, ["fork", "live", "diff", "full"]);
        let backends = MemoryBackend::ALL.map(|backend| backend.to_string());
        assert_eq!(backends, ["anonymous", "file", "memfd-shared", "memfd-private", "userfault"]);
        for mode in BranchMode::ALL {
            assert_eq!(mode.name().parse(), Ok(mode));
        }
        for backend in MemoryBackend::ALL {
            assert_eq!(backend.name().parse(), Ok(backend));
        }
        let error = "memfd".parse::<MemoryBackend>().expect_err("neither one");
        assert!(error.to_string().contains("memfd-shared, memfd-private"), "{error}");
        assert!("Fork".parse::<BranchMode>().is_err());
    }

    #[test]
    fn each_mode_is_supported_or_there_is_a_reason() {
        for backend in MemoryBackend::ALL {
            for mode in BranchMode::ALL {
                let supported = backend.branch_modes().contains(&mode);
                assert_eq!(supported, backend.why_not(mode).is_none(), "{backend} {mode}");
            }
        }
        let modes = MemoryBackend::MemfdShared.branch_modes();
        assert_eq!(modes, [BranchMode::Live, BranchMode::Diff, BranchMode::Full]);
        let why = MemoryBackend::Anonymous.why_not(BranchMode::Live).expect("not live");
        assert!(why.contains("--memory memfd-shared"), "{why}");
    }
}
