//! PID 1: from the kernel's initramfs to a running agent, and the way back.
//!
//! ```text
//! /dev, /proc ─> root device ─> read-only root + tmpfs = overlay ─> enter it ─> the other pseudo
//! file systems, loopback, files of /etc ─> listen ─> hello ─> serve ─> terminate, sync, restart
//! ```
//!
//! Kernel command line:
//!
//! | word | meaning |
//! |---|---|
//! | `forkd.root=DEVICE` | the root image; default: `/dev/pmem0`, or `/dev/vda` if that comes first |
//! | `forkd.rootfstype=TYPE` | its file system; default: erofs, ext4 and squashfs are tried |
//! | `forkd.overlay_mib=N` | size of the writable layer; default: half of the RAM |
//! | `forkd.root_timeout_s=N` | how long to wait for the root device; default: 30 |
//! | `forkd.tcp` | listen on TCP as well, on all addresses |
//!
//! Whatever fails before the agent serves is fatal: one line on the console, then a restart, which
//! ends the VM.

mod cmdline;
mod files;
mod net;
mod root;
mod shutdown;

use std::fmt::Display;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use forkd_agent::protocol::hello::{BootTimings, Hello};
use forkd_agent::protocol::{ENVD_PORT, HELLO_PORT, INTERPRETER_PORT};
use forkd_sys::clock;
use rustix::mount::{MountFlags, mount};
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::agent::{Agent, Listener};
use crate::conn::Service;
use crate::system::{self, System};
use crate::vsock;
use cmdline::Cmdline;

/// How long the host may take to accept the hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Open files that a process may have: more than the kernel's 1,024, as on any server.
const OPEN_FILES: u64 = 65_536;

/// A step of the boot failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}: {why}")]
pub struct BootError {
    what: String,
    why: String,
}

/// Makes errors of a step.
pub fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> BootError {
    let what = what.into();
    move |error| BootError { what, why: error.to_string() }
}

/// Like [`failed`], for rustix.
pub fn refused(what: impl Into<String>) -> impl FnOnce(rustix::io::Errno) -> BootError {
    let what = what.into();
    move |errno| BootError { what, why: io::Error::from(errno).to_string() }
}

/// Runs as PID 1; never returns.
pub fn run() -> ! {
    match serve() {
        Ok(stop) => shutdown::restart(Some(stop)),
        Err(error) => {
            system::console(&format_args!("fatal: {error}"));
            shutdown::restart(None)
        }
    }
}

fn mark() -> u64 {
    clock::boottime_ns() / 1000
}

fn serve() -> Result<Agent, BootError> {
    let mut boot = BootTimings { start_us: mark(), ..Default::default() };
    mount_early()?;
    // Ctrl+Alt+Del shall be a signal, not a reset: that is how the VMM asks for a clean end.
    rustix::system::reboot(rustix::system::RebootCommand::CadOff)
        .map_err(refused("take over Ctrl+Alt+Del"))?;
    let cmdline = Cmdline::read()?;
    boot.pseudo_us = mark();
    let device = root::wait(&cmdline)?;
    boot.root_found_us = mark();
    root::enter(&device, &cmdline)?;
    boot.root_us = mark();
    set_up()?;
    boot.setup_us = mark();
    let mut agent = Agent::new(System::guest(), listeners(&cmdline)?)
        .map_err(failed("start the event loop"))?;
    boot.listening_us = mark();
    hello(boot);
    agent.run().map_err(failed("wait for events"))?;
    Ok(agent)
}

/// Mounts what everything else needs, and makes sure that there is a console.
fn mount_early() -> Result<(), BootError> {
    let quiet = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount_at("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, "mode=0755")?;
    mount_at("proc", "/proc", "proc", quiet | MountFlags::NODEV, "")?;
    // The kernel has opened it for us if the initramfs had the node. Descriptors 0 to 2 must be open
    // in any case: others would get their numbers, and be taken for them.
    loop {
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
        let console = rustix::fs::open(c"/dev/console", flags, rustix::fs::Mode::empty())
            .or_else(|_| rustix::fs::open(c"/dev/null", flags, rustix::fs::Mode::empty()))
            .map_err(refused("open /dev/console"))?;
        if std::os::fd::AsRawFd::as_raw_fd(&console) > 2 {
            return Ok(());
        }
        let _: i32 = std::os::fd::IntoRawFd::into_raw_fd(console);
    }
}

/// Mounts, making the directory if it is missing.
pub fn mount_at(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    data: &str,
) -> Result<(), BootError> {
    let data = std::ffi::CString::new(data).map_err(|e| failed("mount")(e.into()))?;
    let attempt = || mount(source, target, kind, flags, data.as_c_str());
    let mut result = attempt();
    if result == Err(rustix::io::Errno::NOENT) && !Path::new(target).is_dir() {
        std::fs::create_dir_all(target).map_err(failed(format!("make {target}")))?;
        result = attempt();
    }
    match result {
        // The kernel mounts devtmpfs by itself if configured to.
        Ok(()) | Err(rustix::io::Errno::BUSY) => Ok(()),
        Err(errno) => Err(refused(format!("mount {kind} at {target}"))(errno)),
    }
}

/// What is left to do once the root is there. What an image may do without is only reported.
fn set_up() -> Result<(), BootError> {
    let quiet = MountFlags::NOSUID | MountFlags::NODEV;
    let none = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    for (source, target, kind, flags, data) in [
        ("sysfs", "/sys", "sysfs", none, ""),
        ("cgroup2", "/sys/fs/cgroup", "cgroup2", none, "nsdelegate"),
        ("devpts", "/dev/pts", "devpts", MountFlags::NOSUID, "gid=5,mode=0620,ptmxmode=0666"),
        ("tmpfs", "/dev/shm", "tmpfs", quiet, "mode=1777"),
        ("tmpfs", "/run", "tmpfs", quiet, "mode=0755"),
        ("tmpfs", "/tmp", "tmpfs", quiet, "mode=1777"),
    ] {
        if let Err(error) = mount_at(source, target, kind, flags, data) {
            system::console(&error);
        }
    }
    report(&"bring up loopback", net::loopback_up());
    report(&"write files of /etc", files::defaults());
    report(&"allow huge pages", allow_huge_pages());
    report(&"calm the kernel's housekeeping", calm_housekeeping());
    report(&"let go of the console", system::let_go_of_console());
    let limit = Rlimit { current: Some(OPEN_FILES), maximum: Some(OPEN_FILES) };
    setrlimit(Resource::Nofile, limit).map_err(refused("raise the limit of open files"))
}

/// Huge pages for who asks for them: with less than 512 MiB of RAM, as a guest of 512 MiB sees, the
/// kernel turns them off altogether. Where page faults are emulated, they make big arrays several
/// times cheaper to fill.
fn allow_huge_pages() -> io::Result<()> {
    const ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
    match std::fs::write(ENABLED, "madvise") {
        // A kernel without them.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Rounds that the kernel makes several times a second whether or not there is anything to do. Of a hundred
/// idle guests on a host, each would cost the host a share of a CPU.
fn calm_housekeeping() -> io::Result<()> {
    for (setting, value) in [
        // No compaction ahead of need (every 0.5 s).
        ("/proc/sys/vm/compaction_proactiveness", "0"),
        // Folding of per-CPU memory statistics, which reads of them do anyway: every 1 s -> every 2 min.
        ("/proc/sys/vm/stat_interval", "120"),
        // Small pages are made huge behind their owner's back every 10 s. Page faults make huge ones by themselves.
        ("/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs", "600000"),
        // Neighbours that some driver asked to have probed; there are none: every 5 s -> every hour.
        ("/proc/sys/net/ipv4/neigh/default/interval_probe_time_ms", "3600000"),
        ("/proc/sys/net/ipv6/neigh/default/interval_probe_time_ms", "3600000"),
    ] {
        match std::fs::write(setting, value) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => result?,
        }
    }
    Ok(())
}

fn report(what: &dyn Display, result: io::Result<()>) {
    if let Err(error) = result {
        system::console(&format_args!("cannot {what}: {error}"));
    }
}

fn listeners(cmdline: &Cmdline) -> Result<Vec<Listener>, BootError> {
    let mut listeners = Vec::new();
    for (port, service) in [(ENVD_PORT, Service::Envd), (INTERPRETER_PORT, Service::Interpreter)] {
        let fd = vsock::listen(port).map_err(failed(format!("listen on vsock port {port}")))?;
        listeners.push(Listener { fd, service });
        if cmdline.tcp {
            let fd = listen_tcp(port).map_err(failed(format!("listen on TCP port {port}")))?;
            listeners.push(Listener { fd, service });
        }
    }
    Ok(listeners)
}

fn listen_tcp(port: u32) -> io::Result<OwnedFd> {
    let port = u16::try_from(port).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let listener = std::net::TcpListener::bind(("0.0.0.0", port))?;
    listener.set_nonblocking(true)?;
    Ok(listener.into())
}

/// Tells the host that the agent listens. A host that does not want to know is none of our business.
fn hello(boot: BootTimings) {
    let Ok(fd) = vsock::connect_host(HELLO_PORT, HELLO_TIMEOUT) else { return };
    let hello = Hello { agent_version: env!("CARGO_PKG_VERSION").into(), boot };
    let mut line = serde_json::to_vec(&hello).unwrap_or_default();
    line.push(b'\n');
    // One small message into an empty socket: it is taken as a whole, or the host has gone.
    let _ = rustix::io::write(fd.as_fd(), &line);
}
