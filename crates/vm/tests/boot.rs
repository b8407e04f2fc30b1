//! Boots the real guest kernel on this host's KVM, forks it with fork(2) while it runs, and checks that both halves go
//! on. Needs the kernel from guest/kernel/build.sh and a C compiler.
//!
//! Not under libtest, whose threads fork(2) would cut off: here the only other threads are vCPUs', which are parked
//! when it forks.

#![allow(unsafe_code, missing_docs, dead_code)]
#![allow(clippy::print_stderr, clippy::expect_used, clippy::unwrap_used)]

mod guest;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use forkd_vm::Host;
use forkd_vm::boot::ElfEntry;
use guest::{Config, Event, Machine, Report};

/// On PVM, where the guest's kernel mode is emulated, on a busy machine.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
const LIMIT: Duration = Duration::from_secs(120);
/// How long a child waits before it goes on, as one does whose snapshot is old.
const ASLEEP: Duration = Duration::from_millis(1500);

fn main() {
    let wanted: Vec<_> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let tests: [(&str, fn()); 2] = [
        ("two_vcpus_with_acpi_go_on_in_parent_and_child", two_vcpus_fork),
        ("one_vcpu_boots_by_the_mp_table", one_vcpu_boots_by_the_mp_table),
    ];
    for (name, test) in tests {
        if wanted.is_empty() || wanted.iter().any(|w| name.contains(w.as_str())) {
            let start = Instant::now();
            test();
            eprintln!("test {name} ... ok ({:.1} s)", start.elapsed().as_secs_f64());
        }
    }
}

fn boot(vcpus: u8, extra: &str) -> (Machine, Report) {
    let host = Host::open().unwrap_or_else(|e| panic!("{e}"));
    let dir = tempfile::tempdir().expect("temporary directory");
    let kernel = guest::kernel();
    assert!(kernel.exists(), "{}: build it with guest/kernel/build.sh", kernel.display());
    let initrd = guest::initramfs(dir.path());
    let entry = ElfEntry::Linux64;
    let config = Config { kernel, initrd, vcpus, mem: 128 << 20, entry, extra: extra.to_owned() };
    let machine = Machine::boot(&host, &config);
    machine.expect_mark(b'F', BOOT_LIMIT);
    let report = machine.console.report("BOOT").expect("init says what it found");
    assert_eq!(report.number("cpus"), i64::from(vcpus));
    assert_eq!(report.get("clock"), "kvm-clock");
    (machine, report)
}

fn one_vcpu_boots_by_the_mp_table() {
    let (mut machine, report) = boot(1, "acpi=off quiet");
    assert_eq!(report.number("acpi"), 0);
    machine.stop();
}

fn two_vcpus_fork() {
    let (mut machine, report) = boot(2, "quiet");
    assert_eq!(report.number("acpi"), 1);
    let mut vcpus = machine.park();
    let saved = machine.save(&mut vcpus);
    // SAFETY: the only other threads are vCPU threads, which wait on a channel and hold no lock.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork");
    if pid == 0 {
        let done = catch_unwind(AssertUnwindSafe(|| {
            std::thread::sleep(ASLEEP);
            let (mut machine, vcpus) = machine.rebuild(&saved);
            machine.go(vcpus);
            finish(&machine, "child");
        }));
        // SAFETY: ends the child at once; nothing of the parent's may be torn down here.
        unsafe { libc::_exit(done.is_err().into()) }
    }
    machine.resume(vcpus);
    finish(&machine, "parent");
    let mut status = 0;
    // SAFETY: waits for our own child.
    unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!(status, 0, "the child's status; its message is above");
    machine.stop();
}

/// The guest goes on from where it asked for a fork, to its end.
fn finish(machine: &Machine, who: &str) {
    machine.expect_mark(b'E', LIMIT);
    let report = |when| machine.console.report(when).unwrap_or_else(|| panic!("{who}: {when}"));
    let (before, after, end) = (report("BEFORE"), report("AFTER"), report("END"));
    for report in [&before, &after, &end] {
        // User mode and kernel read one clock.
        assert!(report.number("disorder_ns") < 50_000, "{who}: {report:?}");
        for cpu in 0..2 {
            assert_eq!(report.number(&format!("back{cpu}")), 0, "{who}: {report:?}");
        }
    }
    for cpu in 0..2 {
        let count = format!("count{cpu}");
        assert!(
            end.number(&count) > before.number(&count),
            "{who}: CPU {cpu} stands still: {end:?}"
        );
    }
    let (before, after, end) =
        (before.number("mono_us"), after.number("mono_us"), end.number("mono_us"));
    assert!(before < after && after + 300_000 <= end, "{who}: {before} {after} {end}");
    match machine.wait(LIMIT) {
        Ok(Event::Reset) => {}
        other => panic!("{who}: instead of a reset: {other:?}"),
    }
}
