//! Boots the guest kernel with the tests' init, shows its console, and prints what saving, forking and rebuilding
//! cost.
//!
//! ```text
//! cargo run --release -p forkd-vm --example boot -- [--vcpus N] [--mem MIB] [--pvh] [--forks N] [WORDS...]
//! ```
//!
//! WORDS go to the kernel's command line; `acpi=off` makes it use the MP table.

#![allow(clippy::print_stdout, clippy::print_stderr, clippy::expect_used, clippy::unwrap_used)]
#![allow(unsafe_code, dead_code, missing_docs)]

#[path = "../tests/guest/mod.rs"]
mod guest;

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use forkd_vm::Host;
use forkd_vm::boot::ElfEntry;
use guest::{Config, Event, Machine, Saved};

fn main() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut config = Config {
        kernel: guest::kernel(),
        initrd: guest::initramfs(dir.path()),
        vcpus: 1,
        mem: 256 << 20,
        entry: ElfEntry::Linux64,
        extra: String::new(),
    };
    let mut forks = 50;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || args.next().and_then(|n| n.parse::<u64>().ok()).expect("a number");
        match arg.as_str() {
            "--vcpus" => config.vcpus = number() as u8,
            "--mem" => config.mem = number() << 20,
            "--forks" => forks = number(),
            "--pvh" => config.entry = ElfEntry::Pvh,
            word => config.extra += &format!(" {word}"),
        }
    }
    let host = Host::open().unwrap_or_else(|e| panic!("{e}"));
    for (name, value) in host.describe() {
        println!("{name}: {value}");
    }
    let begin = Instant::now();
    let mut machine = Machine::boot(&host, &config);
    machine.console.echo("  ");
    machine.expect_mark(b'F', Duration::from_secs(300));
    println!("init asks for a fork after {:.2} s", begin.elapsed().as_secs_f64());

    let mut vcpus = machine.park();
    let (saved, save_us) = repeat(forks, || machine.save(&mut vcpus));
    println!("save: {}", p50(save_us));
    let mut total = Vec::new();
    let mut rebuild = Vec::new();
    for _ in 0..forks {
        let start = Instant::now();
        machine = fork_once(machine, &saved, &mut rebuild);
        total.push(start.elapsed().as_secs_f64() * 1e6);
    }
    println!("rebuild in a child of fork(2): {}", p50(rebuild));
    println!("fork, rebuild, exit, reap: {}", p50(total));
    machine.resume(vcpus);
    loop {
        match machine.wait(Duration::from_secs(60)) {
            Ok(Event::Mark(m)) => println!("mark {:?}", char::from(m)),
            Ok(Event::Reset) => break println!("reset"),
            other => panic!("{other:?}"),
        }
    }
}

/// Forks; the child rebuilds the VM, says how long that took, and ends.
fn fork_once(machine: Machine, saved: &Saved, us: &mut Vec<f64>) -> Machine {
    let (mut reader, mut writer) = std::io::pipe().expect("pipe");
    // SAFETY: the only other threads are vCPU threads, which wait on a channel.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork");
    if pid == 0 {
        let start = Instant::now();
        let built = machine.rebuild(saved);
        let us = start.elapsed().as_secs_f64() * 1e6;
        writer.write_all(&us.to_le_bytes()).expect("pipe");
        drop(built);
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(0) }
    }
    drop(writer);
    let mut bytes = [0; 8];
    reader.read_exact(&mut bytes).expect("child reports");
    us.push(f64::from_le_bytes(bytes));
    // SAFETY: waits for our own child.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
    machine
}

fn repeat<T>(n: u64, mut what: impl FnMut() -> T) -> (T, Vec<f64>) {
    let mut us = Vec::new();
    loop {
        let start = Instant::now();
        let value = what();
        us.push(start.elapsed().as_secs_f64() * 1e6);
        if us.len() as u64 >= n {
            return (value, us);
        }
    }
}

fn p50(mut us: Vec<f64>) -> String {
    us.sort_by(f64::total_cmp);
    let at = |q: f64| us[((us.len() - 1) as f64 * q) as usize];
    format!("p50 {:.0} us, p99 {:.0} us, {} runs", at(0.5), at(0.99), us.len())
}
