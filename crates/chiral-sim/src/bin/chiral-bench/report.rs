//! Figures as JSON lines on stdout, and percentiles.

use serde_json::json;

/// Prints the figures of one workload.
pub(crate) struct Report {
    workload: String,
}

impl Report {
    pub(crate) fn new(workload: String) -> Report {
        Report { workload }
    }

    /// Prints a metric's values, one per round.
    pub(crate) fn print(&self, row: &str, path: &str, metric: &str, rounds: &[f64]) {
        self.print_for(&self.workload, row, path, metric, rounds);
    }

    /// Prints them under another workload's name.
    pub(crate) fn print_for(&self, workload: &str, row: &str, path: &str, metric: &str, rounds: &[f64]) {
        println!(
            "{}",
            json!({"row": row, "workload": workload, "path": path, "metric": metric, "rounds": rounds})
        );
    }
}

/// The percentile of these values; NaN if there are none.
pub(crate) fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    sorted.get((sorted.len() * percent / 100).min(last)).copied().unwrap_or(f64::NAN)
}
