//! The seam to the file system: everything that changes it goes through [`Io`], so that tests can
//! fail, tear and cut off each single operation. Reading does not.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{CWD, FallocateFlags, RenameFlags, fallocate, renameat_with};

/// What is to happen with what has the new name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Renaming {
    /// Nothing may have it (`RENAME_NOREPLACE`).
    New,
    /// It gets the old name, in the same instant (`RENAME_EXCHANGE`).
    Exchange,
}

/// Operations that change the file system. Those that take a file take its path too, for messages
/// and shims.
pub trait Io: Send + Sync + std::fmt::Debug {
    /// Makes a directory, mode 0700.
    ///
    /// # Errors
    /// Of `mkdir(2)`.
    fn make_dir(&self, path: &Path) -> io::Result<()>;
    /// Makes a file that does not exist, mode 0600, open for reading and writing, `len` bytes of hole.
    ///
    /// # Errors
    /// Of `open(2)` and `ftruncate(2)`.
    fn create(&self, path: &Path, len: u64) -> io::Result<File>;
    /// Writes all bytes at an offset.
    ///
    /// # Errors
    /// Of `pwrite(2)`; some of the bytes may have been written.
    fn write_at(&self, file: &File, path: &Path, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Makes a range a hole that reads as zeroes.
    ///
    /// # Errors
    /// Of `fallocate(2)`.
    fn punch(&self, file: &File, path: &Path, offset: u64, len: u64) -> io::Result<()>;
    /// Makes a file's bytes and length durable.
    ///
    /// # Errors
    /// Of `fsync(2)`.
    fn sync_file(&self, file: &File, path: &Path) -> io::Result<()>;
    /// Makes a directory's entries durable.
    ///
    /// # Errors
    /// Of `open(2)` and `fsync(2)`.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Renames, atomically.
    ///
    /// # Errors
    /// Of `renameat2(2)`.
    fn rename(&self, from: &Path, to: &Path, how: Renaming) -> io::Result<()>;
    /// Removes a file.
    ///
    /// # Errors
    /// Of `unlink(2)`.
    fn unlink(&self, path: &Path) -> io::Result<()>;
    /// Removes an empty directory.
    ///
    /// # Errors
    /// Of `rmdir(2)`.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
}

/// The kernel's file system as it is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Kernel;

impl Io for Kernel {
    fn make_dir(&self, path: &Path) -> io::Result<()> {
        std::fs::DirBuilder::new().mode(0o700).create(path)
    }

    fn create(&self, path: &Path, len: u64) -> io::Result<File> {
        let file =
            OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
        if len > 0 {
            file.set_len(len)?;
        }
        Ok(file)
    }

    fn write_at(&self, file: &File, _path: &Path, bytes: &[u8], offset: u64) -> io::Result<()> {
        file.write_all_at(bytes, offset)
    }

    fn punch(&self, file: &File, _path: &Path, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(file, flags, offset, len)?)
    }

    fn sync_file(&self, file: &File, _path: &Path) -> io::Result<()> {
        file.sync_all()
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path, how: Renaming) -> io::Result<()> {
        let flags = match how {
            Renaming::New => RenameFlags::NOREPLACE,
            Renaming::Exchange => RenameFlags::EXCHANGE,
        };
        Ok(renameat_with(CWD, from, CWD, to, flags)?)
    }

    fn unlink(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_dir(path)
    }
}
