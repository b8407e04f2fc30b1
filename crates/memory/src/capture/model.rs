//! The copier under loom: every interleaving of a few threads, and every value that the memory model
//! lets a load see.
//!
//! The guest is modelled by a cell per page, which loom watches for a read that races a write, and a
//! flag per page that says whether it is protected. Clearing the flag releases and seeing it clear
//! acquires, as the lock of a page table does.

use std::io;
use std::ops::Range;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use loom::thread;

use super::copier::{Copier, GuestPages};
use super::pages::{PageStates, Word};

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

struct Page {
    byte: UnsafeCell<u8>,
    protected: AtomicBool,
}

struct Guest(Vec<Page>);

// SAFETY: what loom is here to show; it panics on the first access that races another.
#[allow(unsafe_code)]
unsafe impl Send for Guest {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Guest {}

#[allow(unsafe_code)]
impl Guest {
    fn new(pages: usize) -> Self {
        let page = |index: usize| Page {
            byte: UnsafeCell::new(before(index)),
            protected: AtomicBool::new(true),
        };
        Self((0..pages).map(page).collect())
    }

    /// A write by the guest: it happens if the page is not protected; else the guest waits.
    fn write(&self, page: usize) -> bool {
        let open = !self.0[page].protected.load(Ordering::Acquire);
        if open {
            // SAFETY: loom checks that no other access is concurrent.
            self.0[page].byte.with_mut(|byte| unsafe { *byte = 0xff });
        }
        open
    }
}

#[allow(unsafe_code)]
impl GuestPages for Guest {
    fn read(&self, pages: Range<usize>, into: &mut [u8]) -> io::Result<()> {
        for (page, byte) in pages.zip(into) {
            // SAFETY: loom checks that no other access is concurrent.
            *byte = self.0[page].byte.with(|byte| unsafe { *byte });
        }
        Ok(())
    }

    fn unprotect(&self, pages: Range<usize>) -> io::Result<()> {
        for page in pages {
            self.0[page].protected.store(false, Ordering::Release);
        }
        Ok(())
    }
}

/// What a page holds at the arm.
fn before(page: usize) -> u8 {
    page as u8 + 1
}

struct World {
    copier: Copier<Guest, AtomicU64>,
    written: Vec<AtomicUsize>,
}

impl World {
    fn new(pages: usize) -> Self {
        Self {
            copier: Copier::new(Guest::new(pages), pages, 1),
            written: (0..pages).map(|_| AtomicUsize::new(0)).collect(),
        }
    }

    /// What the bulk copier does with a chunk, and the fault handler with a page.
    fn take(&self, pages: Range<usize>) {
        let (mut bytes, mut runs) = (Vec::new(), Vec::new());
        let taken = self.copier.take(pages, &mut bytes, &mut runs).expect("take");
        let pages: Vec<usize> = runs.into_iter().flatten().collect();
        assert_eq!((pages.len(), bytes.len()), (taken, taken));
        for (page, byte) in pages.into_iter().zip(bytes) {
            assert_eq!(byte, before(page), "page {page} is not as it was at the arm");
            self.written[page].fetch_add(1, Ordering::Relaxed);
        }
    }

    fn check(&self) {
        for (page, written) in self.written.iter().enumerate() {
            assert_eq!(written.load(Ordering::Relaxed), 1, "page {page}");
            assert!(self.copier.guest().write(page), "who waits for page {page} is never woken");
        }
        assert!(self.copier.states().all_captured(0..self.written.len()));
    }
}

#[test]
fn bulk_handler_and_guest() {
    loom::model(|| {
        let world = Arc::new(World::new(2));
        let handler = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.take(1..2))
        };
        let guest = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                world.copier.guest().write(1);
                world.copier.guest().write(0);
            })
        };
        world.take(0..2);
        handler.join().expect("join");
        guest.join().expect("join");
        world.check();
    });
}

#[test]
fn handler_between_two_halves_of_a_chunk() {
    loom::model(|| {
        // The handler takes the middle page; the bulk copier is left with two runs around it.
        let world = Arc::new(World::new(3));
        let other = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                world.take(1..2);
                world.copier.guest().write(0);
                world.copier.guest().write(2);
            })
        };
        world.take(0..3);
        other.join().expect("join");
        world.check();
    });
}

#[test]
fn two_faults_on_one_page() {
    loom::model(|| {
        let world = Arc::new(World::new(1));
        let others: Vec<_> = (0..2)
            .map(|_| {
                let world = Arc::clone(&world);
                thread::spawn(move || world.take(0..1))
            })
            .collect();
        world.take(0..1);
        for other in others {
            other.join().expect("join");
        }
        world.check();
    });
}

/// That the model would find the ancestor's fault: a page unprotected while another copies it.
#[test]
#[should_panic(expected = "Causality violation")]
fn a_handler_that_unprotects_what_it_has_not_claimed_is_found() {
    loom::model(|| {
        let states = Arc::new(PageStates::<AtomicU64>::new(1));
        let guest = Arc::new(Guest::new(1));
        let handler = {
            let (states, guest) = (Arc::clone(&states), Arc::clone(&guest));
            thread::spawn(move || {
                let claim = states.claim(0..1);
                if let Some(claim) = claim {
                    guest.read(0..1, &mut [0]).expect("read");
                    drop(states.finish(claim));
                }
                // Wrong: the page may be another's, who still copies.
                guest.unprotect(0..1).expect("unprotect");
                guest.write(0);
            })
        };
        if let Some(claim) = states.claim(0..1) {
            guest.read(0..1, &mut [0]).expect("read");
            drop(states.finish(claim));
        }
        handler.join().expect("join");
    });
}
