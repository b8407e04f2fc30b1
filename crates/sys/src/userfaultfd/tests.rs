//! On real memory of this process. Faults come from other threads, for one that faults cannot answer.

use super::*;
use crate::mmap::{AnonymousOptions, Mapping, page_size};
use crate::testing::turn;
use std::sync::mpsc;
use std::thread;

const WP: Features = Features(1 << 0 | 1 << 12);

fn memfd(pages: usize) -> (OwnedFd, Mapping) {
    let fd = rustix::fs::memfd_create("uffd-test", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
    rustix::fs::ftruncate(&fd, (pages * page_size()) as u64).expect("size");
    let mapping = Mapping::file_shared(&fd, 0, pages * page_size()).expect("mapping");
    (fd, mapping)
}

fn anonymous(pages: usize) -> Mapping {
    let mapping =
        Mapping::anonymous(pages * page_size(), AnonymousOptions::default()).expect("mapping");
    mapping.advise_small_pages().expect("small pages");
    mapping
}

fn range(mapping: &Mapping) -> Range<u64> {
    mapping.address() as u64..(mapping.address() + mapping.len()) as u64
}

fn page(mapping: &Mapping, index: usize) -> Range<u64> {
    let start = (mapping.address() + index * page_size()) as u64;
    start..start + page_size() as u64
}

fn uffd(required: Features) -> Userfaultfd {
    Userfaultfd::new(required, Features::NONE).expect("userfaultfd")
}

/// The faults that come next, at least one.
fn next(uffd: &Userfaultfd) -> Vec<Fault> {
    let mut faults = Vec::new();
    while faults.is_empty() {
        assert!(uffd.wait(Some(std::time::Duration::from_secs(10))).expect("poll"), "no fault");
        uffd.read(&mut faults).expect("read");
    }
    faults
}

fn byte(mapping: &Mapping, offset: usize) -> u8 {
    let mut byte = [0];
    mapping.read_at(offset, &mut byte).expect("read");
    byte[0]
}

#[test]
fn the_kernel_says_what_it_can_do() {
    let available = Userfaultfd::available().expect("available");
    assert!(available.contains(WP), "{available:?}");
    let error = Userfaultfd::new(Features(1 << 63), Features::NONE).expect_err("no such feature");
    assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    assert!(error.to_string().contains("0x8000000000000000"), "{error}");
    let made = Userfaultfd::new(WP, Features(1 << 63) | Features::THREAD_ID).expect("made");
    assert_eq!(made.features(), WP | Features::THREAD_ID);
}

#[test]
fn a_write_to_a_protected_page_waits_until_it_is_unprotected() {
    let _turn = turn();
    // Page 0 is there, page 1 was never touched: the marker of shared memory catches both.
    let (_fd, mapping) = memfd(3);
    mapping.write_at(0, b"old").expect("write");
    let uffd = uffd(WP | Features::THREAD_ID);
    uffd.register(range(&mapping), Mode::WRITE_PROTECT).expect("register");
    uffd.write_protect(range(&mapping)).expect("protect");
    assert_eq!(byte(&mapping, 0), b'o', "reads go on");
    for index in [0, 1] {
        let before = byte(&mapping, index * page_size());
        let (sender, receiver) = mpsc::channel();
        thread::scope(|scope| {
            let mapping = &mapping;
            scope.spawn(move || {
                sender.send(crate::fork::tid()).expect("send");
                mapping.write_at(index * page_size(), b"new").expect("write");
                sender.send(0).expect("send");
            });
            let thread = receiver.recv().expect("thread").unsigned_abs();
            let address = page(mapping, index).start;
            let expected = Fault { address, kind: FaultKind::WriteProtect, thread };
            assert_eq!(next(&uffd), [expected]);
            assert_eq!(byte(mapping, index * page_size()), before, "it waits");
            uffd.write_unprotect(page(mapping, index), false).expect("unprotect");
            assert!(receiver.try_recv().is_err(), "not woken");
            uffd.wake(page(mapping, index)).expect("wake");
            receiver.recv().expect("it goes on");
            assert_eq!(byte(mapping, index * page_size()), b'n');
        });
    }
    uffd.unregister(range(&mapping)).expect("unregister");
    mapping.write_at(2 * page_size(), b"free").expect("nobody is asked");
    let mut none = Vec::new();
    assert_eq!(uffd.read(&mut none).expect("read"), 0);
}

#[test]
fn unregistering_and_the_last_close_wake_who_waits() {
    let _turn = turn();
    for unregister in [true, false] {
        let (_fd, mapping) = memfd(1);
        let uffd = uffd(WP);
        uffd.register(range(&mapping), Mode::WRITE_PROTECT).expect("register");
        uffd.write_protect(range(&mapping)).expect("protect");
        thread::scope(|scope| {
            let writer = scope.spawn(|| mapping.write_at(0, b"new").expect("write"));
            next(&uffd);
            if unregister {
                uffd.unregister(range(&mapping)).expect("unregister");
            } else {
                let copy = uffd.try_clone().expect("clone");
                drop(uffd);
                assert!(!writer.is_finished());
                drop(copy);
            }
            writer.join().expect("join");
        });
        assert_eq!(byte(&mapping, 0), b'n');
    }
}

#[test]
fn missing_pages_are_copied_in_and_those_that_are_there_stay() {
    let _turn = turn();
    let size = page_size();
    for shared in [false, true] {
        let (_fd, mapping) =
            if shared { memfd(4) } else { (tempfile::tempfile().expect("x").into(), anonymous(4)) };
        mapping.write_at(2 * size, b"mine").expect("page 2 is there");
        let uffd = uffd(if shared { Features::MISSING_SHMEM } else { Features::NONE });
        uffd.register(range(&mapping), Mode::MISSING).expect("register");
        thread::scope(|scope| {
            let reader = scope.spawn(|| byte(&mapping, size + 5));
            let fault = next(&uffd)[0];
            assert_eq!((fault.address, fault.thread), (page(&mapping, 1).start, 0));
            assert_eq!(fault.kind, FaultKind::Missing { write: false });
            let bytes = vec![7u8; 3 * size];
            let placed =
                uffd.copy(range(&mapping).start + size as u64, &bytes, true, false).expect("copy");
            assert_eq!(placed, Placed::Exists(size), "page 2 was there");
            assert_eq!(reader.join().expect("join"), 7);
        });
        assert_eq!(byte(&mapping, 2 * size), b'm');
        assert_eq!(uffd.zero(page(&mapping, 0), true).expect("zero"), Placed::Done);
        assert_eq!(uffd.zero(page(&mapping, 0), true).expect("zero"), Placed::Exists(0));
        assert_eq!(byte(&mapping, 0), 0);
        let last = page(&mapping, 3).start;
        assert_eq!(uffd.copy(last, &vec![3; size], true, false).expect("copy"), Placed::Done);
        assert_eq!(byte(&mapping, 3 * size), 3);
    }
}

#[test]
fn pages_can_come_protected() {
    let _turn = turn();
    let mapping = anonymous(1);
    let uffd = uffd(Features::PAGEFAULT_FLAG_WP);
    uffd.register(range(&mapping), Mode::BOTH).expect("register");
    uffd.copy(range(&mapping).start, &vec![1; page_size()], true, true).expect("copy");
    thread::scope(|scope| {
        let writer = scope.spawn(|| mapping.write_at(0, b"new").expect("write"));
        assert_eq!(next(&uffd)[0].kind, FaultKind::WriteProtect);
        uffd.write_unprotect(range(&mapping), true).expect("unprotect");
        writer.join().expect("join");
    });
}

#[test]
fn a_forked_child_serves_its_parent() {
    let _turn = turn();
    let (_fd, mapping) = memfd(1);
    let uffd = uffd(WP);
    let all = range(&mapping);
    let mut child = crate::testing::fork_with(|| {
        let mut faults = Vec::new();
        while faults.is_empty() {
            if uffd.wait(None).is_err() || uffd.read(&mut faults).is_err() {
                return 1;
            }
        }
        i32::from(uffd.write_unprotect(all.clone(), true).is_err()) * 2
    });
    uffd.register(all.clone(), Mode::WRITE_PROTECT).expect("register");
    uffd.write_protect(all).expect("protect");
    mapping.write_at(0, b"new").expect("the child lets it pass");
    assert_eq!(child.wait().expect("wait").code(), Some(0));
}

#[test]
fn what_cannot_be_is_refused() {
    let _turn = turn();
    let (_fd, mapping) = memfd(2);
    let (a, b) = (uffd(WP), uffd(WP));
    let all = range(&mapping);
    let unaligned = all.start + 1..all.end;
    let error = a.register(unaligned, Mode::WRITE_PROTECT).expect_err("unaligned");
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    let empty = all.start..all.start;
    assert_eq!(a.write_protect(empty).expect_err("empty").kind(), io::ErrorKind::InvalidInput);
    assert_eq!(
        a.write_protect(all.clone()).expect_err("not registered").kind(),
        io::ErrorKind::NotFound
    );
    a.register(all.clone(), Mode::WRITE_PROTECT).expect("register");
    let error = b.register(all.clone(), Mode::WRITE_PROTECT).expect_err("taken");
    assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
    let nowhere = anonymous(1);
    let nowhere = range(&nowhere);
    assert!(a.copy(nowhere.start, &vec![1; page_size()], true, false).is_err());
    assert!(parse(&[0x13; MESSAGE]).is_err(), "a fork event");
    assert!(parse(&[0x12; 9]).is_err(), "cut short");
}
