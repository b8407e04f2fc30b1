//! Facts about this host.

use std::env;
use std::fs;

use anyhow::{Result, bail};
use forkd_api::types::{PvmConfig, PvmMode};
use forkd_vm::Host;

use crate::paths::Paths;

/// The user's wish: auto, native or emulated.
const PVM_VARIABLE: &str = "FORKD_PVM";
/// What the probe of the host's PVM found; below the run directory.
const PVM_MEMO: &str = "pvm-probe";

/// What the user wants of a host with PVM, and the file that remembers what this one can do.
///
/// # Errors
/// FORKD_PVM has none of its values.
pub fn pvm(paths: &Paths) -> Result<PvmConfig> {
    let value = env::var_os(PVM_VARIABLE).unwrap_or_default();
    let mode = match value.to_str() {
        Some("auto" | "") => PvmMode::Auto,
        Some("native") => PvmMode::Native,
        Some("emulated") => PvmMode::Emulated,
        _ => bail!("{PVM_VARIABLE} is {value:?}: set it to auto, native or emulated"),
    };
    Ok(PvmConfig { mode, memo: Some(paths.run.join(PVM_MEMO)) })
}

/// Opens KVM as VMs of this installation will.
///
/// # Errors
/// It is not there, or not usable: says what to do.
pub fn open(paths: &Paths) -> Result<Host> {
    Ok(forkd_vmm::machine::open_host(&pvm(paths)?)?)
}

/// RAM of this host, in MiB; none if /proc does not tell.
pub fn memory_mib() -> Option<u64> {
    meminfo("MemTotal")
}

/// RAM that could be had without swapping, in MiB.
pub fn available_mib() -> Option<u64> {
    meminfo("MemAvailable")
}

fn meminfo(field: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let rest = text.lines().find_map(|l| l.strip_prefix(field)?.strip_prefix(':'))?;
    rest.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib / 1024)
}

#[cfg(test)]
mod tests {
    #[test]
    fn memory_is_told() {
        assert!(super::memory_mib().unwrap() >= super::available_mib().unwrap());
    }
}
