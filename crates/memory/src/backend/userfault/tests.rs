//! Faults come from other threads than the one that would answer them, as in a VM.

use super::*;

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::mpsc;
use std::time::Duration;

use proptest::prelude::*;

use crate::backend::FileExtent;
use crate::testing::{PAGE as PAGE_LEN, fork_with, pattern};
use threads::FAULT_PAGES;

const BLOCK: usize = FAULT_PAGES as usize * PAGE_LEN;
/// 32 blocks.
const LEN: usize = 32 * BLOCK;

/// What the test sees and steers of a source.
#[derive(Debug, Default)]
struct Control {
    reads: Mutex<Vec<Range<u64>>>,
    /// Reads of these bytes fail.
    bad: Mutex<Option<Range<u64>>>,
    /// A read tells the first, and waits for the second.
    gate: Mutex<Option<(mpsc::Sender<()>, mpsc::Receiver<()>)>>,
}

impl Control {
    fn blocks_read(&self) -> Vec<u64> {
        let reads = self.reads.lock().expect("reads");
        let mut blocks: Vec<u64> = reads
            .iter()
            .flat_map(|r| r.start / BLOCK as u64..r.end.div_ceil(BLOCK as u64))
            .collect();
        blocks.sort_unstable();
        blocks.dedup();
        blocks
    }
}

#[derive(Debug)]
struct Fake {
    bytes: Vec<u8>,
    control: Arc<Control>,
}

impl PageSource for Fake {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let range = offset..offset + buffer.len() as u64;
        self.control.reads.lock().expect("reads").push(range.clone());
        let gate = self.control.gate.lock().expect("gate").take();
        if let Some((entered, go)) = gate {
            entered.send(()).expect("the test listens");
            go.recv().expect("the test lets go");
        }
        let bad = self.control.bad.lock().expect("bad").clone();
        if bad.is_some_and(|bad| range.start < bad.end && bad.start < range.end) {
            return Err(io::Error::other("the store is away"));
        }
        let start = usize::try_from(offset).expect("small");
        buffer.copy_from_slice(&self.bytes[start..start + buffer.len()]);
        Ok(())
    }

    fn is_zero(&self, offset: u64, len: u64) -> bool {
        let start = usize::try_from(offset).expect("small");
        self.bytes[start..][..usize::try_from(len).expect("small")].iter().all(|&b| b == 0)
    }
}

fn lazy(bytes: Vec<u8>, set: Option<WorkingSet>) -> (Arc<Userfault>, Arc<Control>) {
    let control = Arc::new(Control::default());
    let source = Fake { bytes, control: Arc::clone(&control) };
    let ram = Userfault::new(source.bytes.len(), Box::new(source), set).expect("userfaultfd");
    (Arc::new(ram), control)
}

/// Bytes of RAM. They are read even if the test does not look at them.
fn read(ram: &Userfault, at: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.mapping.read_at(at, &mut bytes).expect("within RAM");
    std::hint::black_box(bytes)
}

fn event(ram: &Userfault) {
    let came = forkd_sys::reactor::wait_readable(ram.events(), Some(Duration::from_secs(20)));
    assert!(came.expect("poll"), "no event");
}

#[test]
fn only_what_is_touched_is_loaded() {
    let bytes = pattern(LEN, 1);
    let (ram, control) = lazy(bytes.clone(), None);
    assert_eq!(ram.status(), LoadStatus::Loading { remaining: LEN as u64 });
    assert_eq!(control.blocks_read(), [0; 0]);
    assert!(read(&ram, 5 * BLOCK + 100, 10) == bytes[5 * BLOCK + 100..][..10]);
    ram.mapping.write_at(3 * BLOCK - 1, &[7, 7]).expect("write");
    assert_eq!(control.blocks_read(), [2, 3, 5]);
    assert_eq!(ram.status(), LoadStatus::Loading { remaining: (LEN - 3 * BLOCK) as u64 });
    let mut model = bytes;
    model[3 * BLOCK - 1..][..2].fill(7);
    assert!(read(&ram, 0, LEN) == model);
    assert_eq!(control.reads.lock().expect("reads").len(), 32, "each once");
}

#[test]
fn zeroes_are_not_read() {
    let mut bytes = vec![0; LEN];
    bytes[4 * BLOCK..5 * BLOCK].copy_from_slice(&pattern(BLOCK, 2));
    let (ram, control) = lazy(bytes.clone(), None);
    ram.mapping.write_at(100, &[9]).expect("write into zeroes");
    bytes[100] = 9;
    assert!(read(&ram, 0, LEN) == bytes);
    assert_eq!(control.blocks_read(), [4]);
}

#[test]
fn the_working_set_is_recorded_and_fetched_ahead() {
    let bytes = pattern(LEN, 3);
    let (ram, _) = lazy(bytes.clone(), None);
    for block in [7, 8, 3, 20] {
        read(&ram, block * BLOCK + 5, 1);
    }
    let set = ram.recorded();
    let block = |n: u64, count: u64| n * BLOCK as u64..(n + count) * BLOCK as u64;
    assert_eq!(set.ranges(), [block(7, 2), block(3, 1), block(20, 1)]);
    drop(ram);

    let dir = tempfile::TempDir::new().expect("a directory");
    let path = dir.path().join("working-set");
    set.save(&path).expect("save");
    let set = WorkingSet::load(&path).expect("load");
    let (ram, control) = lazy(bytes.clone(), Some(set.clone()));
    // Nobody touches RAM: it comes by itself.
    let mut pages = ram.shared.lock();
    let left = (LEN - 4 * BLOCK) as u64 / PAGE;
    while pages.wanted() > left {
        drop(pages);
        std::thread::yield_now();
        pages = ram.shared.lock();
    }
    drop(pages);
    let order: Vec<u64> =
        control.reads.lock().expect("reads").iter().map(|r| r.start / BLOCK as u64).collect();
    assert_eq!(order, [7, 3, 20], "in the order of the first load");
    for block in [7, 8, 3, 20] {
        assert!(read(&ram, block * BLOCK, BLOCK) == bytes[block * BLOCK..][..BLOCK]);
    }
    assert_eq!(control.reads.lock().expect("reads").len(), 3, "touching them loads nothing");
    assert_eq!(ram.recorded(), set);
    read(&ram, 0, 1);
    assert_eq!(ram.recorded().ranges().last(), Some(&block(0, 1)));
}

/// Threads of this process.
fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").expect("tasks").count()
}

/// In a process of its own, which has no other threads.
#[test]
fn when_all_is_loaded_it_is_plain_memory() {
    let bytes = pattern(LEN, 4);
    let mut child = fork_with(|| {
        let control = Arc::new(Control::default());
        let source = Box::new(Fake { bytes: bytes.clone(), control });
        let Ok(mut ram) = Userfault::new(LEN, source, None) else { return 1 };
        if threads() != 3 {
            return 2;
        }
        if ram.complete().is_err() || ram.status() != LoadStatus::Complete {
            return 3;
        }
        if ram.check_fork().is_err() {
            return 4;
        }
        // They were joined, but the kernel lists a thread a little longer. The parent waits for us.
        while threads() != 1 {
            std::thread::yield_now();
        }
        ram.mapping.write_at(0, &[1; 100]).expect("within RAM");
        let mut grandchild = fork_with(|| {
            let own = ram.detach_child().is_ok() && read(&ram, 100, LEN - 100) == bytes[100..];
            let zero =
                ram.discard(BLOCK, BLOCK).is_ok() && read(&ram, BLOCK, BLOCK) == vec![0; BLOCK];
            let written = ram.mapping.write_at(0, &[2; 100]).is_ok();
            i32::from(!(own && zero && written))
        });
        if grandchild.wait().ok().and_then(|status| status.code()) != Some(0) {
            return 5;
        }
        let mut model = bytes.clone();
        model[..100].fill(1);
        if read(&ram, 0, LEN) != model {
            return 6;
        }
        drop(ram);
        0
    });
    assert_eq!(child.wait().expect("wait").code(), Some(0));
}

#[test]
fn loading_all_goes_on_behind() {
    let bytes = pattern(LEN, 5);
    let (ram, _) = lazy(bytes.clone(), None);
    ram.load_all();
    event(&ram);
    assert_eq!(ram.status(), LoadStatus::Complete);
    assert_eq!(ram.fork_behaviour(), ForkBehaviour::CopyOnWrite);
    assert_eq!(ram.branch_modes(), MemoryBackend::Userfault.branch_modes());
    assert!(read(&ram, 0, LEN) == bytes);
    ram.complete().expect("it is");
    ram.populate_write(0, LEN).expect("populate");
    ram.discard(PAGE_LEN, PAGE_LEN).expect("discard");
    assert!(read(&ram, PAGE_LEN, PAGE_LEN) == [0; PAGE_LEN]);
}

#[test]
fn it_is_not_forked_while_it_loads() {
    let (ram, _) = lazy(pattern(LEN, 6), None);
    assert_eq!(ram.fork_behaviour(), ForkBehaviour::Incomplete);
    assert_eq!(ram.branch_modes(), [BranchMode::Full]);
    for mode in BranchMode::ALL {
        assert_eq!(ram.branch_modes().contains(&mode), ram.why_not(mode).is_none(), "{mode}");
    }
    let error = ram.check_fork().expect_err("refused").to_string();
    assert!(error.contains("still being loaded"), "{error}");
    // A child that there is all the same is told so, also if a thread had the lock as it was made.
    let held = ram.shared.lock();
    let mut owned = Arc::clone(&ram);
    let mut child = fork_with(|| match Arc::get_mut(&mut owned) {
        None => i32::from(owned.check_fork().is_ok()),
        Some(_) => 2,
    });
    assert_eq!(child.wait().expect("wait").code(), Some(0));
    drop(held);
}

#[test]
fn a_failing_source_is_told_and_asked_again() {
    let bytes = pattern(LEN, 7);
    let (ram, control) = lazy(bytes.clone(), None);
    let (hook, told) = mpsc::channel();
    ram.on_failure(move |failure| hook.send(failure.clone()).expect("the test listens"));
    let bad = 3 * BLOCK as u64 + 2 * PAGE..3 * BLOCK as u64 + 3 * PAGE;
    *control.bad.lock().expect("bad") = Some(bad.clone());

    let waiting = Arc::clone(&ram);
    let (done, is_done) = mpsc::channel();
    let guest = std::thread::spawn(move || {
        let page = read(&waiting, 3 * BLOCK + 2 * PAGE_LEN, PAGE_LEN);
        done.send(()).expect("the test listens");
        page
    });
    event(&ram);
    let failure = told.recv_timeout(Duration::from_secs(20)).expect("the hook is called");
    assert!(failure.error.contains("the store is away"), "{failure}");
    assert!((failure.offset..failure.offset + failure.len).contains(&bad.start), "{failure}");
    assert_eq!(ram.status(), LoadStatus::Failed(failure.clone()));
    assert!(ram.drain_events().expect("drain"));

    // The others are served, even of the same block; the one that waits is shown nothing.
    assert!(read(&ram, 9 * BLOCK, BLOCK) == bytes[9 * BLOCK..10 * BLOCK]);
    assert!(read(&ram, 3 * BLOCK, PAGE_LEN) == bytes[3 * BLOCK..][..PAGE_LEN]);
    assert!(is_done.try_recv().is_err());
    assert_eq!(ram.complete().expect_err("fails").error, failure.error);
    let error = ram.populate_write(3 * BLOCK, BLOCK).expect_err("no hang").to_string();
    assert!(error.contains("the store is away"), "{error}");

    // A retry that fails again tells again.
    ram.retry().expect("retry");
    event(&ram);
    assert!(told.recv_timeout(Duration::from_secs(20)).is_ok());
    assert!(is_done.try_recv().is_err());

    *control.bad.lock().expect("bad") = None;
    ram.retry().expect("retry");
    let page = guest.join().expect("the guest");
    assert!(page == bytes[3 * BLOCK + 2 * PAGE_LEN..][..PAGE_LEN]);
    ram.complete().expect("all of it");
    assert!(read(&ram, 0, LEN) == bytes);
}

#[test]
fn a_page_that_cannot_be_had_may_be_discarded() {
    let (ram, control) = lazy(pattern(LEN, 8), None);
    *control.bad.lock().expect("bad") = Some(0..LEN as u64);
    let waiting = Arc::clone(&ram);
    let guest = std::thread::spawn(move || read(&waiting, 6 * BLOCK, PAGE_LEN));
    event(&ram);
    ram.discard(6 * BLOCK, PAGE_LEN).expect("discard");
    assert!(guest.join().expect("the guest") == [0; PAGE_LEN]);
}

/// The source is asked for a block, which is discarded before it answers.
#[test]
fn an_answer_that_comes_after_a_discard_is_not_shown() {
    let bytes = pattern(LEN, 9);
    let (ram, control) = lazy(bytes.clone(), None);
    let (entered, is_entered) = mpsc::channel();
    let (go, wait) = mpsc::channel();
    *control.gate.lock().expect("gate") = Some((entered, wait));
    let waiting = Arc::clone(&ram);
    let guest = std::thread::spawn(move || read(&waiting, BLOCK, PAGE_LEN));
    is_entered.recv_timeout(Duration::from_secs(20)).expect("the source is asked");
    ram.discard(BLOCK + PAGE_LEN, BLOCK - PAGE_LEN).expect("discard");
    go.send(()).expect("the source waits");
    assert!(guest.join().expect("the guest") == bytes[BLOCK..][..PAGE_LEN]);
    assert!(read(&ram, BLOCK + PAGE_LEN, BLOCK - PAGE_LEN).iter().all(|&b| b == 0));
    // Present ones too.
    read(&ram, 2 * BLOCK, BLOCK);
    ram.discard(2 * BLOCK, BLOCK).expect("discard");
    ram.mapping.write_at(2 * BLOCK + PAGE_LEN, &[5]).expect("write");
    let mut model = bytes;
    model[BLOCK + PAGE_LEN..3 * BLOCK].fill(0);
    model[2 * BLOCK + PAGE_LEN] = 5;
    ram.complete().expect("all of it");
    assert!(read(&ram, 0, LEN) == model);
    assert!(ram.discard(LEN, PAGE_LEN).is_err());
}

#[test]
fn dropping_does_not_wait_for_what_is_not_loaded() {
    let (ram, _) = lazy(pattern(LEN, 10), None);
    read(&ram, 0, 1);
    drop(ram);
    let (ram, control) = lazy(pattern(LEN, 10), None);
    *control.bad.lock().expect("bad") = Some(0..LEN as u64);
    ram.load_all();
    event(&ram);
    drop(ram);
}

#[test]
fn what_does_not_fit_is_refused() {
    let source = || Box::new(Fake { bytes: vec![0; LEN], control: Arc::default() });
    let error = Userfault::new(LEN + BLOCK, source(), None).expect_err("size").to_string();
    assert!(error.contains(&format!("{LEN:#x}")), "{error}");
    let mut set = WorkingSet::default();
    set.push(0..PAGE);
    set.push(LEN as u64..LEN as u64 + PAGE);
    let error = Userfault::new(LEN, source(), Some(set)).expect_err("set").to_string();
    assert!(error.contains("range 1 of the working set"), "{error}");
}

#[test]
fn all_vcpus_may_fault_at_once() {
    let bytes = pattern(LEN, 11);
    for round in 0..8 {
        let (ram, _) = lazy(bytes.clone(), None);
        if round % 2 == 1 {
            ram.load_all();
        }
        std::thread::scope(|scope| {
            for vcpu in 0..4 {
                let (ram, bytes) = (&ram, &bytes);
                scope.spawn(move || {
                    for step in 0..32 {
                        // Some the same at the same time, some each its own.
                        let block = if step % 2 == 0 { step } else { (step * 7 + vcpu * 5) % 32 };
                        let at = block * BLOCK + vcpu * 2 * PAGE_LEN;
                        assert!(read(ram, at, 2 * PAGE_LEN) == bytes[at..][..2 * PAGE_LEN]);
                        // Each has its own pages to write to.
                        let own = block * BLOCK + (8 + vcpu) * PAGE_LEN;
                        ram.mapping.write_at(own, &bytes[own..][..10]).expect("write");
                    }
                });
            }
        });
        ram.complete().expect("all of it");
        assert!(read(&ram, 0, LEN) == bytes);
    }
}

const FILE_PAGES: usize = 64;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn files_are_a_source(
        pieces in proptest::collection::vec((0usize..4, 1usize..8, 0usize..2, 0usize..FILE_PAGES - 8), 0..16),
        asked in proptest::collection::vec((0usize..128, 1usize..40), 1..8),
        seed: u64,
    ) {
        // The second file has a hole in the middle.
        let mut contents = [pattern(FILE_PAGES * PAGE_LEN, seed), pattern(FILE_PAGES * PAGE_LEN, !seed)];
        contents[1][16 * PAGE_LEN..48 * PAGE_LEN].fill(0);
        let files: Vec<File> = contents.iter().map(|bytes| {
            let file = tempfile::tempfile().expect("a file");
            file.set_len(bytes.len() as u64).expect("size");
            for (index, page) in bytes.chunks(PAGE_LEN).enumerate().filter(|(_, p)| p.iter().any(|&b| b != 0)) {
                file.write_all_at(page, (index * PAGE_LEN) as u64).expect("write");
            }
            file
        }).collect();
        let size = 176 * PAGE_LEN;
        let (mut model, mut extents, mut next) = (vec![0; size], Vec::new(), 0);
        for (gap, pages, file, at) in pieces {
            let ram = next + gap;
            next = ram + pages;
            let bytes = |pages: usize| (pages * PAGE_LEN) as u64;
            extents.push(FileExtent { ram_offset: bytes(ram), len: bytes(pages), file, file_offset: bytes(at) });
            model[ram * PAGE_LEN..next * PAGE_LEN].copy_from_slice(&contents[file][at * PAGE_LEN..][..pages * PAGE_LEN]);
        }
        let source = FileSource::new(size as u64, files, &extents).expect("a source");
        for (page, pages) in asked {
            let (at, len) = (page * PAGE_LEN, pages * PAGE_LEN);
            let mut buffer = vec![1; len];
            source.read_at(at as u64, &mut buffer).expect("read");
            prop_assert!(buffer == model[at..][..len]);
            // Holes are known where the file system has them, here at least to the page.
            let zero = buffer.iter().all(|&b| b == 0);
            prop_assert_eq!(source.is_zero(at as u64, len as u64), zero);
        }
        let set = (next > 2).then(|| { let mut set = WorkingSet::default(); set.push(PAGE..2 * PAGE); set });
        let ram = Userfault::new(size, Box::new(source), set).expect("userfaultfd");
        prop_assert!(read(&ram, 0, size) == model);
        ram.complete().expect("all of it");
        prop_assert!(read(&ram, 0, size) == model);
    }
}

#[test]
fn a_file_that_was_cut_is_no_zeroes() {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(LEN as u64).expect("size");
    let cut = file.try_clone().expect("clone");
    let whole = FileExtent { ram_offset: 0, len: LEN as u64, file: 0, file_offset: 0 };
    let source = FileSource::new(LEN as u64, vec![file], &[whole]).expect("a source");
    assert!(source.is_zero(0, LEN as u64));
    cut.set_len(PAGE).expect("cut");
    assert!(!source.is_zero(BLOCK as u64, PAGE));
    assert!(source.read_at(BLOCK as u64, &mut [0; PAGE_LEN]).is_err());
}
