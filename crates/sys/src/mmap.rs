//! Memory mappings that unmap themselves.
//!
//! A [`Mapping`] is a range of this process's address space: anonymous (guest RAM, private, copied
//! on write by fork(2)) or of a file. It is inherited by a fork at the same address.
//!
//! The bytes may change under our hands at any time: vCPUs write guest RAM, other processes write
//! shared files. So a mapping never gives out `&[u8]`; it copies in and out ([`Mapping::read_at`],
//! [`Mapping::write_at`]) or gives a raw pointer. Copies are not atomic as a whole.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};

/// How to map anonymous memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AnonymousOptions {
    /// Do not count the memory against the overcommit limit (`MAP_NORESERVE`).
    pub noreserve: bool,
    /// Ask for transparent huge pages (`MADV_HUGEPAGE`). A kernel without them is no error.
    pub huge_pages: bool,
    /// Align the address to this power of two (2 MiB lets huge pages be used from the first byte);
    /// 0 leaves it to the kernel.
    pub align: usize,
}

/// An access outside of a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at offset {offset:#x} are outside of a mapping of {mapping:#x} bytes")]
pub struct OutOfBounds {
    /// Offset asked for.
    pub offset: usize,
    /// Number of bytes asked for.
    pub len: usize,
    /// Length of the mapping.
    pub mapping: usize,
}

impl From<OutOfBounds> for io::Error {
    fn from(error: OutOfBounds) -> Self {
        io::Error::new(io::ErrorKind::InvalidInput, error)
    }
}

/// A mapped range of memory.
#[derive(Debug)]
pub struct Mapping {
    address: NonNull<u8>,
    len: usize,
    writable: bool,
}

// SAFETY: a mapping is an address range that belongs to the process, not to a thread; this handle
// gives out no references into it, and its copies tolerate concurrent change (see the module's doc).
unsafe impl Send for Mapping {}
// SAFETY: as for Send; the methods that take `&self` only copy bytes or advise the kernel.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of private zeroed memory, readable and writable.
    ///
    /// # Errors
    /// `InvalidInput` for a length of 0 or an alignment that is no power of two; that of `mmap(2)`:
    /// `OutOfMemory`.
    pub fn anonymous(len: usize, options: AnonymousOptions) -> io::Result<Self> {
        let bad = |text: &str| io::Error::new(io::ErrorKind::InvalidInput, text.to_owned());
        if options.align != 0 && !options.align.is_power_of_two() {
            return Err(bad("a mapping's alignment must be a power of two"));
        }
        let slack = if options.align > page_size() { options.align } else { 0 };
        let padded = len.checked_add(slack).ok_or_else(|| bad("a mapping is too long"))?;
        let mut flags = MapFlags::PRIVATE;
        flags.set(MapFlags::NORESERVE, options.noreserve);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: no address is asked for, so no existing mapping is touched.
        let start =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), padded, protection, flags)? };
        let mut mapping = Self::own(start.cast(), padded, true)?;
        if slack != 0 {
            mapping.trim(options.align, len)?;
        }
        if options.huge_pages {
            match mapping.advise_huge_pages() {
                // EINVAL: a kernel built without transparent huge pages.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                other => other?,
            }
        }
        Ok(mapping)
    }

    /// Maps `len` bytes of a file from `offset` (a multiple of the page size), shared, read-only.
    ///
    /// Pages beyond the end of the file raise SIGBUS when touched: check the file's size first.
    ///
    /// # Errors
    /// That of `mmap(2)`: `InvalidInput` for a length of 0 or an unaligned offset.
    pub fn file_shared_readonly(file: impl AsFd, offset: u64, len: usize) -> io::Result<Self> {
        Self::file(file, offset, len, ProtFlags::READ, MapFlags::SHARED)
    }

    /// Maps `len` bytes of a file, readable and writable; writes stay in this process.
    ///
    /// # Errors
    /// As for [`Mapping::file_shared_readonly`].
    pub fn file_private(file: impl AsFd, offset: u64, len: usize) -> io::Result<Self> {
        Self::file(file, offset, len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
    }

    /// Maps `len` bytes of a file (or memfd), readable and writable; writes reach the file.
    ///
    /// # Errors
    /// As for [`Mapping::file_shared_readonly`].
    pub fn file_shared(file: impl AsFd, offset: u64, len: usize) -> io::Result<Self> {
        Self::file(file, offset, len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED)
    }

    fn file(
        file: impl AsFd,
        offset: u64,
        len: usize,
        protection: ProtFlags,
        flags: MapFlags,
    ) -> io::Result<Self> {
        // SAFETY: no address is asked for, so no existing mapping is touched.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len, protection, flags, file, offset)?
        };
        Self::own(start.cast(), len, protection.contains(ProtFlags::WRITE))
    }

    fn own(start: *mut u8, len: usize, writable: bool) -> io::Result<Self> {
        let address = NonNull::new(start)
            .ok_or_else(|| io::Error::other("mmap put a mapping at address 0"))?;
        Ok(Self { address, len, writable })
    }

    /// Unmaps what is before the first address that is aligned to `align`, and all but `len` bytes
    /// from there. The mapping must be at least `len + align` long.
    fn trim(&mut self, align: usize, len: usize) -> io::Result<()> {
        let start = self.address.as_ptr();
        let head = start.align_offset(align);
        if head.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(io::Error::other("a mapping is too short to be aligned"));
        }
        let tail = self.len - head - len;
        if head > 0 {
            // SAFETY: the head lies within this mapping, and nothing points into it yet.
            unsafe { rustix::mm::munmap(start.cast(), head)? };
        }
        // SAFETY: `head` is within the mapping (checked above).
        let aligned = unsafe { self.address.add(head) };
        // From here on, dropping unmaps what is left, if the tail's unmapping fails.
        self.address = aligned;
        self.len -= head;
        if tail > 0 {
            // SAFETY: `len` is within the mapping, so the end of what is kept is within or at its
            // end; the tail lies within this mapping, and nothing points into it yet.
            unsafe { rustix::mm::munmap(aligned.as_ptr().add(len).cast(), tail)? };
            self.len = len;
        }
        Ok(())
    }

    /// The first byte. Valid for [`Mapping::len`] bytes as long as the mapping lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    /// The first byte's address.
    pub fn address(&self) -> usize {
        self.address.as_ptr().addr()
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true: a mapping has at least one byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies bytes out.
    ///
    /// # Errors
    /// [`OutOfBounds`].
    pub fn read_at(&self, offset: usize, buffer: &mut [u8]) -> Result<(), OutOfBounds> {
        let from = self.range(offset, buffer.len())?;
        // SAFETY: the range is within the mapping, which is readable; `buffer` is a distinct object
        // as no reference into a mapping is ever given out. Concurrent change of the source gives
        // undetermined bytes, which every value of u8 may be.
        unsafe { std::ptr::copy_nonoverlapping(from, buffer.as_mut_ptr(), buffer.len()) };
        Ok(())
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// [`OutOfBounds`], also for any write to a read-only mapping.
    pub fn write_at(&self, offset: usize, data: &[u8]) -> Result<(), OutOfBounds> {
        let to = self.range(offset, data.len())?;
        if !self.writable {
            return Err(OutOfBounds { offset, len: data.len(), mapping: 0 });
        }
        // SAFETY: the range is within the mapping, which is writable, and nobody has a reference
        // into it; `data` is a distinct object.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
        Ok(())
    }

    fn range(&self, offset: usize, len: usize) -> Result<*mut u8, OutOfBounds> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(OutOfBounds { offset, len, mapping: self.len });
        }
        // SAFETY: the offset is at most the mapping's length.
        Ok(unsafe { self.as_ptr().add(offset) })
    }

    /// Asks for transparent huge pages (`MADV_HUGEPAGE`).
    ///
    /// # Errors
    /// `InvalidInput` if the kernel has none.
    pub fn advise_huge_pages(&self) -> io::Result<()> {
        self.advise(0, self.len, Advice::LinuxHugepage)
    }

    /// Asks that no transparent huge pages be made (`MADV_NOHUGEPAGE`); those that are, stay.
    ///
    /// # Errors
    /// `InvalidInput` if the kernel has none.
    pub fn advise_small_pages(&self) -> io::Result<()> {
        self.advise(0, self.len, Advice::LinuxNoHugepage)
    }

    /// Keeps the range out of core dumps (`MADV_DONTDUMP`).
    ///
    /// # Errors
    /// That of `madvise(2)`.
    pub fn exclude_from_core_dumps(&self) -> io::Result<()> {
        self.advise(0, self.len, Advice::LinuxDontDump)
    }

    /// Keeps same-page merging off the range (`MADV_UNMERGEABLE`).
    ///
    /// # Errors
    /// `InvalidInput` if the kernel has no KSM.
    pub fn advise_unmergeable(&self) -> io::Result<()> {
        self.advise(0, self.len, Advice::LinuxUnmergeable)
    }

    /// Gives pages back (`MADV_DONTNEED`): anonymous ones read as zeroes then, private file pages
    /// as the file. Offset and length are multiples of the page size.
    ///
    /// # Errors
    /// [`OutOfBounds`] as an `io::Error`; that of `madvise(2)`.
    pub fn discard(&self, offset: usize, len: usize) -> io::Result<()> {
        self.advise(offset, len, Advice::LinuxDontNeed)
    }

    /// Makes all pages of the range present and writable now, so that the first writes do not fault
    /// (`MADV_POPULATE_WRITE`, Linux 5.14). Copies pages that are shared copy-on-write.
    ///
    /// # Errors
    /// [`OutOfBounds`] as an `io::Error`; that of `madvise(2)`: `OutOfMemory`.
    pub fn populate_write(&self, offset: usize, len: usize) -> io::Result<()> {
        self.advise(offset, len, Advice::LinuxPopulateWrite)
    }

    /// Makes all pages of the range present for reading (`MADV_POPULATE_READ`, Linux 5.14).
    ///
    /// # Errors
    /// As for [`Mapping::populate_write`].
    pub fn populate_read(&self, offset: usize, len: usize) -> io::Result<()> {
        self.advise(offset, len, Advice::LinuxPopulateRead)
    }

    /// Maps, for reading, those pages of the range that are in memory already (`mincore(2)`): nothing is read
    /// from a disk, as far as this process may know what is in the page cache. Returns their number.
    ///
    /// # Errors
    /// As for [`Mapping::populate_write`].
    pub fn populate_resident(&self, offset: usize, len: usize) -> io::Result<usize> {
        let start = self.range(offset, len)?;
        let page = page_size();
        let mut resident = vec![0u8; len.div_ceil(page)];
        // SAFETY: the range is within this mapping, and the vector has a byte for each of its pages.
        if unsafe { libc::mincore(start.cast(), len, resident.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let mut first = 0;
        // The lowest bit tells; the others are reserved.
        for run in resident.chunk_by(|a, b| a & 1 == b & 1) {
            if run[0] & 1 == 1 {
                let at = first * page;
                self.populate_read(offset + at, (run.len() * page).min(len - at))?;
            }
            first += run.len();
        }
        Ok(resident.iter().filter(|byte| *byte & 1 == 1).count())
    }

    /// Takes write access away from the whole mapping, for good.
    ///
    /// # Errors
    /// That of `mprotect(2)`.
    pub fn make_readonly(&mut self) -> io::Result<()> {
        // SAFETY: the range is this mapping; writes through `write_at` are refused from now on, and
        // writers through the raw pointer have to mind their own.
        unsafe { rustix::mm::mprotect(self.as_ptr().cast(), self.len, MprotectFlags::READ)? };
        self.writable = false;
        Ok(())
    }

    fn advise(&self, offset: usize, len: usize, advice: Advice) -> io::Result<()> {
        let start = self.range(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        loop {
            // SAFETY: the range is within this mapping. The advices used here change residency, or
            // for DONTNEED the content, of memory to which no references exist.
            match unsafe { rustix::mm::madvise(start.cast(), len, advice) } {
                Ok(()) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by this value, which goes away with it. munmap of a valid
        // range fails only for lack of memory to split a mapping; then it leaks, which is safe.
        let _unmapped = unsafe { rustix::mm::munmap(self.as_ptr().cast(), self.len) };
    }
}

/// The size of a page, in bytes.
pub fn page_size() -> usize {
    rustix::param::page_size()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn small() -> Mapping {
        Mapping::anonymous(8192, AnonymousOptions::default()).expect("a mapping")
    }

    #[test]
    fn what_is_resident_gets_mapped() {
        let page = page_size();
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&vec![7; 3 * page]).expect("write");
        let mapping = Mapping::file_shared_readonly(&file, 0, 3 * page).expect("map");
        assert_eq!(mapping.populate_resident(0, 3 * page).expect("populate"), 3);
        assert_eq!(mapping.populate_resident(page, 2 * page).expect("populate"), 2);
        assert!(mapping.populate_resident(page, 3 * page).is_err());
        let anonymous = Mapping::anonymous(4 * page, AnonymousOptions::default()).expect("map");
        anonymous.write_at(page, &[1]).expect("write");
        assert_eq!(anonymous.populate_resident(0, 4 * page).expect("populate"), 1);
    }

    #[test]
    fn anonymous_memory_is_zero_and_keeps_what_is_written() {
        let mapping = small();
        let mut bytes = [1u8; 8];
        mapping.read_at(8184, &mut bytes).expect("the last bytes");
        assert_eq!(bytes, [0; 8]);
        mapping.write_at(4090, b"across a page").expect("write");
        let mut back = [0u8; 13];
        mapping.read_at(4090, &mut back).expect("read");
        assert_eq!(&back, b"across a page");
        mapping.discard(0, 8192).expect("discard");
        mapping.read_at(4090, &mut back).expect("read");
        assert_eq!(back, [0; 13]);
    }

    #[test]
    fn alignment_is_kept() {
        let align = 2 << 20;
        for len in [4096, align, align + 4096, 8 << 20] {
            let options = AnonymousOptions { align, huge_pages: true, noreserve: true };
            let mapping = Mapping::anonymous(len, options).expect("a mapping");
            assert_eq!((mapping.address() % align, mapping.len()), (0, len));
            mapping.write_at(len - 1, &[9]).expect("the last byte");
            mapping.populate_write(0, len).expect("populate");
        }
        let options = AnonymousOptions { align: 3, ..Default::default() };
        assert!(Mapping::anonymous(4096, options).is_err());
        assert!(Mapping::anonymous(0, AnonymousOptions::default()).is_err());
        assert!(Mapping::anonymous(usize::MAX, AnonymousOptions::default()).is_err());
    }

    #[test]
    fn file_mappings_share_or_do_not() {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&[b'f'; 4096]).expect("write");
        let private = Mapping::file_private(&file, 0, 4096).expect("private");
        let readonly = Mapping::file_shared_readonly(&file, 0, 4096).expect("readonly");
        let shared = Mapping::file_shared(&file, 0, 4096).expect("shared");
        private.write_at(0, b"p").expect("write");
        shared.write_at(1, b"s").expect("write");
        assert!(readonly.write_at(2, b"r").is_err());
        let mut bytes = [0u8; 3];
        readonly.read_at(0, &mut bytes).expect("read");
        assert_eq!(&bytes, b"fsf");
        assert!(Mapping::file_private(&file, 1, 4096).is_err(), "an unaligned offset");
    }

    #[test]
    fn readonly_is_for_good() {
        let mut mapping = small();
        mapping.make_readonly().expect("protect");
        assert!(mapping.write_at(0, &[1]).is_err());
        mapping.read_at(0, &mut [0]).expect("read");
    }

    proptest! {
        #[test]
        fn bounds_hold(offset in prop_oneof![0usize..20_000, Just(usize::MAX)], len in 0usize..10_000) {
            let mapping = small();
            let inside = offset.checked_add(len).is_some_and(|end| end <= 8192);
            prop_assert_eq!(mapping.read_at(offset, &mut vec![0; len]).is_ok(), inside);
            prop_assert_eq!(mapping.write_at(offset, &vec![0; len]).is_ok(), inside);
        }
    }
}
