//! Packing a directory into EROFS, and telling whether a file is such an image.
//!
//! The guest maps the image by DAX. For that the data must be uncompressed, in 4 KiB blocks, and not packed
//! into the inode's block (`-E noinline_data`). Times and the file system's UUID are fixed, so equal
//! trees give equal bytes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::ImageError;
use crate::tools::{MKFS_EROFS, Run};

/// Offset of the super block, and its magic: `EROFS_SUPER_OFFSET` and `EROFS_SUPER_MAGIC_V1` of the
/// kernel's fs/erofs/erofs_fs.h.
const SUPER_OFFSET: u64 = 1024;
const SUPER_MAGIC: u32 = 0xe0f5_e1e2;
const BLOCK_BITS: u8 = 12;
/// Fixed id of every image that forkd packs.
const UUID: &str = "666f726b-6430-4000-8000-000000000001";
/// With this time as "now", mkfs.erofs keeps all earlier times of files: 2100-01-01.
const KEEP_TIMES_UNTIL: &str = "4102444800";

/// What becomes of the files' modification times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Times {
    /// All are the epoch: inodes are half as large.
    Epoch,
    /// As in the tree.
    Keep,
}

/// Packs `tree` into the new file `image`.
pub(crate) fn pack(
    tree: &Path,
    image: &Path,
    times: Times,
    all_root: bool,
) -> Result<(), ImageError> {
    let mut run = Run::new(MKFS_EROFS).args(["--quiet", "-E", "noinline_data", "-U", UUID]);
    run = match times {
        Times::Epoch => run.args(["-T", "0", "--ignore-mtime"]),
        Times::Keep => run.env("SOURCE_DATE_EPOCH", KEEP_TIMES_UNTIL),
    };
    if all_root {
        run = run.arg("--all-root");
    }
    run.arg(image)
        .arg(tree)
        .finish("cannot pack the image")
        .map_err(|e| e.or_disk_full(image.parent().unwrap_or(image)))?;
    check(image)
}

/// Checks that the file is a whole EROFS image that can be mapped by DAX.
///
/// # Errors
/// [`ImageError::Corrupt`] with the reason, or the file can't be read.
pub fn check(image: &Path) -> Result<(), ImageError> {
    let corrupt = |reason: String| ImageError::Corrupt { path: image.to_path_buf(), reason };
    let file = File::open(image).map_err(|e| ImageError::io("cannot open", image, e))?;
    let size = file.metadata().map_err(|e| ImageError::io("cannot stat", image, e))?.len();
    // The super block is 128 bytes; magic is at 0, blkszbits at 12, blocks at 36.
    let mut block = [0u8; 128];
    file.read_exact_at(&mut block, SUPER_OFFSET)
        .map_err(|_| corrupt(format!("it is too short for EROFS ({size} bytes)")))?;
    let word =
        |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    if word(0) != SUPER_MAGIC {
        return Err(corrupt("it is no EROFS image (bad magic)".to_string()));
    }
    if block[12] != BLOCK_BITS {
        return Err(corrupt(format!("its blocks are 2^{} bytes, not 4096", block[12])));
    }
    let blocks = u64::from(word(36));
    if blocks << BLOCK_BITS > size {
        return Err(corrupt(format!(
            "it is cut short: {} of {} bytes",
            size,
            blocks << BLOCK_BITS
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        fs::write(dir.path().join("etc/hostname"), "guest\n").unwrap();
        fs::write(dir.path().join("big"), vec![0xabu8; 10_000]).unwrap();
        dir
    }

    #[test]
    fn equal_trees_give_equal_bytes() {
        let out = tempfile::tempdir().unwrap();
        let (a, b) = (out.path().join("a"), out.path().join("b"));
        pack(tree().path(), &a, Times::Epoch, true).unwrap();
        pack(tree().path(), &b, Times::Epoch, true).unwrap();
        assert_eq!(fs::read(&a).unwrap(), fs::read(&b).unwrap());
    }

    #[test]
    fn kept_times_are_part_of_the_bytes() {
        let out = tempfile::tempdir().unwrap();
        let tree = tree();
        let packed = |name: &str, seconds: u64| {
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
            let image = out.path().join(name);
            for path in ["", "etc", "etc/hostname", "big"] {
                let file = File::open(tree.path().join(path)).unwrap();
                file.set_times(fs::FileTimes::new().set_modified(time)).unwrap();
            }
            pack(tree.path(), &image, Times::Keep, true).unwrap();
            fs::read(image).unwrap()
        };
        let first = packed("a", 1_000_000_000);
        assert!(first == packed("b", 1_000_000_000));
        assert!(first != packed("c", 1_000_000_001));
    }

    #[test]
    fn file_data_is_aligned_for_dax() {
        let out = tempfile::tempdir().unwrap();
        let image = out.path().join("a");
        pack(tree().path(), &image, Times::Epoch, true).unwrap();
        let bytes = fs::read(&image).unwrap();
        let at = bytes.windows(6).position(|w| w == b"guest\n").unwrap();
        assert_eq!(at % 4096, 0, "a small file's data must not be inlined");
        let at = bytes.windows(10_000).position(|w| w.iter().all(|b| *b == 0xab)).unwrap();
        assert_eq!(at % 4096, 0);
    }

    #[test]
    fn files_that_are_no_images_are_refused() {
        let out = tempfile::tempdir().unwrap();
        let image = out.path().join("a");
        pack(tree().path(), &image, Times::Epoch, true).unwrap();
        let good = fs::read(&image).unwrap();
        fs::write(&image, &good[..good.len() - 4096]).unwrap();
        assert!(check(&image).unwrap_err().to_string().contains("cut short"));
        fs::write(&image, &good[..1000]).unwrap();
        assert!(check(&image).unwrap_err().to_string().contains("too short"));
        fs::write(&image, vec![0; 8192]).unwrap();
        assert!(check(&image).unwrap_err().to_string().contains("magic"));
    }
}
