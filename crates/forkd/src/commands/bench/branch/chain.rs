//! Loading a durable snapshot, alone and as a chain of diffs.

use std::ops::RangeInclusive;
use std::time::Instant;

use anyhow::Result;
use forkd_api::types::SnapshotMode;
use serde::Serialize;

use super::super::measure::{Brood, WAIT};
use super::super::stats::{Samples, Summary};
use super::load::Load;
use super::{CHAIN_MEM, Subject};
use crate::{persist, registry};

/// MB that each link of a chain has written.
const LINK_MB: u32 = 8;

/// What it takes to load a chain.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Loaded {
    /// RAM of the guest.
    pub mem_mib: u64,
    /// Diffs over the flat snapshot.
    pub depth: u32,
    /// From the request to a zygote that can be forked, in ms.
    pub zygote_ms: Summary,
    /// From the request to the vCPUs of a child of it running, in ms.
    pub running_ms: Summary,
    /// What p50 of `running_ms` must be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub must_reach: Option<&'static str>,
}

impl Subject<'_> {
    /// Loads chains of these lengths from the page cache.
    pub(super) fn chain(&mut self, depths: &RangeInclusive<u32>) -> Result<()> {
        let mut tip = self.tag.clone();
        for depth in 0..=*depths.end() {
            if depth > 0 {
                tip = self.link(&tip, depth)?;
            }
            if depths.contains(&depth) {
                self.load(&tip, depth)?;
            }
        }
        Ok(())
    }

    /// Adds a diff to a chain: its tag.
    fn link(&self, parent: &str, depth: u32) -> Result<String> {
        let tag = format!("{}.{depth}", self.tag);
        let zygote = persist::find(self.paths, parent)?;
        let brood = Brood::fork(self.paths, &zygote, 1, Some(WAIT))?;
        let vm = brood.live(self.paths, brood.first()?)?;
        let load = Load::of(&vm.client, self.args.writers);
        if depth == 1 {
            // In the others they run since then.
            load.start()?;
        }
        load.write_set(LINK_MB)?;
        vm.client.snapshot(self.store.dir(), &tag, SnapshotMode::Diff, true)?;
        brood.end()?;
        self.stop_zygote(parent)?;
        Ok(tag)
    }

    fn load(&mut self, tag: &str, depth: u32) -> Result<()> {
        let (mut zygote_ms, mut running_ms) = (Samples::default(), Samples::default());
        for _ in 0..self.args.rounds {
            if registry::snapshot(self.paths, tag).is_ok() {
                self.stop_zygote(tag)?;
            }
            let begun = Instant::now();
            let zygote = persist::find(self.paths, tag)?;
            let took = begun.elapsed().as_secs_f64() * 1e3;
            let brood = Brood::fork(self.paths, &zygote, 1, None)?;
            if let Some(time) = brood.first()?.to_running() {
                running_ms.push(took + time.as_secs_f64() * 1e3);
            }
            zygote_ms.push(took);
            brood.end()?;
        }
        if let (Some(zygote_ms), Some(running_ms)) = (zygote_ms.summary(), running_ms.summary()) {
            let must_reach = (depth == 0 && self.mem_mib == CHAIN_MEM).then_some("8 ms");
            let mem_mib = self.mem_mib;
            self.report.loads.push(Loaded { mem_mib, depth, zygote_ms, running_ms, must_reach });
        }
        Ok(())
    }
}

/// What each link adds to the time to running vCPUs, in ms: the slope of the least squares over the medians. None of
/// fewer than two depths.
pub fn per_link_ms(loads: &[Loaded]) -> Option<f64> {
    let points: Vec<(f64, f64)> =
        loads.iter().map(|load| (f64::from(load.depth), load.running_ms.p50)).collect();
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let spread: f64 = points.iter().map(|p| (p.0 - x).powi(2)).sum();
    (spread > 0.0).then(|| points.iter().map(|p| (p.0 - x) * (p.1 - y)).sum::<f64>() / spread)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loaded(depth: u32, p50: f64) -> Loaded {
        let summary = Summary { count: 1, min: p50, p50, p99: p50, max: p50 };
        Loaded { mem_mib: 512, depth, zygote_ms: summary, running_ms: summary, must_reach: None }
    }

    #[test]
    fn a_link_costs_the_slope() {
        let slope = per_link_ms(&[loaded(0, 10.0), loaded(1, 12.5), loaded(3, 17.5)]).unwrap();
        assert!((slope - 2.5).abs() < 1e-9, "{slope}");
        assert_eq!(per_link_ms(&[loaded(4, 10.0)]), None);
        assert_eq!(per_link_ms(&[]), None);
    }
}
