//! RAM of another process, through its memfd and its userfaultfd.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;

use forkd_sys::userfaultfd::Userfaultfd;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::copier::GuestPages;

/// A source's RAM: a memfd, mapped and registered in the source.
#[derive(Debug)]
pub struct SharedRam {
    /// The source's, or rather: of its address space.
    pub uffd: Userfaultfd,
    /// RAM's file.
    pub memfd: OwnedFd,
    /// Offset in the file of the first byte of RAM.
    pub file_offset: u64,
    /// Address of the first byte of RAM in the source.
    pub address: u64,
    /// Length of RAM in bytes: whole pages.
    pub len: u64,
    /// Size of a page in bytes.
    pub page_size: u64,
}

impl SharedRam {
    /// The addresses of pages in the source.
    pub fn addresses(&self, pages: Range<usize>) -> Range<u64> {
        let at = |page: usize| self.address + page as u64 * self.page_size;
        at(pages.start)..at(pages.end)
    }

    /// The page at an address in the source, if it is RAM.
    pub fn page_at(&self, address: u64) -> Option<usize> {
        let offset = address.checked_sub(self.address).filter(|&offset| offset < self.len)?;
        usize::try_from(offset / self.page_size).ok()
    }

    /// Offset in RAM of a page, in bytes.
    pub fn offset(&self, page: usize) -> u64 {
        page as u64 * self.page_size
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        usize::try_from(self.len / self.page_size).unwrap_or(usize::MAX)
    }

    /// The first run of pages from `page` on that are not holes of the file; empty, at the end of
    /// RAM, if there are none.
    ///
    /// # Errors
    /// That of `lseek(2)`. It moves the file's offset, which nothing here uses.
    pub fn data_from(&self, page: usize) -> io::Result<Range<usize>> {
        let end = self.pages();
        let to_page = |offset: u64, up: bool| {
            let offset = offset.saturating_sub(self.file_offset);
            let page = if up { offset.div_ceil(self.page_size) } else { offset / self.page_size };
            usize::try_from(page).unwrap_or(usize::MAX).min(end)
        };
        let from = self.file_offset + self.offset(page);
        let data = match rustix::fs::seek(&self.memfd, SeekFrom::Data(from)) {
            Ok(data) => data,
            Err(Errno::NXIO) => return Ok(end..end),
            Err(errno) => return Err(errno.into()),
        };
        let hole = rustix::fs::seek(&self.memfd, SeekFrom::Hole(data))?;
        let start = to_page(data, false).max(page);
        Ok(start..to_page(hole, true).max(start))
    }

    /// Lets the source write `pages` and reports no more faults of them.
    ///
    /// # Errors
    /// That of `UFFDIO_UNREGISTER`; not that the source is gone.
    pub fn unregister(&self, pages: Range<usize>) -> io::Result<()> {
        if pages.is_empty() {
            return Ok(());
        }
        unless_gone(self.uffd.unregister(self.addresses(pages)))
    }
}

impl GuestPages for SharedRam {
    fn read(&self, pages: Range<usize>, into: &mut [u8]) -> io::Result<()> {
        let mut offset = self.file_offset + self.offset(pages.start);
        let mut rest = into;
        while !rest.is_empty() {
            let got =
                rustix::io::retry_on_intr(|| rustix::io::pread(&self.memfd, &mut *rest, offset))?;
            if got == 0 {
                let text = format!("RAM's file ends at {offset:#x}, within RAM");
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
            }
            offset += got as u64;
            rest = rest.get_mut(got..).unwrap_or(&mut []);
        }
        Ok(())
    }

    fn unprotect(&self, pages: Range<usize>) -> io::Result<()> {
        match unless_gone(self.uffd.write_unprotect(self.addresses(pages), true)) {
            // A part that was unregistered in between has all its pages captured, and so is open.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

/// A source that is gone (ESRCH) has nobody who waits.
fn unless_gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => other,
    }
}
