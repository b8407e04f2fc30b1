//! Captures of memory of this process, by real writer processes. A gate stands for the pause.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, RwLock, mpsc};
use std::thread;
use std::time::Duration;

use forkd_sys::fork::{Fork, PidFd, exit_now, fork};
use forkd_sys::mmap::Mapping;
use rustix::fs::MemfdFlags;
use rustix::process::Signal;

use super::*;

const PAGE: usize = 4096;

struct Ram {
    memfd: OwnedFd,
    mapping: Mapping,
}

impl Ram {
    fn new(pages: usize) -> Self {
        let memfd = rustix::fs::memfd_create("capture", MemfdFlags::CLOEXEC).expect("memfd");
        rustix::fs::ftruncate(&memfd, (pages * PAGE) as u64).expect("size");
        let mapping = Mapping::file_shared(&memfd, 0, pages * PAGE).expect("mapping");
        Self { memfd, mapping }
    }

    fn config(&self) -> LiveConfig<'_> {
        let (address, len) = (self.mapping.address() as u64, self.mapping.len() as u64);
        LiveConfig::new(address, len, self.memfd.as_fd())
    }

    fn prepare(&self, sink: impl PageSink) -> LiveCapture {
        // SAFETY: the other threads of these tests hold no lock that the writer takes.
        unsafe { LiveCapture::prepare(&self.config(), sink, || {}) }.expect("prepare")
    }

    /// Protects it ahead, as far as the guest lets.
    fn prearm(&self, enough: usize) -> PreArm {
        let ahead = PreArm::start(&self.config(), enough).expect("start");
        ready(&ahead);
        ahead
    }

    fn adopt(&self, protected: Protected, sink: impl PageSink) -> LiveCapture {
        // SAFETY: as in `Self::prepare`.
        unsafe { LiveCapture::adopt(&self.config(), protected, sink, || {}) }.expect("adopt")
    }

    fn fill(&self, page: usize, seq: u64) {
        self.mapping.write_at(page * PAGE, &content(page, seq)).expect("write");
    }
}

/// Waits until it is; how many pages are noted.
fn ready(ahead: &PreArm) -> usize {
    loop {
        match ahead.look() {
            Ahead::Ready { noted } => return noted,
            Ahead::Working => {
                let limit = Some(Duration::from_secs(10));
                let told = forkd_sys::reactor::wait_readable(ahead.told_fd(), limit).expect("poll");
                assert!(told, "it tells in time");
            }
            Ahead::Ended => panic!("it ended: {:?}", ahead),
        }
    }
}

/// A page whose every word says which write it is of: torn if they differ.
fn content(page: usize, seq: u64) -> Vec<u8> {
    let word = if seq == 0 { 0 } else { seq << 20 | page as u64 };
    word.to_ne_bytes().repeat(PAGE / 8)
}

/// Writes into a file, and refuses what it is given twice.
struct FileSink {
    file: File,
    given: Mutex<(Vec<bool>, usize)>,
    /// Fails with "no space" when so many pages have been given.
    room: usize,
    /// Hangs until this can be read, at every write.
    hang: Option<OwnedFd>,
    /// What `finish` leaves at the end of the file, so that it can be seen.
    mark: u64,
}

impl FileSink {
    fn new(pages: usize) -> (Self, File) {
        let file = tempfile::tempfile().expect("a file");
        file.set_len((pages * PAGE) as u64).expect("size");
        let copy = file.try_clone().expect("a copy");
        let given = Mutex::new((vec![false; pages], 0));
        let mark = (pages * PAGE) as u64;
        (Self { file, given, room: usize::MAX, hang: None, mark }, copy)
    }
}

impl PageSink for FileSink {
    fn write_page_run(&self, ram_offset: u64, bytes: &[u8]) -> io::Result<()> {
        if let Some(hang) = &self.hang {
            forkd_sys::reactor::wait_readable(hang, None)?;
        }
        let first = ram_offset as usize / PAGE;
        {
            let mut given = self.given.lock().expect("lock");
            for page in first..first + bytes.len() / PAGE {
                if std::mem::replace(&mut given.0[page], true) {
                    return Err(io::Error::other(format!("page {page} was given before")));
                }
                given.1 += 1;
            }
            if given.1 > self.room {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
        }
        self.file.write_all_at(bytes, ram_offset)
    }

    fn finish(&self) -> io::Result<()> {
        self.file.write_all_at(b"finished", self.mark)
    }

    fn kept_fds(&self) -> Vec<RawFd> {
        let hang = self.hang.as_ref().map(AsRawFd::as_raw_fd);
        [Some(self.file.as_raw_fd()), hang].into_iter().flatten().collect()
    }
}

/// The pages of an image; checks that it was finished.
fn image(file: &File, pages: usize) -> Vec<u8> {
    let mut bytes = vec![0; pages * PAGE + 8];
    file.read_exact_at(&mut bytes, 0).expect("read");
    assert_eq!(bytes.split_off(pages * PAGE), b"finished");
    bytes
}

/// Starts a write that the capture holds up, and waits until it is.
fn blocked_write<'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    ram: &'scope Ram,
    page: usize,
) -> thread::ScopedJoinHandle<'scope, ()> {
    let (sender, receiver) = mpsc::channel();
    let writer = scope.spawn(move || {
        sender.send(forkd_sys::fork::tid()).expect("send");
        ram.fill(page, 99);
    });
    let wchan = format!("/proc/self/task/{}/wchan", receiver.recv().expect("tid"));
    while !std::fs::read_to_string(&wchan).is_ok_and(|at| at == "handle_userfault") {
        assert!(!writer.is_finished(), "the write was not held up");
        thread::yield_now();
    }
    writer
}

#[test]
fn thirty_images_each_of_one_instant() {
    const PAGES: usize = 8192;
    const THREADS: usize = 4;
    let ram = Ram::new(PAGES);
    // What each page holds, kept outside of it. Pages are touched for the first time at any moment.
    let seqs: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    let (gate, stop) = (RwLock::new(()), AtomicBool::new(false));
    let (mut caught, mut left, mut served) = (0, 0, 0);
    thread::scope(|scope| {
        for index in 0..THREADS {
            let (ram, seqs, gate, stop) = (&ram, &seqs, &gate, &stop);
            scope.spawn(move || {
                let mut random = index as u64 + 1;
                while !stop.load(Ordering::Relaxed) {
                    // xorshift64, Marsaglia 2003.
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    // Squared, so that some pages are hot and the last ones long untouched.
                    let part = ((random >> 40) as usize * (PAGES / THREADS)) >> 24;
                    let page = part * part / (PAGES / THREADS) * THREADS + index;
                    let _running = gate.read().expect("gate");
                    let seq = seqs[page].load(Ordering::Relaxed) + 1;
                    ram.fill(page, seq);
                    seqs[page].store(seq, Ordering::Relaxed);
                }
            });
        }
        for round in 0..30 {
            let (sink, file) = FileSink::new(PAGES);
            let mut sink = Some(sink);
            // In turn: armed in the pause, and before it.
            let ahead = (round % 2 == 1).then(|| ram.prearm(64));
            let prepared = ahead.is_none().then(|| ram.prepare(sink.take().expect("a sink")));
            let (mut capture, expected) = {
                // Those that wait for a page are served until they are here.
                let _paused = gate.write().expect("gate");
                let capture = match (ahead, prepared) {
                    (Some(ahead), _) => {
                        let protected = ahead.finish().expect("finish");
                        left += protected.report.left;
                        served += protected.report.faults;
                        ram.adopt(protected, sink.take().expect("a sink"))
                    }
                    (None, Some(mut capture)) => {
                        capture.arm().expect("arm");
                        capture
                    }
                    (None, None) => panic!("one of them"),
                };
                let seqs = seqs.iter().map(|seq| seq.load(Ordering::Relaxed));
                (capture, seqs.collect::<Vec<u64>>())
            };
            capture.go().expect("go");
            let report = capture.wait().expect("an image");
            let image = image(&file, PAGES);
            for (page, (bytes, &seq)) in image.chunks_exact(PAGE).zip(&expected).enumerate() {
                assert!(bytes == content(page, seq), "round {round}: page {page} is not of {seq}");
            }
            let sum = report.pages_by_bulk + report.pages_by_handler + report.pages_of_holes;
            assert_eq!(sum, PAGES as u64, "{report:?}");
            assert_eq!(
                report.bytes,
                (report.pages_by_bulk + report.pages_by_handler) * PAGE as u64
            );
            caught += report.pages_by_handler;
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(caught > 0, "the guest never met the handler");
    assert!(served > 0 && left > 0, "the guest never wrote while RAM was protected ahead");
    assert!(left < 15 * PAGES as u64 / 4, "{left} pages were left to the pauses");
}

#[test]
fn a_page_never_touched_before_the_arm_is_captured_as_zero() {
    let ram = Ram::new(700);
    for page in [0, 5, 300] {
        ram.fill(page, 1);
    }
    let (sink, file) = FileSink::new(700);
    let mut capture = ram.prepare(sink);
    capture.arm().expect("arm");
    // Before go: the handler serves from the start. A hole between data, and one at the end.
    for page in [3, 5, 699] {
        ram.fill(page, 2);
    }
    capture.go().expect("go");
    let report = capture.wait().expect("an image");
    assert_eq!(report.pages_by_handler, 3, "{report:?}");
    assert!(report.pages_of_holes >= 690, "holes stay holes: {report:?}");
    for (page, bytes) in image(&file, 700).chunks_exact(PAGE).enumerate() {
        let seq = if [0, 5, 300].contains(&page) { 1 } else { 0 };
        assert!(bytes == content(page, seq), "page {page}");
    }
    // Free again, and what was written is there.
    ram.fill(4, 3);
    let mut word = [0; 8];
    ram.mapping.read_at(699 * PAGE, &mut word).expect("read");
    assert_eq!(word, content(699, 2)[..8]);
}

#[test]
fn what_is_written_while_ram_is_protected_ahead_is_captured_as_in_the_pause() {
    let ram = Ram::new(2000);
    for page in [0, 5, 300, 1999] {
        ram.fill(page, 1);
    }
    let ahead = ram.prearm(0);
    // One that was there, holes, neighbours, and one twice.
    for page in [5, 700, 701, 1998, 5] {
        ram.fill(page, 2);
    }
    assert_eq!(ready(&ahead), 4);
    ahead.again(0);
    assert_eq!(ready(&ahead), 0, "nobody writes");
    for page in [0, 900] {
        ram.fill(page, 3);
    }
    let protected = ahead.finish().expect("finish");
    let report = protected.report;
    assert_eq!((report.faults, report.left, report.rounds), (6, 2, 1), "{report:?}");
    assert!(report.longest_stall > Duration::ZERO && report.protecting > Duration::ZERO);
    let (sink, file) = FileSink::new(2000);
    let mut capture = ram.adopt(protected, sink);
    let error = capture.arm().expect_err("it is armed");
    assert!(matches!(error, CaptureError::Order { .. }), "{error}");
    // Protected all over: these come by the handler, before go.
    for page in [0, 1, 5, 700, 900, 901, 1999] {
        ram.fill(page, 4);
    }
    capture.go().expect("go");
    let report = capture.wait().expect("an image");
    assert_eq!(report.pages_by_handler, 7, "{report:?}");
    for (page, bytes) in image(&file, 2000).chunks_exact(PAGE).enumerate() {
        let seq = match page {
            0 | 900 => 3,
            5 | 700 | 701 | 1998 => 2,
            300 | 1999 => 1,
            _ => 0,
        };
        assert!(bytes == content(page, seq), "page {page}");
    }
}

#[test]
fn given_up_ahead_of_the_pause_it_leaves_ram_free() {
    let ram = Ram::new(5000);
    let free = || (0..5000).for_each(|page| ram.fill(page, 7));
    // While it works, most likely, when it is ready, and between the pause and the fork.
    drop(PreArm::start(&ram.config(), 0).expect("start"));
    free();
    drop(ram.prearm(0));
    free();
    drop(ram.prearm(0).finish().expect("finish"));
    free();
    // While somebody writes all the time.
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                free();
            }
        });
        for _ in 0..20 {
            drop(PreArm::start(&ram.config(), 0).expect("start"));
        }
        stop.store(true, Ordering::Relaxed);
    });
    // Another watches RAM: refused, and that one is not disturbed.
    let first = ram.prearm(0);
    let error = PreArm::start(&ram.config(), 0).expect_err("taken");
    assert!(error.to_string().contains("another userfaultfd"), "{error}");
    drop(first.finish().expect("finish"));
    free();
}

#[test]
fn a_fork_while_ram_is_protected_copies_no_page_tables() {
    const PAGES: usize = 64 << 8;
    let ram = Ram::new(PAGES);
    (0..PAGES).for_each(|page| ram.fill(page, 1));
    let ahead = ram.prearm(0);
    let tables = || -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").expect("status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmPTE:")).expect("VmPTE");
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    };
    let here = tables();
    let (read, write) = super::live::pipe().expect("pipe");
    // SAFETY: the child allocates, makes system calls, and ends by _exit.
    let mut child = match unsafe { fork() }.expect("fork") {
        Fork::Parent(child) => child,
        Fork::Child => {
            let told = File::from(write).write_all(&tables().to_ne_bytes()).is_ok();
            exit_now(i32::from(!told));
        }
    };
    drop(write);
    let mut there = [0; 8];
    File::from(read).read_exact(&mut there).expect("the child's tables");
    assert_eq!(child.wait().expect("wait").code(), Some(0));
    let there = u64::from_ne_bytes(there);
    // 64 MiB need 32 tables of 4 KiB.
    assert!(there + 120 <= here, "{there} KiB of tables in the child, {here} here");
    drop(ahead);
}

#[test]
fn the_death_of_the_writer_lets_go_who_waits() {
    let ram = Ram::new(64);
    let (sink, _file) = FileSink::new(64);
    let mut capture = ram.prepare(sink);
    // Stopped, so that it serves nobody; then killed, as by the kernel when memory is short.
    let writer = PidFd::open(capture.writer_pid()).expect("pidfd");
    writer.send_signal(Signal::STOP).expect("stop");
    let tasks = format!("/proc/{}/task", capture.writer_pid());
    while !std::fs::read_dir(&tasks).expect("tasks").all(|task| {
        let stat = std::fs::read_to_string(task.expect("task").path().join("stat"));
        stat.expect("stat").contains(") T ")
    }) {
        thread::yield_now();
    }
    capture.arm().expect("arm");
    capture.go().expect("go");
    thread::scope(|scope| {
        let blocked = blocked_write(scope, &ram, 7);
        assert!(matches!(capture.poll(), Progress::Running));
        writer.send_signal(Signal::KILL).expect("kill");
        blocked.join().expect("it goes on");
    });
    let error = capture.wait().expect_err("no image");
    assert!(matches!(error, CaptureError::Died { .. }), "{error}");
    assert!(error.to_string().contains("SIGKILL"), "{error}");
    ram.fill(8, 1);
    // And RAM can be captured again.
    let (sink, file) = FileSink::new(64);
    let mut capture = ram.prepare(sink);
    capture.arm().expect("arm");
    capture.go().expect("go");
    capture.wait().expect("an image");
    assert!(image(&file, 64)[7 * PAGE..8 * PAGE] == content(7, 99));
}

#[test]
fn abort_lets_go_who_waits_though_the_sink_hangs() {
    let ram = Ram::new(64);
    let (never, _hang) = super::live::pipe().expect("pipe");
    let (mut sink, _file) = FileSink::new(64);
    sink.hang = Some(never);
    let mut config = ram.config();
    config.pool_bytes = PAGE as u64;
    config.max_stall = Duration::from_secs(600);
    // SAFETY: as in `Ram::prepare`.
    let mut capture = unsafe { LiveCapture::prepare(&config, sink, || {}) }.expect("prepare");
    capture.arm().expect("arm");
    // The only buffer goes to the flusher, who hangs; the next write waits for it.
    ram.fill(3, 1);
    thread::scope(|scope| {
        let blocked = blocked_write(scope, &ram, 4);
        capture.abort();
        blocked.join().expect("it goes on");
    });
    assert!(matches!(capture.wait(), Err(CaptureError::Aborted)));
    assert!(matches!(capture.poll(), Progress::Failed(CaptureError::Order { .. })), "it is over");
}

#[test]
fn a_sink_too_slow_ends_the_capture_not_the_guest() {
    let ram = Ram::new(64);
    let (never, _hang) = super::live::pipe().expect("pipe");
    let (mut sink, _file) = FileSink::new(64);
    sink.hang = Some(never);
    let mut config = ram.config();
    config.pool_bytes = 2 * PAGE as u64;
    config.max_stall = Duration::from_millis(20);
    // SAFETY: as in `Ram::prepare`.
    let mut capture = unsafe { LiveCapture::prepare(&config, sink, || {}) }.expect("prepare");
    capture.arm().expect("arm");
    // Without go: the bulk copier would take all pages before it hangs, and nobody would wait.
    for page in 0..64 {
        ram.fill(page, 1);
    }
    let error = capture.wait().expect_err("no image");
    assert!(matches!(error, CaptureError::TooSlow(_)), "{error}");
    assert!(error.to_string().contains("20ms"), "{error}");
}

#[test]
fn a_full_disk_ends_the_capture_not_the_guest() {
    let ram = Ram::new(4096);
    for page in 0..4096 {
        ram.fill(page, 1);
    }
    for by_handler in [false, true] {
        let (mut sink, _file) = FileSink::new(4096);
        sink.room = if by_handler { 10 } else { 3000 };
        let mut capture = ram.prepare(sink);
        capture.arm().expect("arm");
        if by_handler {
            (0..100).for_each(|page| ram.fill(page, 2));
        } else {
            capture.go().expect("go");
        }
        let error = capture.wait().expect_err("no image");
        let CaptureError::Writer { source, .. } = &error else { panic!("{error}") };
        assert_eq!(source.raw_os_error(), Some(libc::ENOSPC), "{error}");
        (0..4096).for_each(|page| ram.fill(page, 3));
    }
}

#[test]
fn the_writer_ends_with_its_source() {
    let (read, write) = super::live::pipe().expect("pipe");
    let (never, _hang) = super::live::pipe().expect("pipe");
    // SAFETY: the child allocates, makes system calls, and ends by _exit.
    let mut source = match unsafe { fork() }.expect("fork") {
        Fork::Parent(source) => source,
        Fork::Child => {
            let ram = Ram::new(64);
            let (mut sink, _file) = FileSink::new(64);
            sink.hang = Some(never);
            ram.fill(1, 1);
            let mut capture = ram.prepare(sink);
            let going = capture.arm().is_ok() && capture.go().is_ok();
            let pid = capture.writer_pid().to_ne_bytes();
            let told = File::from(write).write_all(&pid).is_ok();
            exit_now(i32::from(!going || !told));
        }
    };
    drop(write);
    let mut pid = [0; 4];
    File::from(read).read_exact(&mut pid).expect("the writer's pid");
    assert_eq!(source.wait().expect("wait").code(), Some(0));
    match PidFd::open(u32::from_ne_bytes(pid)) {
        Ok(writer) => assert!(writer.wait(Some(Duration::from_secs(10))).expect("poll")),
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ESRCH), "{error}"),
    }
}

#[test]
fn dropped_at_any_point_it_leaves_ram_free() {
    let ram = Ram::new(64);
    for stage in 0..3 {
        let (never, _hang) = super::live::pipe().expect("pipe");
        let (mut sink, _file) = FileSink::new(64);
        sink.hang = Some(never);
        ram.fill(1, 1);
        let mut capture = ram.prepare(sink);
        if stage > 0 {
            capture.arm().expect("arm");
        }
        if stage > 1 {
            capture.go().expect("go");
        }
        let pid = capture.writer_pid();
        drop(capture);
        (0..64).for_each(|page| ram.fill(page, 2));
        // Ours to reap, as drop does not wait.
        let pid = rustix::process::Pid::from_raw(pid.cast_signed());
        let _reaped = rustix::process::waitpid(pid, rustix::process::WaitOptions::empty());
    }
}

#[test]
fn what_cannot_be_captured_is_refused() {
    let ram = Ram::new(8);
    let refused = |config: &LiveConfig<'_>| {
        // SAFETY: as in `Ram::prepare`.
        let error = unsafe { LiveCapture::prepare(config, FileSink::new(8).0, || {}) };
        let error = error.expect_err("refused");
        assert!(matches!(error, CaptureError::Config(_)), "{error}");
        error.to_string()
    };
    let good = ram.config();
    refused(&LiveConfig { address: good.address + 1, ..good });
    refused(&LiveConfig { len: 0, ..good });
    refused(&LiveConfig { page_size: 2048, ..good });
    refused(&LiveConfig { file_offset: u64::MAX, ..good });
    let text = refused(&LiveConfig { file_offset: PAGE as u64, ..good });
    assert!(text.contains("32768 bytes, fewer"), "{text}");
    // Not mapped at all.
    refused(&LiveConfig { address: 1 << 46, ..good });

    let private = Mapping::file_private(&ram.memfd, 0, 8 * PAGE).expect("mapping");
    let text = refused(&LiveConfig { address: private.address() as u64, ..good });
    assert!(text.contains("private") && text.contains("start the sandbox"), "{text}");

    let mut capture = ram.prepare(FileSink::new(8).0);
    assert!(matches!(capture.go(), Err(CaptureError::Order { .. })), "not armed");
    let text = refused(&good);
    assert!(text.contains("another userfaultfd"), "{text}");
    capture.arm().expect("arm");
    assert!(matches!(capture.arm(), Err(CaptureError::Order { .. })), "once");
    capture.kill();
    assert!(matches!(capture.wait(), Err(CaptureError::Died { .. } | CaptureError::Aborted)));
}
