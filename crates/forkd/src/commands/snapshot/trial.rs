//! A trial child of a new snapshot: what it writes, all children write, and get copies of ahead of their writes.

use std::time::Duration;

use anyhow::{Context, Result};
use forkd_api::types::{HotPages, PageRanges};

use crate::commands::fork::{self, Request};
use crate::guest::Guest;
use crate::paths::Paths;
use crate::registry;
use crate::vm_client::VmClient;

/// How long the trial child may take to answer.
const PATIENCE: Duration = Duration::from_secs(120);

/// Forks one child of the snapshot `tag`, has it answer, and evaluate if the snapshot is `warmed`, tells the zygote which
/// pages that wrote, and ends the child.
///
/// # Errors
/// The child failed. The snapshot is as good as before, its children only slower.
pub fn run(paths: &Paths, tag: &str, warmed: bool) -> Result<()> {
    let source = registry::snapshot(paths, tag)?;
    let request = Request { count: 1, name: None, wait: Some(PATIENCE) };
    let forked = fork::fork(paths, &source, &request)?;
    let child = forked.children.first().context("there is no child")?;
    let pid = child.pid.context("the child has no process")?;
    let client = VmClient::new(&paths.vm(&child.id), &child.id);
    let pages = look(&client, warmed);
    // Whatever came of it, the child goes.
    client.stop(pid)?;
    source.client.set_hot(&pages?)
}

fn look(client: &VmClient, warmed: bool) -> Result<HotPages> {
    let answer = client.written()?;
    let mut eval = PageRanges::default();
    if warmed {
        Guest::of(client).eval("None", None, &mut |_, _| Ok(()))?;
        eval.ranges = without(&client.written()?.ranges, &answer.ranges);
    }
    Ok(HotPages { answer, eval })
}

/// The parts of `all` that are not in `known`. Both are ascending, and no range of either overlaps another of it.
fn without(all: &[(u64, u64)], known: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut rest = Vec::new();
    let mut known = known.iter().copied().peekable();
    for &(start, len) in all {
        let (mut at, end) = (start, start.saturating_add(len));
        while let Some(&(skip, skip_len)) = known.peek() {
            let skip_end = skip.saturating_add(skip_len);
            if skip >= end {
                break;
            }
            if skip > at {
                rest.push((at, skip - at));
            }
            at = at.max(skip_end);
            if skip_end > end {
                break;
            }
            known.next();
        }
        if at < end {
            rest.push((at, end - at));
        }
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of ten pages those whose bit is set, as ranges.
    fn ranges(bits: u32) -> Vec<(u64, u64)> {
        let mut out: Vec<(u64, u64)> = Vec::new();
        for page in (0..10).filter(|page| bits >> page & 1 == 1) {
            match out.last_mut() {
                Some((start, len)) if *start + *len == page => *len += 1,
                _ => out.push((page, 1)),
            }
        }
        out
    }

    #[test]
    fn the_difference_is_that_of_the_pages() {
        for all in 0..1024 {
            for known in 0..1024 {
                let rest = without(&ranges(all), &ranges(known));
                let pages = rest.iter().flat_map(|(start, len)| *start..start + len);
                let bits = pages.fold(0, |bits, page| bits | 1 << page);
                assert_eq!(bits, all & !known, "{all:#b} without {known:#b}: {rest:?}");
            }
        }
    }
}
