//! What a process costs in memory, by /proc/PID/smaps_rollup (proc_pid_smaps(5)).

use std::fs;

use anyhow::{Context, Result};
use serde::Serialize;

/// Memory of a process, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ProcessMemory {
    /// Resident: shared pages counted in full.
    pub rss: u64,
    /// Proportional: a page that n processes map counts 1/n.
    pub pss: u64,
    /// Unique: pages that no other process maps. What would be freed if it ended.
    pub uss: u64,
}

impl ProcessMemory {
    /// Measures a process. The kernel walks its page tables: some milliseconds per GiB.
    ///
    /// # Errors
    /// No such process, or it belongs to someone else.
    pub fn of(pid: u32) -> Result<Self> {
        Ok(Self::parse(&rollup(pid)?))
    }

    fn parse(text: &str) -> Self {
        Self {
            rss: field(text, "Rss"),
            pss: field(text, "Pss"),
            uss: field(text, "Private_Clean").saturating_add(field(text, "Private_Dirty")),
        }
    }
}

/// Resident anonymous memory of a process by the size of its pages, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Anonymous {
    /// In transparent huge pages.
    pub huge: u64,
    /// In pages of 4 KiB.
    pub small: u64,
}

impl Anonymous {
    /// Measures a process.
    ///
    /// # Errors
    /// As for [`ProcessMemory::of`].
    pub fn of(pid: u32) -> Result<Self> {
        let text = rollup(pid)?;
        let huge = field(&text, "AnonHugePages");
        Ok(Self { huge, small: field(&text, "Anonymous").saturating_sub(huge) })
    }
}

fn rollup(pid: u32) -> Result<String> {
    let path = format!("/proc/{pid}/smaps_rollup");
    fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
}

/// A field of the roll-up, in bytes; 0 if it is not there.
fn field(text: &str, name: &str) -> u64 {
    let value = |line: &str| -> Option<u64> {
        line.strip_prefix(name)?.strip_prefix(':')?.split_whitespace().next()?.parse().ok()
    };
    text.lines().find_map(value).map_or(0, |kib| kib.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rollup_is_read() {
        let text = "55d0-7ffc ---p 00000000 00:00 0 [rollup]\nRss:    100 kB\nPss:     40 kB\n\
                    Pss_Dirty: 7 kB\nPrivate_Clean:  8 kB\nPrivate_Dirty:  12 kB\n";
        let memory = ProcessMemory::parse(text);
        assert_eq!(memory, ProcessMemory { rss: 102_400, pss: 40_960, uss: 20_480 });
    }

    #[test]
    fn a_process_can_measure_itself() {
        let memory = ProcessMemory::of(std::process::id()).unwrap();
        assert!(memory.uss > 0 && memory.uss <= memory.pss && memory.pss <= memory.rss);
    }
}
