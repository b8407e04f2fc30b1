//! The machine that the agent runs on: its identity and clock, or, in tests, a directory that shows
//! what would have been done to them.

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use forkd_sys::clock;

use crate::crng::Crng;
use crate::spawn::Credentials;
use crate::users::User;

/// A clock that is off by less is left alone: setting it costs more than it gains.
const CLOCK_TOLERANCE_NS: u64 = 1_000_000;

/// The machine.
pub struct System {
    /// Nothing outside this directory is changed.
    sandbox: Option<PathBuf>,
    crng: Option<Crng>,
    machine_id: Option<File>,
    hostname: String,
}

/// Something about the machine cannot be changed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {0}: {1}")]
pub struct SystemError(&'static str, io::Error);

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> SystemError {
    move |error| SystemError(what, error)
}

impl System {
    /// The guest, as its PID 1.
    pub const fn guest() -> Self {
        Self { sandbox: None, crng: None, machine_id: None, hostname: String::new() }
    }

    /// A directory that stands for the machine.
    pub const fn sandbox(dir: PathBuf) -> Self {
        Self { sandbox: Some(dir), crng: None, machine_id: None, hostname: String::new() }
    }

    fn is_guest(&self) -> bool {
        self.sandbox.is_none()
    }

    /// Feeds the kernel's random number generator.
    pub fn mix_entropy(&mut self, entropy: &[u8]) -> Result<(), SystemError> {
        let Some(dir) = &self.sandbox else {
            let crng = match &self.crng {
                Some(crng) => crng,
                None => self.crng.insert(Crng::open().map_err(failed("open /dev/urandom"))?),
            };
            return crng.reseed(entropy).map_err(failed("reseed the kernel's CRNG"));
        };
        fs::write(dir.join("entropy"), entropy).map_err(failed("record entropy"))
    }

    /// Sets the wall clock, unless it is right.
    pub fn set_clock(&self, unix_ns: u64) -> Result<(), SystemError> {
        if clock::realtime_ns().abs_diff(unix_ns) <= CLOCK_TOLERANCE_NS {
            return Ok(());
        }
        match &self.sandbox {
            None => clock::set_realtime(unix_ns).map_err(failed("set the clock")),
            Some(dir) => fs::write(dir.join("realtime"), unix_ns.to_string())
                .map_err(failed("record the clock")),
        }
    }

    /// Sets the host name, unless it is that already.
    pub fn set_hostname(&mut self, name: &str) -> Result<(), SystemError> {
        if self.hostname == name {
            return Ok(());
        }
        match &self.sandbox {
            None => rustix::system::sethostname(name.as_bytes())
                .map_err(|e| SystemError("set the host name", e.into()))?,
            Some(dir) => {
                fs::write(dir.join("hostname"), name).map_err(failed("record the host name"))?;
            }
        }
        self.hostname = name.to_owned();
        Ok(())
    }

    /// Writes the machine id. The file is kept open, so that the next time costs one system call.
    pub fn set_machine_id(&mut self, id: &str) -> Result<(), SystemError> {
        let file = match &self.machine_id {
            Some(file) => file,
            None => {
                let path = match &self.sandbox {
                    None => PathBuf::from("/etc/machine-id"),
                    Some(dir) => dir.join("machine-id"),
                };
                let file = open_machine_id(&path).map_err(failed("open /etc/machine-id"))?;
                self.machine_id.insert(file)
            }
        };
        file.write_all_at(format!("{id}\n").as_bytes(), 0).map_err(failed("write /etc/machine-id"))
    }

    /// Who a process of this user runs as; `None`: as the agent.
    pub fn credentials<'a>(&self, user: &'a User) -> Option<&'a Credentials> {
        // The agent of a guest is root already. In tests it is whoever runs them.
        (user.credentials.uid != 0).then_some(&user.credentials)
    }

    /// Where interpreters start.
    pub fn home(&self) -> String {
        let candidates = ["/home/user", "/root"];
        let found = candidates.into_iter().find(|dir| self.is_guest() && Path::new(dir).is_dir());
        found.unwrap_or("/").to_owned()
    }
}

fn open_machine_id(path: &Path) -> io::Result<File> {
    // Many images have an empty one, and some a link to /var/lib/dbus.
    let file = File::options().write(true).create(true).truncate(false).open(path)?;
    file.set_len(33)?;
    Ok(file)
}

/// Writes a line to the console: PID 1's is opened for each, see [`let_go_of_console`].
pub fn console(what: &dyn Display) {
    let line = format!("forkd-agent: {what}\n");
    let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::NOCTTY;
    let console = (std::process::id() == 1)
        .then(|| rustix::fs::open(c"/dev/console", flags, rustix::fs::Mode::empty()))
        .and_then(Result::ok);
    // There is nowhere to tell that the console cannot be written to.
    let _ = match console {
        Some(console) => File::from(console).write_all(line.as_bytes()),
        None => io::stderr().write_all(line.as_bytes()),
    };
}

/// Leads the standard streams to /dev/null. An open serial port has the 8250 driver look at it ten times
/// a second, which is most of what an idle guest would do.
///
/// # Errors
/// /dev/null cannot be opened.
pub fn let_go_of_console() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok(())
}
