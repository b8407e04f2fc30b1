//! Who copies which page: the state of every page of a live capture.
//!
//! ```text
//!   Protected ── claim, by exactly one ──> Copying(owner) ── finish, by the owner ──> Captured
//! ```
//!
//! Two bits a page, each in an array of words: *claimed* and *captured*. A claim is one atomic OR,
//! whose old value says which bits were new: those pages are the caller's, and a [`Claim`] is the
//! proof. It cannot be copied, and only by giving it up are its pages captured. No lock is involved,
//! so nobody who copies ever holds up another.
//!
//! What this buys: a page is claimed once, so it is copied and written once. It is captured only by
//! its owner, after he has copied. Whoever takes write protection away does so from captured pages
//! only, so never from one that is being read.
//!
//! The words are generic so that the model checker can put its own in: see `model.rs`.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Pages in a word.
pub const WORD_PAGES: usize = u64::BITS as usize;

/// A shared word of bits that are only ever set.
pub trait Word: Send + Sync {
    /// All bits clear.
    fn clear() -> Self;
    /// The bits. What was done before they were set is seen after.
    fn get(&self) -> u64;
    /// Sets bits, and returns what was set before. What was done before is seen by who sees them.
    fn set(&self, bits: u64) -> u64;
}

impl Word for AtomicU64 {
    fn clear() -> Self {
        Self::new(0)
    }

    fn get(&self) -> u64 {
        self.load(Ordering::Acquire)
    }

    fn set(&self, bits: u64) -> u64 {
        self.fetch_or(bits, Ordering::AcqRel)
    }
}

/// The right, and the duty, to copy some pages of one word. If it is dropped without
/// [`PageStates::finish`] its pages are never captured: that is how a failed copy ends.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "its pages are captured only when it is finished"]
pub struct Claim {
    word: usize,
    mask: u64,
}

impl Claim {
    /// The pages, as maximal runs, ascending.
    pub fn runs(&self) -> Runs {
        Runs { first: self.word * WORD_PAGES, mask: self.mask }
    }
}

/// Maximal runs of set bits of a word, as ranges of pages.
#[derive(Debug, Clone)]
pub struct Runs {
    first: usize,
    mask: u64,
}

impl Iterator for Runs {
    type Item = Range<usize>;

    fn next(&mut self) -> Option<Range<usize>> {
        if self.mask == 0 {
            return None;
        }
        let start = self.mask.trailing_zeros();
        let len = (self.mask >> start).trailing_ones();
        self.mask &= !bits(start as usize, len as usize);
        let start = self.first + start as usize;
        Some(start..start + len as usize)
    }
}

/// `len` set bits from bit `start`; `start + len` is at most 64.
fn bits(start: usize, len: usize) -> u64 {
    if len == 0 { 0 } else { (u64::MAX >> (WORD_PAGES - len)) << start }
}

/// The states of pages 0 to a number.
#[derive(Debug)]
pub struct PageStates<W = AtomicU64> {
    claimed: Vec<W>,
    captured: Vec<W>,
    pages: usize,
}

impl<W: Word> PageStates<W> {
    /// All protected.
    pub fn new(pages: usize) -> Self {
        let words = |_| (0..pages.div_ceil(WORD_PAGES)).map(|_| W::clear()).collect();
        Self { claimed: words(()), captured: words(()), pages }
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// The pages from the start of `pages` up to its end, the end of the word, or the last page.
    pub fn within_word(&self, pages: Range<usize>) -> Range<usize> {
        let word_end = (pages.start / WORD_PAGES + 1) * WORD_PAGES;
        pages.start..pages.end.min(word_end).min(self.pages).max(pages.start)
    }

    /// Claims those of `pages` (cut to [`Self::within_word`]) that nobody has claimed; none if there
    /// are none.
    pub fn claim(&self, pages: Range<usize>) -> Option<Claim> {
        let pages = self.within_word(pages);
        let word = pages.start / WORD_PAGES;
        let wanted = bits(pages.start % WORD_PAGES, pages.len());
        let claimed = self.claimed.get(word)?;
        // A look first: a page that was captured long ago should not cost a locked instruction.
        if claimed.get() & wanted == wanted {
            return None;
        }
        let mask = wanted & !claimed.set(wanted);
        (mask != 0).then_some(Claim { word, mask })
    }

    /// The pages of a claim have been copied: they are captured. Returns what may be unprotected now:
    /// the runs of captured pages around them, which are fewer than the claim's own when others have
    /// captured what lies between.
    pub fn finish(&self, claim: Claim) -> impl Iterator<Item = Range<usize>> + use<W> {
        let Claim { word, mask } = claim;
        let captured = self.captured.get(word).map_or(0, |bits| bits.set(mask) | mask);
        let first = word * WORD_PAGES;
        Runs { first, mask: captured }.filter(move |run| {
            let run = bits(run.start - first, run.len());
            run & mask != 0
        })
    }

    /// Whether all of `pages` are captured.
    pub fn all_captured(&self, pages: Range<usize>) -> bool {
        let mut rest = pages;
        while !rest.is_empty() {
            let part = self.within_word(rest.clone());
            if part.is_empty() {
                return false;
            }
            let wanted = bits(part.start % WORD_PAGES, part.len());
            let captured = self.captured.get(part.start / WORD_PAGES).map_or(0, Word::get);
            if captured & wanted != wanted {
                return false;
            }
            rest.start = part.end;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type States = PageStates<AtomicU64>;

    /// The only run.
    fn one(mut runs: impl Iterator<Item = Range<usize>>) -> Range<usize> {
        let run = runs.next().expect("a run");
        assert_eq!(runs.next(), None);
        run
    }

    #[test]
    fn a_page_is_claimed_once_and_captured_when_finished() {
        let states = States::new(100);
        let claim = states.claim(60..70).expect("nobody has them");
        assert_eq!(one(claim.runs()), 60..64, "cut at the end of the word");
        assert_eq!(states.claim(60..64), None);
        assert!(!states.all_captured(60..61));
        let around = states.claim(58..64).expect("two are left");
        assert_eq!(one(states.finish(claim)), 60..64);
        assert!(states.all_captured(60..64) && !states.all_captured(59..64));
        assert_eq!(one(states.finish(around)), 58..64, "joined with its neighbours");
        assert!(states.all_captured(0..0));
    }

    #[test]
    fn there_is_nothing_beyond_the_last_page() {
        let states = States::new(70);
        let last = states.claim(64..128).expect("the last ones");
        assert_eq!(one(last.runs()), 64..70);
        assert_eq!(states.claim(70..71), None);
        assert_eq!(states.claim(1000..1001), None);
        assert!(!states.all_captured(69..71));
    }

    proptest! {
        /// Against a set of claimed and one of captured pages.
        #[test]
        fn claims_partition_the_pages(
            pages in 1usize..200,
            wants in proptest::collection::vec((0usize..210, 0usize..80, any::<bool>()), 0..80),
        ) {
            let states = States::new(pages);
            let (mut claimed, mut captured) = (vec![false; pages], vec![false; pages]);
            for (start, len, finish) in wants {
                let end = (start + len).min((start / 64 + 1) * 64).min(pages);
                let free: Vec<usize> = (start..end).filter(|&page| !claimed[page]).collect();
                let claim = states.claim(start..start + len);
                let got: Vec<usize> = claim.iter().flat_map(Claim::runs).flatten().collect();
                prop_assert_eq!(&got, &free);
                for &page in &got {
                    claimed[page] = true;
                }
                let Some(claim) = claim.filter(|_| finish) else { continue };
                for &page in &got {
                    captured[page] = true;
                }
                let open: Vec<usize> = states.finish(claim).flatten().collect();
                prop_assert!(open.iter().all(|&page| captured[page]), "only captured ones");
                prop_assert!(got.iter().all(|page| open.contains(page)), "and all of these");
            }
            for (page, &captured) in captured.iter().enumerate() {
                prop_assert_eq!(states.all_captured(page..page + 1), captured);
            }
            let all = captured.iter().all(|&captured| captured);
            prop_assert_eq!(states.all_captured(0..pages), all);
        }
    }
}
