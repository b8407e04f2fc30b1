//! Starting a VM process, and finding out why one died.
//!
//! `forkd vm` is started in a session of its own, so that it outlives this command and its terminal. It is
//! given its configuration on standard input, and says in one line whether the vCPUs run. A guard
//! ends it when this command is through with it, fails or is interrupted.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use forkd_api::types::{Fault, RestoreConfig, VmConfig, VmInfo};
use forkd_sys::reactor::wait_readable;
use forkd_sys::spawn::{SpawnOptions, prepare};
use serde::Serialize;

use crate::cleanup::Guard;
use crate::vm_client::VmClient;

/// How long a VM process has to load the kernel and start its vCPUs. It takes milliseconds; RAM of 64 GiB and a
/// cold disk take longer.
pub const START: Duration = Duration::from_secs(60);
/// The program that runs, whatever its file has become since it was started.
pub const THIS_PROGRAM: &str = "/proc/self/exe";
/// Most bytes of its first line, and of what is read of its logs.
const MAX_LINE: u64 = 64 << 10;
const LOG_TAIL: u64 = 64 << 10;

/// A VM process that was started here.
#[derive(Debug)]
pub struct Booted {
    /// The way to talk to it.
    pub client: VmClient,
    logs: Logs,
    guard: Guard,
}

/// Its logs, opened while they exist: it removes them when it ends.
#[derive(Debug)]
struct Logs {
    console: Option<File>,
    vmm: Option<File>,
}

/// How a VM process is started.
#[derive(Debug, Clone, Copy)]
pub struct Launch<'a> {
    /// The `forkd` that is run.
    pub program: &'a Path,
    /// How long it has to say that all is well.
    pub start: Duration,
}

impl Default for Launch<'_> {
    fn default() -> Self {
        Self { program: Path::new(THIS_PROGRAM), start: START }
    }
}

/// Starts a VM process; returns once its vCPUs run.
///
/// # Errors
/// It could not be started, or said why it can't run. Nothing is left.
pub fn start(config: &VmConfig) -> Result<Booted> {
    launch(config, &config.name, &config.dir, Launch::default(), Vec::new())
}

/// The same for a zygote from a durable snapshot, which returns once it can be forked, or for a VM from one.
///
/// # Errors
/// As [`start`].
pub fn restore(config: &RestoreConfig) -> Result<Booted> {
    restore_with(config, Launch::default(), None)
}

/// The same with another program or time limit, and with a memfd for [`RestoreConfig::memfd`].
///
/// # Errors
/// As [`start`].
pub fn restore_with(
    config: &RestoreConfig,
    how: Launch<'_>,
    memfd: Option<BorrowedFd<'_>>,
) -> Result<Booted> {
    let memfd = memfd.map(|fd| fd.try_clone_to_owned()).transpose();
    let memfd = memfd.context("cannot share the memfd of its RAM")?;
    let number = memfd.as_ref().map(AsRawFd::as_raw_fd);
    let config = RestoreConfig { memfd: number, ..config.clone() };
    let name = config.run_as.as_deref().unwrap_or(&config.id);
    launch(&config, name, &config.dir, how, memfd.into_iter().collect())
}

/// A run directory has the name of the VM's id.
fn launch<T: Serialize>(
    config: &T,
    name: &str,
    dir: &Path,
    how: Launch<'_>,
    inherit: Vec<OwnedFd>,
) -> Result<Booted> {
    let id = dir.file_name().unwrap_or_default().to_string_lossy();
    let text = serde_json::to_vec(config).context("cannot write the VM's configuration as JSON")?;
    // Not by its path: the file may have been replaced since this command was started.
    let mut command = Command::new(how.program);
    command.arg0("forkd").arg("vm").arg(format!("--id={id}"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let options = SpawnOptions {
        new_session: true,
        cwd: Some(PathBuf::from("/")),
        inherit,
        ..Default::default()
    };
    prepare(&mut command, options).context("cannot prepare the VM's process")?;
    let failed = || format!("cannot start the VM's process, {}", how.program.display());
    let mut child = command.spawn().with_context(failed)?;
    let mut stdin = child.stdin.take().context("the VM's process has no standard input")?;
    let child = Arc::new(Mutex::new(child));
    let guard = Guard::new({
        let (child, dir) = (child.clone(), dir.to_path_buf());
        move || {
            end(&mut child.lock().unwrap_or_else(PoisonError::into_inner));
            remove_remains(&dir);
        }
    });
    // If it died already, it says why on its output.
    let sent = stdin.write_all(&text).and_then(|()| stdin.flush());
    drop(stdin);
    let said = first_line(&child, how.start);
    let line = match (said, sent) {
        (Ok(line), _) => line,
        (Err(_), Err(e)) => return Err(e).context("cannot configure the VM's process"),
        (Err(e), Ok(())) => return Err(e),
    };
    check_started(&line, dir)?;
    let client = VmClient::new(dir, name);
    let logs = Logs {
        console: File::open(client.console()).ok(),
        vmm: File::open(dir.join("vmm.log")).ok(),
    };
    Ok(Booted { client, logs, guard })
}

/// `{"ok":true}`, or a fault.
fn check_started(line: &str, dir: &Path) -> Result<()> {
    if let Ok(fault) = serde_json::from_str::<Fault>(line) {
        bail!("{}", fault.fault_message);
    }
    match serde_json::from_str::<serde_json::Value>(line) {
        Ok(said) if said["ok"] == true => Ok(()),
        _ => bail!(
            "the VM's process said {line:?}, which is no answer; its directory was {}",
            dir.display()
        ),
    }
}

/// Reads the one line that a VM process says.
fn first_line(child: &Mutex<Child>, limit: Duration) -> Result<String> {
    let (stdout, stderr) = {
        let mut child = child.lock().unwrap_or_else(PoisonError::into_inner);
        (child.stdout.take(), child.stderr.take())
    };
    let stdout = stdout.context("the VM's process has no standard output")?;
    if !wait_readable(&stdout, Some(limit)).context("cannot wait for the VM's process")? {
        bail!("the VM's process did not start its vCPUs within {} s", limit.as_secs());
    }
    let mut line = String::new();
    BufReader::new(stdout.take(MAX_LINE))
        .read_line(&mut line)
        .context("cannot read what the VM's process says")?;
    if !line.is_empty() {
        return Ok(line.trim_end().to_string());
    }
    // It has died; what it said on its standard error tells why.
    let mut said = Vec::new();
    if let Some(stderr) = stderr {
        stderr
            .take(MAX_LINE)
            .read_to_end(&mut said)
            .context("cannot read what the VM's process says")?;
    }
    let said = String::from_utf8_lossy(&said);
    let why = said.lines().map(str::trim).find(|l| !l.is_empty()).unwrap_or("it said nothing");
    bail!("the VM's process died at its start: {why}")
}

impl Booted {
    /// Waits until its agent serves.
    ///
    /// # Errors
    /// The agent did not come up: says why, as far as the guest's console tells.
    pub fn wait_ready(&self, timeout: Duration) -> Result<VmInfo> {
        self.client
            .wait_ready(timeout)
            .map_err(|e| self.explain(e.context(self.client.who().to_string())))
    }

    /// Adds to an error what the logs tell of a VM that died.
    pub fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        let panic = self.logs.console.as_ref().and_then(|f| find_last(f, "Kernel panic"));
        if let Some(line) = panic {
            return anyhow!("the guest's kernel panicked: {line}");
        }
        if forkd_vmm::run_dir::is_alive(self.client.dir()) {
            return error;
        }
        let last = |log: &Option<File>| log.as_ref().and_then(|f| find_last(f, ""));
        match last(&self.logs.vmm).or_else(|| last(&self.logs.console)) {
            Some(line) => error.context(format!("the VM ended: {line}")),
            None => error.context("the VM ended"),
        }
    }

    /// Leaves it running when this command ends.
    pub fn keep(self) {
        self.guard.disarm();
    }

    /// Ends it and removes what it had.
    pub fn stop(self) {
        drop(self.guard);
    }
}

/// Kills a VM process of ours and reaps it.
fn end(child: &mut Child) {
    // Both fail only if it has been reaped, and then it is gone.
    let _ = child.kill();
    let _ = child.wait();
}

/// Removes a run directory whose owner is dead.
fn remove_remains(dir: &Path) {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            crate::output::note(&format!("forkd: cannot remove {}: {e}", dir.display()));
        }
        _ => {}
    }
}

/// The last line near the end of a log that holds `mark`, without control characters.
fn find_last(log: &File, mark: &str) -> Option<String> {
    let len = log.metadata().ok()?.len();
    let start = len.saturating_sub(LOG_TAIL);
    let mut tail = vec![0; usize::try_from(len - start).ok()?];
    log.read_exact_at(&mut tail, start).ok()?;
    let text = String::from_utf8_lossy(&tail);
    let clean =
        |l: &str| l.chars().filter(|c| !c.is_control()).collect::<String>().trim().to_string();
    text.lines().rev().filter(|l| l.contains(mark)).map(clean).find(|l| !l.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_the_error() {
        let dir = Path::new("/d");
        check_started(r#"{"ok":true}"#, dir).unwrap();
        let error = check_started(r#"{"fault_message":"no kernel"}"#, dir).unwrap_err();
        assert_eq!(error.to_string(), "no kernel");
        for bad in ["", "panic", r#"{"ok":false}"#] {
            assert!(check_started(bad, dir).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_reason_is_found_in_a_log() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("log");
        let noise = "x".repeat(100) + "\n";
        let mut text = noise.repeat(1000);
        text.push_str("[1.0] Kernel panic - not syncing: VFS\r\n[1.1] rebooting\n\n");
        std::fs::write(&path, text).unwrap();
        let log = File::open(&path).unwrap();
        assert_eq!(
            find_last(&log, "Kernel panic").unwrap(),
            "[1.0] Kernel panic - not syncing: VFS"
        );
        assert_eq!(find_last(&log, "").unwrap(), "[1.1] rebooting");
        assert_eq!(find_last(&log, "absent"), None);
    }
}
