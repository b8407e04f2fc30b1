//! What the steps of `live` branches cost on this host, without a guest.
//!
//!     cargo run --release -p forkd-memory --example capture_costs [MIB] [ROUNDS]
//!
//! Threads of this process stand for vCPUs. Under KVM the same steps also drop its page tables.

#![allow(unsafe_code, clippy::print_stdout, clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use forkd_memory::capture::{Ahead, LiveCapture, LiveConfig, PageSink, PreArm};
use forkd_sys::mmap::Mapping;
use forkd_sys::userfaultfd::{Fault, Features, Mode, Userfaultfd};

const PAGE: usize = 4096;
const MIB: usize = 1 << 20;

struct FileSink(File);

impl PageSink for FileSink {
    fn write_page_run(&self, ram_offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, ram_offset)
    }

    fn kept_fds(&self) -> Vec<RawFd> {
        vec![self.0.as_raw_fd()]
    }
}

struct NullSink;

impl PageSink for NullSink {
    fn write_page_run(&self, _ram_offset: u64, _bytes: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn kept_fds(&self) -> Vec<RawFd> {
        Vec::new()
    }
}

fn memfd(len: usize) -> (OwnedFd, Mapping) {
    let fd = rustix::fs::memfd_create("costs", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
    rustix::fs::ftruncate(&fd, len as u64).expect("size");
    let mapping = Mapping::file_shared(&fd, 0, len).expect("mapping");
    mapping.populate_write(0, len).expect("populate");
    (fd, mapping)
}

fn percentiles(name: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |part: usize| times[(times.len() * part / 100).min(times.len() - 1)];
    println!("{name:<58} p50 {:>10.1?}  p99 {:>10.1?}  max {:>10.1?}", at(50), at(99), at(100));
}

/// One fault, served by another thread of this process: from the write to its return.
fn one_fault() {
    let (_fd, mapping) = memfd(1000 * PAGE);
    let uffd = Userfaultfd::new(Features::WP_HUGETLBFS_SHMEM, Features::NONE).expect("uffd");
    let range = mapping.address() as u64..(mapping.address() + mapping.len()) as u64;
    uffd.register(range.clone(), Mode::WRITE_PROTECT).expect("register");
    uffd.write_protect(range.clone()).expect("protect");
    let mut times = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut served, mut faults) = (0, Vec::<Fault>::new());
            while served < 1000 {
                uffd.wait(None).expect("poll");
                faults.clear();
                served += uffd.read(&mut faults).expect("read");
                for fault in &faults {
                    uffd.write_unprotect(fault.address..fault.address + PAGE as u64, true)
                        .expect("unprotect");
                }
            }
        });
        for page in 0..1000 {
            let since = Instant::now();
            mapping.write_at(page * PAGE, &[1]).expect("write");
            times.push(since.elapsed());
        }
    });
    percentiles("one WP fault: write to return, idle host", times);
}

/// Nanoseconds for which this thread was runnable and had no CPU: the second field of
/// /proc/thread-self/schedstat.
fn run_delay() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("schedstat");
    text.split(' ').nth(1).and_then(|ns| ns.parse().ok()).expect("a number")
}

fn live(mib: usize, rounds: usize, writers: usize, to_file: bool) {
    let (fd, ram) = memfd(mib * MIB);
    let pages = ram.len() / PAGE;
    let (gate, stop) = (RwLock::new(()), AtomicBool::new(false));
    let (longest, held) = (AtomicU64::new(0), AtomicU64::new(0));
    let mut helds = vec![];
    let (mut arms, mut stalls, mut prepares, mut waits) = (vec![], vec![], vec![], vec![]);
    let (mut services, mut claims, mut caught) = (vec![], vec![], 0);
    std::thread::scope(|scope| {
        for index in 0..writers {
            let (ram, gate, stop, longest, held) = (&ram, &gate, &stop, &longest, &held);
            scope.spawn(move || {
                let mut random = index as u64 + 1;
                while !stop.load(Ordering::Relaxed) {
                    let _running = gate.read().expect("gate");
                    let (delayed, mut worst) = (run_delay(), 0);
                    for _ in 0..64 {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        let page = (random >> 20) as usize % pages;
                        let since = Instant::now();
                        ram.write_at(page * PAGE, &[1; 64]).expect("write");
                        let ns = since.elapsed().as_nanos() as u64;
                        longest.fetch_max(ns, Ordering::Relaxed);
                        worst = worst.max(ns);
                    }
                    // Without what the thread itself waited for a CPU.
                    let waited = worst.saturating_sub(run_delay() - delayed);
                    held.fetch_max(waited, Ordering::Relaxed);
                }
            });
        }
        let mut floor = Vec::new();
        for _ in 0..rounds {
            longest.store(0, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(500));
            floor.push(Duration::from_nanos(longest.load(Ordering::Relaxed)));
        }
        percentiles("longest single write in 0.5 s without a capture", floor);
        for _ in 0..rounds {
            let config = LiveConfig::new(ram.address() as u64, ram.len() as u64, fd.as_fd());
            let since = Instant::now();
            // SAFETY: the other threads hold only the gate, which the writer does not take.
            let mut capture = unsafe {
                if to_file {
                    let file = tempfile::tempfile().expect("a file");
                    file.set_len(ram.len() as u64).expect("size");
                    LiveCapture::prepare(&config, FileSink(file), || {})
                } else {
                    LiveCapture::prepare(&config, NullSink, || {})
                }
            }
            .expect("prepare");
            prepares.push(since.elapsed());
            {
                let _paused = gate.write().expect("gate");
                let since = Instant::now();
                capture.arm().expect("arm");
                arms.push(since.elapsed());
                longest.store(0, Ordering::Relaxed);
                held.store(0, Ordering::Relaxed);
            }
            let since = Instant::now();
            capture.go().expect("go");
            let report = capture.wait().expect("an image");
            waits.push(since.elapsed());
            stalls.push(Duration::from_nanos(longest.load(Ordering::Relaxed)));
            helds.push(Duration::from_nanos(held.load(Ordering::Relaxed)));
            services.push(report.longest_fault);
            claims.push(report.longest_claim);
            caught += report.pages_by_handler;
        }
        stop.store(true, Ordering::Relaxed);
    });
    println!(
        "live, {mib} MiB, {writers} writers, to {}:",
        if to_file { "a file" } else { "nowhere" }
    );
    let per_page = arms.iter().map(|arm| arm.as_nanos() as f64 / pages as f64 / 1000.0);
    println!("  arm per mapped page, mean: {:.4} us", per_page.sum::<f64>() / arms.len() as f64);
    println!("  pages caught by the handler, mean: {}", caught / rounds as u64);
    percentiles("  prepare", prepares);
    percentiles("  arm", arms);
    percentiles("  longest single write after resume", stalls);
    percentiles("  the same, without the writer's own wait for a CPU", helds);
    percentiles("  longest fault service", services);
    percentiles("  longest claim of the bulk copier", claims);
    percentiles("  go to done", waits);
}

/// What protecting RAM again costs: by the call, and by the page that is protected already.
fn protect_again(mib: usize) {
    let (_fd, ram) = memfd(mib * MIB);
    let uffd = Userfaultfd::new(Features::WP_HUGETLBFS_SHMEM, Features::NONE).expect("uffd");
    let start = ram.address() as u64;
    uffd.register(start..start + ram.len() as u64, Mode::WRITE_PROTECT).expect("register");
    uffd.write_protect(start..start + ram.len() as u64).expect("protect");
    for pages in [1, 17, 256] {
        let since = Instant::now();
        let calls = 1000;
        for call in 0..calls {
            let at = start + (call * 300 % (ram.len() / PAGE - 256) * PAGE) as u64;
            uffd.write_protect(at..at + (pages * PAGE) as u64).expect("protect");
        }
        println!("a call for {pages} protected pages: {:?}", since.elapsed() / calls as u32);
    }
}

/// Protected ahead: what is left for the pause.
fn live_ahead(mib: usize, rounds: usize, writers: usize, hot_pages: usize) {
    let (fd, ram) = memfd(mib * MIB);
    let (gate, stop) = (RwLock::new(()), AtomicBool::new(false));
    let (mut aheads, mut arms, mut forks, mut stalls) = (vec![], vec![], vec![], vec![]);
    let (mut left, mut faults, mut again) = (0, 0, 0);
    std::thread::scope(|scope| {
        for index in 0..writers {
            let (ram, gate, stop) = (&ram, &gate, &stop);
            scope.spawn(move || {
                let mut random = index as u64 + 1;
                while !stop.load(Ordering::Relaxed) {
                    let _running = gate.read().expect("gate");
                    for _ in 0..64 {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        let page = (random >> 20) as usize % hot_pages * 7 % (ram.len() / PAGE);
                        ram.write_at(page * PAGE, &[1; 64]).expect("write");
                    }
                }
            });
        }
        for _ in 0..rounds {
            let config = LiveConfig::new(ram.address() as u64, ram.len() as u64, fd.as_fd());
            let since = Instant::now();
            let ahead = PreArm::start(&config, 64).expect("start");
            while ahead.look() == Ahead::Working {
                forkd_sys::reactor::wait_readable(ahead.told_fd(), None).expect("poll");
            }
            aheads.push(since.elapsed());
            let paused = gate.write().expect("gate");
            let since = Instant::now();
            let protected = ahead.finish().expect("finish");
            arms.push(since.elapsed());
            let report = protected.report;
            let since = Instant::now();
            // SAFETY: the other threads hold only the gate, which the writer does not take.
            let mut capture =
                unsafe { LiveCapture::adopt(&config, protected, NullSink, || {}) }.expect("adopt");
            forks.push(since.elapsed());
            drop(paused);
            stalls.push(report.longest_stall);
            left += report.left;
            faults += report.faults;
            again += u64::from(report.rounds);
            capture.go().expect("go");
            capture.wait().expect("an image");
        }
        stop.store(true, Ordering::Relaxed);
    });
    let mean = |sum: u64| sum / rounds as u64;
    println!("live, protected ahead, {mib} MiB, {writers} writers of {hot_pages} pages:");
    println!("  mean: {} left, {} faults, {} rounds", mean(left), mean(faults), mean(again));
    percentiles("  start to ready", aheads);
    percentiles("  finish: join and protect what is left", arms);
    percentiles("  adopt: fork", forks);
    percentiles("  longest stall ahead of the pause, at most", stalls);
}

fn main() {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse::<usize>().expect("a number"));
    let (mib, rounds) = (args.next().unwrap_or(1536), args.next().unwrap_or(20));
    one_fault();
    protect_again(mib);
    for (writers, hot_pages) in [(0, 1), (1, 1000), (2, 10_000), (2, 300_000)] {
        live_ahead(mib, rounds, writers, hot_pages);
    }
    live(mib, rounds, 0, false);
    for writers in [1, 2, 4] {
        live(mib, rounds, writers, false);
        live(mib, rounds, writers, true);
    }
}
