//! Private anonymous memory: RAM of a freshly booted VM.
//!
//! fork(2) shares it copy-on-write, page by page, to any depth. With huge pages the fork copies a
//! page-table entry per 2 MiB instead of 512, but the first write into a huge page after a fork
//! splits it.

use forkd_sys::mmap::{AnonymousOptions, Mapping};

use super::{Backend, HUGE_PAGE, MemoryBackend};

/// Private anonymous memory.
#[derive(Debug)]
pub struct Anonymous {
    mapping: Mapping,
}

impl Anonymous {
    /// Maps `len` bytes of zeroed memory, not counted against the overcommit limit: a guest touches
    /// its RAM slowly, and forks share it.
    ///
    /// # Errors
    /// That of `mmap(2)`.
    pub fn new(len: usize, huge_pages: bool) -> std::io::Result<Self> {
        let options = AnonymousOptions { noreserve: true, huge_pages, align: HUGE_PAGE };
        let mapping = Mapping::anonymous(len, options)?;
        if !huge_pages {
            match mapping.advise_small_pages() {
                // EINVAL: a kernel without huge pages, which is as was asked.
                Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => {}
                other => other?,
            }
        }
        Ok(Self { mapping })
    }
}

impl Backend for Anonymous {
    fn kind(&self) -> MemoryBackend {
        MemoryBackend::Anonymous
    }

    fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    fn backed(&self) -> std::io::Result<Vec<std::ops::Range<u64>>> {
        Ok(Vec::new())
    }
}
