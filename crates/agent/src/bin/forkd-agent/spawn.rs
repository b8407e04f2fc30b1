//! Starting a program without copying the agent: clone(2) with CLONE_VM and CLONE_VFORK, then exec.
//!
//! A plain fork(2) would copy page tables and then fault on every page that either side writes, at
//! about 1 ms a fault where guest kernel mode is emulated. So the child borrows the agent's memory, as
//! in posix_spawn(3), while the agent stands still. In return the child may do nothing but system
//! calls: everything it needs is prepared beforehand, and it writes to one place only, the
//! [`Failure`] on the agent's stack. posix_spawn itself will not do: it cannot make a terminal the
//! controlling one, nor change the user.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr;

/// Bytes of stack for the child. It calls a few shallow functions.
const STACK: usize = 32 << 10;

/// A program about to be started.
pub struct Program<'a> {
    /// Paths to try, in order, as execvp(3) does.
    pub paths: &'a [CString],
    /// Arguments, with the program's name.
    pub args: &'a [CString],
    /// Environment, `NAME=value`.
    pub env: &'a [CString],
    /// Working directory, entered as the new user.
    pub cwd: &'a CStr,
    /// If the directory cannot be entered, stay in `/`.
    pub cwd_optional: bool,
    /// Descriptors 0, 1 and 2. None of them may itself be one of those.
    pub stdio: [BorrowedFd<'a>; 3],
    /// Descriptors that the program keeps, under their own numbers.
    pub keep: &'a [BorrowedFd<'a>],
    /// Descriptor 0 becomes the controlling terminal.
    pub terminal: bool,
    /// Who it runs as; `None`: as the agent.
    pub credentials: Option<&'a Credentials>,
}

/// A user, in numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// What the child was doing when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Step {
    Session,
    Terminal,
    Descriptors,
    Groups,
    Group,
    User,
    Directory,
    Exec,
}

/// A program could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// No process could be made.
    #[error("cannot make a process: {0}")]
    Clone(io::Error),
    /// The working directory cannot be entered.
    #[error("cwd {0:?} cannot be entered: {1}")]
    Directory(String, io::Error),
    /// None of the paths can be executed.
    #[error("cannot execute {0:?}: {1}")]
    Exec(String, io::Error),
    /// Something before that failed.
    #[error("cannot {0}: {1}")]
    Setup(&'static str, io::Error),
}

/// Starts programs; keeps the stack that children use, so that its pages are touched once.
pub struct Spawner {
    stack: Vec<u128>,
}

struct Failure {
    step: Step,
    errno: c_int,
}

/// What the child reads. All pointers outlive the call: the parent stands still until exec or exit.
struct Plan<'a> {
    program: &'a Program<'a>,
    args: *const *const c_char,
    env: *const *const c_char,
    failure: Option<Failure>,
}

impl Spawner {
    /// A spawner with its stack.
    pub fn new() -> Self {
        Self { stack: vec![0; STACK / size_of::<u128>()] }
    }

    /// Starts the program as leader of its own session and process group; returns its process id.
    ///
    /// # Errors
    ///
    /// Those of the step that failed. No process is left behind.
    pub fn spawn(&mut self, program: &Program<'_>) -> Result<i32, SpawnError> {
        let pointers = |strings: &[CString]| -> Vec<*const c_char> {
            strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
        };
        let (args, env) = (pointers(program.args), pointers(program.env));
        let mut plan = Plan { program, args: args.as_ptr(), env: env.as_ptr(), failure: None };
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        let top = self.stack.as_mut_ptr_range().end.cast::<c_void>();
        // SAFETY: the stack is ours, aligned to 16 and used by one child at a time, since CLONE_VFORK
        // suspends this only thread until the child has executed or exited. For the same reason
        // `plan` and all it points to live longer than the child uses them, and no reference to
        // `plan` is used meanwhile. `child` makes only system calls.
        let pid = unsafe { libc::clone(child, top, flags, (&raw mut plan).cast::<c_void>()) };
        if pid < 0 {
            return Err(SpawnError::Clone(io::Error::last_os_error()));
        }
        let Some(Failure { step, errno }) = plan.failure else {
            return Ok(pid);
        };
        reap(pid);
        let error = io::Error::from_raw_os_error(errno);
        let text = |c: &CStr| c.to_string_lossy().into_owned();
        Err(match step {
            Step::Exec => {
                SpawnError::Exec(program.args.first().map(|a| text(a)).unwrap_or_default(), error)
            }
            Step::Directory => SpawnError::Directory(text(program.cwd), error),
            Step::Session => SpawnError::Setup("start a session", error),
            Step::Terminal => SpawnError::Setup("take the terminal", error),
            Step::Descriptors => SpawnError::Setup("set up descriptors", error),
            Step::Groups => SpawnError::Setup("set groups", error),
            Step::Group => SpawnError::Setup("set the group", error),
            Step::User => SpawnError::Setup("set the user", error),
        })
    }
}

/// Waits for a child that has failed before exec: it exits at once.
fn reap(pid: i32) {
    let Some(pid) = rustix::process::Pid::from_raw(pid) else { return };
    let options = rustix::process::WaitOptions::empty();
    while matches!(rustix::process::waitpid(Some(pid), options), Err(rustix::io::Errno::INTR)) {}
}

extern "C" fn child(arg: *mut c_void) -> c_int {
    // SAFETY: `arg` is the `Plan` of the parent, which is suspended and so does not use it.
    let plan = unsafe { &mut *arg.cast::<Plan<'_>>() };
    plan.failure = Some(run(plan));
    // SAFETY: _exit only ends this process.
    unsafe { libc::_exit(127) }
}

fn errno() -> c_int {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

/// Runs in the child; returns only what failed. Raw system calls for credentials: libc's would tell
/// them to threads that are not there.
fn run(plan: &Plan<'_>) -> Failure {
    let program = plan.program;
    macro_rules! check {
        ($step:expr, $call:expr) => {
            if $call < 0 {
                return Failure { step: $step, errno: errno() };
            }
        };
    }
    // SAFETY: every call below takes numbers, or pointers into `plan`, which outlives the child.
    // The child has its own descriptor table, signal dispositions, session and credentials, so that
    // nothing of this is felt by the agent, apart from errno.
    unsafe {
        check!(Step::Session, libc::setsid());
        for (target, fd) in (0..).zip(&program.stdio) {
            check!(Step::Descriptors, libc::dup2(fd.as_raw_fd(), target));
        }
        for fd in program.keep {
            check!(Step::Descriptors, libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0));
        }
        if program.terminal {
            check!(Step::Terminal, libc::ioctl(0, libc::TIOCSCTTY as _, 0));
        }
        if let Some(c) = program.credentials {
            let groups = c.groups.as_ptr();
            check!(Step::Groups, libc::syscall(libc::SYS_setgroups, c.groups.len(), groups));
            check!(Step::Group, libc::syscall(libc::SYS_setresgid, c.gid, c.gid, c.gid));
            check!(Step::User, libc::syscall(libc::SYS_setresuid, c.uid, c.uid, c.uid));
        }
        if libc::chdir(program.cwd.as_ptr()) < 0 {
            if !program.cwd_optional {
                return Failure { step: Step::Directory, errno: errno() };
            }
            check!(Step::Directory, libc::chdir(c"/".as_ptr()));
        }
        // Rust's runtime ignores it; an ignored signal would stay so over exec.
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut all);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const all, ptr::null_mut());
        let mut denied = false;
        for path in program.paths {
            libc::execve(path.as_ptr(), plan.args, plan.env);
            match errno() {
                libc::EACCES => denied = true,
                libc::ENOENT | libc::ENOTDIR => {}
                errno => return Failure { step: Step::Exec, errno },
            }
        }
        let errno = if denied { libc::EACCES } else { libc::ENOENT };
        Failure { step: Step::Exec, errno }
    }
}

/// The paths that execvp(3) would try for `cmd` with this `PATH`.
///
/// # Errors
///
/// Names the argument that has a zero byte.
pub fn candidates(cmd: &str, path: &str) -> Result<Vec<CString>, std::ffi::NulError> {
    if cmd.contains('/') {
        return Ok(vec![CString::new(cmd)?]);
    }
    path.split(':')
        .filter(|dir| !dir.is_empty())
        .map(|dir| CString::new(format!("{}/{cmd}", dir.trim_end_matches('/'))))
        .collect()
}

/// For descriptors that the kernel gave us: their numbers as arguments.
pub fn number(fd: BorrowedFd<'_>) -> RawFd {
    fd.as_raw_fd()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn strings(list: &[&str]) -> Vec<CString> {
        list.iter().map(|s| CString::new(*s).unwrap()).collect()
    }

    fn run_sh(script: &str, cwd: &CStr, cwd_optional: bool) -> Result<String, SpawnError> {
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        let result = Spawner::new().spawn(&Program {
            paths: &strings(&["/nonexistent/sh", "/bin/sh"]),
            args: &strings(&["sh", "-c", script]),
            env: &strings(&["A=1"]),
            cwd,
            cwd_optional,
            stdio: [null.as_fd(), writer.as_fd(), writer.as_fd()],
            keep: &[],
            terminal: false,
            credentials: None,
        });
        drop(writer);
        let pid = result?;
        let text = std::io::read_to_string(std::fs::File::from(reader)).unwrap();
        reap(pid);
        Ok(text)
    }

    #[test]
    fn environment_session_and_directory() {
        let text = run_sh("echo $A; pwd; [ $(ps -o sid= $$) = $$ ] && echo leader", c"/tmp", false);
        assert_eq!(text.unwrap(), "1\n/tmp\nleader\n");
        assert_eq!(run_sh("pwd", c"/nonexistent", true).unwrap(), "/\n");
    }

    #[test]
    fn failures_name_the_step() {
        let error = run_sh("", c"/nonexistent", false).unwrap_err();
        assert!(matches!(&error, SpawnError::Directory(dir, _) if dir == "/nonexistent"));
        let null = std::fs::File::open("/dev/null").unwrap();
        let error = Spawner::new()
            .spawn(&Program {
                paths: &candidates("nonexistent-program", "/bin:/usr/bin").unwrap(),
                args: &strings(&["nonexistent-program"]),
                env: &[],
                cwd: c"/",
                cwd_optional: false,
                stdio: [null.as_fd(); 3],
                keep: &[],
                terminal: false,
                credentials: None,
            })
            .unwrap_err();
        assert!(error.to_string().contains("\"nonexistent-program\": No such file"), "{error}");
    }

    #[test]
    fn path_is_searched_in_order() {
        assert_eq!(candidates("ls", "/a/::/b").unwrap(), strings(&["/a/ls", "/b/ls"]));
        assert_eq!(candidates("./ls", "/a").unwrap(), strings(&["./ls"]));
        assert!(candidates("l\0s", "/a").is_err());
    }
}
