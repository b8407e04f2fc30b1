//! The words of the kernel command line that are ours.

use std::fs;
use std::time::Duration;

use super::{BootError, failed};

/// How long to wait for the root device unless told otherwise.
const ROOT_TIMEOUT: Duration = Duration::from_secs(30);

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cmdline {
    /// Root devices, the first that appears is taken.
    pub roots: Vec<String>,
    /// File systems to try.
    pub types: Vec<String>,
    /// Size of the writable layer in MiB.
    pub overlay_mib: Option<u32>,
    /// How long to wait for the root device.
    pub root_timeout: Duration,
    /// Listen on TCP.
    pub tcp: bool,
}

impl Cmdline {
    /// Reads /proc/cmdline.
    pub fn read() -> Result<Self, BootError> {
        let text = fs::read_to_string("/proc/cmdline").map_err(failed("read /proc/cmdline"))?;
        Self::parse(&text)
            .map_err(|why| BootError { what: "understand the kernel command line".into(), why })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let strings = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        let mut cmdline = Self {
            roots: strings(&["/dev/pmem0", "/dev/vda"]),
            types: strings(&["erofs", "ext4", "squashfs"]),
            overlay_mib: None,
            root_timeout: ROOT_TIMEOUT,
            tcp: false,
        };
        for word in text.split_ascii_whitespace() {
            let Some(word) = word.strip_prefix("forkd.") else { continue };
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            let number = || value.parse::<u32>().map_err(|_| format!("{word:?} has no number"));
            match name {
                "root" if value.starts_with("/dev/") => cmdline.roots = vec![value.to_owned()],
                "root" => return Err(format!("forkd.root={value:?} is not in /dev")),
                "rootfstype" => cmdline.types = vec![value.to_owned()],
                "overlay_mib" => cmdline.overlay_mib = Some(number()?),
                "root_timeout_s" => {
                    cmdline.root_timeout = Duration::from_secs(number()?.into());
                }
                "tcp" => cmdline.tcp = true,
                _ => {}
            }
        }
        Ok(cmdline)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_are_taken_and_others_left() {
        let cmdline = Cmdline::parse(
            "console=ttyS0 forkd.root=/dev/vdb forkd.overlay_mib=64 forkd.tcp forkd.new=1 quiet\n",
        )
        .unwrap();
        assert_eq!(cmdline.roots, ["/dev/vdb"]);
        assert_eq!((cmdline.overlay_mib, cmdline.tcp), (Some(64), true));
        let default = Cmdline::parse("").unwrap();
        assert_eq!(default.roots, ["/dev/pmem0", "/dev/vda"]);
        assert_eq!(default.root_timeout, ROOT_TIMEOUT);
    }

    #[test]
    fn nonsense_is_named() {
        assert!(Cmdline::parse("forkd.overlay_mib=many").unwrap_err().contains("many"));
        assert!(Cmdline::parse("forkd.root=pmem0").unwrap_err().contains("pmem0"));
    }
}
