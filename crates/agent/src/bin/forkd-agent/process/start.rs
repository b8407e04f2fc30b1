//! Starting a process: user, directory, environment, pipes or terminal.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use forkd_agent::protocol::connect::{Code, RpcError};
use forkd_agent::protocol::init::valid_env;
use forkd_agent::protocol::process::{PtySize, StartRequest};
use forkd_sys::fds::set_nonblocking;
use forkd_sys::reactor::Interest;
use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::stdin::Stdin;
use super::{MAX_PROCESSES, Process, output_source};
use crate::agent::Agent;
use crate::slab::Key;
use crate::spawn::{Program, candidates};
use crate::users::{self, User};

/// Where programs are looked for unless told otherwise.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Bytes that a pipe to or from a process is asked to hold. The larger, the fewer the turns that the process and the agent take
/// at a CPU: each costs a guest some 50 us on a PVM host.
pub const PIPE: usize = 256 << 10;

/// A pipe of [`PIPE`] bytes, or of the usual size if the kernel does not give as much. Room is taken when it is filled.
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let ends = pipe_with(PipeFlags::CLOEXEC)?;
    // Refused where the user's pipes hold too much already: a smaller pipe does as well.
    let _ = fcntl_setpipe_size(&ends.0, PIPE);
    Ok(ends)
}

fn invalid(message: impl Into<String>) -> RpcError {
    RpcError::new(Code::InvalidArgument, message)
}

fn internal(what: &str, error: &io::Error) -> RpcError {
    RpcError::new(Code::Internal, format!("cannot {what}: {error}"))
}

/// Our ends and the child's ends of what connects us.
struct Io {
    stdin: Option<OwnedFd>,
    outputs: [Option<OwnedFd>; 2],
    child: [OwnedFd; 3],
}

impl Io {
    fn open(request: &StartRequest) -> io::Result<Self> {
        match request.pty {
            Some(pty) => Self::terminal(pty.size.unwrap_or(PtySize { cols: 80, rows: 24 })),
            None => Self::pipes(request.stdin.unwrap_or(true)),
        }
    }

    fn pipes(stdin: bool) -> io::Result<Self> {
        let (our_out, out) = pipe()?;
        let (our_err, err) = pipe()?;
        let (input, our_input) = if stdin {
            let (input, ours) = pipe()?;
            // Outputs are read only when they have something; input may find its pipe full.
            set_nonblocking(&ours, true)?;
            (input, Some(ours))
        } else {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            (rustix::fs::open(c"/dev/null", flags, Mode::empty())?, None)
        };
        Ok(Self {
            stdin: our_input,
            outputs: [Some(our_out), Some(our_err)],
            child: [input, out, err],
        })
    }

    fn terminal(size: PtySize) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let ours = rustix::fs::open(c"/dev/ptmx", flags, Mode::empty())?;
        unlockpt(&ours)?;
        let peer_flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let child = ioctl_tiocgptpeer(&ours, peer_flags)?;
        tcsetwinsize(&ours, winsize(size))?;
        Ok(Self {
            stdin: Some(ours.try_clone()?),
            outputs: [Some(ours), None],
            child: [child.try_clone()?, child.try_clone()?, child],
        })
    }
}

/// The kernel's form of a terminal's size; sizes beyond its range are cut.
pub fn winsize(size: PtySize) -> Winsize {
    let cut = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
    Winsize { ws_row: cut(size.rows), ws_col: cut(size.cols), ws_xpixel: 0, ws_ypixel: 0 }
}

/// Expands a directory as envd does: `~`, and relative to the home.
fn directory(cwd: Option<&str>, home: &str) -> String {
    match cwd {
        None | Some("" | "~") => home.to_owned(),
        Some(path) if path.starts_with('/') => path.to_owned(),
        Some(path) => format!("{home}/{}", path.strip_prefix("~/").unwrap_or(path)),
    }
}

/// The environment of a process of this user: what everybody gets, what `/init` set, what the request
/// sets; the later wins.
pub fn environment(
    user: &User,
    terminal: bool,
    layers: &[&BTreeMap<String, String>],
) -> BTreeMap<String, String> {
    let mut env: BTreeMap<String, String> = [
        ("PATH", DEFAULT_PATH),
        ("HOME", &user.home),
        ("USER", &user.name),
        ("LOGNAME", &user.name),
        ("SHELL", &user.shell),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    if terminal {
        env.insert("TERM".into(), "xterm-256color".into());
    }
    for layer in layers {
        env.extend(layer.iter().map(|(name, value)| (name.clone(), value.clone())));
    }
    env
}

/// As execve(2) wants it.
///
/// # Errors
///
/// A variable that no process can be given, by name.
pub fn env_strings(env: &BTreeMap<String, String>) -> Result<Vec<CString>, String> {
    env.iter()
        .map(|(name, value)| {
            let string = valid_env(name, value).then(|| CString::new(format!("{name}={value}")));
            string.and_then(Result::ok).ok_or_else(|| name.clone())
        })
        .collect()
}

impl Agent {
    /// Starts a process; returns its key and process id.
    pub fn start_process(
        &mut self,
        request: StartRequest,
        user: Option<&str>,
    ) -> Result<(Key, i32), RpcError> {
        if self.processes.all.len() >= MAX_PROCESSES {
            return Err(RpcError::new(
                Code::ResourceExhausted,
                format!("{MAX_PROCESSES} processes run already"),
            ));
        }
        let config = &request.process;
        if config.cmd.is_empty() {
            return Err(invalid("process.cmd is empty"));
        }
        let user = users::lookup(user.unwrap_or("root"))
            .map_err(|e| RpcError::new(Code::Unauthenticated, e.to_string()))?;
        let env = environment(&user, request.pty.is_some(), &[&self.env, &config.envs]);
        let path = env.get("PATH").map_or(DEFAULT_PATH, String::as_str);
        let zero = |_| invalid("process.cmd or process.args has a zero byte");
        let paths = candidates(&config.cmd, path).map_err(zero)?;
        let args: Vec<CString> = std::iter::once(&config.cmd)
            .chain(&config.args)
            .map(|arg| CString::new(arg.as_str()).map_err(zero))
            .collect::<Result<_, _>>()?;
        let env = env_strings(&env).map_err(|name| {
            invalid(format!("process.envs: no process can be given the variable {name:?}"))
        })?;
        let cwd = CString::new(directory(config.cwd.as_deref(), &user.home))
            .map_err(|_| invalid("process.cwd has a zero byte"))?;

        let io = Io::open(&request).map_err(|e| internal("make pipes or a terminal", &e))?;
        let [stdin, stdout, stderr] = &io.child;
        let pid = self
            .spawner
            .spawn(&Program {
                paths: &paths,
                args: &args,
                env: &env,
                cwd: &cwd,
                cwd_optional: config.cwd.as_deref().unwrap_or("").is_empty(),
                stdio: [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()],
                keep: &[],
                terminal: request.pty.is_some(),
                credentials: self.system.credentials(&user),
            })
            .map_err(|e| invalid(e.to_string()))?;
        drop(io.child);
        let key = self.processes.all.insert(Process {
            pid,
            tag: request.tag,
            config: request.process,
            stdin: Stdin::new(io.stdin),
            outputs: io.outputs,
            terminal: request.pty.is_some(),
            subscribers: Vec::new(),
            busy: false,
            paused: false,
            deadline: None,
            timed_out: false,
            end: None,
            drained: 0,
            lingering: false,
        });
        self.processes.by_pid.insert(pid, key);
        self.watch_outputs(key);
        Ok((key, pid))
    }

    fn watch_outputs(&mut self, key: Key) {
        let Some(process) = self.processes.all.get(key) else { return };
        for (index, fd) in process.outputs.iter().enumerate() {
            if let Some(fd) = fd {
                let token = output_source(key, index).token();
                if let Err(error) = self.reactor.add(fd, token, Interest::READ) {
                    self.report(&format_args!("cannot watch a process's output: {error}"));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_as_envd_expands_them() {
        for (cwd, want) in [
            (None, "/home/u"),
            (Some(""), "/home/u"),
            (Some("~"), "/home/u"),
            (Some("~/x"), "/home/u/x"),
            (Some("x/y"), "/home/u/x/y"),
            (Some("/x"), "/x"),
        ] {
            assert_eq!(directory(cwd, "/home/u"), want, "{cwd:?}");
        }
    }

    #[test]
    fn later_layers_of_the_environment_win() {
        let user = users::lookup("root").unwrap();
        let layer = |v: &str| BTreeMap::from([("A".to_owned(), v.to_owned())]);
        let env = environment(&user, true, &[&layer("1"), &layer("2")]);
        assert_eq!((env["A"].as_str(), env["HOME"].as_str()), ("2", "/root"));
        assert_eq!(env["TERM"], "xterm-256color");
        assert!(env_strings(&env).unwrap().contains(&CString::new("A=2").unwrap()));
        let bad = BTreeMap::from([("A=B".to_owned(), String::new())]);
        assert_eq!(env_strings(&bad), Err("A=B".to_owned()));
    }
}
