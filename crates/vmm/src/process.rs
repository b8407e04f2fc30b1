//! The VM process from its start to its end, over all the roles that forks give it.

use std::io::{self, Write};
use std::process::ExitCode;

use forkd_api::types::{ChildResult, Fault, RestoreConfig, VmConfig};

use crate::fork::{Birth, child};
use crate::machine::MachineError;
use crate::run_dir::RunDirError;
use crate::running::Running;
use crate::vcpus::VcpusError;
use crate::zygote::Zygote;

/// Why a VM process could not start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The configuration is wrong.
    #[error("{0}")]
    Config(String),
    /// The machine could not be built.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Its vCPUs failed.
    #[error(transparent)]
    Vcpus(#[from] VcpusError),
    /// Its run directory failed.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// Something else that it needs failed.
    #[error("{0}: {1}")]
    Setup(&'static str, io::Error),
}

impl VmmError {
    /// For `map_err`: says what failed.
    pub fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Setup(what, source)
    }
}

/// What follows when a role's loop returns.
#[derive(Debug)]
pub enum Next {
    /// This process has done its work.
    Exit(ExitCode),
    /// This process is a child that was just forked, and has let go of its source's things.
    Child(Box<Birth>, Box<child::Inherited>),
}

/// A role of the process.
pub enum Role {
    /// A VM that runs.
    Running(Box<Running>),
    /// A zygote.
    Zygote(Box<Zygote>),
}

/// Runs a VM process: boots a VM as `config` says and serves it until it ends.
///
/// Says on standard output, in one line of JSON, `{"ok":true}` once the vCPUs run, or a [`Fault`]. After
/// that the process is a daemon: its standard streams lead to its `vmm.log`.
///
/// Children that are forked off run in here as well, and return from here when they end.
///
/// # Errors
/// What went wrong after the start; what went wrong before it was told on standard output.
pub fn run_vm(config: VmConfig) -> Result<ExitCode, VmmError> {
    run(Running::boot(config).map(|running| Role::Running(Box::new(running))))
}

/// Runs a VM process that is a zygote or a VM from a durable snapshot; otherwise as [`run_vm`].
///
/// # Errors
/// As [`run_vm`].
pub fn run_restored(config: &RestoreConfig) -> Result<ExitCode, VmmError> {
    run(crate::snapshot::restore(config))
}

fn run(role: Result<Role, VmmError>) -> Result<ExitCode, VmmError> {
    let mut role = match role {
        Ok(role) => role,
        Err(error) => {
            tell(&Fault { fault_message: error.to_string() });
            return Ok(ExitCode::FAILURE);
        }
    };
    loop {
        let next = match role {
            Role::Running(running) => running.serve()?,
            Role::Zygote(zygote) => zygote.serve()?,
        };
        role = match next {
            Next::Exit(code) => return Ok(code),
            Next::Child(birth, inherited) => match child::be_born(*birth, *inherited) {
                Ok(role) => role,
                Err(stillborn) => {
                    stillborn.report();
                    forkd_sys::fork::exit_now(1)
                }
            },
        };
    }
}

/// Writes one line of JSON to standard output. A caller that does not listen is no reason to stop.
pub(crate) fn tell<T: serde::Serialize>(what: &T) {
    if let Ok(mut line) = serde_json::to_vec(what) {
        line.push(b'\n');
        let mut out = io::stdout();
        let _ = out.write_all(&line).and_then(|()| out.flush());
    }
}

/// Sends a child's result to its source, in one write. A source that is gone is no reason to stop.
pub(crate) fn report(pipe: &mut io::PipeWriter, result: &ChildResult) {
    if let Ok(mut line) = serde_json::to_vec(result) {
        line.push(b'\n');
        let _ = pipe.write_all(&line);
    }
}
