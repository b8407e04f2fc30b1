//! Times what the store does: `cargo run --release -p forkd-snapshot --example measure [DIR]`. DIR is
//! where the snapshots are written; without it, the temporary directory.
#![allow(clippy::print_stdout, clippy::expect_used, reason = "a tool for developers")]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use forkd_snapshot::{
    CpuModel, Facts, ImageRef, KvmFlavour, Mode, Platform, Removal, Store, Verification,
};

const PAGE: usize = 4096;
const MIB: usize = 1 << 20;
const RAM_MIB: usize = 512;
/// Pages that are not zero: 100 MiB, in runs as a booted guest has them.
const RUN_PAGES: usize = 64;
const RUNS: usize = 100 * MIB / PAGE / RUN_PAGES;

fn facts() -> Facts {
    let cpu = CpuModel::of_host().expect("the processor");
    let page_size = 4096;
    Facts {
        created_unix_ms: Facts::now(),
        forkd: "measure".into(),
        platform: Platform { arch: "x86_64".into(), cpu, kvm: KvmFlavour::Pvm, page_size },
        kernel: "k".into(),
        image: ImageRef { digest: "i".into(), tag: None },
        vcpus: 1,
        mem_mib: RAM_MIB as u64,
        mode: Mode::Full,
        instant: None,
    }
}

fn fill(bytes: &mut [u8], seed: u64) {
    let mut state = seed | 1;
    for word in bytes.chunks_exact_mut(8) {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        word.copy_from_slice(&state.to_le_bytes());
    }
}

fn timed<T>(what: &str, work: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let result = work();
    let took = start.elapsed();
    println!("{what:<58} {:>9.3} ms", took.as_secs_f64() * 1e3);
    (result, took)
}

fn best(what: &str, mut work: impl FnMut()) -> Duration {
    let times = (0..5).map(|_| {
        let start = Instant::now();
        work();
        start.elapsed()
    });
    let best = times.min().unwrap_or_default();
    println!("{what:<58} {:>9.3} ms, best of 5", best.as_secs_f64() * 1e3);
    best
}

fn main() {
    let below = std::env::args().nth(1).map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = below.join(format!("forkd-measure-{}", std::process::id()));
    let store = Store::open(&dir).expect("open");
    let mut ram = vec![0; RAM_MIB * MIB];
    let spacing = RAM_MIB * MIB / RUNS / PAGE * PAGE;
    for run in 0..RUNS {
        fill(&mut ram[run * spacing..][..RUN_PAGES * PAGE], run as u64);
    }
    timed("commit 512 MiB, 100 MiB not zero, 1 thread: all", || {
        let mut staged = store.stage("base", None).expect("stage");
        let memory = staged.memory(ram.len() as u64).expect("memory");
        timed("  write (scan, hash, pwrite)", || {
            for (index, block) in ram.chunks(2 * MIB).enumerate() {
                memory.write((index * 2 * MIB) as u64, block).expect("write");
            }
        });
        staged.state(&[1; 16384]).expect("state");
        timed("  commit (fsync, rename)", || staged.commit(facts()).expect("commit"));
    });
    timed("commit the same on 2 threads: all", || {
        let mut staged = store.stage("threads", None).expect("stage");
        let memory = staged.memory(ram.len() as u64).expect("memory");
        timed("  write", || {
            std::thread::scope(|scope| {
                for half in 0..2 {
                    let (memory, ram) = (memory.clone(), &ram);
                    scope.spawn(move || {
                        for index in (half..RAM_MIB / 2).step_by(2) {
                            let block = &ram[index * 2 * MIB..][..2 * MIB];
                            memory.write((index * 2 * MIB) as u64, block).expect("write");
                        }
                    });
                }
            });
        });
        staged.state(&[1; 16384]).expect("state");
        timed("  commit", || staged.commit(facts()).expect("commit"));
    });
    let verified = store.verify("base").expect("verify");
    let took = best("verify, page cache warm", || {
        store.verify("base").expect("verify");
    });
    let rate = verified.bytes as f64 / took.as_secs_f64() / 1e9;
    println!("  {} blocks, {} MiB, {rate:.2} GB/s", verified.blocks, verified.bytes >> 20);
    for depth in 1..=8 {
        // 8 MiB each: 2048 pages that stand alone.
        let parent = if depth == 1 { "base".to_string() } else { format!("d{}", depth - 1) };
        let mut staged = store.stage(&format!("d{depth}"), Some(&parent)).expect("stage");
        let memory = staged.memory(ram.len() as u64).expect("memory");
        let mut page = [0; PAGE];
        for index in 0..2048 {
            fill(&mut page, (depth * 4096 + index) as u64);
            memory.write(((index * 64 + depth * 3) * PAGE) as u64, &page).expect("write");
        }
        staged.state(&[1; 16384]).expect("state");
        staged.commit(facts()).expect("commit");
    }
    for depth in [0, 1, 2, 4, 8] {
        let tag = if depth == 0 { "base".to_string() } else { format!("d{depth}") };
        let extents =
            store.load(&tag, Verification::Remembered).expect("load").memory.extents.len();
        best(&format!("load, depth {depth}, verified before, {extents} extents"), || {
            store.load(&tag, Verification::Remembered).expect("load");
        });
    }
    best("load, depth 8, verifying all", || {
        store.load("d8", Verification::Always).expect("load");
    });
    timed("compact depth 8", || store.compact("d8").expect("compact"));
    for tag in ["base", "threads"] {
        store.remove(tag, Removal::Cascade).expect("remove");
    }
    std::fs::remove_dir_all(&dir).expect("remove");
}
