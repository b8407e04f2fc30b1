//! The root: a read-only image below, a tmpfs above, and the way into it.
//!
//! The image is mapped straight from the host's page cache where it is a pmem device (`dax`), so it
//! takes none of the guest's RAM. Nothing is asked of the image: directories that it lacks are made in
//! the layer above.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use forkd_sys::reactor::wait_readable;
use rustix::fs::inotify;
use rustix::mount::{MountFlags, mount, mount_move};

use super::cmdline::Cmdline;
use super::{BootError, failed, mount_at, refused};

/// Waits until one of the root devices is there.
pub fn wait(cmdline: &Cmdline) -> Result<String, BootError> {
    let found = || cmdline.roots.iter().find(|root| Path::new(root).exists()).cloned();
    if let Some(root) = found() {
        return Ok(root);
    }
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
        .map_err(refused("watch /dev"))?;
    inotify::add_watch(&watch, c"/dev", inotify::WatchFlags::CREATE)
        .map_err(refused("watch /dev"))?;
    let deadline = Instant::now() + cmdline.root_timeout;
    let mut events = [0; 4096];
    loop {
        // Looked for after the watch is set, so that none is missed.
        if let Some(root) = found() {
            return Ok(root);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(BootError {
                what: format!("find the root device {}", cmdline.roots.join(" or ")),
                why: format!(
                    "it has not appeared within {} s; /dev has {}",
                    cmdline.root_timeout.as_secs(),
                    block_devices()
                ),
            });
        }
        wait_readable(&watch, Some(left)).map_err(failed("watch /dev"))?;
        // Only the wake-up counts. Nothing to read is no error.
        let _ = rustix::io::read(&watch, &mut events);
    }
}

/// Names of what may be a disk, for the error.
fn block_devices() -> String {
    let Ok(dir) = std::fs::read_dir("/sys/class/block").or_else(|_| std::fs::read_dir("/dev"))
    else {
        return "nothing".into();
    };
    let mut names: Vec<String> = dir
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| ["pmem", "vd", "sd", "nvme"].iter().any(|p| name.starts_with(p)))
        .collect();
    names.sort();
    if names.is_empty() { "no disk".into() } else { names.join(", ") }
}

/// Mounts the root and its overlay, and makes it `/`. /dev and /proc come along.
pub fn enter(device: &str, cmdline: &Cmdline) -> Result<(), BootError> {
    for dir in ["/lower", "/rw", "/newroot"] {
        match rustix::fs::mkdir(dir, 0o755.into()) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => return Err(refused(format!("make {dir}"))(errno)),
        }
    }
    mount_lower(device, cmdline)?;
    let size = cmdline.overlay_mib.map(|mib| format!(",size={mib}m")).unwrap_or_default();
    mount_at("tmpfs", "/rw", "tmpfs", MountFlags::empty(), &format!("mode=0755{size}"))?;
    for dir in ["/rw/upper", "/rw/work"] {
        rustix::fs::mkdir(dir, 0o755.into()).map_err(refused(format!("make {dir}")))?;
    }
    // The upper layer is RAM: syncing it would be work for nothing.
    let layers = "lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work,volatile";
    mount_at("overlay", "/newroot", "overlay", MountFlags::empty(), layers)?;
    for dir in ["/dev", "/proc"] {
        move_mount(dir, &format!("/newroot{dir}"))?;
    }
    rustix::process::chdir("/newroot").map_err(refused("enter the new root"))?;
    mount_move(".", "/").map_err(refused("move the new root to /"))?;
    rustix::process::chroot(".").map_err(refused("change to the new root"))?;
    rustix::process::chdir("/").map_err(refused("enter /"))
}

fn move_mount(from: &str, to: &str) -> Result<(), BootError> {
    let mut result = mount_move(from, to);
    if result == Err(rustix::io::Errno::NOENT) {
        std::fs::create_dir_all(to).map_err(failed(format!("make {to}")))?;
        result = mount_move(from, to);
    }
    result.map_err(refused(format!("move {from} to {to}")))
}

/// How often a root device that cannot be opened yet is tried. Nothing that the agent can see at this point
/// tells when: the kernel makes the node first, and the disk behind it some 100 ms later on slow hosts.
const RETRY: Duration = Duration::from_millis(10);

/// Mounts the image, once its device can be opened.
fn mount_lower(device: &str, cmdline: &Cmdline) -> Result<(), BootError> {
    let deadline = Instant::now() + cmdline.root_timeout;
    loop {
        match try_types(device, cmdline) {
            Ok(()) => return Ok(()),
            Err(Refusal::NoDisk) if Instant::now() < deadline => std::thread::sleep(RETRY),
            Err(refusal) => {
                let what = format!("mount the root image {device}");
                return Err(BootError { what, why: refusal.to_string() });
            }
        }
    }
}

/// Why the image could not be mounted.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    /// The node is there, the disk is not.
    #[error("there is no disk behind its node")]
    NoDisk,
    /// What was tried, and what came of it.
    #[error("{0}")]
    All(String),
}

/// Tries the file systems, with DAX where the device is memory.
fn try_types(device: &str, cmdline: &Cmdline) -> Result<(), Refusal> {
    let pmem = device.starts_with("/dev/pmem");
    let mut tried = Vec::new();
    for kind in &cmdline.types {
        // erofs and ext4 know `dax=always`; whoever cannot do it refuses the option.
        let options: &[&std::ffi::CStr] = if pmem { &[c"dax=always", c""] } else { &[c""] };
        for options in options {
            match mount(device, "/lower", kind.as_str(), MountFlags::RDONLY, *options) {
                Ok(()) => return Ok(()),
                // Not the next option instead: it would be mounted without DAX if the disk came meanwhile.
                Err(rustix::io::Errno::NXIO) => return Err(Refusal::NoDisk),
                Err(errno) => {
                    let words = options.to_string_lossy();
                    tried.push(format!("{kind} {words}: {}", io::Error::from(errno)));
                }
            }
        }
    }
    Err(Refusal::All(tried.join("; ")))
}
