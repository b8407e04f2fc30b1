//! A VM is branched while it counts: both halves agree up to that instant, and differ after it.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use forkd_api::types::SourcePause;
use serde::Serialize;

use crate::commands::fork::{Request, fork};
use crate::guest::Guest;
use crate::paths::Paths;
use crate::registry::{self, Live};
use crate::{output, parallel};

/// Name of the branch.
const NAME: &str = "quickstart-branch";
/// A thread that counts as fast as it can, and every so often notes the count with a random number. After a
/// branch the random numbers differ, for each VM gets entropy of its own.
const COUNT: &str = "\
import random, threading
ticks = []
def _count():
    n = 0
    while True:
        n += 1
        if n % 200_000 == 0:
            ticks.append((n, random.getrandbits(32)))
threading.Thread(target=_count, daemon=True).start()
";
/// Notes before the branch, and after it on each side.
const BEFORE: usize = 20;
const AFTER: usize = 20;

/// A note of the counter: the count, and a random number.
type Tick = (u64, u64);

/// What came of it.
#[derive(Debug, Serialize)]
pub struct Branching {
    source: String,
    branch: String,
    pause: Option<SourcePause>,
    /// Notes that both have in common from the start on.
    common: usize,
    source_ticks: Vec<Tick>,
    branch_ticks: Vec<Tick>,
}

impl Branching {
    /// Lets a VM count, branches it, and lets both go on.
    ///
    /// # Errors
    /// A step failed.
    pub fn run(paths: &Paths, source: &Live, wait: Duration) -> Result<Self> {
        let guest = Guest::of(&source.client);
        if let Some(error) = guest.eval(COUNT, Some(wait), &mut |_, _| Ok(()))?.error {
            bail!("{} can't count: {}", source.record.name, error.summary());
        }
        wait_for(&guest, BEFORE, wait)?;
        let request = Request { count: 1, name: Some(NAME.to_string()), wait: Some(wait) };
        let forked = fork(paths, source, &request)?;
        forked.require_all()?;
        let branch = registry::vm(paths, NAME)?;
        let both = [guest, Guest::of(&branch.client)];
        // Both have the notes up to the branch; what comes on top of those is each one's own.
        let shared = count(&both[1], wait)?;
        let ticks = parallel::map(&both, |guest| {
            wait_for(guest, shared + AFTER, wait)?;
            ticks(guest, wait)
        });
        let [source_ticks, branch_ticks] =
            <[_; 2]>::try_from(ticks.into_iter().collect::<Result<Vec<_>>>()?)
                .ok()
                .context("one of two counters did not answer")?;
        let common = source_ticks.iter().zip(&branch_ticks).take_while(|(a, b)| a == b).count();
        Ok(Self {
            source: source.record.name.clone(),
            branch: NAME.to_string(),
            pause: forked.pause,
            common,
            source_ticks,
            branch_ticks,
        })
    }

    /// Checks that both agree up to the branch, differ after it, and both went on.
    ///
    /// # Errors
    /// They do not.
    pub fn check(&self) -> Result<()> {
        if self.common < BEFORE {
            bail!(
                "{} and {} agree on {} notes only, not on {BEFORE}",
                self.source,
                self.branch,
                self.common
            );
        }
        for (name, ticks) in
            [(&self.source, &self.source_ticks), (&self.branch, &self.branch_ticks)]
        {
            if ticks.len() <= self.common {
                bail!("{name} did not go on after the branch");
            }
            if !ticks.is_sorted_by(|a, b| a.0 < b.0) {
                bail!("{name} did not count steadily");
            }
        }
        Ok(())
    }

    /// Prints the last notes before the branch and the first after it, side by side.
    ///
    /// # Errors
    /// Standard output can't be written.
    pub fn print(&self) -> Result<()> {
        let pause = self
            .pause
            .map_or("-".to_string(), |p| output::duration(Duration::from_micros(p.pause_us)));
        output::line(&format!(
            "\n{} counts, noting a random number now and then; branched while it ran, it paused for {pause}:\n",
            self.source
        ))?;
        let cell = |ticks: &[Tick], at: usize| {
            ticks.get(at).map_or("-".to_string(), |(n, random)| format!("{n:>10}  {random:08x}"))
        };
        let from = self.common.saturating_sub(3);
        let rows = (from..self.common + 3).map(|at| {
            let same = if at < self.common { "same" } else { "differs" };
            vec![cell(&self.source_ticks, at), cell(&self.branch_ticks, at), same.to_string()]
        });
        output::line(&output::table(&[&self.source, &self.branch, ""], rows))
    }
}

/// Waits in the guest until it has so many notes.
fn wait_for(guest: &Guest, notes: usize, wait: Duration) -> Result<()> {
    let code = format!("import time\nwhile len(ticks) < {notes}: time.sleep(0.01)\n");
    match guest.eval(&code, Some(wait), &mut |_, _| Ok(()))?.error {
        Some(error) => bail!("the counter did not get to {notes} notes: {}", error.summary()),
        None => Ok(()),
    }
}

fn count(guest: &Guest, wait: Duration) -> Result<usize> {
    let text = guest.eval("len(ticks)", Some(wait), &mut |_, _| Ok(()))?.result;
    text.and_then(|t| t.parse().ok()).context("the counter does not tell how many notes it has")
}

fn ticks(guest: &Guest, wait: Duration) -> Result<Vec<Tick>> {
    let mut json = String::new();
    let code = "import json\nprint(json.dumps(ticks))\n";
    guest.eval(code, Some(wait), &mut |_, text| {
        json.push_str(text);
        Ok(())
    })?;
    serde_json::from_str(&json).context("the counter's notes can't be read")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn branching(source: &[Tick], branch: &[Tick]) -> Branching {
        let common = source.iter().zip(branch).take_while(|(a, b)| a == b).count();
        Branching {
            source: "a".into(),
            branch: "b".into(),
            pause: None,
            common,
            source_ticks: source.to_vec(),
            branch_ticks: branch.to_vec(),
        }
    }

    fn ticks_of(shared: usize, own: usize, random: u64) -> Vec<Tick> {
        let note = |n: usize| (n as u64, if n < shared { 1 } else { random });
        (0..shared + own).map(note).collect()
    }

    #[test]
    fn only_a_true_branch_passes() {
        let ok = branching(&ticks_of(25, 5, 7), &ticks_of(25, 5, 8));
        assert_eq!(ok.common, 25);
        ok.check().unwrap();
        assert!(
            branching(&ticks_of(25, 5, 7), &ticks_of(25, 5, 7)).check().is_err(),
            "no difference"
        );
        assert!(
            branching(&ticks_of(25, 5, 7), &ticks_of(25, 0, 8)).check().is_err(),
            "branch stands"
        );
        assert!(
            branching(&ticks_of(5, 30, 7), &ticks_of(5, 30, 8)).check().is_err(),
            "no agreement"
        );
    }
}
