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

    /// The same with the pages of a VM's RAM that are those of a snapshot's file or a memfd: all that fork(2) or a
    /// write protection of RAM has to look at.
    ///
    /// # Errors
    /// As for [`ProcessMemory::of`].
    pub fn with_mapped_ram(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        Ok(Self::parse_smaps(&text))
    }

    fn parse_smaps(text: &str) -> Self {
        let (mut all, mut huge, mut is_ram) = (0u64, 0u64, false);
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let (Some(first), value) = (words.next(), words.next()) else { continue };
            if !first.ends_with(':') {
                // Address, permissions, offset, device, inode, and a name or none.
                let name = words.nth(3).unwrap_or_default();
                is_ram = name.ends_with("/memory") || name.starts_with("/memfd:");
                continue;
            }
            let bytes = value.and_then(|v| v.parse::<u64>().ok()).map_or(0, |kib| kib * 1024);
            match first {
                "Rss:" if is_ram => all += bytes,
                "Anonymous:" if !is_ram => all += bytes,
                "AnonHugePages:" => huge += bytes,
                _ => {}
            }
        }
        Self { huge, small: all.saturating_sub(huge) }
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
    fn mapped_ram_counts_and_other_files_do_not() {
        let text = "55d0-55d1 r-xp 00000000 00:01 7    /usr/bin/forkd\nRss: 100 kB\nAnonymous: 0 kB\n\
                    VmFlags: rd ex\n7f00-7f40 rw-p 00001000 08:01 9    /d/snapshots/py/memory\nRss: 30 kB\n\
                    Anonymous: 20 kB\nAnonHugePages: 0 kB\n7f50-7f60 rw-p 00000000 00:00 0\nRss: 4100 kB\n\
                    Anonymous: 4096 kB\nAnonHugePages: 2048 kB\n7f70-7f80 rw-s 0 00:01 3    /memfd:ram (deleted)\n\
                    Rss: 8 kB\nAnonymous: 0 kB\n";
        let resident = Anonymous::parse_smaps(text);
        assert_eq!(resident, Anonymous { huge: 2048 << 10, small: (30 + 2048 + 8) << 10 });
    }

    #[test]
    fn a_process_can_measure_itself() {
        let memory = ProcessMemory::of(std::process::id()).unwrap();
        assert!(memory.uss > 0 && memory.uss <= memory.pss && memory.pss <= memory.rss);
    }
}
