//! `forkd vm`: the VM process. Not for people: `forkd snapshot create` and others start it.

use std::io::{IsTerminal, Read, Write};
use std::process::ExitCode;

use forkd_api::types::{Fault, RestoreConfig, VmConfig};

use crate::{cleanup, output};

/// Most bytes of a configuration.
const MAX_CONFIG: u64 = 1 << 20;

/// The VM process: reads its configuration as JSON on standard input
#[derive(Debug, clap::Args)]
#[command(hide = true)]
pub struct Args {
    /// Shown in process lists; the configuration decides
    #[arg(long)]
    id: Option<String>,
}

/// Runs the VM process to its end. Nothing in this process has made a thread yet.
pub fn run() -> ExitCode {
    match configure() {
        Ok(start) => match start.run() {
            Ok(code) => code,
            Err(error) => {
                // By now standard error is the VM's log.
                output::note(&format!("forkd vm: {error}"));
                ExitCode::FAILURE
            }
        },
        Err(message) => {
            refuse(message);
            ExitCode::FAILURE
        }
    }
}

/// What the process is to be.
enum Start {
    Boot(Box<VmConfig>),
    Restore(RestoreConfig),
}

impl Start {
    fn run(self) -> Result<ExitCode, forkd_vmm::VmmError> {
        match self {
            Self::Boot(config) => forkd_vmm::run_vm(*config),
            Self::Restore(config) => forkd_vmm::run_restored(&config),
        }
    }

    fn parse(text: &[u8]) -> serde_json::Result<Self> {
        let value: serde_json::Value = serde_json::from_slice(text)?;
        if value.get("restore_from").is_some() {
            serde_json::from_value(value).map(Self::Restore)
        } else {
            serde_json::from_value(value).map(|config| Self::Boot(Box::new(config)))
        }
    }
}

fn configure() -> Result<Start, String> {
    if std::io::stdin().is_terminal() {
        return Err("this is for other verbs to start: use `forkd snapshot create`".to_string());
    }
    cleanup::unblock_signals().map_err(|e| format!("cannot unblock signals: {e}"))?;
    let mut text = Vec::new();
    std::io::stdin()
        .take(MAX_CONFIG)
        .read_to_end(&mut text)
        .map_err(|e| format!("cannot read the configuration from standard input: {e}"))?;
    Start::parse(&text)
        .map_err(|e| format!("the configuration on standard input is not understood: {e}"))
}

/// Says why there will be no VM, in the form that `run_vm` would have used.
fn refuse(fault_message: String) {
    if let Ok(mut line) = serde_json::to_vec(&Fault { fault_message }) {
        line.push(b'\n');
        // A caller that does not listen can't be told.
        let _ = std::io::stdout().write_all(&line);
    }
}
