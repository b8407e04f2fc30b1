//! `forkd info`.

use std::process::ExitCode;

use anyhow::Result;
use forkd_api::types::{KernelMode, Metrics, Timing, VmInfo};
use serde::Serialize;

use crate::cli::OutputArgs;
use crate::commands::ls::phase_name;
use crate::paths::Paths;
use crate::process_memory::ProcessMemory;
use crate::registry::Live;
use crate::{output, registry};

/// Show all about a VM
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd info vm-7k2m9x4qpa
  forkd info web --json | jq .metrics")]
pub struct Args {
    /// Id, unique start of an id, or name
    #[arg(value_name = "VM")]
    vm: String,
    #[command(flatten)]
    output: OutputArgs,
}

/// All about a VM or snapshot.
#[derive(Debug, Serialize)]
pub struct Report {
    #[serde(flatten)]
    info: VmInfo,
    memory: ProcessMemory,
    metrics: Metrics,
    dir: std::path::PathBuf,
}

impl Args {
    /// Runs the verb.
    ///
    /// # Errors
    /// No such VM, or it does not answer.
    pub fn run(self, paths: &Paths) -> Result<ExitCode> {
        Report::of(&registry::vm(paths, &self.vm)?)?.print(self.output)?;
        Ok(ExitCode::SUCCESS)
    }
}

impl Report {
    /// Asks a VM or snapshot.
    ///
    /// # Errors
    /// It does not answer.
    pub fn of(live: &Live) -> Result<Self> {
        Ok(Self {
            info: live.client.info()?,
            memory: ProcessMemory::of(live.record.pid)?,
            metrics: live.client.metrics()?,
            dir: live.client.dir().to_path_buf(),
        })
    }

    /// Prints it.
    ///
    /// # Errors
    /// Standard output can't be written.
    pub fn print(&self, how: OutputArgs) -> Result<()> {
        if how.json {
            return output::json(self);
        }
        let record = &self.info.record;
        let mut rows = vec![
            ("id", record.id.clone()),
            ("name", record.name.clone()),
            ("phase", phase_name(self.info.phase).to_string()),
            ("image", format!("{} ({})", record.image, short_digest(&record.image_digest))),
            ("from", record.parent.clone().unwrap_or_else(|| "cold boot".to_string())),
            ("generation", record.generation.to_string()),
            ("vCPUs", record.vcpus.to_string()),
            ("RAM", format!("{} MiB", record.mem_mib)),
            ("age", output::age(record.created_unix_ms)),
            ("pid", record.pid.to_string()),
            ("directory", self.dir.display().to_string()),
            ("resident", output::bytes(self.memory.rss)),
            ("proportional", output::bytes(self.memory.pss)),
            ("private", output::bytes(self.memory.uss)),
        ];
        if let Some(mode) = self.info.kernel_mode {
            rows.push(("kernel mode", kernel_mode_name(mode).to_string()));
        }
        if let Some(error) = &self.info.error {
            rows.push(("error", error.clone()));
        }
        rows.extend(steps(&self.info.timing));
        for (name, value) in rows {
            output::line(&format!("{name:<22} {value}"))?;
        }
        for (name, value) in self.metrics.iter().filter(|(_, value)| **value > 0) {
            output::line(&format!("{name:<22} {value}"))?;
        }
        Ok(())
    }
}

/// For people.
pub fn kernel_mode_name(mode: KernelMode) -> &'static str {
    match mode {
        KernelMode::Hardware => "hardware",
        KernelMode::PvmEmulated => "emulated (PVM)",
        KernelMode::PvmNative => "native (PVM)",
    }
}

/// Name of the sum of all steps.
pub const TOTAL: &str = "request to ready";

/// The steps of a VM's coming to life, with the time each took.
pub fn steps(timing: &Timing) -> Vec<(&'static str, String)> {
    let forked = timing.fork_end_ns > 0;
    let marks: &[(&str, u64)] = if forked {
        &[
            ("until fork", timing.fork_begin_ns),
            ("fork", timing.fork_end_ns),
            ("KVM rebuild", timing.vm_created_ns),
            ("restore", timing.restored_ns),
            ("vCPUs running", timing.running_ns),
            ("agent's answer", timing.ready_ns),
        ]
    } else {
        &[
            ("KVM setup", timing.vm_created_ns),
            ("loading", timing.restored_ns),
            ("vCPUs running", timing.running_ns),
            ("guest's boot", timing.agent_hello_ns),
            ("agent's answer", timing.ready_ns),
        ]
    };
    let mut rows = Vec::new();
    let mut before = timing.requested_ns;
    for (name, at) in marks {
        if let Some(took) = output::between(before, *at) {
            rows.push((*name, output::duration(took)));
            before = *at;
        }
    }
    if let Some(total) = output::between(timing.requested_ns, timing.ready_ns) {
        rows.push((TOTAL, output::duration(total)));
    }
    rows
}

/// Enough of a digest to know it by.
pub fn short_digest(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_follow_one_another() {
        let timing = Timing {
            requested_ns: 1_000_000,
            fork_begin_ns: 2_000_000,
            fork_end_ns: 4_000_000,
            vm_created_ns: 5_000_000,
            restored_ns: 0,
            running_ns: 6_000_000,
            agent_hello_ns: 0,
            ready_ns: 9_000_000,
        };
        let steps = steps(&timing);
        assert_eq!(steps[1], ("fork", "2.00 ms".to_string()));
        assert_eq!(steps[3], ("vCPUs running", "1.00 ms".to_string()));
        assert_eq!(steps.last().unwrap(), &(TOTAL, "8.00 ms".to_string()));
        assert!(super::steps(&Timing::default()).is_empty());
    }
}
