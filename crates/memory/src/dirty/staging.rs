//! Where pages wait between being copied and being written out: the latest version of each.
//!
//! Pages lie side by side in the order in which they first came, in huge pages that can be made ready
//! before the pause ([`Staging::reserve`]): a first touch of a page of its own for each would cost more
//! than its copy.

#![allow(unsafe_code)]

use std::io;
use std::ops::Range;

use forkd_sys::mmap::{AnonymousOptions, Mapping, page_size};

/// Bytes of a piece of the buffer; 16 huge pages.
const CHUNK: usize = 32 << 20;
/// Size of a huge page on x86-64.
const HUGE_PAGE: usize = 2 << 20;

/// Pages of a RAM.
#[derive(Debug)]
pub struct Staging {
    chunks: Vec<Mapping>,
    /// For each page of RAM its place in the chunks, from 1; 0 if it is not in.
    places: Vec<u32>,
    used: u32,
    ram_len: usize,
}

impl Staging {
    /// Empty, for a RAM of `ram_len` bytes, whole pages.
    ///
    /// # Errors
    /// `InvalidInput` for more than 2^32 - 2 pages.
    pub fn new(ram_len: usize) -> io::Result<Self> {
        let pages = ram_len.div_ceil(page_size());
        if u32::try_from(pages).is_err() || pages as u32 == u32::MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Self { chunks: Vec::new(), places: vec![0; pages], used: 0, ram_len })
    }

    /// Makes room ready for `bytes` more, so that putting them takes no more than their copy.
    ///
    /// # Errors
    /// That of `mmap(2)` and `madvise(2)`: `OutOfMemory`.
    pub fn reserve(&mut self, bytes: usize) -> io::Result<()> {
        let wanted = (self.used as usize * page_size()).saturating_add(bytes.min(self.ram_len));
        while self.chunks.len() * CHUNK < wanted {
            let options = AnonymousOptions { noreserve: true, huge_pages: true, align: HUGE_PAGE };
            let chunk = Mapping::anonymous(CHUNK, options)?;
            chunk.populate_write(0, CHUNK)?;
            self.chunks.push(chunk);
        }
        Ok(())
    }

    /// Copies bytes of RAM in, whole pages, each over what is there of an earlier copy.
    ///
    /// # Errors
    /// `InvalidInput` for a range that is not of whole pages of RAM; as for [`Self::reserve`].
    pub fn put(&mut self, ram: &Mapping, range: Range<usize>) -> io::Result<()> {
        let page = page_size();
        let whole = range.start.is_multiple_of(page) && range.end.is_multiple_of(page);
        if !whole || range.end < range.start || range.end > self.ram_len.min(ram.len()) {
            let text = format!("{:#x}..{:#x} are no pages of RAM", range.start, range.end);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        for index in range.start / page..range.end / page {
            let place = self.place(index)? as usize;
            let (chunk, at) = (place * page / CHUNK, place * page % CHUNK);
            let Some(chunk) = self.chunks.get(chunk) else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            // SAFETY: the page is within RAM (checked above) and its place within the chunk, as
            // chunks are of whole pages. They are distinct mappings; the chunk is writable, borrowed
            // exclusively by way of `self`, and no reference into it is out. RAM may change under our
            // hands: any bytes are valid, and a page that has changed is told again.
            unsafe {
                let from = ram.as_ptr().add(index * page).cast_const();
                std::ptr::copy_nonoverlapping(from, chunk.as_ptr().add(at), page);
            }
        }
        Ok(())
    }

    /// The place of a page: its old one, or a new one.
    fn place(&mut self, index: usize) -> io::Result<u32> {
        match self.places.get(index) {
            Some(0) => {}
            Some(&place) => return Ok(place - 1),
            None => return Err(io::ErrorKind::InvalidInput.into()),
        }
        self.reserve(page_size())?;
        if let Some(place) = self.places.get_mut(index) {
            *place = self.used + 1;
        }
        self.used += 1;
        Ok(self.used - 1)
    }

    /// The runs of pages that are in, ascending and maximal, as offsets in RAM in bytes.
    pub fn runs(&self) -> Vec<Range<usize>> {
        self.find_runs(|_, _| true)
    }

    /// Runs of pages in RAM, of which `joined` says whether two neighbours' places can go together.
    fn find_runs(&self, joined: impl Fn(u32, u32) -> bool) -> Vec<Range<usize>> {
        let page = page_size();
        let mut runs: Vec<Range<usize>> = Vec::new();
        let mut before = 0;
        for (index, &place) in self.places.iter().enumerate() {
            if place != 0 {
                match runs.last_mut() {
                    Some(last) if before != 0 && joined(before, place) => last.end += page,
                    _ => runs.push(index * page..(index + 1) * page),
                }
            }
            before = place;
        }
        runs
    }

    /// Number of pages that are in.
    pub fn pages(&self) -> usize {
        self.used as usize
    }

    /// Calls `each` with runs of pages, ascending, all pages that are in: the offset in RAM, and the
    /// bytes. Neighbours may come in two runs.
    ///
    /// # Errors
    /// The first of `each`.
    pub fn each_run<E>(&self, mut each: impl FnMut(u64, &[u8]) -> Result<(), E>) -> Result<(), E> {
        let page = page_size();
        let chunk_of = |place: u32| (place as usize - 1) * page / CHUNK;
        let side_by_side = |a: u32, b: u32| b == a + 1 && chunk_of(a) == chunk_of(b);
        for run in self.find_runs(side_by_side) {
            let place = self.places.get(run.start / page).copied().unwrap_or(0);
            let Some(chunk) = (place != 0).then(|| self.chunks.get(chunk_of(place))).flatten()
            else {
                continue;
            };
            let at = (place as usize - 1) * page % CHUNK;
            // SAFETY: the run's places are side by side in this chunk, so all of it is within. The
            // chunk is this value's own and only `put` changes it, which takes it exclusively.
            let bytes = unsafe { std::slice::from_raw_parts(chunk.as_ptr().add(at), run.len()) };
            each(run.start as u64, bytes)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_latest_version_counts() {
        let page = page_size();
        let ram = Mapping::anonymous(4 * page, AnonymousOptions::default()).expect("RAM");
        let mut staging = Staging::new(4 * page).expect("staging");
        ram.write_at(page, b"first").expect("write");
        staging.put(&ram, page..2 * page).expect("put");
        ram.write_at(page, b"later").expect("write");
        staging.put(&ram, page..3 * page).expect("put");
        let mut seen = Vec::new();
        let ended: Result<(), ()> = staging.each_run(|offset, bytes| {
            seen.push((offset as usize, bytes.len(), bytes[..5].to_vec()));
            Ok(())
        });
        ended.expect("no error");
        assert_eq!(seen, [(page, 2 * page, b"later".to_vec())]);
        assert!(staging.put(&ram, 0..5 * page).is_err());
        assert!(staging.put(&ram, 0..page + 1).is_err());
        assert_eq!(staging.each_run(|_, _| Err(7)), Err(7));
        assert_eq!(staging.pages(), 2);
    }

    #[test]
    fn it_goes_on_beyond_a_chunk() {
        let len = CHUNK + 3 * page_size();
        let ram = Mapping::anonymous(len, AnonymousOptions::default()).expect("RAM");
        for offset in (0..len).step_by(page_size()) {
            ram.write_at(offset, &(offset as u64).to_ne_bytes()).expect("write");
        }
        let mut staging = Staging::new(len).expect("staging");
        staging.reserve(usize::MAX).expect("all of RAM, no more");
        staging.put(&ram, 0..len).expect("put");
        let mut next = 0;
        let ended: Result<(), ()> = staging.each_run(|offset, bytes| {
            assert_eq!(offset, next);
            for page in bytes.chunks_exact(page_size()) {
                assert_eq!(page[..8], next.to_ne_bytes());
                next += page_size() as u64;
            }
            Ok(())
        });
        ended.expect("no error");
        assert_eq!(next, len as u64);
    }

    proptest! {
        #[test]
        fn pages_are_what_was_put(puts in proptest::collection::vec((0usize..300, 0usize..90), 0..20)) {
            let page = page_size();
            let ram = Mapping::anonymous(300 * page, AnonymousOptions::default()).expect("RAM");
            let mut staging = Staging::new(300 * page).expect("staging");
            let mut model = vec![0u64; 300];
            for (version, (start, len)) in (1..).zip(puts) {
                let end = (start + len).min(300);
                for (index, latest) in (start..).zip(&mut model[start..end]) {
                    *latest = version * 1000 + index as u64;
                    ram.write_at(index * page, &latest.to_ne_bytes()).expect("write");
                }
                staging.put(&ram, start * page..end * page).expect("put");
            }
            let mut found = vec![0; 300];
            let ended: Result<(), ()> = staging.each_run(|offset, bytes| {
                for (index, page) in (offset as usize / page..).zip(bytes.chunks_exact(page)) {
                    found[index] = u64::from_ne_bytes(page[..8].try_into().expect("length"));
                }
                Ok(())
            });
            ended.expect("no error");
            prop_assert_eq!(staging.pages(), model.iter().filter(|&&is| is != 0).count());
            let runs = staging.runs();
            prop_assert!(runs.windows(2).all(|w| w[0].end < w[1].start), "maximal, ascending");
            let covered: usize = runs.iter().map(|run| run.len() / page).sum();
            prop_assert_eq!(covered, staging.pages());
            prop_assert_eq!(found, model);
        }
    }
}
