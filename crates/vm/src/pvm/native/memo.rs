//! What the probe found, remembered in a file until the host restarts or changes its KVM.
//!
//! The file is a cache and no more: one that is missing, damaged, of another host boot, or that somebody else could
//! have written is as good as none, and one that cannot be written is not missed. It is text:
//!
//! ```text
//! forkd-pvm-probe 1
//! <boot id> <kernel's release and version> <KVM module's version and its parameter pvm_native>
//! native                                     (or: differs REASON)
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// First line of the file. The number is the version of the file and of the probe: a probe that asks more than the last
/// one has another.
const HEADER: &str = "forkd-pvm-probe 1";
/// Most bytes that are read.
const MAX: u64 = 4096;
/// Longest reason that is kept, in bytes.
const REASON_MAX: usize = 1024;

/// The file, and what its answer is valid for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memo {
    path: PathBuf,
    key: String,
}

impl Memo {
    /// In the file `path`, for this boot of this host. None if the host does not tell which boot this is.
    pub fn of_host(path: &Path) -> Option<Self> {
        let line = |path: &str| {
            fs::read_to_string(path).ok().map(|text| text.trim().replace(char::is_whitespace, "_"))
        };
        let boot = line("/proc/sys/kernel/random/boot_id").filter(|id| !id.is_empty())?;
        let kernel = ["/proc/sys/kernel/osrelease", "/proc/sys/kernel/version"].map(line);
        let module = ["srcversion", "coresize", "parameters/pvm_native"]
            .map(|name| line(&format!("/sys/module/kvm_pvm/{name}")));
        let known = kernel.into_iter().chain(module).map(|word| word.unwrap_or_else(|| "-".into()));
        let key = std::iter::once(boot).chain(known).collect::<Vec<_>>().join(" ");
        Some(Self { path: path.to_owned(), key })
    }

    /// What the probe found when it last ran: nothing amiss, or the reason. None if that is not known.
    pub fn read(&self) -> Option<Result<(), String>> {
        let text = read_own(&self.path)?;
        let mut lines = text.lines();
        if lines.next() != Some(HEADER) || lines.next() != Some(self.key.as_str()) {
            return None;
        }
        match (lines.next()?, lines.next()) {
            ("native", None) => Some(Ok(())),
            (line, None) => line.strip_prefix("differs ").map(|why| Err(why.to_owned())),
            _ => None,
        }
    }

    /// Remembers what the probe found.
    ///
    /// # Errors
    /// The file cannot be written; nothing depends on it.
    pub fn write(&self, found: &Result<(), String>) -> io::Result<()> {
        let answer = match found {
            Ok(()) => "native".to_owned(),
            Err(why) => {
                let line: String =
                    why.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
                let mut end = line.len().min(REASON_MAX);
                while !line.is_char_boundary(end) {
                    end -= 1;
                }
                format!("differs {}", line.get(..end).unwrap_or_default())
            }
        };
        let text = format!("{HEADER}\n{}\n{answer}\n", self.key);
        // Whole or not at all; two processes that write at once write the same.
        let draft = self.path.with_extension(format!("{}.tmp", std::process::id()));
        let written = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&draft)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .and_then(|()| fs::rename(&draft, &self.path));
        if written.is_err() {
            // If it is not there, so much the better.
            let _ = fs::remove_file(&draft);
        }
        written
    }
}

/// A file that belongs to this user and that nobody else can write.
fn read_own(path: &Path) -> Option<String> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .ok()?;
    is_own(&file).then_some(())?;
    let mut text = String::new();
    file.take(MAX).read_to_string(&mut text).ok()?;
    Some(text)
}

fn is_own(file: &File) -> bool {
    // SAFETY: geteuid cannot fail and has no effects.
    let me = unsafe { libc::geteuid() };
    file.metadata().is_ok_and(|m| m.is_file() && m.uid() == me && m.mode() & 0o022 == 0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn memo(dir: &Path) -> Memo {
        Memo::of_host(&dir.join("pvm-probe")).expect("the kernel tells its boot id")
    }

    #[test]
    fn an_answer_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let memo = memo(dir.path());
        assert_eq!(memo.read(), None);
        for found in [Ok(()), Err("MSR 0x1 is\nnot there".to_owned()), Ok(())] {
            memo.write(&found).unwrap();
            assert_eq!(memo.read(), Some(found.map_err(|why| why.replace('\n', " "))));
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no draft is left");
        let long = "ä".repeat(2000);
        memo.write(&Err(long)).unwrap();
        assert_eq!(memo.read().unwrap().unwrap_err().len(), REASON_MAX);
    }

    #[test]
    fn another_boot_or_kernel_is_another_matter() {
        let dir = tempfile::tempdir().unwrap();
        let memo = memo(dir.path());
        memo.write(&Ok(())).unwrap();
        let other = Memo { key: format!("{} ", memo.key), ..memo.clone() };
        assert_eq!(other.read(), None);
        let text = fs::read_to_string(&memo.path).unwrap();
        for bad in [
            text.replace("probe 1", "probe 2"),
            text.replace("native", "nativ"),
            text.replace("native", "native\nnative"),
            text.replace("native\n", ""),
            String::new(),
        ] {
            fs::write(&memo.path, &bad).unwrap();
            assert_eq!(memo.read(), None, "{bad}");
        }
        fs::write(&memo.path, [0xff; 100]).unwrap();
        assert_eq!(memo.read(), None);
    }

    #[test]
    fn a_file_that_others_could_have_written_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let memo = memo(dir.path());
        memo.write(&Ok(())).unwrap();
        let chmod = |mode| fs::set_permissions(&memo.path, fs::Permissions::from_mode(mode));
        for (mode, trusted) in [(0o602, false), (0o620, false), (0o644, true), (0o600, true)] {
            chmod(mode).unwrap();
            assert_eq!(memo.read().is_some(), trusted, "{mode:o}");
        }
        let real = dir.path().join("elsewhere");
        fs::rename(&memo.path, &real).unwrap();
        std::os::unix::fs::symlink(&real, &memo.path).unwrap();
        assert_eq!(memo.read(), None, "a link");
        fs::remove_file(&memo.path).unwrap();
        fs::create_dir(&memo.path).unwrap();
        assert_eq!(memo.read(), None, "a directory");
        assert!(memo.write(&Ok(())).is_err());
    }
}
