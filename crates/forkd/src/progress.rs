//! Progress of long steps, on standard error: a spinner on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::output;

/// One step at work.
pub struct Step {
    bar: Option<ProgressBar>,
    what: String,
    begun: Instant,
    quiet: bool,
}

impl Step {
    /// Begins a step and says so; `quiet` says nothing at all.
    pub fn begin(what: &str, quiet: bool) -> Self {
        let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::new_spinner();
            // The template is a constant; should it be wrong, indicatif's own remains.
            if let Ok(style) =
                ProgressStyle::with_template("{spinner} {prefix} {elapsed} {wide_msg:.dim}")
            {
                bar.set_style(style);
            }
            bar.set_prefix(what.to_string());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        if bar.is_none() && !quiet {
            output::note(&format!("{what} ..."));
        }
        Self { bar, what: what.to_string(), begun: Instant::now(), quiet }
    }

    /// Says what the step is at now. Shown on terminals only.
    pub fn at(&mut self, detail: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(detail.to_string());
        }
    }

    /// Ends the step well; returns how long it took.
    pub fn done(mut self, note: &str) -> Duration {
        let took = self.begun.elapsed();
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        if !self.quiet {
            let sep = if note.is_empty() { "" } else { ": " };
            output::note(&format!("{:>9}  {}{sep}{note}", output::duration(took), self.what));
        }
        took
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
