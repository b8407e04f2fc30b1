//! Which pages were written since they were protected, while the guest runs.
//!
//! One thread protects RAM piece by piece, serves the faults of what it has protected, and notes them.
//! It alone changes protection, and keeps to one rule at every moment:
//!
//! ```text
//!   a page that was reached and is not noted is protected
//! ```
//!
//! - A piece is *reached* once the kernel has protected it.
//! - A page is noted before it is unprotected.
//! - A note is struck out after the page has been protected again.
//!
//! A fault message may be late: its page may have been served for another message, or be protected
//! again by now. It is served all the same, which leaves a page noted and open that need not be; the
//! rule holds. So when the guest is stopped, and no message is served any more, protecting what is
//! noted leaves no page of RAM open ([`Notes::protect_next`] until it has nothing to do).

use std::io;
use std::ops::Range;

/// Most pages protected by one call, 1 MiB of small pages: a fault waits for that, 40 us.
pub const PIECE: usize = 256;

/// Protection of the guest's pages against its writes. The tests have one of their own.
pub trait Protection {
    /// A write to one of `pages` waits from now on, and is told of.
    ///
    /// # Errors
    /// That of the kernel; some may be protected then.
    fn protect(&self, pages: Range<usize>) -> io::Result<()>;

    /// Lets the guest write `pages` from now on, and wakes who waits for that.
    ///
    /// # Errors
    /// That of the kernel.
    fn unprotect(&self, pages: Range<usize>) -> io::Result<()>;
}

/// The notes.
#[derive(Debug)]
pub struct Notes {
    /// A bit for each page.
    words: Vec<u64>,
    pages: usize,
    /// Pages from the first on that were protected once.
    reached: usize,
    noted: usize,
}

impl Notes {
    /// Of a guest of `pages` pages, none of them protected yet.
    pub fn new(pages: usize) -> Self {
        Self { words: vec![0; pages.div_ceil(64)], pages, reached: 0, noted: 0 }
    }

    /// How many pages are noted.
    pub fn noted(&self) -> usize {
        self.noted
    }

    /// Whether all of RAM has been reached.
    pub fn is_complete(&self) -> bool {
        self.reached == self.pages
    }

    /// Protects the next piece that was not reached yet.
    ///
    /// # Errors
    /// That of [`Protection::protect`]; the piece counts as not reached.
    pub fn reach(&mut self, protection: &impl Protection) -> io::Result<()> {
        let piece = self.reached..(self.reached + PIECE).min(self.pages);
        if !piece.is_empty() {
            protection.protect(piece.clone())?;
            self.reached = piece.end;
        }
        Ok(())
    }

    /// Lets a page go that the guest wants to write.
    ///
    /// # Errors
    /// `InvalidInput` for a page that is not of the guest; that of [`Protection::unprotect`].
    pub fn serve(&mut self, protection: &impl Protection, page: usize) -> io::Result<()> {
        let word = self.words.get_mut(page / 64).filter(|_| page < self.pages);
        let word = word.ok_or(io::ErrorKind::InvalidInput)?;
        let bit = 1 << (page % 64);
        if *word & bit == 0 {
            *word |= bit;
            self.noted += 1;
        }
        protection.unprotect(page..page + 1)
    }

    /// Protects the first run of noted pages from page `from` on again, and strikes them out. Returns
    /// where to go on, none if there was nothing to do.
    ///
    /// # Errors
    /// That of [`Protection::protect`]; the pages stay noted.
    pub fn protect_next(
        &mut self,
        protection: &impl Protection,
        from: usize,
    ) -> io::Result<Option<usize>> {
        let Some(start) = self.next_noted(from) else { return Ok(None) };
        // Only neighbours: a page between that is protected already costs a quarter of a call, and is
        // taken from KVM's page tables once more (`capture_costs`).
        let mut end = start + 1;
        while end - start < PIECE && self.next_noted(end) == Some(end) {
            end += 1;
        }
        protection.protect(start..end)?;
        for page in start..end {
            if let Some(word) = self.words.get_mut(page / 64) {
                self.noted -= usize::from(*word >> (page % 64) & 1 == 1);
                *word &= !(1 << (page % 64));
            }
        }
        Ok(Some(end))
    }

    /// The first noted page from `from` on.
    fn next_noted(&self, from: usize) -> Option<usize> {
        let mut index = from / 64;
        // Without the bits before `from`.
        let mut word = self.words.get(index)? & (u64::MAX << (from % 64));
        while word == 0 {
            index += 1;
            word = *self.words.get(index)?;
        }
        Some(index * 64 + word.trailing_zeros() as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::RefCell;
    use std::collections::VecDeque;

    /// A guest whose writes to protected pages wait and send a message, as the kernel has it.
    #[derive(Default)]
    struct Guest {
        protected: Vec<bool>,
        messages: VecDeque<usize>,
        waiting: Vec<usize>,
        calls: usize,
    }

    struct Kernel(RefCell<Guest>);

    impl Kernel {
        fn new(pages: usize) -> Self {
            Self(RefCell::new(Guest { protected: vec![false; pages], ..Guest::default() }))
        }

        fn write(&self, page: usize) {
            let guest = &mut *self.0.borrow_mut();
            if guest.protected[page] {
                guest.messages.push_back(page);
                guest.waiting.push(page);
            }
        }

        /// The messages that one read gives.
        fn read(&self, most: usize) -> Vec<usize> {
            let messages = &mut self.0.borrow_mut().messages;
            let count = most.min(messages.len());
            messages.drain(..count).collect()
        }
    }

    impl Protection for Kernel {
        fn protect(&self, pages: Range<usize>) -> io::Result<()> {
            let guest = &mut *self.0.borrow_mut();
            guest.calls += 1;
            guest.protected[pages].fill(true);
            Ok(())
        }

        fn unprotect(&self, pages: Range<usize>) -> io::Result<()> {
            let guest = &mut *self.0.borrow_mut();
            guest.protected[pages.clone()].fill(false);
            guest.waiting.retain(|page| !pages.contains(page));
            Ok(())
        }
    }

    fn the_rule_holds(notes: &Notes, kernel: &Kernel) {
        let guest = kernel.0.borrow();
        let mut noted = 0;
        for (page, &protected) in guest.protected.iter().enumerate() {
            let note = notes.words[page / 64] >> (page % 64) & 1 == 1;
            noted += usize::from(note);
            assert!(page >= notes.reached || note || protected, "page {page} is open, not noted");
        }
        assert_eq!(notes.noted(), noted);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Write(usize),
        Read(usize),
        Serve,
        Reach,
        ProtectNext,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0usize..1000).prop_map(Step::Write),
            2 => (1usize..9).prop_map(Step::Read),
            4 => Just(Step::Serve),
            1 => Just(Step::Reach),
            2 => Just(Step::ProtectNext),
        ]
    }

    proptest! {
        /// Whatever comes in between, and however late messages are served.
        #[test]
        fn stopped_at_any_point_all_is_protected_after(
            pages in 1usize..600,
            steps in proptest::collection::vec(step(), 0..200),
        ) {
            let (kernel, mut notes) = (Kernel::new(pages), Notes::new(pages));
            let (mut read, mut at) = (VecDeque::new(), 0);
            for step in steps {
                match step {
                    Step::Write(page) => kernel.write(page % pages),
                    Step::Read(most) => read.extend(kernel.read(most)),
                    Step::Serve => {
                        if let Some(page) = read.pop_front() {
                            notes.serve(&kernel, page).expect("serve");
                        }
                    }
                    Step::Reach => notes.reach(&kernel).expect("reach"),
                    Step::ProtectNext => {
                        at = notes.protect_next(&kernel, at).expect("protect").unwrap_or(0);
                    }
                }
                the_rule_holds(&notes, &kernel);
            }
            // The guest stops: who waits is served first, as only then he can.
            while !notes.is_complete() {
                notes.reach(&kernel).expect("reach");
            }
            read.extend(kernel.read(usize::MAX));
            for page in read {
                notes.serve(&kernel, page).expect("serve");
            }
            prop_assert!(kernel.0.borrow().waiting.is_empty(), "somebody waits for ever");
            let mut from = 0;
            while let Some(next) = notes.protect_next(&kernel, from).expect("protect") {
                from = next;
            }
            prop_assert!(kernel.0.borrow().protected.iter().all(|&protected| protected));
            prop_assert_eq!(notes.noted(), 0);
        }
    }

    #[test]
    fn neighbours_are_protected_by_one_call() {
        let (kernel, mut notes) = (Kernel::new(2000), Notes::new(2000));
        while !notes.is_complete() {
            notes.reach(&kernel).expect("reach");
        }
        for page in [3, 4, 6, 1000, 1999] {
            notes.serve(&kernel, page).expect("serve");
        }
        kernel.0.borrow_mut().calls = 0;
        let mut from = 0;
        let mut ends = Vec::new();
        while let Some(next) = notes.protect_next(&kernel, from).expect("protect") {
            ends.push(next);
            from = next;
        }
        assert_eq!((ends.as_slice(), kernel.0.borrow().calls), ([5, 7, 1001, 2000].as_slice(), 4));
        let error = notes.serve(&kernel, 2000).expect_err("no page of it");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
