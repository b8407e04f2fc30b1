//! What forkd must not leave: processes, mounts, sockets, files, memory.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use forkd_sys::fork::PidFd;
use rustix::process::Signal;

use crate::fixture::{Suite, eventually, names};

/// How much less memory may be available than before, in MiB: what else runs on the host takes and gives as well.
const MEMORY_SLACK_MIB: u64 = 384;
/// How long the kernel may take to give back what dead processes had.
const MEMORY_WAIT: Duration = Duration::from_secs(30);

/// How the host was before.
pub struct Before {
    shm: Vec<String>,
    available_mib: u64,
}

impl Before {
    /// Looks.
    pub fn look() -> Result<Self> {
        Ok(Self { shm: names(Path::new("/dev/shm"))?, available_mib: available_mib()? })
    }

    /// Memory and /dev/shm are as they were.
    pub fn check(&self) -> Result<()> {
        let shm = names(Path::new("/dev/shm"))?;
        let ours: Vec<&String> =
            shm.iter().filter(|n| !self.shm.contains(n) && n.contains("forkd")).collect();
        ensure!(ours.is_empty(), "left in /dev/shm: {ours:?}");
        let deadline = Instant::now() + MEMORY_WAIT;
        eventually(deadline, "memory is given back", || {
            Ok(available_mib()? + MEMORY_SLACK_MIB >= self.available_mib)
        })
        .with_context(|| format!("{} MiB were available before", self.available_mib))
    }
}

/// MemAvailable of this host.
pub fn available_mib() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|l| l.split_whitespace().next()).context("MemAvailable")?;
    Ok(kib.parse::<u64>()? / 1024)
}

/// Pids of living processes that belong to a directory: they were started with it in their environment, or have something
/// in it open. Not this process.
pub fn processes_of(dir: &Path) -> Result<Vec<u32>> {
    let own = std::process::id();
    let dir = dir.to_string_lossy().into_owned();
    let mut found = Vec::new();
    for name in names(Path::new("/proc"))? {
        let Ok(pid) = name.parse::<u32>() else { continue };
        if pid != own && belongs(pid, &dir) {
            found.push(pid);
        }
    }
    Ok(found)
}

/// Children of a process, of whichever of its threads.
pub fn children(pid: u32) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for thread in names(Path::new(&format!("/proc/{pid}/task")))? {
        // A thread may end meanwhile.
        let text = fs::read_to_string(format!("/proc/{pid}/task/{thread}/children"));
        found.extend(text.unwrap_or_default().split_whitespace().flat_map(str::parse::<u32>));
    }
    Ok(found)
}

/// A process may end while it is looked at: then it belongs nowhere.
fn belongs(pid: u32, dir: &str) -> bool {
    let proc = Path::new("/proc").join(pid.to_string());
    let environment = fs::read(proc.join("environ")).unwrap_or_default();
    if environment.windows(dir.len()).any(|w| w == dir.as_bytes()) {
        return true;
    }
    let Ok(fds) = fs::read_dir(proc.join("fd")) else { return false };
    fds.flatten()
        .filter_map(|fd| fs::read_link(fd.path()).ok())
        .any(|target| target.to_string_lossy().contains(dir))
}

/// Lines of a file of /proc that name a directory.
fn lines_with(file: &str, dir: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {file}"))?;
    let dir = dir.to_string_lossy();
    Ok(text.lines().filter(|l| l.contains(dir.as_ref())).map(str::to_string).collect())
}

/// Nothing that belongs to a directory runs, is mounted or listens.
pub fn nothing_of(dir: &Path) -> Result<()> {
    let mounts = lines_with("/proc/self/mountinfo", dir)?;
    ensure!(mounts.is_empty(), "still mounted: {mounts:#?}");
    let sockets = lines_with("/proc/net/unix", dir)?;
    ensure!(sockets.is_empty(), "still listening: {sockets:#?}");
    let processes = processes_of(dir)?;
    let shown: Vec<String> = processes.iter().map(|pid| describe(*pid)).collect();
    ensure!(shown.is_empty(), "still running: {shown:?}");
    Ok(())
}

fn describe(pid: u32) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    format!("{pid}: {}", String::from_utf8_lossy(&line).replace('\0', " "))
}

/// The run directories of a home are empty, and nothing of it is left otherwise.
pub fn home_is_empty(home: &Path) -> Result<()> {
    for dir in ["run/vms", "run/snapshots"] {
        let left = names(&home.join(dir))?;
        ensure!(left.is_empty(), "left in {dir}: {left:?}");
    }
    let staging: Vec<String> = names(&home.join("images"))?
        .into_iter()
        .filter(|n| n.starts_with('.') && n != ".lock")
        .collect();
    ensure!(staging.is_empty(), "left in images: {staging:?}");
    nothing_of(home)
}

/// The last test: once the snapshots are removed, all is as before.
pub fn nothing_stays(suite: &Suite, before: &Before) -> Result<()> {
    suite.forkd(["snapshot", "rm", "--all"]).ok()?;
    home_is_empty(&suite.home())?;
    nothing_of(suite.root())?;
    before.check()
}

/// Ends whatever the suite has started, by SIGKILL, and removes its directory.
pub fn end_all(suite: &Suite) {
    for pid in processes_of(suite.root()).unwrap_or_default() {
        if let Ok(process) = PidFd::open(pid) {
            // It may have ended meanwhile.
            let _ = process.send_signal(Signal::KILL);
            let _ = process.wait(Some(Duration::from_secs(10)));
        }
    }
    if let Err(e) = fs::remove_dir_all(suite.root()) {
        println!("e2e: cannot remove {}: {e}", suite.root().display());
    }
}
