//! Samples and what is told of them.

use serde::Serialize;

/// Samples of one measure, in its unit.
#[derive(Debug, Clone, Default)]
pub struct Samples(Vec<f64>);

/// What is told of samples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    /// How many samples.
    pub count: usize,
    /// Least.
    pub min: f64,
    /// Median.
    pub p50: f64,
    /// The value that 99 of 100 don't exceed; of fewer than 100 samples the greatest.
    pub p99: f64,
    /// Greatest.
    pub max: f64,
}

impl Samples {
    /// Adds one.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Sums them up; none if there are none.
    pub fn summary(&self) -> Option<Summary> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        // Nearest rank.
        let rank = |percent: usize| {
            sorted.get((sorted.len() * percent).div_ceil(100).saturating_sub(1)).copied()
        };
        Some(Summary {
            count: sorted.len(),
            min: *sorted.first()?,
            p50: rank(50)?,
            p99: rank(99)?,
            max: *sorted.last()?,
        })
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        Self(values.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let summary = (1..=200).rev().map(f64::from).collect::<Samples>().summary().unwrap();
        assert_eq!(
            (summary.min, summary.p50, summary.p99, summary.max),
            (1.0, 100.0, 198.0, 200.0)
        );
        let one = Samples(vec![7.0]).summary().unwrap();
        assert_eq!((one.p50, one.p99), (7.0, 7.0));
        assert!(Samples::default().summary().is_none());
    }
}
