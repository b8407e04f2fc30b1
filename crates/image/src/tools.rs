//! External programs: where they come from, and how they are run.
//!
//! A program never outlives forkd: it is started through `setpriv --pdeathsig`, so the kernel ends it if
//! forkd dies. Programs that mount things run in a mount namespace of their own, so no mount survives
//! them either.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::ImageError;

/// A program that building images needs, and the Debian package that holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tool {
    /// Name of the program.
    pub name: &'static str,
    /// Debian package.
    pub package: &'static str,
}

/// Packs a directory into an EROFS image.
pub const MKFS_EROFS: Tool = Tool { name: "mkfs.erofs", package: "erofs-utils" };
/// Makes a root directory of a Debian suite.
pub const MMDEBSTRAP: Tool = Tool { name: "mmdebstrap", package: "mmdebstrap" };
/// Unpacks archives.
pub const TAR: Tool = Tool { name: "tar", package: "tar" };
/// Ties a program's life to ours.
pub const SETPRIV: Tool = Tool { name: "setpriv", package: "util-linux" };
/// Gives a program mounts of its own.
pub const UNSHARE: Tool = Tool { name: "unshare", package: "util-linux" };
/// Decompresses .gz.
pub const GZIP: Tool = Tool { name: "gzip", package: "gzip" };
/// Decompresses .xz.
pub const XZ: Tool = Tool { name: "xz", package: "xz-utils" };
/// Decompresses .zst.
pub const ZSTD: Tool = Tool { name: "zstd", package: "zstd" };

/// Lines of a failed program that are kept for the error message.
const KEPT_LINES: usize = 40;
/// Bytes of one line that are looked at.
const MAX_LINE: u64 = 16 * 1024;
/// Directories that root's programs live in, even where a user's PATH lacks them.
const SYSTEM_DIRS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

impl Tool {
    /// Where the program is, or none.
    pub fn find(&self) -> Option<PathBuf> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path)
            .chain(SYSTEM_DIRS.iter().map(PathBuf::from))
            .map(|dir| dir.join(self.name))
            .find(|file| {
                rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok() && file.is_file()
            })
    }

    /// Where the program is.
    ///
    /// # Errors
    /// It is not installed: names the package.
    pub fn require(&self) -> Result<PathBuf, ImageError> {
        self.find().ok_or(ImageError::MissingTool { tool: self.name, package: self.package })
    }
}

/// One run of a program.
pub(crate) struct Run<'a> {
    tool: Tool,
    args: Vec<OsString>,
    env: Vec<(&'static str, OsString)>,
    own_mounts: bool,
    progress: Option<&'a mut dyn FnMut(&str)>,
}

impl<'a> Run<'a> {
    pub(crate) fn new(tool: Tool) -> Self {
        let env = vec![("LC_ALL", OsString::from("C.UTF-8"))];
        Self { tool, args: Vec::new(), env, own_mounts: false, progress: None }
    }

    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_os_string());
        self
    }

    pub(crate) fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.args.extend(args.into_iter().map(|a| a.as_ref().to_os_string()));
        self
    }

    pub(crate) fn env(mut self, name: &'static str, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name, value.as_ref().to_os_string()));
        self
    }

    /// Runs it in a mount namespace of its own.
    pub(crate) fn own_mounts(mut self) -> Self {
        self.own_mounts = true;
        self
    }

    /// Hands each line of standard error to `progress`.
    pub(crate) fn progress(mut self, progress: &'a mut dyn FnMut(&str)) -> Self {
        self.progress = Some(progress);
        self
    }

    fn command(&self) -> Result<Command, ImageError> {
        let program = self.tool.require()?;
        let mut command = Command::new(SETPRIV.require()?);
        command.args(["--pdeathsig", "TERM", "--"]);
        if self.own_mounts {
            command.arg(UNSHARE.require()?).args(["--mount", "--"]);
        }
        command.arg(program).args(&self.args).envs(self.env.iter().map(|(k, v)| (k, v)));
        Ok(command)
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// [`ImageError::MissingTool`], or [`ImageError::Tool`] with the end of what it said.
    pub(crate) fn finish(mut self, what: &str) -> Result<(), ImageError> {
        let mut command = self.command()?;
        command.stdin(Stdio::null());
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| ImageError::io("cannot run", Path::new(self.tool.name), e))?;
        let mut kept = VecDeque::new();
        if let Some(stderr) = child.stderr.take() {
            let mut lines = BufReader::new(stderr);
            while let Some(line) = next_line(&mut lines) {
                if let Some(progress) = self.progress.as_mut() {
                    progress(&line);
                }
                kept.push_back(line);
                if kept.len() > KEPT_LINES {
                    kept.pop_front();
                }
            }
        }
        let status = child
            .wait()
            .map_err(|e| ImageError::io("cannot wait for", Path::new(self.tool.name), e))?;
        if status.success() {
            return Ok(());
        }
        Err(ImageError::Tool {
            what: what.to_string(),
            tool: self.tool.name,
            status: status.to_string(),
            message: telling_line(kept.make_contiguous()),
        })
    }
}

/// The next line, lossily decoded and cut at [`MAX_LINE`]; none at the end.
fn next_line(reader: &mut BufReader<impl Read>) -> Option<String> {
    let mut line = Vec::new();
    match reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
        Ok(0) | Err(_) => None,
        Ok(_) => Some(String::from_utf8_lossy(&line).trim_end().to_string()),
    }
}

/// Of a failed program's last lines, the one that most likely says why. The first error is the cause, later ones
/// are its consequences.
fn telling_line(lines: &[String]) -> String {
    // tar's last word, which says that there were others.
    let lines: Vec<&String> =
        lines.iter().filter(|l| !l.contains("due to previous errors")).collect();
    let marked = |marks: &[&str]| {
        let has_mark = |l: &&String| marks.iter().any(|mark| l.trim_start().starts_with(mark));
        lines.iter().copied().find(has_mark)
    };
    // apt's and mmdebstrap's mark; erofs-utils'; what others have in common.
    let line = marked(&["E: "])
        .or_else(|| marked(&["<E>"]))
        .or_else(|| lines.iter().copied().find(|l| l.to_lowercase().contains("error")))
        .or_else(|| lines.iter().rev().copied().find(|l| !l.trim().is_empty()));
    line.map_or_else(
        || "it said nothing".to_string(),
        |l| l.trim().trim_start_matches("E: ").to_string(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const SH: Tool = Tool { name: "sh", package: "dash" };

    #[test]
    fn a_missing_tool_names_its_package() {
        let tool = Tool { name: "forkd-no-such-tool", package: "some-package" };
        let error = Run::new(tool).finish("nothing").unwrap_err().to_string();
        assert!(error.contains("forkd-no-such-tool") && error.contains("some-package"), "{error}");
    }

    #[test]
    fn a_failure_carries_status_and_reason() {
        let error = Run::new(SH)
            .args(["-c", "echo noise >&2; echo 'E: the reason' >&2; echo 'E: more' >&2; exit 3"])
            .finish("testing")
            .unwrap_err()
            .to_string();
        assert!(error.contains("testing") && error.contains("3"), "{error}");
        assert!(error.ends_with(": the reason"), "{error}");
    }

    #[test]
    fn progress_gets_every_line() {
        let mut lines = Vec::new();
        let mut take = |line: &str| lines.push(line.to_string());
        Run::new(SH)
            .args(["-c", "echo one >&2; printf two >&2"])
            .progress(&mut take)
            .finish("testing")
            .unwrap();
        assert_eq!(lines, ["one", "two"]);
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let mut reader = BufReader::new(std::io::repeat(b'x').take(3 * MAX_LINE));
        assert_eq!(next_line(&mut reader).unwrap().len() as u64, MAX_LINE);
    }
}
