//! What is known of each page of RAM that is being loaded.
//!
//! A page is *wanted* until its bytes are settled, and *settled* for ever after: loaded, or known to be
//! zero, as it is at the source or as the guest has discarded it. A settled page need not be present:
//! it is put in place as zeroes when it is touched. So a discard settles pages and takes them away,
//! and no later answer of the source is put there.
//!
//! ```text
//!   wanted ──bytes of the source──▶ settled, present ─┐
//!     │                                   │           │ discard
//!     │ zero, or discard                  ▼           │
//!     └───────────────────────────▶ settled, missing ◀┘
//!                                         │ touched: zeroes
//!                                         └──────────▶ settled, present
//! ```
//!
//! Pages change and are put in place under one lock, so that "still wanted" holds when the bytes land.
//! The source is read outside of it.

use std::ops::Range;

use super::WorkingSet;

/// State of all pages, by number.
#[derive(Debug)]
pub(super) struct Pages {
    /// A bit for each page: settled.
    settled: Vec<u64>,
    count: u64,
    wanted: u64,
    /// What was fetched ahead and what was faulted in, in order.
    pub(super) recorded: WorkingSet,
    /// Page faults that were taken note of.
    pub(super) faults: u64,
    /// Ranges of pages that a guest waits for and the source did not give.
    pub(super) failed: Vec<Range<u64>>,
    /// Why not, the first time.
    pub(super) failure: Option<super::SourceFailure>,
    /// All shall be loaded, not only what is touched.
    pub(super) load_all: bool,
    /// The range is not watched any more: it is plain memory.
    pub(super) complete: bool,
    /// The threads shall end.
    pub(super) stop: bool,
}

impl Pages {
    pub(super) fn new(count: u64) -> Self {
        let words = usize::try_from(count.div_ceil(64)).unwrap_or(usize::MAX);
        Self {
            settled: vec![0; words],
            count,
            wanted: count,
            recorded: WorkingSet::default(),
            faults: 0,
            failed: Vec::new(),
            failure: None,
            load_all: false,
            complete: false,
            stop: false,
        }
    }

    /// Number of pages whose bytes are not settled.
    pub(super) fn wanted(&self) -> u64 {
        self.wanted
    }

    fn bit(page: u64) -> (usize, u64) {
        // A page's number is below the count, which the vector has words for.
        ((page / 64) as usize, 1 << (page % 64))
    }

    pub(super) fn is_settled(&self, page: u64) -> bool {
        let (word, bit) = Self::bit(page);
        self.settled.get(word).is_none_or(|word| word & bit != 0)
    }

    /// Settles the pages of a range that are not.
    pub(super) fn settle(&mut self, pages: Range<u64>) {
        for page in pages.start..pages.end.min(self.count) {
            let (word, bit) = Self::bit(page);
            if let Some(word) = self.settled.get_mut(word)
                && *word & bit == 0
            {
                *word |= bit;
                self.wanted -= 1;
            }
        }
    }

    /// The first run of wanted pages in a range, of which no more than `most` are looked for.
    pub(super) fn first_wanted(&self, pages: Range<u64>, most: u64) -> Option<Range<u64>> {
        let end = pages.end.min(self.count);
        let mut page = pages.start;
        while page < end && self.is_settled(page) {
            // Whole words of settled pages are the common case of a search for the rest.
            let full = page.is_multiple_of(64)
                && self.settled.get(Self::bit(page).0).is_some_and(|&word| word == u64::MAX);
            page += if full { 64 } else { 1 };
        }
        if page >= end {
            return None;
        }
        let start = page;
        let end = end.min(start.saturating_add(most));
        while page < end && !self.is_settled(page) {
            page += 1;
        }
        Some(start..page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn wanted_runs_are_those_that_were_not_settled(
            count in 1u64..400,
            settled in proptest::collection::vec((0u64..420, 0u64..100), 0..12),
            asked in (0u64..420, 0u64..420),
            most in 1u64..100,
        ) {
            let mut pages = Pages::new(count);
            let mut model = vec![false; usize::try_from(count).expect("small")];
            for (start, len) in settled {
                pages.settle(start..start + len);
                for page in start..(start + len).min(count) {
                    model[usize::try_from(page).expect("small")] = true;
                }
            }
            prop_assert_eq!(pages.wanted(), model.iter().filter(|&&s| !s).count() as u64);
            let mut found = Vec::new();
            let mut at = asked.0;
            while let Some(run) = pages.first_wanted(at..asked.1, most) {
                prop_assert!(run.start >= at && run.end <= asked.1);
                prop_assert!((1..=most).contains(&(run.end - run.start)));
                at = run.end;
                found.extend(run);
            }
            let expected: Vec<u64> = (asked.0..asked.1.min(count))
                .filter(|&page| !model[usize::try_from(page).expect("small")]).collect();
            prop_assert_eq!(found, expected);
        }
    }
}
