//! The writer process: control, fault handler, bulk copier, flusher.
//!
//! *Control* is the thread that was forked. It listens to the source and to the others, touches no
//! disk, and ends the process. The *handler* serves faults, from the start. The *bulk copier* starts
//! at `go`. The *flusher* gives the handler's pages to the sink, and finishes it. When the bulk copier
//! has been through, every page is taken; the handler ends, RAM is unregistered, the flusher goes on
//! until all is out. The first error ends everything.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use forkd_sys::userfaultfd::{Fault, FaultKind};
use forkd_sys::wake::Waker;
use rustix::event::{PollFd, PollFlags, poll};

use super::PageSink;
use super::copier::Copier;
use super::guest::SharedRam;
use super::pages::WORD_PAGES;
use super::priority::{Turns, Urgency};
use super::report::{Outcome, Report};

/// What the bulk copier claims at once: a fault on it waits for that to be copied.
const CLAIM_BYTES: u64 = 128 << 10;
/// What the bulk copier gives to the sink at once.
const BATCH_BYTES: usize = 1 << 20;
/// What is unregistered at once: the source's mappings are locked for as long as that takes, 0.1 ms
/// for 2 MiB.
const BLOCK_BYTES: u64 = 2 << 20;

/// All that the writer works with.
pub struct Writer<S> {
    /// The source's RAM.
    pub ram: SharedRam,
    /// Where its pages go.
    pub sink: S,
    /// Commands of the source: one byte is `go`, the end is `abort`.
    pub commands: OwnedFd,
    /// Bytes of captured pages that may wait for the sink.
    pub pool_bytes: u64,
    /// How long a fault may wait for the sink.
    pub max_stall: Duration,
}

struct Shared<S> {
    copier: Copier<SharedRam, AtomicU64>,
    sink: S,
    pool_pages: usize,
    max_stall: Duration,
}

#[derive(Debug, Default)]
struct BulkCount {
    pages: u64,
    holes: u64,
    bytes: u64,
    longest_claim: Duration,
    /// Blocks that could not be unregistered in passing.
    left: Vec<Range<usize>>,
}

#[derive(Debug, Default)]
struct HandlerCount {
    pages: u64,
    faults: u64,
    longest_fault: Duration,
}

/// How a thread ended.
enum Ended {
    Bulk(BulkCount),
    Handler(HandlerCount),
    /// The flusher, with the bytes it has given to the sink.
    Flusher(u64),
}

/// A captured page on its way to the flusher.
struct Caught {
    page: usize,
    bytes: Vec<u8>,
}

fn failed(action: &str, source: io::Error) -> Outcome {
    Outcome::Failed { action: action.to_owned(), source }
}

/// Runs the writer to its end. When this returns the source is free, and other threads may still be
/// about: end the process.
pub fn run<S: PageSink>(writer: Writer<S>) -> Outcome {
    let Writer { ram, sink, commands, pool_bytes, max_stall } = writer;
    let page_size = ram.page_size;
    let pages = ram.pages();
    let Ok(page_bytes) = usize::try_from(page_size) else {
        return failed("start", io::Error::other("the page size is out of range"));
    };
    let pool_pages = usize::try_from(pool_bytes / page_size).unwrap_or(usize::MAX).max(1);
    let copier = Copier::new(ram, pages, page_bytes);
    let shared = Arc::new(Shared { copier, sink, pool_pages, max_stall });
    let outcome = match Control::start(Arc::clone(&shared), commands) {
        Ok(control) => control.run(),
        Err(error) => failed("start", error),
    };
    if !matches!(outcome, Outcome::Done(_)) {
        // The guest goes on. If even this fails, the end of the process does it.
        let _released = shared.copier.guest().unregister(0..pages);
    }
    outcome
}

struct Control<S> {
    shared: Arc<Shared<S>>,
    commands: OwnedFd,
    ended: Receiver<Result<Ended, Outcome>>,
    ends: Sender<Result<Ended, Outcome>>,
    wake: Waker,
    stop_handler: Waker,
}

impl<S: PageSink> Control<S> {
    fn start(shared: Arc<Shared<S>>, commands: OwnedFd) -> io::Result<Self> {
        let (ends, ended) = channel();
        let (wake, stop_handler) = (Waker::new()?, Waker::new()?);
        let control = Self { shared, commands, ended, ends, wake, stop_handler };
        let (caught, to_flush) = channel();
        let (free, freed) = channel();
        let stop = control.stop_handler.clone();
        control.spawn("handler", move |shared| {
            handle(shared, &stop, &caught, &freed).map(Ended::Handler)
        })?;
        control
            .spawn("flusher", move |shared| flush(shared, &to_flush, &free).map(Ended::Flusher))?;
        Ok(control)
    }

    /// What `body` has captured, its ends of channels, is dropped after its end has been told: so the
    /// handler's end is told before the flusher's, and an error before those that follow from it.
    fn spawn(
        &self,
        name: &'static str,
        mut body: impl FnMut(&Shared<S>) -> Result<Ended, Outcome> + Send + 'static,
    ) -> io::Result<()> {
        let (shared, ends, wake) = (Arc::clone(&self.shared), self.ends.clone(), self.wake.clone());
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            let end = catch_unwind(AssertUnwindSafe(|| body(&shared))).unwrap_or_else(|_| {
                Err(failed(&format!("run its {name}"), io::Error::other("it panicked")))
            });
            // Control has gone only if the process is about to.
            let _told = ends.send(end).is_ok() && wake.wake().is_ok();
            drop(body);
        })?;
        Ok(())
    }

    fn run(self) -> Outcome {
        self.attend().unwrap_or_else(|outcome| outcome)
    }

    fn attend(&self) -> Result<Outcome, Outcome> {
        let pages = self.shared.copier.states().pages();
        let mut report = Report::default();
        let mut left = Vec::new();
        let mut since: Option<Instant> = None;
        loop {
            let [commanded, _] = wait_for([&self.commands, &self.wake.as_fd()])
                .map_err(|error| failed("wait for commands", error))?;
            if commanded && self.command()? && since.is_none() {
                since = Some(Instant::now());
                self.spawn("bulk copier", |shared| bulk(shared).map(Ended::Bulk))
                    .map_err(|error| failed("start its bulk copier", error))?;
            }
            self.wake.drain().map_err(|error| failed("wait for its threads", error))?;
            while let Ok(ended) = self.ended.try_recv() {
                match ended? {
                    Ended::Bulk(count) => {
                        report.pages_by_bulk = count.pages;
                        report.pages_of_holes = count.holes;
                        report.longest_claim = count.longest_claim;
                        report.bytes += count.bytes;
                        left = count.left;
                        self.stop_handler
                            .wake()
                            .map_err(|error| failed("stop its handler", error))?;
                    }
                    Ended::Handler(count) => {
                        report.pages_by_handler = count.pages;
                        report.faults = count.faults;
                        report.longest_fault = count.longest_fault;
                        if !self.shared.copier.states().all_captured(0..pages) {
                            let error = io::Error::other("a page was left out");
                            return Err(failed("take all of RAM", error));
                        }
                        for block in left.drain(..) {
                            self.release(block)?;
                        }
                        report.copying = since.map_or(Duration::ZERO, |since| since.elapsed());
                        since = Some(Instant::now());
                    }
                    Ended::Flusher(bytes) => {
                        report.bytes += bytes;
                        report.finishing = since.map_or(Duration::ZERO, |since| since.elapsed());
                        return Ok(Outcome::Done(report));
                    }
                }
            }
        }
    }

    /// Takes what the source says: true for `go`.
    fn command(&self) -> Result<bool, Outcome> {
        let mut byte = [0];
        let read = rustix::io::retry_on_intr(|| rustix::io::read(&self.commands, &mut byte[..]));
        match read {
            Ok(0) => Err(Outcome::Aborted),
            Ok(_) => Ok(true),
            Err(errno) => Err(failed("read a command", errno.into())),
        }
    }

    fn release(&self, block: Range<usize>) -> Result<(), Outcome> {
        let released = self.shared.copier.guest().unregister(block);
        released.map_err(|error| failed("unregister RAM", error))
    }
}

/// Waits until one of two can be read, or has come to its end; which.
pub(super) fn wait_for(fds: [&dyn AsFd; 2]) -> io::Result<[bool; 2]> {
    let mut polled = fds.map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN));
    rustix::io::retry_on_intr(|| poll(&mut polled, None))?;
    Ok(polled.map(|fd| !fd.revents().is_empty()))
}

/// The fault handler. Ends when it is stopped, having served every fault it has read.
fn handle<S: PageSink>(
    shared: &Shared<S>,
    stop: &Waker,
    caught: &Sender<Caught>,
    freed: &Receiver<Vec<u8>>,
) -> Result<HandlerCount, Outcome> {
    // It sleeps most of the time, and a vCPU waits when it does not.
    Urgency::of_this_thread().hurry();
    let ram = shared.copier.guest();
    let mut count = HandlerCount::default();
    let mut pool = Pool { freed, spare: Vec::new(), made: 0, shared };
    let mut faults: Vec<Fault> = Vec::new();
    let mut runs = Vec::with_capacity(1);
    loop {
        let [stopped, _] = wait_for([&stop.as_fd(), &ram.uffd.as_fd()])
            .map_err(|error| failed("wait for faults", error))?;
        if stopped {
            return Ok(count);
        }
        faults.clear();
        ram.uffd.read(&mut faults).map_err(|error| failed("read faults", error))?;
        let since = Instant::now();
        for fault in &faults {
            let page = ram.page_at(fault.address).filter(|_| fault.kind == FaultKind::WriteProtect);
            let page = page.ok_or_else(|| {
                failed("serve a fault", io::Error::other(format!("{fault:?} is not for it")))
            })?;
            count.faults += 1;
            // Before the claim: once a page is claimed, everybody relies on its being copied.
            let mut bytes = pool.take()?;
            runs.clear();
            let took = shared.copier.take(page..page + 1, &mut bytes, &mut runs);
            if took.map_err(|error| failed("copy a page", error))? == 0 {
                // Another has it, or had it when the message was on its way; he wakes who waits.
                pool.spare.push(bytes);
                continue;
            }
            count.pages += 1;
            count.longest_fault = count.longest_fault.max(since.elapsed());
            if caught.send(Caught { page, bytes }).is_err() {
                return Err(failed("pass a page on", io::Error::other("the flusher is gone")));
            }
        }
    }
}

/// The handler's buffers: of a page each, made when first needed, at most so many.
struct Pool<'a, S> {
    freed: &'a Receiver<Vec<u8>>,
    spare: Vec<Vec<u8>>,
    made: usize,
    shared: &'a Shared<S>,
}

impl<S: PageSink> Pool<'_, S> {
    /// An empty buffer. Waits for the flusher if all are on their way.
    fn take(&mut self) -> Result<Vec<u8>, Outcome> {
        if let Some(buffer) = self.spare.pop() {
            return Ok(buffer);
        }
        if let Ok(buffer) = self.freed.try_recv() {
            return Ok(buffer);
        }
        if self.made < self.shared.pool_pages {
            self.made += 1;
            let page = usize::try_from(self.shared.copier.guest().page_size).unwrap_or(0);
            return Ok(Vec::with_capacity(page));
        }
        self.freed.recv_timeout(self.shared.max_stall).map_err(|error| match error {
            RecvTimeoutError::Timeout => Outcome::TooSlow(format!(
                "{} pages wait to be written, and none was in {:?}",
                self.made, self.shared.max_stall
            )),
            RecvTimeoutError::Disconnected => {
                failed("pass a page on", io::Error::other("the flusher is gone"))
            }
        })
    }
}

/// The flusher: gives the handler's pages to the sink until the handler has ended, and finishes it.
fn flush<S: PageSink>(
    shared: &Shared<S>,
    caught: &Receiver<Caught>,
    free: &Sender<Vec<u8>>,
) -> Result<u64, Outcome> {
    let mut given = 0;
    while let Ok(Caught { page, mut bytes }) = caught.recv() {
        let offset = shared.copier.guest().offset(page);
        let kept = shared.sink.write_page_run(offset, &bytes);
        kept.map_err(|error| failed("write a page that the guest was about to change", error))?;
        given += bytes.len() as u64;
        bytes.clear();
        // A handler that has ended wants no more buffers.
        let _wanted = free.send(bytes).is_ok();
    }
    // The handler has ended, and so the bulk copier has: nobody else uses the sink now. If it ended
    // by an error, control has that first, and this is not waited for.
    shared.sink.finish().map_err(|error| failed("finish the image", error))?;
    Ok(given)
}

/// The bulk copier: through RAM once, from the first page to the last.
fn bulk<S: PageSink>(shared: &Shared<S>) -> Result<BulkCount, Outcome> {
    let (ram, pages) = (shared.copier.guest(), shared.copier.states().pages());
    let at_once = |bytes: u64| usize::try_from(bytes / ram.page_size).unwrap_or(0);
    let claim = at_once(CLAIM_BYTES).max(1);
    // Whole words, for an unprotect is of captured pages of a word, and may not be half registered.
    let block = at_once(BLOCK_BYTES).next_multiple_of(WORD_PAGES).max(WORD_PAGES);
    let (urgency, mut turns) = (Urgency::of_this_thread(), Turns::new());
    let mut count = BulkCount::default();
    let mut batch = Batch::default();
    let mut data = 0..0;
    let (mut page, mut done) = (0, 0);
    while page < pages {
        if data.end <= page {
            data = ram.data_from(page).map_err(|error| failed("find holes in RAM", error))?;
        }
        let next = if page < data.start {
            let next = data.start.min(done + block);
            let took = shared.copier.take_holes(page..next);
            count.holes += took.map_err(|error| failed("let a hole go", error))? as u64;
            next
        } else {
            let next = shared.copier.states().within_word(page..data.end.min(page + claim)).end;
            urgency.hurry();
            let since = Instant::now();
            let took = shared.copier.take(page..next, &mut batch.bytes, &mut batch.runs);
            count.longest_claim = count.longest_claim.max(since.elapsed());
            urgency.relax();
            count.pages += took.map_err(|error| failed("copy pages", error))? as u64;
            next
        };
        if batch.bytes.len() >= BATCH_BYTES {
            count.bytes += batch.give(shared)?;
        }
        turns.pause();
        page = next;
        if page == done + block || page == pages {
            // In passing, for it makes KVM look at these pages afresh, as unprotecting them just did.
            let behind = done..page;
            done = page;
            if shared.copier.states().all_captured(behind.clone()) {
                ram.unregister(behind).map_err(|error| failed("unregister RAM", error))?;
            } else {
                count.left.push(behind);
            }
        }
    }
    count.bytes += batch.give(shared)?;
    Ok(count)
}

/// Pages on their way from the bulk copier to the sink.
#[derive(Default)]
struct Batch {
    bytes: Vec<u8>,
    runs: Vec<Range<usize>>,
}

impl Batch {
    /// Gives all to the sink; returns how many bytes.
    fn give<S: PageSink>(&mut self, shared: &Shared<S>) -> Result<u64, Outcome> {
        let ram = shared.copier.guest();
        let page_size = usize::try_from(ram.page_size).unwrap_or(0);
        let mut rest = self.bytes.as_slice();
        for run in self.runs.drain(..) {
            let (bytes, after) = rest.split_at((run.len() * page_size).min(rest.len()));
            rest = after;
            let kept = shared.sink.write_page_run(ram.offset(run.start), bytes);
            kept.map_err(|error| failed("write pages", error))?;
        }
        let given = self.bytes.len() as u64;
        self.bytes.clear();
        Ok(given)
    }
}
