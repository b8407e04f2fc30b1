//! `forkd fork --memory`: where the RAM of VMs that are loaded from disk comes from.

use std::fs::{self, OpenOptions};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use forkd_api::types::{Metrics, VmInfo, VmPhase};
use rustix::process::Signal;

use crate::fixture::{Suite, WARM, eventually, names};
use crate::live::{durable, forget, store};
use crate::runner::{Test, tests};
use crate::vm::{Branched, Vm};

pub const TESTS: &[Test] = tests!["backends":
    each_child_has_ram_of_its_own_and_a_disk_to_it 240,
    more_than_3_gib_work_in_all 300,
    children_of_one_memfd_cost_one_copy 120,
    private_memfds_are_forked_and_saved 120,
    userfault_learns_what_is_needed 120,
    userfault_is_forked_once_all_is_loaded 120,
    a_truncated_file_fails_the_vm_with_the_reason 120,
];

/// All that `--memory` takes.
pub const KINDS: [&str; 4] = ["file", "memfd-private", "memfd-shared", "userfault"];

/// Tag of the snapshot with RAM on both sides of the hole below 4 GiB, and its RAM in MiB.
const BIG: &str = "big";
const BIG_MIB: &str = "4096";

fn load<'s>(suite: &'s Suite, tag: &str, kind: &str, count: usize) -> Result<Vec<Vm<'s>>> {
    let count = count.to_string();
    let said = suite.forkd(["fork", tag, "--memory", kind, "-n", &count, "--json"]).output()?;
    Ok(Branched::read(suite, said).with_context(|| kind.to_string())?.children)
}

fn load_one<'s>(suite: &'s Suite, tag: &str, kind: &str) -> Result<Vm<'s>> {
    load(suite, tag, kind, 1)?.pop().context("one child")
}

fn each_child_has_ram_of_its_own_and_a_disk_to_it(suite: &Suite) -> Result<()> {
    let tag = durable(suite)?;
    for kind in KINDS {
        let vms = load(suite, tag, kind, 2)?;
        for (number, vm) in vms.iter().enumerate() {
            vm.run(&format!("level.append({number})"))?;
            vm.guest(&["ring", "serve", "/tmp/ring", "/dev/vda"]).context(kind)?;
        }
        for (number, vm) in vms.iter().enumerate() {
            ensure!(vm.value("level")? == format!("['warm', {number}]"), "{kind}: RAM is its own");
            ensure!(vm.value("int(array.sum())")? == "4999950000", "{kind}: RAM is as it was");
            vm.guest(&["ring", "verify", "/tmp/ring"]).context(kind)?;
            vm.kill()?;
        }
    }
    Ok(())
}

/// Writes to 1024 pages, reads them back, and tells how many are above 4 GiB, where the second region is. (Few, as the
/// first touch of each takes milliseconds where the guest's kernel is emulated; Linux takes high memory first.)
const TOUCH: &str = "import ctypes, mmap, struct
m = mmap.mmap(-1, 4 << 20)
m[::4096] = b'x' * 1024
at = ctypes.addressof(ctypes.c_char.from_buffer(m))
with open('/proc/self/pagemap', 'rb') as f:
    f.seek(at // 4096 * 8)
    entries = struct.unpack('<1024Q', f.read(8192))
print(m[::4096].count(b'x'), sum(entry & (1 << 55) - 1 >= 0x100000 for entry in entries))";

fn more_than_3_gib_work_in_all(suite: &Suite) -> Result<()> {
    suite.link_image(&suite.home())?;
    let args = ["snapshot", "create", BIG, "--mem", BIG_MIB];
    suite.forkd(args).ok()?;
    suite.forkd(["snapshot", "save", BIG]).ok()?;
    for kind in KINDS {
        let vm = load_one(suite, BIG, kind)?;
        let total = vm.sh("sed -n 's/MemTotal: *//p' /proc/meminfo")?;
        let kib: u64 = total.trim().trim_end_matches(" kB").parse()?;
        ensure!(kib > 3_500_000, "{kind}: the guest has {total}");
        let found = vm.exec(&["python3", "-c", TOUCH]).ok().context(kind)?.text();
        let numbers: Vec<u64> =
            found.split(' ').map(|n| n.trim().parse()).collect::<Result<_, _>>()?;
        ensure!(numbers[0] == 1024, "{kind}: of 1024 pages {found:?} read back");
        ensure!(numbers[1] > 0, "{kind}: none of the guest's pages is in the second region");
        vm.kill()?;
    }
    forget(suite, BIG)
}

/// A process's mappings of a snapshot's memfd, in bytes.
#[derive(Debug, Default)]
struct Mapped {
    inode: String,
    resident: u64,
    proportional: u64,
    /// What it has written since: pages of its own.
    anonymous: u64,
}

fn mapped(pid: u32) -> Result<Mapped> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut found = Mapped::default();
    let mut ours = false;
    for line in smaps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            [range, _, _, _, inode, ..] if range.contains('-') => {
                ours = line.contains("/memfd:forkd-");
                if ours {
                    found.inode = inode.to_string();
                }
            }
            [name, number, "kB"] if ours => {
                let bytes = number.parse::<u64>()? << 10;
                match name {
                    "Rss:" => found.resident += bytes,
                    "Pss:" => found.proportional += bytes,
                    "Anonymous:" => found.anonymous += bytes,
                    _ => {}
                }
            }
            _ => {}
        }
    }
    ensure!(found.resident > 0, "process {pid} maps no memfd");
    Ok(found)
}

/// Bytes that a snapshot's memory file takes, which are those of a memfd of it.
fn data_bytes(suite: &Suite, tag: &str) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(fs::metadata(store(suite).join(tag).join("memory"))?.blocks() * 512)
}

fn children_of_one_memfd_cost_one_copy(suite: &Suite) -> Result<()> {
    const MANY: usize = 4;
    let tag = durable(suite)?;
    let vms = load(suite, tag, "memfd-private", MANY)?;
    for vm in &vms {
        vm.run("own = b'x' * (2 << 20)")?;
    }
    let all: Vec<Mapped> = vms.iter().map(|vm| mapped(vm.pid)).collect::<Result<_>>()?;
    ensure!(all.iter().all(|one| one.inode == all[0].inode), "it is one memfd: {all:?}");
    let sum = |of: fn(&Mapped) -> u64| all.iter().map(of).sum::<u64>();
    let written = sum(|one| one.anonymous);
    let (shared, seen) = (sum(|one| one.proportional) - written, sum(|one| one.resident) - written);
    let copy = data_bytes(suite, tag)?;
    println!(
        "    {} MiB in the memfd; {MANY} VMs see {} MiB of it, which count {} MiB; each wrote {} MiB",
        copy >> 20,
        seen >> 20,
        shared >> 20,
        (written / MANY as u64) >> 20
    );
    ensure!(shared <= copy + copy / 8, "{shared} bytes count as shared, of {copy}");
    ensure!(seen > 2 * shared, "the VMs use the same pages: {seen} seen, {shared} counted");
    // One that dies takes nothing from the others.
    let process = forkd_sys::fork::PidFd::open(vms[0].pid)?;
    process.send_signal(Signal::KILL)?;
    process.wait(Some(Duration::from_secs(10)))?;
    for vm in &vms[1..] {
        ensure!(vm.value("(level, own.count(b'x') >> 20)")? == "(['warm'], 2)", "it is well");
        vm.kill()?;
    }
    // What is left of the dead one goes when somebody looks.
    ensure!(suite.ls()?.is_empty() && names(&suite.vms_dir())?.is_empty(), "nothing stays");
    Ok(())
}

fn private_memfds_are_forked_and_saved(suite: &Suite) -> Result<()> {
    let source = load_one(suite, durable(suite)?, "memfd-private")?;
    source.run("level.append('source')")?;
    let branch = source.branch_one()?;
    branch.run("level.append('branch')")?;
    let args = ["branch", &source.id, "--snapshot", "private-diff", "--mode", "diff"];
    suite.forkd(args).ok()?;
    source.kill()?;
    ensure!(branch.value("level")? == "['warm', 'source', 'branch']", "the branch has its own");
    let (diff, whole) = (data_bytes(suite, "private-diff")?, data_bytes(suite, WARM)?);
    ensure!(diff < whole / 2, "a diff of {diff} bytes over {whole}");
    for kind in KINDS {
        let vm = load_one(suite, "private-diff", kind)?;
        ensure!(vm.value("level")? == "['warm', 'source']", "{kind}: a chain is loaded");
        ensure!(vm.value("int(array.sum())")? == "4999950000", "{kind}: so is what is below");
        vm.kill()?;
    }
    branch.kill()?;
    forget(suite, "private-diff")
}

fn metric(vm: &Vm<'_>, name: &str) -> Result<u64> {
    let metrics: Metrics = vm.api()?.get_json("/metrics")?;
    metrics.get(name).copied().with_context(|| format!("no metric {name}"))
}

fn all_is_loaded(suite: &Suite, vm: &Vm<'_>) -> Result<()> {
    eventually(suite.deadline(), "all RAM is loaded", || Ok(metric(vm, "ram.missing_bytes")? == 0))
}

/// Page faults of a load until the agent has answered and done some work.
fn faults(suite: &Suite) -> Result<(Vm<'_>, u64)> {
    let vm = load_one(suite, WARM, "userfault")?;
    ensure!(vm.value("int(array.sum())")? == "4999950000", "RAM is as it was");
    let faults = metric(&vm, "ram.faults")?;
    all_is_loaded(suite, &vm)?;
    ensure!(vm.value("level")? == "['warm']", "RAM is as it was");
    Ok((vm, faults))
}

fn userfault_learns_what_is_needed(suite: &Suite) -> Result<()> {
    durable(suite)?;
    let known = store(suite).join(WARM).join("working-set");
    if known.exists() {
        fs::remove_file(&known)?;
    }
    let (vm, first) = faults(suite)?;
    vm.kill()?;
    ensure!(known.exists(), "what was needed is recorded");
    let (vm, second) = faults(suite)?;
    vm.kill()?;
    println!("    {first} page faults at the first load, {second} at the second");
    ensure!(second * 2 < first, "{first} faults at first, {second} at the second load");
    for bad in ["", "no working set", "FORKD\r\n\x1a"] {
        fs::write(&known, bad)?;
        let vm = load_one(suite, WARM, "userfault")?;
        let log = fs::read_to_string(vm.dir().join("vmm.log"))?;
        ensure!(log.contains("nothing is fetched ahead") && log.contains("working-set"), "{log}");
        ensure!(vm.value("level")? == "['warm']", "it works without");
        vm.kill()?;
    }
    fs::remove_file(&known)?;
    Ok(())
}

fn userfault_is_forked_once_all_is_loaded(suite: &Suite) -> Result<()> {
    let source = load_one(suite, durable(suite)?, "userfault")?;
    // Asked for at once, it waits for that.
    let first = source.branch_one()?;
    ensure!(metric(&source, "ram.missing_bytes")? == 0, "it was forked with RAM missing");
    source.run("level.append('source')")?;
    let second = first.branch_one()?;
    for vm in [&first, &second] {
        ensure!(vm.value("level")? == "['warm']", "its RAM is its own, and whole");
        ensure!(vm.value("int(array.sum())")? == "4999950000", "its RAM is whole");
    }
    let args = ["branch", &source.id, "--snapshot", "lazy", "--mode", "full"];
    suite.forkd(args).ok()?;
    let saved = suite.fork_of("lazy", 1)?.pop().context("one child")?;
    ensure!(saved.value("level")? == "['warm', 'source']", "it was saved");
    suite.kill_all()?;
    forget(suite, "lazy")
}

fn a_truncated_file_fails_the_vm_with_the_reason(suite: &Suite) -> Result<()> {
    let source = load_one(suite, durable(suite)?, "file")?;
    suite.forkd(["branch", &source.id, "--snapshot", "cut", "--mode", "full"]).ok()?;
    source.kill()?;
    let vm = load_one(suite, "cut", "userfault")?;
    let memory = store(suite).join("cut").join("memory");
    OpenOptions::new().write(true).open(&memory)?.set_len(4096)?;
    let info = || -> Result<VmInfo> { Ok(vm.api()?.get_json("/vm")?) };
    eventually(suite.deadline(), "the VM has failed", || Ok(info()?.phase == VmPhase::Failed))?;
    let why = info()?.error.context("a reason")?;
    ensure!(why.contains("cannot load") && why.contains("RAM"), "{why}");
    let said = suite.forkd(["eval", &vm.id, "1 + 1"]).output()?;
    ensure!(!said.stderr_text().is_empty() && said.stdout.is_empty(), "it answers nothing");
    suite.forkd(["branch", &vm.id]).output()?.status_is(1)?;
    let log = fs::read_to_string(vm.dir().join("vmm.log"))?;
    ensure!(log.contains("the VM has failed: cannot load"), "{log}");
    vm.kill()?;
    ensure!(names(&suite.vms_dir())?.is_empty(), "nothing is left of it");
    // Not to be loaded any more, but removed.
    let said = suite.forkd(["fork", "cut", "--memory", "userfault"]).output()?;
    said.status_is(1)?.one_line(&["child #1 of 1", &memory.display().to_string()])?;
    forget(suite, "cut")
}
