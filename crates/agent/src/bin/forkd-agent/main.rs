//! forkd-agent: PID 1 of a guest.
//!
//! `forkd-agent --listen-unix DIR` serves the same protocols on Unix sockets `DIR/49983` and
//! `DIR/49999`, on any Linux machine, which it leaves as it is: for tests. It says `ready` on standard
//! output once it listens.

#![deny(unsafe_code)]

mod agent;
mod boot;
mod conn;
mod crng;
mod identity;
mod interpreter;
mod kill;
mod outbox;
mod process;
mod routes;
mod slab;
mod source;
mod spawn;
mod system;
mod timers;
mod users;
mod vsock;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use forkd_agent::protocol::{ENVD_PORT, INTERPRETER_PORT};

use crate::agent::{Agent, Listener};
use crate::conn::Service;
use crate::system::System;

/// The C library's gives each large piece back to the kernel when it is freed, and faults it in again, page by page, when it is
/// needed next. A fault costs a guest some 50 us on a PVM host; this one keeps up to 2 MiB.
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    if rustix::process::getpid().is_init() {
        boot::run();
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match args.as_slice() {
        ["--version"] => {
            system::console(&env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        ["--listen-unix", dir] => serve_unix(Path::new(dir)),
        _ => {
            system::console(&"usage: forkd-agent --listen-unix DIR (or run as PID 1)");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            system::console(&format_args!("fatal: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Serves on Unix sockets until SIGTERM, and then ends what it has started.
fn serve_unix(dir: &Path) -> io::Result<()> {
    // Orphans come to us, as they do to a PID 1.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    let listen = |port: u32, service| -> io::Result<Listener> {
        let listener = forkd_sys::unix_path::bind_listener(&dir.join(port.to_string()))?;
        listener.set_nonblocking(true)?;
        Ok(Listener { fd: OwnedFd::from(listener), service })
    };
    let listeners =
        vec![listen(ENVD_PORT, Service::Envd)?, listen(INTERPRETER_PORT, Service::Interpreter)?];
    let mut agent = Agent::new(System::sandbox(PathBuf::from(dir)), listeners)?;
    rustix::io::write(rustix::stdio::stdout(), b"ready\n")?;
    agent.run()?;
    agent.kill_processes(libc::SIGKILL);
    agent.kill_contexts(libc::SIGKILL);
    Ok(())
}
