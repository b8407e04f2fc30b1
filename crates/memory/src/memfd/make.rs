//! Making memfds.

use std::fs::File;
use std::io;

use forkd_sys::memfd::{self as sys, HUGE_PAGE, MAX_NAME};
use forkd_sys::mmap::Mapping;

use super::copy::{Sink, Source, copy};
use super::{MemfdError, MemfdOptions, MemfdRegion};

/// A memfd of `len` zeroes, not yet sealed. A memfd of huge pages has the mapping that reserved them.
struct Blank {
    file: File,
    allocated: u64,
    mapping: Option<Mapping>,
    fallback: Option<String>,
}

pub(super) fn empty(len: u64, name: &str, huge_pages: bool) -> Result<MemfdRegion, MemfdError> {
    if len == 0 {
        return Err(MemfdError::Empty { what: format!("memfd {name:?}") });
    }
    blank(len, name, huge_pages)?.seal(len, name, false)
}

pub(super) fn populated(
    source: &Source,
    name: &str,
    options: &MemfdOptions,
    threads: impl FnOnce(u64) -> usize,
) -> Result<MemfdRegion, MemfdError> {
    let blank = blank(source.len, name, options.huge_pages)?;
    let sink = blank.mapping.as_ref().map_or(Sink::File(&blank.file), Sink::Mapping);
    copy(source, &sink, name, threads)?;
    blank.seal(source.len, name, options.immutable)
}

impl Blank {
    fn seal(self, len: u64, name: &str, immutable: bool) -> Result<MemfdRegion, MemfdError> {
        let huge_pages = self.mapping.is_some();
        // Bytes that are mapped shared cannot be sealed.
        drop(self.mapping);
        let sealed = if immutable { sys::seal_all(&self.file) } else { sys::seal_size(&self.file) };
        sealed.map_err(|source| failed("seal", name, len, source))?;
        Ok(MemfdRegion {
            file: self.file,
            size: len,
            allocated: self.allocated,
            huge_pages,
            fallback: self.fallback,
        })
    }
}

fn failed(action: &'static str, name: &str, len: u64, source: io::Error) -> MemfdError {
    MemfdError::Create { action, name: name.to_owned(), len, source }
}

fn blank(len: u64, name: &str, huge_pages: bool) -> Result<Blank, MemfdError> {
    if name.len() > MAX_NAME || name.contains('\0') {
        return Err(MemfdError::Name { name: name.to_owned(), max: MAX_NAME });
    }
    let mut fallback = None;
    if huge_pages {
        match blank_of_huge_pages(len, name) {
            Ok(blank) => return Ok(blank),
            Err(error) => fallback = Some(why_small_pages(len, name, &error)),
        }
    }
    let file = sys::create(name, false).map_err(|source| failed("make", name, len, source))?;
    file.set_len(len).map_err(|source| failed("size", name, len, source))?;
    Ok(Blank { file, allocated: len, mapping: None, fallback })
}

/// The pool is asked for all pages here, and they are allocated: mapping alone reserves them, but a
/// cgroup's limit would be met only at the first touch, by SIGBUS, with the guest running.
fn blank_of_huge_pages(len: u64, name: &str) -> io::Result<Blank> {
    let too_long = || io::Error::from(io::ErrorKind::InvalidInput);
    let allocated = len.checked_next_multiple_of(HUGE_PAGE).ok_or_else(too_long)?;
    let file = sys::create(name, true)?;
    file.set_len(allocated)?;
    let bytes = usize::try_from(allocated).map_err(|_| too_long())?;
    let mapping = Mapping::file_shared(&file, 0, bytes)?;
    sys::allocate(&file, 0, allocated)?;
    Ok(Blank { file, allocated, mapping: Some(mapping), fallback: None })
}

fn why_small_pages(len: u64, name: &str, error: &io::Error) -> String {
    let pages = len.div_ceil(HUGE_PAGE);
    format!(
        "memfd {name:?} has 4 KiB pages: the host's pool does not give the {pages} pages of 2 MiB that it needs ({error}); vm.nr_hugepages sets the pool's size"
    )
}
