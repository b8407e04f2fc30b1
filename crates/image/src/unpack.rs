//! A root directory out of a tar archive.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::ImageError;
use crate::tools::{GZIP, Run, TAR, Tool, XZ, ZSTD};

/// How an archive is compressed, told by its first bytes.
fn compression(head: &[u8]) -> Option<(&'static str, Tool)> {
    const XZ_MAGIC: &[u8] = b"\xfd7zXZ\0";
    const ZSTD_MAGIC: &[u8] = b"\x28\xb5\x2f\xfd";
    match head {
        h if h.starts_with(b"\x1f\x8b") => Some(("--gzip", GZIP)),
        h if h.starts_with(XZ_MAGIC) => Some(("--xz", XZ)),
        h if h.starts_with(ZSTD_MAGIC) => Some(("--zstd", ZSTD)),
        _ => None,
    }
}

/// Unpacks `archive` into `target`, an empty directory. As root with owners and device nodes as archived.
///
/// tar itself keeps entries inside the target: it strips leading slashes, refuses "..", and delays
/// symbolic links that lead out.
pub(crate) fn unpack(archive: &Path, target: &Path) -> Result<(), ImageError> {
    let mut file = File::open(archive).map_err(|e| ImageError::io("cannot open", archive, e))?;
    let mut head = Vec::new();
    file.by_ref()
        .take(8)
        .read_to_end(&mut head)
        .map_err(|e| ImageError::io("cannot read", archive, e))?;
    let mut run = Run::new(TAR)
        .args(["--extract", "--force-local", "--numeric-owner", "--preserve-permissions"])
        .args(["--xattrs", "--xattrs-include=*"]);
    if let Some((flag, tool)) = compression(&head) {
        tool.require()?;
        run = run.arg(flag);
    }
    let result = run
        .arg("--file")
        .arg(std::path::absolute(archive).map_err(|e| ImageError::io("cannot find", archive, e))?)
        .arg("--directory")
        .arg(target)
        .finish("cannot unpack");
    match result.map_err(|e| e.or_disk_full(target)) {
        Err(ImageError::Tool { message, .. }) => {
            Err(ImageError::Tar { path: archive.to_path_buf(), message })
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::process::Command;

    fn archive(dir: &Path, name: &str, flag: &str) -> std::path::PathBuf {
        let tree = dir.join("tree");
        fs::create_dir_all(tree.join("etc")).unwrap();
        fs::write(tree.join("etc/motd"), "hello\n").unwrap();
        let path = dir.join(name);
        let status = Command::new("tar")
            .args(["--create", flag, "--file"])
            .arg(&path)
            .arg("--directory")
            .arg(&tree)
            .arg(".")
            .status();
        assert!(status.unwrap().success());
        path
    }

    #[test]
    fn every_compression_is_told_by_content() {
        let tmp = tempfile::tempdir().unwrap();
        for (index, flag) in ["--verbose", "--gzip", "--xz", "--zstd"].into_iter().enumerate() {
            let path = archive(tmp.path(), &format!("a:{index}"), flag);
            let target = tmp.path().join(format!("out{index}"));
            fs::create_dir(&target).unwrap();
            unpack(&path, &target).unwrap();
            assert_eq!(fs::read_to_string(target.join("etc/motd")).unwrap(), "hello\n", "{flag}");
        }
    }

    #[test]
    fn a_corrupt_archive_is_named() {
        let tmp = tempfile::tempdir().unwrap();
        for (name, flag) in [("plain", "--verbose"), ("gz", "--gzip")] {
            let path = archive(tmp.path(), name, flag);
            let mut bytes = fs::read(&path).unwrap();
            let (from, to) = (bytes.len() / 4, bytes.len() / 2);
            if flag == "--gzip" {
                bytes[from..to].fill(0x55);
            } else {
                bytes[..512].fill(0x55);
            }
            fs::write(&path, bytes).unwrap();
            let target = tmp.path().join(format!("{name}.out"));
            fs::create_dir(&target).unwrap();
            let error = unpack(&path, &target).unwrap_err();
            assert!(matches!(&error, ImageError::Tar { path: p, .. } if *p == path), "{error}");
            assert!(!error.to_string().contains("previous errors"), "{error}");
        }
    }

    #[test]
    fn a_missing_archive_is_named() {
        let error = unpack(Path::new("/nonexistent.tar"), Path::new("/tmp")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent.tar"));
    }
}
