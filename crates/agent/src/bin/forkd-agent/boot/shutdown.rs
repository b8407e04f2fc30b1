//! The clean end of the machine: processes first, then file systems, then the power.
//!
//! A microVM ends by a reset (the kernel's `reboot=k` pulses the keyboard controller's reset line),
//! whether it was asked to power off or to restart: there is no firmware that could do either.

use std::fs;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{WaitOptions, wait};
use rustix::system::{RebootCommand, reboot};

use crate::agent::Agent;
use crate::kill;
use crate::system;

/// How long processes may take to end when asked.
const TERM_GRACE: Duration = Duration::from_secs(3);
/// How long they may take when killed: they may be in the kernel.
const KILL_GRACE: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(10);

/// Ends everything and resets the machine.
pub fn restart(agent: Option<Agent>) -> ! {
    // What it holds of file systems must not keep them busy.
    drop(agent);
    // Fails only if there is no other process.
    if kill::all(libc::SIGTERM).is_ok() {
        let _ = kill::all(libc::SIGHUP);
        if !reap_all(TERM_GRACE) && kill::all(libc::SIGKILL).is_ok() {
            reap_all(KILL_GRACE);
        }
    }
    rustix::fs::sync();
    unmount_disks();
    match reboot(RebootCommand::Restart) {
        Ok(()) => {}
        Err(errno) => system::console(&format_args!("cannot reset the machine: {errno}")),
    }
    // PID 1 must not end. If the machine still runs, there is nothing left to do on it.
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// Waits for all processes to end; false if some have not in time.
fn reap_all(limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) | Err(Errno::INTR) => {}
            Err(_) => return true,
            Ok(None) if Instant::now() >= deadline => return false,
            Ok(None) => std::thread::sleep(POLL),
        }
    }
}

/// Unmounts file systems that are on disks, the last mounted first. The root's layers are RAM and a
/// read-only image.
fn unmount_disks() {
    let Ok(mounts) = fs::read_to_string("/proc/self/mounts") else { return };
    for line in mounts.lines().rev() {
        let mut fields = line.split(' ');
        if let (Some(source), Some(target)) = (fields.next(), fields.next())
            && source.starts_with("/dev/")
            && target != "/"
            && let Err(errno) = unmount(target, UnmountFlags::empty())
        {
            system::console(&format_args!("cannot unmount {target}: {errno}"));
        }
    }
}
