//! Taking pages out of a guest's RAM: claim, copy, mark, unprotect. In that order, always.

use std::io;
use std::ops::Range;

use super::pages::{PageStates, Word};

/// The guest's pages, as the copier needs them. The model checker has its own.
pub trait GuestPages: Send + Sync {
    /// Copies the bytes of `pages` out; `into` is as long as they are.
    ///
    /// # Errors
    /// They cannot be read.
    fn read(&self, pages: Range<usize>, into: &mut [u8]) -> io::Result<()>;

    /// Lets the guest write `pages` from now on, and wakes who waits for that. Pages that are not
    /// protected any more are no error.
    ///
    /// # Errors
    /// The protection cannot be taken away.
    fn unprotect(&self, pages: Range<usize>) -> io::Result<()>;
}

/// Takes each page once, from any number of threads.
#[derive(Debug)]
pub struct Copier<G, W> {
    states: PageStates<W>,
    guest: G,
    page_size: usize,
}

impl<G: GuestPages, W: Word> Copier<G, W> {
    /// For `pages` pages, all of them protected.
    pub fn new(guest: G, pages: usize, page_size: usize) -> Self {
        Self { states: PageStates::new(pages), guest, page_size }
    }

    /// The guest.
    pub fn guest(&self) -> &G {
        &self.guest
    }

    /// The states of the pages.
    pub fn states(&self) -> &PageStates<W> {
        &self.states
    }

    /// Takes those of `pages` that nobody has taken: appends their bytes to `bytes` and their numbers
    /// to `runs`, and lets the guest write them again. `pages` is cut at the end of a word of states;
    /// returns how many pages were taken. The guest cannot write them between its being stopped at
    /// the arm and this function's having copied them, so the bytes are those of the arm.
    ///
    /// # Errors
    /// Those of [`GuestPages`]. The capture has failed then, and `bytes` and `runs` are undetermined.
    pub fn take(
        &self,
        pages: Range<usize>,
        bytes: &mut Vec<u8>,
        runs: &mut Vec<Range<usize>>,
    ) -> io::Result<usize> {
        let Some(claim) = self.states.claim(pages) else { return Ok(0) };
        let mut taken = 0;
        for run in claim.runs() {
            let at = bytes.len();
            bytes.resize(at + run.len() * self.page_size, 0);
            self.guest.read(run.clone(), bytes.get_mut(at..).unwrap_or(&mut []))?;
            taken += run.len();
            match runs.last_mut() {
                Some(last) if last.end == run.start => last.end = run.end,
                _ => runs.push(run),
            }
        }
        // The bytes are ours: nothing that the guest does now can change them.
        for open in self.states.finish(claim) {
            self.guest.unprotect(open)?;
        }
        Ok(taken)
    }

    /// As [`Self::take`] for pages that are known to be holes, and so zero: nothing is copied. A page
    /// that was found to be a hole after the arm, and is claimed here, was not written in between.
    /// Returns how many pages were taken.
    ///
    /// # Errors
    /// Those of [`GuestPages::unprotect`].
    pub fn take_holes(&self, pages: Range<usize>) -> io::Result<usize> {
        let mut taken = 0;
        let mut open: Option<Range<usize>> = None;
        let mut rest = pages;
        while rest.start < rest.end.min(self.states.pages()) {
            let part = self.states.within_word(rest.clone());
            rest.start = part.end;
            let Some(claim) = self.states.claim(part) else { continue };
            taken += claim.runs().map(|run| run.len()).sum::<usize>();
            for run in self.states.finish(claim) {
                // Neighbours in one go: a hole is usually long.
                match open.as_mut() {
                    Some(last) if last.end == run.start => last.end = run.end,
                    _ => {
                        if let Some(done) = open.replace(run) {
                            self.guest.unprotect(done)?;
                        }
                    }
                }
            }
        }
        open.map_or(Ok(()), |done| self.guest.unprotect(done))?;
        Ok(taken)
    }
}
