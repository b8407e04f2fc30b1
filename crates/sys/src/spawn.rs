//! What `std::process::Command` lacks: sessions, terminals, groups, cgroups and ties to the parent.
//!
//! [`prepare`] adds a hook that runs in the child between fork and exec. All that it needs is
//! allocated beforehand: the hook makes only system calls, as it must in the child of a process
//! that may have had threads. It does, in this order: own session or process group, controlling
//! terminal, cgroup, groups, gid, uid, parent-death signal (which a change of credentials would
//! clear), inherited descriptors, working directory (as the new user).

#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use rustix::process::Signal;

/// Most supplementary groups: the kernel's `NGROUPS_MAX`.
pub const MAX_GROUPS: usize = 65_536;

/// How a child differs from what `Command` makes by itself.
#[derive(Debug, Default)]
pub struct SpawnOptions {
    /// Become the leader of a new session (and process group).
    pub new_session: bool,
    /// The child's descriptor 0, 1 or 2 that shall be its controlling terminal; needs `new_session`.
    pub controlling_terminal: Option<RawFd>,
    /// Become the leader of a new process group in the same session.
    pub new_process_group: bool,
    /// Supplementary groups; needs `CAP_SETGID`.
    pub groups: Option<Vec<u32>>,
    /// Group id: real, effective and saved.
    pub gid: Option<u32>,
    /// User id: real, effective and saved.
    pub uid: Option<u32>,
    /// Signal to get when the spawning thread ends.
    pub parent_death_signal: Option<Signal>,
    /// Working directory, entered as the new user.
    pub cwd: Option<PathBuf>,
    /// An open `cgroup.procs` to join; written to by the child before it gives up its credentials.
    pub cgroup_procs: Option<OwnedFd>,
    /// Descriptors that the child keeps, under the same numbers. Those must not be 0, 1 or 2.
    pub inherit: Vec<OwnedFd>,
}

/// Adds the options to a command. They are done at each spawn.
///
/// # Errors
/// `InvalidInput` for a directory with a zero byte, more than [`MAX_GROUPS`] groups, or a
/// controlling terminal without a new session, and one of 0, 1 and 2 in `inherit`. Failures in the child are
/// returned by `spawn()`.
pub fn prepare(command: &mut Command, options: SpawnOptions) -> io::Result<()> {
    let bad = |text: String| io::Error::new(io::ErrorKind::InvalidInput, text);
    let cwd = match &options.cwd {
        Some(path) => Some(
            CString::new(path.as_os_str().as_bytes())
                .map_err(|_| bad(format!("{} contains a zero byte", path.display())))?,
        ),
        None => None,
    };
    if let Some(groups) = options.groups.as_ref().filter(|g| g.len() > MAX_GROUPS) {
        return Err(bad(format!("{} groups; at most {MAX_GROUPS} are possible", groups.len())));
    }
    if options.controlling_terminal.is_some() && !options.new_session {
        return Err(bad("a controlling terminal needs a new session".to_owned()));
    }
    if options.inherit.iter().any(|fd| fd.as_raw_fd() <= libc::STDERR_FILENO) {
        return Err(bad("standard streams cannot be inherited by number".to_owned()));
    }
    let hook = move || apply(&options, cwd.as_ref());
    // SAFETY: the hook makes system calls on memory that was allocated before the fork; it neither
    // allocates nor takes a lock, and its errors are bare error numbers.
    unsafe { command.pre_exec(hook) };
    Ok(())
}

/// Runs in the child: system calls only, no allocation.
fn apply(options: &SpawnOptions, cwd: Option<&CString>) -> io::Result<()> {
    if options.new_session {
        // SAFETY: takes no argument.
        check(unsafe { libc::setsid() })?;
    } else if options.new_process_group {
        // SAFETY: takes two numbers; 0, 0 is this process.
        check(unsafe { libc::setpgid(0, 0) })?;
    }
    if let Some(fd) = options.controlling_terminal {
        // SAFETY: the request takes a number; 0 means do not steal it from another session.
        check(unsafe { libc::ioctl(fd, libc::TIOCSCTTY as _, 0) })?;
    }
    if let Some(procs) = &options.cgroup_procs {
        // SAFETY: one byte of static memory is read. "0" is the writing process, cgroups(7).
        let wrote = unsafe { libc::write(procs.as_raw_fd(), c"0".as_ptr().cast(), 1) };
        if wrote != 1 {
            return Err(io::Error::last_os_error());
        }
    }
    if let Some(groups) = &options.groups {
        // SAFETY: the pointer is good for as many ids as are said.
        check(unsafe { libc::setgroups(groups.len(), groups.as_ptr()) })?;
    }
    if let Some(gid) = options.gid {
        // SAFETY: takes numbers.
        check(unsafe { libc::setresgid(gid, gid, gid) })?;
    }
    if let Some(uid) = options.uid {
        // SAFETY: takes numbers.
        check(unsafe { libc::setresuid(uid, uid, uid) })?;
    }
    if let Some(signal) = options.parent_death_signal {
        let number = libc::c_ulong::from(signal.as_raw().unsigned_abs());
        // SAFETY: takes numbers.
        check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, number, 0, 0, 0) })?;
    }
    for fd in &options.inherit {
        // SAFETY: takes two numbers; no flags: the descriptor outlives the exec.
        check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) })?;
    }
    if let Some(cwd) = cwd {
        // SAFETY: the string ends with a zero and lives across the call.
        check(unsafe { libc::chdir(cwd.as_ptr()) })?;
    }
    Ok(())
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result >= 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::turn;

    fn output(options: SpawnOptions, script: &str) -> String {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        prepare(&mut command, options).expect("prepare");
        let output = command.output().expect("spawn");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).expect("utf-8").trim().to_owned()
    }

    #[test]
    fn session_group_and_directory() {
        let _turn = turn();
        let ids = "cut -d' ' -f1,5,6 /proc/self/stat; echo $$; pwd";
        let options = SpawnOptions {
            new_session: true,
            cwd: Some("/usr".into()),
            parent_death_signal: Some(Signal::KILL),
            ..Default::default()
        };
        let text = output(options, ids);
        let lines: Vec<&str> = text.lines().collect();
        let stat: Vec<&str> = lines[0].split(' ').collect();
        assert_eq!((stat[1], stat[2]), (lines[1], lines[1]), "group and session are its own");
        assert_eq!(lines[2], "/usr");

        let options = SpawnOptions { new_process_group: true, ..Default::default() };
        let text = output(options, ids);
        let lines: Vec<&str> = text.lines().collect();
        let stat: Vec<&str> = lines[0].split(' ').collect();
        assert_eq!(stat[1], lines[1]);
        assert_ne!(stat[2], lines[1]);
    }

    #[test]
    fn user_and_groups() {
        let _turn = turn();
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let options = SpawnOptions {
            uid: Some(65_534),
            gid: Some(65_533),
            groups: Some(vec![1234, 65_533]),
            ..Default::default()
        };
        let text = output(options, "id -u; id -g; id -G");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(&lines[..2], ["65534", "65533"]);
        assert!(lines[2].split(' ').any(|g| g == "1234"), "{text}");
    }

    #[test]
    fn a_descriptor_is_inherited_by_its_number() {
        let _turn = turn();
        let file = crate::memfd::create("inherited", false).expect("memfd");
        let (kept, number) = (file.try_clone().expect("clone"), file.as_raw_fd());
        let inherit = vec![OwnedFd::from(kept)];
        let script = format!(
            "readlink /proc/self/fd/{}; readlink /proc/self/fd/{number} || echo none",
            inherit[0].as_raw_fd()
        );
        let text = output(SpawnOptions { inherit, ..Default::default() }, &script);
        assert_eq!(text, "/memfd:inherited (deleted)\nnone", "that one and no other");
    }

    #[test]
    fn failures_come_back_from_spawn() {
        let _turn = turn();
        let mut command = Command::new("/bin/true");
        let options = SpawnOptions { cwd: Some("/nonexistent".into()), ..Default::default() };
        prepare(&mut command, options).expect("prepare");
        assert_eq!(command.spawn().unwrap_err().kind(), io::ErrorKind::NotFound);
        let options = SpawnOptions { controlling_terminal: Some(0), ..Default::default() };
        assert!(prepare(&mut Command::new("/bin/true"), options).is_err());
        let options = SpawnOptions { cwd: Some("/a\0b".into()), ..Default::default() };
        assert!(prepare(&mut Command::new("/bin/true"), options).is_err());
    }
}
