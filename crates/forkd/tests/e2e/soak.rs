//! Long work in guests: stress-ng, PostgreSQL that is branched under load, Node, processes in their hundreds; and how far
//! Debian's own kernel gets. Not in the normal suite: `make native-soak`, or FORKD_SOAK_SECONDS.
//!
//! The image is built from Debian's packages, once, and stays in the cache of the tests' images.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::fixture::{Suite, eventually};
use crate::guest_kernel::kernel_is_content;
use crate::runner::{Test, tests};
use crate::vm::Vm;

pub const TESTS: &[Test] = tests!["soak":
    stress_ng_finds_nothing 3600,
    postgresql_is_consistent_in_every_branch 600,
    node_computes_what_python_computes 120,
    processes_by_the_hundred 600,
    debians_own_kernel_stops_with_a_reason 900,
];

/// Tag of the image and of the snapshot.
const SOAK: &str = "soak";
/// Debian packages of the image.
const PACKAGES: [&str; 9] = [
    "python3",
    "stress-ng",
    "postgresql",
    "postgresql-contrib",
    "nodejs",
    "gcc",
    "libc6-dev",
    "e2fsprogs",
    "mount",
];
/// RAM and disk of the guest, in MiB.
const SOAK_MEM_MIB: u64 = 2048;
/// See [`SOAK_MEM_MIB`].
const SOAK_DISK_MIB: u64 = 1024;
/// Branches of the database.
const BRANCHES: usize = 10;

/// How long stress-ng runs, if a soak is asked for at all.
fn seconds() -> Result<Option<u64>> {
    let Some(text) = std::env::var_os("FORKD_SOAK_SECONDS") else {
        println!("    not without FORKD_SOAK_SECONDS: make native-soak");
        return Ok(None);
    };
    let text = text.to_string_lossy();
    text.parse().map(Some).with_context(|| format!("FORKD_SOAK_SECONDS={text}"))
}

/// A guest with two CPUs and all programs.
fn guest(suite: &Suite) -> Result<Vm<'_>> {
    if !suite.snapshots_dir().join(SOAK).exists() {
        suite.package_image(SOAK, &PACKAGES)?;
        suite.create_of(SOAK, SOAK, 2, [SOAK_MEM_MIB, SOAK_DISK_MIB], "import hashlib")?;
    }
    suite.fork_of(SOAK, 1)?.pop().context("one child")
}

/// Shell command that prints the ids of processes by name.
fn processes(name: &str) -> String {
    format!("grep -lsx '{name}' /proc/[0-9]*/comm | cut -d/ -f3")
}

fn stress_ng_finds_nothing(suite: &Suite) -> Result<()> {
    const STRESSORS: &str = "--cpu 2 --vm 1 --vm-bytes 128m --fork 2 --context 2 --signal 2 --mmap 1 --mmap-bytes 64m \
                             --futex 2";
    let Some(seconds) = seconds()? else { return Ok(()) };
    let vm = guest(suite)?;
    let command = format!("stress-ng {STRESSORS} --verify --metrics-brief --timeout {seconds}");
    let stress = vm.exec(&["/bin/sh", "-c", &format!("exec {command} 2>&1")]).spawn()?;
    // It is branched at the start, and the branch comes to the same end.
    stress.wait_stdout("word of its start", |out| out.windows(11).any(|w| w == b"dispatching"))?;
    let branch = vm.branch_one()?;
    branch.sh(&format!("kill -0 $({})", processes("stress-ng.*")))?;
    kernel_is_content(&branch)?;
    branch.kill()?;
    let said = stress.wait()?;
    ensure!(said.status.success(), "{}\n{}", said.status, said.text());
    println!("{}", said.text());
    kernel_is_content(&vm)
}

/// A cluster on the disk, with pgbench's tables.
const START_POSTGRESQL: &str = "set -e
mkfs.ext4 -q /dev/vda
mkdir -p /srv/pg
mount /dev/vda /srv/pg
chown postgres /srv/pg
cat > /usr/local/bin/pg <<'END'
#!/bin/sh
export PATH=/usr/lib/postgresql/15/bin:$PATH PGHOST=/tmp PGDATA=/srv/pg/data PGDATABASE=bench
cd /srv/pg && exec runuser -u postgres -- \"$@\"
END
chmod +x /usr/local/bin/pg
pg initdb -A trust -E UTF8 --locale C >/dev/null
pg pg_ctl -w -s -l /srv/pg/log -o '-k /tmp' start
pg createdb bench
pg pgbench -i -q -s 2 2>/dev/null
pg psql -qc 'create extension amcheck'
";

/// Every transaction of pgbench adds one delta to an account, a teller, a branch and the history.
const SUMS: &str = "select (select sum(abalance) from pgbench_accounts), (select sum(tbalance) from pgbench_tellers), \
                    (select sum(bbalance) from pgbench_branches), (select coalesce(sum(delta), 0) from pgbench_history), \
                    (select count(*) from pgbench_history)";

/// Transactions that the database holds; their sums agree.
fn transactions(vm: &Vm<'_>) -> Result<u64> {
    let row = vm.exec(&["/usr/local/bin/pg", "psql", "-Atc", SUMS]).ok()?.text();
    let numbers: Vec<i64> = row.split('|').map(str::parse).collect::<Result<_, _>>()?;
    let [accounts, tellers, branches, history, count] = numbers[..] else {
        anyhow::bail!("{}: {row}", vm.id)
    };
    ensure!(accounts == tellers && tellers == branches && branches == history, "{}: {row}", vm.id);
    Ok(count.try_into()?)
}

/// The sums agree, the indexes fit their tables, and all of that again after the server was killed and has recovered.
fn database_is_consistent(vm: &Vm<'_>) -> Result<u64> {
    let before = transactions(vm)?;
    let pgbench = processes("pgbench");
    vm.sh(&format!("for p in $({pgbench}); do kill -STOP $p; done; pg pg_amcheck bench"))?;
    let count = transactions(vm)?;
    vm.sh("pg pg_ctl -s -m immediate stop; pg pg_ctl -w -s -l /srv/pg/log -o '-k /tmp' start")?;
    let recovered = transactions(vm).context("recovered")?;
    ensure!(before <= count && count <= recovered, "{before}, {count}, {recovered} transactions");
    Ok(recovered)
}

fn postgresql_is_consistent_in_every_branch(suite: &Suite) -> Result<()> {
    const AT_LEAST: Duration = Duration::from_secs(60);
    if seconds()?.is_none() {
        return Ok(());
    }
    let vm = guest(suite)?;
    vm.sh(START_POSTGRESQL)?;
    let script = "echo begun; exec pg pgbench -n -c 4 -j 2 -T 3600 2>&1";
    let bench = vm.exec(&["/bin/sh", "-c", script]).spawn()?;
    bench.wait_stdout("sign of life", |out| out.starts_with(b"begun"))?;
    let (begun, mut branches, mut last) = (Instant::now(), 0, 0);
    while branches < BRANCHES || begun.elapsed() < AT_LEAST {
        // Each is of a later moment than the one before.
        let goes_on = || Ok(transactions(&vm)? > last);
        eventually(begun + 20 * AT_LEAST, "pgbench goes on", goes_on)?;
        last = transactions(&vm)?;
        let branch = vm.branch_one()?;
        let count =
            database_is_consistent(&branch).with_context(|| format!("branch {branches}"))?;
        ensure!(count >= last, "branch {branches} has {count} transactions, there were {last}");
        kernel_is_content(&branch)?;
        branch.kill()?;
        vm.set_running(true)?;
        branches += 1;
        println!("    branch {branches}: {count} transactions, after {:.0?}", begun.elapsed());
    }
    vm.sh(&format!("kill -INT $({})", processes("pgbench")))?;
    let said = bench.wait()?.text();
    ensure!(!said.contains("error"), "{said}");
    let count = database_is_consistent(&vm).context("the source")?;
    ensure!(count >= last, "{count} transactions, there were {last}");
    println!("    {branches} branches, {count} transactions in {:.0?}", begun.elapsed());
    kernel_is_content(&vm)
}

/// A chain of hashes, by worker threads and timers, in both languages.
const NODE: &str = r#"
const { Worker, isMainThread, parentPort, workerData } = require('worker_threads');
const { createHash } = require('crypto');
const chain = (seed, n) => { let h = seed; while (n--) h = createHash('sha256').update(h).digest('hex'); return h; };
if (!isMainThread) parentPort.postMessage(chain('seed ' + workerData, 100000));
else Promise.all([0, 1, 2, 3].map(i => new Promise((done, fail) => {
  const w = new Worker('/tmp/chain.js', { workerData: i });
  w.on('message', h => setTimeout(() => done(h), 10)); w.on('error', fail);
}))).then(all => console.log(all.join(' ')));
"#;
/// The same.
const PYTHON: &str = "
import hashlib
def chain(seed, n):
    for _ in range(n): seed = hashlib.sha256(seed.encode()).hexdigest()
    return seed
print(' '.join(chain(f'seed {i}', 100000) for i in range(4)))
";

fn node_computes_what_python_computes(suite: &Suite) -> Result<()> {
    if seconds()?.is_none() {
        return Ok(());
    }
    let vm = guest(suite)?;
    vm.exec_with(&["-i"], &["/bin/sh", "-c", "cat > /tmp/chain.js"]).stdin(NODE).ok()?;
    let right = vm.exec(&["/usr/bin/python3", "-c", PYTHON]).ok()?.text();
    ensure!(vm.sh("node /tmp/chain.js")? == right);
    // In the middle of it, too: the branch's copy goes on and writes what it finds into a file.
    vm.sh("rm -f /tmp/found; (node /tmp/chain.js > /tmp/found 2>&1; mv /tmp/found /tmp/done) >/dev/null 2>&1 &")?;
    vm.sh("until [ -e /tmp/found ]; do sleep 0.05; done")?;
    let branch = vm.branch_one()?;
    for vm in [&branch, &vm] {
        let found = vm.sh("until [ -e /tmp/done ]; do sleep 0.1; done; cat /tmp/done")?;
        ensure!(found == right, "{}: {found}", vm.id);
        kernel_is_content(vm)?;
    }
    Ok(())
}

fn processes_by_the_hundred(suite: &Suite) -> Result<()> {
    if seconds()?.is_none() {
        return Ok(());
    }
    let vm = guest(suite)?;
    let pipelines = "for i in $(seq 500); do sh -c 'seq 1 1000 | sort -rn | head -n 1 | tr 0-9 a-j'; done | sort | uniq -c";
    let counted = vm.sh(pipelines)?;
    ensure!(counted.split_whitespace().eq(["500", "baaa"]), "{counted}");
    // Without linking: images have no static libraries, and libc.so needs one.
    let compile = "cd /tmp && for i in $(seq 40); do \
        printf '#include <stdio.h>\\nint main(void) { return printf(\"%%d\", 7); }\\n' > t$i.c; \
        gcc -O2 -c -o t$i.o -x c - < t$i.c || exit 1; \
        sha256sum < t$i.o; done | sort | uniq -c | awk '{ print $1 }'";
    ensure!(vm.sh(compile)? == "40", "forty compilations give the same");
    kernel_is_content(&vm)
}

/// The kernel of Debian 12 (6.1) has virtio, EROFS and vsock as modules, which the initramfs of forkd does not bring along, so
/// the host cannot reach the agent; before that it uses an instruction that KVM's emulator lacks (docs/limits.md). Whichever
/// comes first is said, and nothing hangs.
fn debians_own_kernel_stops_with_a_reason(suite: &Suite) -> Result<()> {
    if seconds()?.is_none() {
        return Ok(());
    }
    let dir = suite.scratch("debian-kernel")?;
    let shell = format!(
        "cd '{}' && package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ {{ print $2; exit }}') \
         && apt-get download -o APT::Sandbox::User=root \"$package\" >&2 && dpkg-deb -x \"$package\"_*.deb . && ls -d $PWD/boot/vmlinuz-*",
        dir.display()
    );
    let kernel = suite.program("/bin/sh").args(["-c", &shell]).ok()?.text();
    let args = ["snapshot", "create", "debian", "--json", "--boot-timeout", "600", "--kernel"];
    let said = suite
        .forkd(args)
        .arg(&kernel)
        .args(["--cmdline", "ignore_loglevel"])
        .env("FORKD_PVM", "emulated")
        .output()?;
    let text = said.stderr_text();
    let reason = text.lines().last().unwrap_or_default();
    ensure!(!said.status.success() && reason.starts_with("forkd: "), "{text}");
    ensure!(["no remedy", "agent", "panic"].iter().any(|word| reason.contains(word)), "{text}");
    println!("    {reason}");
    Ok(())
}
