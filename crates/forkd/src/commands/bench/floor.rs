//! Has `forkd bench-floor` measure.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use forkd_api::types::VmRecord;

use crate::commands::bench_floor::{Floor, Kind};
use crate::process_memory::Anonymous;

/// The floor of a VM or zygote with so much RAM resident.
///
/// # Errors
/// It could not be measured.
pub fn of(kind: Kind, vm: &VmRecord, resident: Anonymous, rounds: u32) -> Result<Floor> {
    let kind = kind.to_possible_value().context("a kind without a name")?;
    let output = Command::new("/proc/self/exe")
        .args(["bench-floor", "--kind", kind.get_name()])
        .args(["--mem", &vm.mem_mib.to_string()])
        .args(["--huge", &resident.huge.to_string()])
        .args(["--small", &resident.small.to_string()])
        .args(["--vcpus", &vm.vcpus.to_string()])
        .args(["--rounds", &rounds.to_string()])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start forkd bench-floor")?;
    if !output.status.success() {
        bail!("forkd bench-floor failed: {}", output.status);
    }
    serde_json::from_slice(&output.stdout).context("forkd bench-floor said something odd")
}
