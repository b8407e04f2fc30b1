//! Anonymous files in memory (`memfd_create(2)`), their seals, and the holes of files.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom};

/// Size of the huge pages that [`create`] can ask for: 2 MiB, the smaller kind of x86-64.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Longest name of a memfd in bytes: `NAME_MAX` less the kernel's prefix `memfd:` (memfd_create(2)).
pub const MAX_NAME: usize = 249;

/// `HUGETLBFS_MAGIC` of linux/magic.h.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// Makes an empty memfd that can be sealed. `name` is for people only: it is what
/// `/proc/<pid>/maps` shows behind `memfd:`.
///
/// With `huge_pages` the memory comes from the pool of 2 MiB pages. That the pool is empty is not
/// seen here but when pages are reserved: at mmap, or by [`allocate`].
///
/// # Errors
/// `InvalidInput` for a name with a NUL or longer than [`MAX_NAME`], and for huge pages on a kernel
/// without them; that of `memfd_create(2)` else.
pub fn create(name: &str, huge_pages: bool) -> io::Result<File> {
    if name.len() > MAX_NAME {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if huge_pages {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    // rustix turns a name with a NUL into EINVAL.
    let fd: OwnedFd = rustix::fs::memfd_create(name, flags)?;
    Ok(File::from(fd))
}

/// Seals a memfd's size for good: it can neither shrink, which would turn accesses of those who map
/// it into SIGBUS, nor grow, and no seal can be added.
///
/// # Errors
/// `PermissionDenied` if it has been sealed against seals; `InvalidInput` for a file that takes none.
pub fn seal_size(memfd: impl AsFd) -> io::Result<()> {
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    Ok(rustix::fs::fcntl_add_seals(memfd, seals)?)
}

/// Seals a memfd's size and bytes for good: besides [`seal_size`], nobody can write to it or map it
/// shared and writable, nor punch holes. Private mappings may be written to, as that stays in them.
///
/// # Errors
/// As for [`seal_size`]; `ResourceBusy` while somebody has it mapped shared and writable.
pub fn seal_all(memfd: impl AsFd) -> io::Result<()> {
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
    Ok(rustix::fs::fcntl_add_seals(memfd, seals)?)
}

/// Whether nobody can change a file's size or bytes: [`seal_all`]. False for a file that takes no
/// seals.
///
/// # Errors
/// As for [`size_is_sealed`].
pub fn is_immutable(file: impl AsFd) -> io::Result<bool> {
    has_seals(file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE)
}

/// Whether a file's size is sealed both ways. False for a file that takes no seals.
///
/// # Errors
/// That of `fcntl(2)`, but for "takes no seals".
pub fn size_is_sealed(file: impl AsFd) -> io::Result<bool> {
    has_seals(file, SealFlags::SHRINK | SealFlags::GROW)
}

fn has_seals(file: impl AsFd, wanted: SealFlags) -> io::Result<bool> {
    match rustix::fs::fcntl_get_seals(file) {
        Ok(seals) => Ok(seals.contains(wanted)),
        Err(rustix::io::Errno::INVAL) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether a file's memory is huge pages of the pool (hugetlbfs).
///
/// # Errors
/// That of `fstatfs(2)`.
pub fn is_hugetlb(file: impl AsFd) -> io::Result<bool> {
    let kind = rustix::fs::fstatfs(file)?.f_type;
    Ok(u64::try_from(kind).is_ok_and(|kind| kind == HUGETLBFS_MAGIC))
}

/// Allocates a range of a file now (`fallocate(2)`), so that no later access to it can fail for lack
/// of memory.
///
/// # Errors
/// `StorageFull` or `OutOfMemory`: no pages left.
pub fn allocate(file: impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    fallocate(file, FallocateFlags::empty(), offset, len)
}

/// Makes a range of a file a hole: its memory is given back, and it reads as zeroes, in all
/// mappings of it that share. Parts of pages are zeroed. The size stays.
///
/// # Errors
/// That of `fallocate(2)`: `Unsupported` if the file's system has no holes.
pub fn punch_hole(file: impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
}

fn fallocate(file: impl AsFd, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
    loop {
        match rustix::fs::fallocate(&file, flags, offset, len) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// The first range at or after `from`, and before `end`, in which a file has data; the rest is holes,
/// which read as zeroes. `None` if there is no more. A file system that does not know its holes
/// calls everything data.
///
/// Moves the file's position, so nobody else may rely on that.
///
/// # Errors
/// That of `lseek(2)`.
pub fn next_data(file: impl AsFd, from: u64, end: u64) -> io::Result<Option<Range<u64>>> {
    if from >= end {
        return Ok(None);
    }
    let start = match rustix::fs::seek(&file, SeekFrom::Data(from)) {
        // ENXIO: no data up to the end of the file, or `from` is beyond it.
        Err(rustix::io::Errno::NXIO) => return Ok(None),
        Ok(start) if start >= end => return Ok(None),
        other => other?,
    };
    let stop = match rustix::fs::seek(&file, SeekFrom::Hole(start)) {
        // The file has shrunk in between: what reads it finds out.
        Err(rustix::io::Errno::NXIO) => end,
        other => other?,
    };
    Ok(Some(start..stop.min(end)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn a_sealed_size_cannot_change_but_its_bytes_can() {
        let memfd = create("a sealed one", false).expect("memfd");
        memfd.set_len(8192).expect("size");
        assert!(!size_is_sealed(&memfd).expect("seals"));
        seal_size(&memfd).expect("seal");
        assert!(size_is_sealed(&memfd).expect("seals"));
        for len in [4096, 8191, 8193, 16384] {
            let error = memfd.set_len(len).expect_err("sealed");
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{len}");
        }
        assert!(seal_size(&memfd).is_err(), "no more seals");
        memfd.write_all_at(&[7; 8192], 0).expect("write");
        punch_hole(&memfd, 0, 4096).expect("a hole is no change of size");
        let mut bytes = [1; 8192];
        memfd.read_exact_at(&mut bytes, 0).expect("read");
        assert!(bytes[..4096].iter().all(|&b| b == 0) && bytes[4096..].iter().all(|&b| b == 7));
        assert_eq!(memfd.metadata().expect("stat").blocks() * 512, 4096);
    }

    #[test]
    fn sealed_bytes_can_be_changed_in_private_only() {
        use crate::mmap::Mapping;
        let memfd = create("immutable", false).expect("memfd");
        memfd.write_all_at(&[7; 8192], 0).expect("write");
        let shared = Mapping::file_shared(&memfd, 0, 4096).expect("shared");
        assert_eq!(seal_all(&memfd).expect_err("mapped").kind(), io::ErrorKind::ResourceBusy);
        drop(shared);
        seal_all(&memfd).expect("seal");
        assert!(is_immutable(&memfd).expect("asked") && size_is_sealed(&memfd).expect("asked"));
        assert!(memfd.write_all_at(&[8], 0).is_err() && punch_hole(&memfd, 0, 4096).is_err());
        assert!(Mapping::file_shared(&memfd, 0, 4096).is_err());
        let private = Mapping::file_private(&memfd, 0, 8192).expect("private");
        private.write_at(0, &[9]).expect("write");
        let mut byte = [0];
        memfd.read_exact_at(&mut byte, 0).expect("read");
        assert_eq!(byte, [7]);
    }

    #[test]
    fn files_without_seals_are_not_sealed() {
        let file = tempfile::tempfile().expect("a file");
        assert!(!size_is_sealed(&file).expect("asked"));
        assert!(!is_hugetlb(&file).expect("asked") && !is_immutable(&file).expect("asked"));
        assert!(seal_size(&file).is_err());
    }

    #[test]
    fn names_are_checked() {
        for bad in ["a\0b", &"x".repeat(MAX_NAME + 1)] {
            assert_eq!(create(bad, false).expect_err(bad).kind(), io::ErrorKind::InvalidInput);
        }
        create(&"x".repeat(MAX_NAME), false).expect("the longest");
    }

    #[test]
    fn data_is_found_between_holes() {
        let memfd = create("holes", false).expect("memfd");
        memfd.set_len(1 << 20).expect("size");
        assert_eq!(next_data(&memfd, 0, 1 << 20).expect("seek"), None);
        memfd.write_all_at(&[1; 4096], 8192).expect("write");
        memfd.write_all_at(&[1; 4096], (1 << 20) - 4096).expect("write");
        let data = |from, end| next_data(&memfd, from, end).expect("seek");
        assert_eq!(data(0, 1 << 20), Some(8192..12288));
        assert_eq!(data(0, 9000), Some(8192..9000), "cut at the end asked for");
        assert_eq!(data(10000, 1 << 20), Some(10000..12288));
        assert_eq!(data(12288, 1 << 20), Some((1 << 20) - 4096..1 << 20));
        assert_eq!(data(12288, 16384), None);
        assert_eq!(data(1 << 20, 2 << 20), None, "beyond the end");
        assert_eq!(data(4096, 4096), None, "nothing asked");
    }
}
