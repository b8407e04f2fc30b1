//! Where pages wait between being copied and being written out: the latest version of each.

#![allow(unsafe_code)]

use std::io;
use std::ops::Range;

use forkd_sys::mmap::{AnonymousOptions, Mapping, OutOfBounds, page_size};

/// Pages of a RAM, each at its own offset. Takes memory for those that were put in, no more.
#[derive(Debug)]
pub struct Staging {
    memory: Mapping,
    /// A bit for each page that is in.
    pages: Vec<u64>,
}

impl Staging {
    /// Empty, for a RAM of `len` bytes.
    ///
    /// # Errors
    /// That of `mmap(2)`.
    pub fn new(len: usize) -> io::Result<Self> {
        let options = AnonymousOptions { noreserve: true, ..AnonymousOptions::default() };
        let memory = Mapping::anonymous(len, options)?;
        match memory.advise_small_pages() {
            // EINVAL: a kernel without huge pages.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
            other => other?,
        }
        let pages = vec![0; len.div_ceil(page_size()).div_ceil(64)];
        Ok(Self { memory, pages })
    }

    /// Copies bytes of RAM in, whole pages, over what is there of an earlier copy.
    ///
    /// # Errors
    /// [`OutOfBounds`] for a range beyond either.
    pub fn put(&mut self, ram: &Mapping, range: Range<usize>) -> Result<(), OutOfBounds> {
        let (offset, len) = (range.start, range.len());
        let mapping = self.memory.len().min(ram.len());
        if range.end > mapping || range.end < range.start {
            return Err(OutOfBounds { offset, len, mapping });
        }
        // SAFETY: the range is within both mappings (checked above), which are distinct, and
        // `memory` is writable and borrowed for this; no reference into it is out. RAM may change
        // under our hands: any bytes are valid, and a page that changed is told again.
        unsafe {
            let (from, to) = (ram.as_ptr().add(offset), self.memory.as_ptr().add(offset));
            std::ptr::copy_nonoverlapping(from.cast_const(), to, len);
        }
        for page in offset / page_size()..range.end.div_ceil(page_size()) {
            if let Some(word) = self.pages.get_mut(page / 64) {
                *word |= 1 << (page % 64);
            }
        }
        Ok(())
    }

    /// The runs of pages that are in, ascending, as offsets in bytes.
    pub fn runs(&self) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for (index, &word) in self.pages.iter().enumerate() {
            let mut rest = word;
            while rest != 0 {
                let bit = rest.trailing_zeros() as usize;
                let count = (rest >> bit).trailing_ones() as usize;
                rest &= !((u64::MAX >> (64 - count)) << bit);
                let start = (index * 64 + bit) * page_size();
                let end = (start + count * page_size()).min(self.memory.len());
                match runs.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => runs.push(start..end),
                }
            }
        }
        runs
    }

    /// Number of pages that are in.
    pub fn pages(&self) -> usize {
        self.pages.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Calls `each` with every run of pages that is in: its offset in RAM, and its bytes.
    ///
    /// # Errors
    /// The first of `each`.
    pub fn each_run<E>(&self, mut each: impl FnMut(u64, &[u8]) -> Result<(), E>) -> Result<(), E> {
        for run in self.runs() {
            // SAFETY: runs are within the mapping. It is this value's own and only `put` changes it,
            // which takes it exclusively.
            let bytes = unsafe {
                std::slice::from_raw_parts(self.memory.as_ptr().add(run.start), run.len())
            };
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
        assert_eq!(staging.each_run(|_, _| Err(7)), Err(7));
    }

    proptest! {
        #[test]
        fn runs_are_what_was_put(puts in proptest::collection::vec((0usize..300, 0usize..90), 0..20)) {
            let page = page_size();
            let ram = Mapping::anonymous(300 * page, AnonymousOptions::default()).expect("RAM");
            let mut staging = Staging::new(300 * page).expect("staging");
            let mut model = vec![false; 300];
            for (start, len) in puts {
                let end = (start + len).min(300);
                staging.put(&ram, start * page..end * page).expect("put");
                model[start..end].fill(true);
            }
            let mut found = vec![false; 300];
            let runs = staging.runs();
            prop_assert!(runs.windows(2).all(|w| w[0].end < w[1].start), "maximal, ascending");
            for run in runs {
                found[run.start / page..run.end / page].fill(true);
            }
            prop_assert_eq!(staging.pages(), model.iter().filter(|&&is| is).count());
            prop_assert_eq!(found, model);
        }
    }
}
