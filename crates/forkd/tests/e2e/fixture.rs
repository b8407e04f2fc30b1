//! What the tests share: a home of their own, and one warm snapshot that all of them fork.
//!
//! Everything is below one directory in /tmp, and all that forkd starts has that directory in its environment, so what a
//! test leaves behind can be found and ended whatever happened.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::command::Run;
use crate::vm::{Branched, Vm};

/// Tag of the snapshot that tests fork: Python with numpy, 1 vCPU, 512 MiB, an empty disk.
pub const WARM: &str = "warm";
/// RAM of the snapshots, in MiB.
pub const MEM_MIB: u64 = 512;
/// Size of their disk (/dev/vda), in MiB.
pub const DISK_MIB: u64 = 64;
/// Tag of the 2-vCPU snapshot.
pub const SMP: &str = "smp";
/// Deadline of what is no test: making the snapshots, and cleaning up.
const SETUP: Duration = Duration::from_secs(600);
/// Sources of the guest's test program, below tests/guest.
const GUEST_SOURCES: [&str; 9] =
    ["main.c", "ring.c", "count.c", "simd.c", "clock.c", "fill.c", "process.c", "cpus.c", "load.c"];
/// Sources of the program that tries what user mode may do to the kernel.
const PROBE_SOURCES: [&str; 9] = [
    "probes/main.c",
    "probes/memory.c",
    "probes/frames.c",
    "probes/instructions.c",
    "probes/segments.c",
    "probes/flags.c",
    "probes/trace.c",
    "probes/tasks.c",
    "probes/stale.c",
];

/// What the warm-up makes, beside the test program: children must find it.
const WARM_CODE: &str = "
import base64, hashlib, json, os, random, socket, time, uuid
import numpy as np
base = 1000
array = np.arange(100_000, dtype=np.int64)
level = ['warm']
random.seed(7)
np.random.seed(7)
before = (time.monotonic(), time.time())
";

/// The shared state of a run.
pub struct Suite {
    root: tempfile::TempDir,
    forkd: PathBuf,
    deadline: Mutex<Instant>,
    warm: OnceLock<Result<Value, String>>,
    smp: OnceLock<Result<Value, String>>,
    programs: OnceLock<Result<PathBuf, String>>,
}

#[derive(Deserialize)]
struct ImageRow {
    digest: String,
    tags: Vec<String>,
    path: PathBuf,
}

impl Suite {
    /// Nothing is started yet.
    pub fn new() -> Result<Self> {
        let root = tempfile::Builder::new().prefix("forkd-e2e-").tempdir()?;
        let forkd = std::env::var_os("FORKD_BIN")
            .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_forkd")), PathBuf::from);
        let forkd = fs::canonicalize(&forkd)
            .with_context(|| format!("no forkd to test: {}", forkd.display()))?;
        fs::create_dir(root.path().join("home"))?;
        Ok(Self {
            root,
            forkd,
            deadline: Mutex::new(Instant::now() + SETUP),
            warm: OnceLock::new(),
            smp: OnceLock::new(),
            programs: OnceLock::new(),
        })
    }

    /// The directory that all is below.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// FORKD_HOME of the tests.
    pub fn home(&self) -> PathBuf {
        self.root().join("home")
    }

    /// Run directories of VMs.
    pub fn vms_dir(&self) -> PathBuf {
        self.home().join("run/vms")
    }

    /// Run directories of snapshots.
    pub fn snapshots_dir(&self) -> PathBuf {
        self.home().join("run/snapshots")
    }

    /// A new empty directory for one test.
    pub fn scratch(&self, name: &str) -> Result<PathBuf> {
        let dir = self.root().join(name);
        fs::create_dir_all(&dir)?;
        Ok(dir)
    }

    /// When the test at work has to be done.
    pub fn deadline(&self) -> Instant {
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the deadline of what follows.
    pub fn set_deadline(&self, limit: Duration) {
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now() + limit;
    }

    /// Sets the deadline for cleaning up.
    pub fn set_cleanup_deadline(&self) {
        self.set_deadline(Duration::from_secs(120));
    }

    /// The binary under test.
    pub fn binary(&self) -> &Path {
        &self.forkd
    }

    /// forkd, in the tests' home.
    pub fn forkd<A: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Run {
        self.forkd_in(&self.home(), args)
    }

    /// forkd, in another home.
    pub fn forkd_in<A: AsRef<std::ffi::OsStr>>(
        &self,
        home: &Path,
        args: impl IntoIterator<Item = A>,
    ) -> Run {
        Run::new(&self.forkd, self.deadline()).env("FORKD_HOME", home).args(args)
    }

    /// Another program.
    pub fn program(&self, path: &str) -> Run {
        Run::new(Path::new(path), self.deadline())
    }

    /// Whether anything has been started in the tests' home.
    pub fn has_run(&self) -> bool {
        self.home().join("run").exists()
    }

    /// Gives a home the Python image, without copying it.
    pub fn link_image(&self, home: &Path) -> Result<()> {
        if home.join("images/by-tag/python").exists() {
            return Ok(());
        }
        link(&self.python_image()?, "python", home)
    }

    /// Gives the tests' home an image of Debian packages, which is built once and kept beside the Python image of the tests.
    pub fn package_image(&self, tag: &str, packages: &[&str]) -> Result<()> {
        if self.home().join("images/by-tag").join(tag).exists() {
            return Ok(());
        }
        let cache = test_images()?;
        let forkd = || Run::new(&self.forkd, self.deadline()).env("FORKD_HOME", &cache);
        let build = forkd().args(["image", "build", "--tag", tag, "--debian", "bookworm"]);
        build.args(packages.iter().flat_map(|name| ["--package", name])).ok()?;
        let image = tagged(forkd(), tag)?.context("the image was built and is not there")?;
        link(&image, tag, &self.home())
    }

    /// The image that `make image` built, or one in a cache of the tests' own.
    fn python_image(&self) -> Result<ImageRow> {
        let forkd = || Run::new(&self.forkd, self.deadline());
        if let Some(image) = tagged(forkd().without_env("FORKD_HOME"), "python")? {
            return Ok(image);
        }
        let cache = test_images()?;
        let forkd = || forkd().env("FORKD_HOME", &cache);
        if tagged(forkd(), "python")?.is_none() {
            forkd().args(["image", "build"]).ok()?;
        }
        tagged(forkd(), "python")?.context("the image was built and is not there")
    }

    /// Directory of the guest's programs, compiled: `guest`, `probes`, `init_exits`, `init_silent`.
    pub fn programs(&self) -> Result<&Path> {
        let made = self.programs.get_or_init(|| self.compile().map_err(|e| format!("{e:#}")));
        made.as_deref().map_err(|e| anyhow::anyhow!("{e}"))
    }

    fn compile(&self) -> Result<PathBuf> {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest");
        let dir = self.scratch("programs")?;
        let gcc = |out: &str, files: &[&str]| {
            self.program("/usr/bin/gcc")
                .args(["-static", "-pthread", "-O2", "-s", "-Wall", "-Wextra", "-Werror"])
                // Inline assembly of the probes pushes onto the stack.
                .args(["-mno-red-zone", "-o"])
                .arg(dir.join(out))
                .args(files.iter().map(|file| sources.join(file)))
                .ok()
        };
        gcc("guest", &GUEST_SOURCES)?;
        gcc("probes", &PROBE_SOURCES)?;
        gcc("init_exits", &["init_exits.c"])?;
        gcc("init_silent", &["init_silent.c"])?;
        Ok(dir)
    }

    /// Makes the warm snapshot, once; gives what `snapshot create --json` said.
    pub fn warm(&self) -> Result<&Value> {
        let made = self.warm.get_or_init(|| {
            let program = ["import numpy", WARM_CODE].join("\n");
            self.create(WARM, 1, &program).map_err(|e| format!("no warm snapshot: {e:#}"))
        });
        made.as_ref().map_err(|e| anyhow::anyhow!("{e}"))
    }

    /// Makes the 2-vCPU snapshot, once.
    pub fn smp(&self) -> Result<&Value> {
        let made = self.smp.get_or_init(|| {
            let program = "import base64, os";
            self.create(SMP, 2, program).map_err(|e| format!("no 2-vCPU snapshot: {e:#}"))
        });
        made.as_ref().map_err(|e| anyhow::anyhow!("{e}"))
    }

    fn create(&self, tag: &str, vcpus: u32, code: &str) -> Result<Value> {
        self.create_with(tag, vcpus, MEM_MIB, code)
    }

    /// Makes a snapshot of the Python image.
    pub fn create_with(&self, tag: &str, vcpus: u32, mem_mib: u64, code: &str) -> Result<Value> {
        self.link_image(&self.home())?;
        self.create_of("python", tag, vcpus, [mem_mib, DISK_MIB], code)
    }

    /// Makes a snapshot of an image, with RAM and a disk of so many MiB. The guest's test program comes with the warm-up
    /// code, so that no test has to send it.
    pub fn create_of(
        &self,
        image: &str,
        tag: &str,
        vcpus: u32,
        [mem_mib, disk_mib]: [u64; 2],
        code: &str,
    ) -> Result<Value> {
        let limit = self.deadline();
        self.set_deadline(SETUP);
        let guest = fs::read(self.programs()?.join("guest"))?;
        let code = format!(
            "{code}\nimport base64, os\nwith open('/tmp/guest', 'wb') as f: f.write(base64.b64decode('{}'))\n\
             os.chmod('/tmp/guest', 0o755)\n",
            base64(&guest)
        );
        let begun = Instant::now();
        let (vcpus, mem, disk) = (vcpus.to_string(), mem_mib.to_string(), disk_mib.to_string());
        let output = self
            .forkd(["snapshot", "create", tag, "--json", "--warm", "-"])
            .args(["--image", image, "--vcpus", &vcpus, "--mem", &mem, "--disk", &disk])
            .stdin(code)
            .ok();
        // What the test had left when this began is left to it still.
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner) = limit + begun.elapsed();
        output?.json()
    }

    /// Forks children of the warm snapshot.
    pub fn fork(&self, count: usize) -> Result<Vec<Vm<'_>>> {
        self.warm()?;
        self.fork_of(WARM, count)
    }

    /// Forks one child of the warm snapshot.
    pub fn fork_one(&self) -> Result<Vm<'_>> {
        only(self.fork(1)?)
    }

    /// Forks one child of the 2-vCPU snapshot.
    pub fn fork_smp(&self) -> Result<Vm<'_>> {
        self.smp()?;
        only(self.fork_of(SMP, 1)?)
    }

    /// Forks children of any snapshot.
    pub fn fork_of(&self, tag: &str, count: usize) -> Result<Vec<Vm<'_>>> {
        let said = self.forkd(["fork", tag, "--json", "-n", &count.to_string()]).output()?;
        let Branched { pause, children } = Branched::read(self, said)?;
        ensure!(pause.is_none(), "a snapshot does not pause");
        ensure!(children.len() == count, "{} children instead of {count}", children.len());
        Ok(children)
    }

    /// Directory of the durable snapshots.
    pub fn store(&self) -> PathBuf {
        self.home().join("snapshots")
    }

    /// Puts a snapshot on the disk, once.
    pub fn save(&self, tag: &str) -> Result<()> {
        if !self.store().join(tag).exists() {
            self.forkd(["snapshot", "save", tag]).ok()?;
        }
        Ok(())
    }

    /// A VM of a durable snapshot, with RAM of that kind (`--memory`).
    pub fn load(&self, tag: &str, memory: &str) -> Result<Vm<'_>> {
        let said = self.forkd(["fork", tag, "--memory", memory, "--json"]).output()?;
        only(Branched::read(self, said)?.children)
    }

    /// Ids that `forkd ls` lists.
    pub fn ls(&self) -> Result<Vec<String>> {
        let text = self.forkd(["ls", "--quiet"]).ok()?.text();
        Ok(text.lines().map(str::to_string).collect())
    }

    /// Ends all VMs; snapshots stay.
    pub fn kill_all(&self) -> Result<()> {
        self.forkd(["kill", "--all"]).ok()?;
        let left = names(&self.vms_dir())?;
        ensure!(left.is_empty(), "`forkd kill --all` leaves {left:?}");
        Ok(())
    }

    /// The logs of all that lives in the tests' home, for whoever reads of a failure.
    pub fn tails(&self) -> String {
        let mut text = String::new();
        for parent in [self.vms_dir(), self.snapshots_dir()] {
            for name in names(&parent).unwrap_or_default().iter().take(4) {
                for log in ["console.log", "vmm.log"] {
                    let Ok(bytes) = fs::read(parent.join(name).join(log)) else { continue };
                    let log_text = String::from_utf8_lossy(&bytes);
                    let lines: Vec<&str> = log_text.lines().collect();
                    let tail = &lines[lines.len().saturating_sub(15)..];
                    text.push_str(&format!("--- {name}/{log}\n{}\n", tail.join("\n")));
                }
            }
        }
        text
    }
}

/// Home of the images that tests build.
fn test_images() -> Result<PathBuf> {
    let home = std::env::var_os("HOME").context("HOME is not set")?;
    Ok(Path::new(&home).join(".cache/forkd/test-images"))
}

/// The image that has a tag in the home of this forkd.
fn tagged(forkd: Run, tag: &str) -> Result<Option<ImageRow>> {
    let rows: Vec<ImageRow> = forkd.args(["image", "ls", "--json"]).ok()?.json()?;
    Ok(rows.into_iter().find(|row| row.tags.iter().any(|has| has == tag)))
}

/// Gives a home an image of another one.
fn link(image: &ImageRow, tag: &str, home: &Path) -> Result<()> {
    let images = home.join("images");
    let from = image.path.parent().context("an image has a directory")?;
    for dir in ["by-tag", "by-recipe"] {
        fs::create_dir_all(images.join(dir))?;
    }
    symlink(from, images.join(&image.digest))?;
    let target = format!("../{}", image.digest);
    symlink(&target, images.join("by-tag").join(tag))?;
    // Whoever asks for the image by its recipe is not to build it again.
    for entry in fs::read_dir(from.with_file_name("by-recipe"))? {
        let entry = entry?;
        if fs::read_link(entry.path())? == Path::new(&target) {
            symlink(&target, images.join("by-recipe").join(entry.file_name()))?;
        }
    }
    Ok(())
}

/// Names in a directory, sorted; none if there is no such directory.
pub fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(|| format!("cannot read {}", dir.display()))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        found.push(entry?.file_name().to_string_lossy().into_owned());
    }
    found.sort();
    Ok(found)
}

/// Looks again and again until something holds that nothing gives notice of.
pub fn eventually(deadline: Instant, what: &str, holds: impl Fn() -> Result<bool>) -> Result<()> {
    while !holds()? {
        if Instant::now() >= deadline {
            bail!("not in time: {what}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn only<T>(mut list: Vec<T>) -> Result<T> {
    ensure!(list.len() == 1, "{} instead of one", list.len());
    list.pop().context("one")
}

fn base64(bytes: &[u8]) -> String {
    let mut text = Vec::new();
    forkd_agent::protocol::base64_bytes::encode_into(bytes, &mut text);
    String::from_utf8_lossy(&text).into_owned()
}
