//! Deletes directories, through the seam.

use std::fs;
use std::io;
use std::path::Path;

use crate::SnapshotError;
use crate::io::Io;

/// Deletes a directory and what is in it. What is gone already, or goes meanwhile, is no error:
/// another may be deleting the same.
pub(crate) fn remove(io: &dyn Io, dir: &Path) -> Result<(), SnapshotError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(SnapshotError::io("list", dir, e)),
    };
    for entry in entries {
        let entry = entry.map_err(|e| SnapshotError::io("list", dir, e))?;
        let path = entry.path();
        // Of the entry itself: a symlink is removed, not followed.
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => remove(io, &path)?,
            _ => gone(io.unlink(&path)).map_err(|e| SnapshotError::io("remove", &path, e))?,
        }
    }
    gone(io.remove_dir(dir)).map_err(|e| SnapshotError::io("remove", dir, e))
}

fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Bytes that the files of a directory take on the disk.
///
/// # Errors
/// It can't be read.
pub fn disk_bytes(dir: &Path) -> Result<u64, SnapshotError> {
    use std::os::unix::fs::MetadataExt;
    /// Of `st_blocks`, whatever the file system's own block size is: stat(2).
    const UNIT: u64 = 512;
    let failed = |e| SnapshotError::io("list", dir, e);
    let mut bytes = 0;
    for entry in fs::read_dir(dir).map_err(failed)? {
        let meta = entry.and_then(|entry| entry.metadata()).map_err(failed)?;
        bytes += meta.blocks() * UNIT;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_take_no_space() {
        let dir = tempfile::tempdir().unwrap();
        let file = fs::File::create(dir.path().join("sparse")).unwrap();
        file.set_len(64 << 20).unwrap();
        assert!(disk_bytes(dir.path()).unwrap() < 1 << 20);
        fs::write(dir.path().join("full"), vec![1; 1 << 20]).unwrap();
        file.sync_all().unwrap();
        fs::File::open(dir.path().join("full")).unwrap().sync_all().unwrap();
        let bytes = disk_bytes(dir.path()).unwrap();
        assert!((1 << 20..2 << 20).contains(&bytes), "{bytes}");
    }
}
