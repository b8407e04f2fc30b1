//! Facts about this host.

use std::fs;

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
