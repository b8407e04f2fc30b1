//! Where things are on this host.
//!
//! | | FORKD_HOME set | root | others |
//! |---|---|---|---|
//! | data: images, durable snapshots | `$FORKD_HOME` | `/var/lib/forkd` | `$XDG_DATA_HOME/forkd` |
//! | run: VMs, live snapshots | `$FORKD_HOME/run` | `/run/forkd` | `$XDG_RUNTIME_DIR/forkd` |
//! | cache: kernels, initramfs | `$FORKD_CACHE`, or `$XDG_CACHE_HOME/forkd`, or `~/.cache/forkd`, for all | | |

use std::env;
use std::fs::DirBuilder;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The directories of one forkd installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// Images and durable snapshots.
    pub data: PathBuf,
    /// Run directories of VMs and live snapshots.
    pub run: PathBuf,
    /// What can be made again: kernels, initramfs.
    pub cache: PathBuf,
}

impl Paths {
    /// Finds them by the environment and the user.
    ///
    /// # Errors
    /// Neither HOME nor an XDG directory tells where a user's files go.
    pub fn find() -> Result<Self> {
        let var = |name: &str| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        Self::from_vars(&var, rustix::process::geteuid().as_raw())
    }

    fn from_vars(var: &dyn Fn(&str) -> Option<PathBuf>, uid: u32) -> Result<Self> {
        let home = |below: &str| {
            let home =
                var("HOME").context("HOME is not set: set it, or FORKD_HOME and FORKD_CACHE")?;
            anyhow::Ok(home.join(below))
        };
        let absolute = |path: PathBuf| {
            std::path::absolute(&path).with_context(|| format!("cannot find {}", path.display()))
        };
        let cache = match (var("FORKD_CACHE"), var("XDG_CACHE_HOME")) {
            (Some(dir), _) => dir,
            (None, Some(dir)) => dir.join("forkd"),
            (None, None) => home(".cache/forkd")?,
        };
        let (data, run) = if let Some(dir) = var("FORKD_HOME") {
            (dir.clone(), dir.join("run"))
        } else if uid == 0 {
            (PathBuf::from("/var/lib/forkd"), PathBuf::from("/run/forkd"))
        } else {
            let data = match var("XDG_DATA_HOME") {
                Some(dir) => dir.join("forkd"),
                None => home(".local/share/forkd")?,
            };
            let run = match var("XDG_RUNTIME_DIR") {
                Some(dir) => dir.join("forkd"),
                None => PathBuf::from(format!("/tmp/forkd-{uid}")),
            };
            (data, run)
        };
        Ok(Self { data: absolute(data)?, run: absolute(run)?, cache: absolute(cache)? })
    }

    /// Run directories of VMs.
    pub fn vms(&self) -> PathBuf {
        self.run.join("vms")
    }

    /// The store of durable snapshots. Not [`Paths::snapshots`], which are processes.
    pub fn snapshot_store(&self) -> PathBuf {
        self.data.join("snapshots")
    }

    /// Run directories of live snapshots (zygotes).
    pub fn snapshots(&self) -> PathBuf {
        self.run.join("snapshots")
    }

    /// Run directory of a VM.
    pub fn vm(&self, id: &str) -> PathBuf {
        self.vms().join(id)
    }

    /// Run directory of a live snapshot.
    pub fn snapshot(&self, tag: &str) -> PathBuf {
        self.snapshots().join(tag)
    }

    /// Makes the run directories, for this user alone: who can reach an API socket owns the VM.
    ///
    /// # Errors
    /// They can't be made, or the run directory belongs to someone else.
    pub fn prepare_run(&self) -> Result<()> {
        make_private(&self.run)?;
        let owner = std::fs::metadata(&self.run)
            .with_context(|| format!("cannot look at {}", self.run.display()))?
            .uid();
        if owner != rustix::process::geteuid().as_raw() {
            bail!(
                "{} belongs to user {owner}: set FORKD_HOME to a directory of yours",
                self.run.display()
            );
        }
        make_private(&self.vms())?;
        make_private(&self.snapshots())
    }
}

fn make_private(dir: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir).with_context(|| {
        format!("cannot make {}: set FORKD_HOME to a directory that can be written", dir.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn paths(vars: &[(&str, &str)], uid: u32) -> Result<Paths> {
        let vars: HashMap<String, PathBuf> =
            vars.iter().map(|(k, v)| (k.to_string(), PathBuf::from(v))).collect();
        Paths::from_vars(&|name| vars.get(name).cloned(), uid)
    }

    #[test]
    fn forkd_home_holds_all_but_the_cache() {
        let found = paths(&[("FORKD_HOME", "/f"), ("HOME", "/h")], 1000).unwrap();
        assert_eq!(found.vm("vm-1"), Path::new("/f/run/vms/vm-1"));
        assert_eq!(found.data, Path::new("/f"));
        assert_eq!(found.snapshot_store(), Path::new("/f/snapshots"));
        assert_eq!(found.snapshot("t"), Path::new("/f/run/snapshots/t"));
        assert_eq!(found.cache, Path::new("/h/.cache/forkd"));
    }

    #[test]
    fn root_and_others_have_their_places() {
        let root = paths(&[("FORKD_CACHE", "/c")], 0).unwrap();
        assert_eq!(
            (root.data.to_str(), root.run.to_str()),
            (Some("/var/lib/forkd"), Some("/run/forkd"))
        );
        assert_eq!(root.cache, Path::new("/c"));
        let user = paths(&[("HOME", "/h"), ("XDG_RUNTIME_DIR", "/run/user/7")], 7).unwrap();
        assert_eq!(user.snapshot("t"), Path::new("/run/user/7/forkd/snapshots/t"));
        assert_eq!(user.data, Path::new("/h/.local/share/forkd"));
    }

    #[test]
    fn without_a_home_the_message_says_what_to_set() {
        let error = paths(&[], 7).unwrap_err().to_string();
        assert!(error.contains("FORKD_HOME"), "{error}");
    }

    #[test]
    fn run_directories_are_private() {
        use std::os::unix::fs::PermissionsExt;
        let tmp = tempfile::tempdir().unwrap();
        let home = tmp.path().join("f");
        let found = paths(&[("FORKD_HOME", home.to_str().unwrap()), ("HOME", "/h")], 7).unwrap();
        found.prepare_run().unwrap();
        for dir in [&found.run, &found.vms(), &found.snapshots()] {
            assert_eq!(std::fs::metadata(dir).unwrap().permissions().mode() & 0o777, 0o700);
        }
    }
}
