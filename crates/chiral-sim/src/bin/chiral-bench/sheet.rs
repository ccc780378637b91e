//! What is measured, as JSON lines on stdout; medians and the like.

use serde_json::json;

/// Prints figures of one workload.
pub(crate) struct Sheet {
    workload: String,
}

impl Sheet {
    pub(crate) fn new(workload: String) -> Sheet {
        Sheet { workload }
    }

    /// One value a round.
    pub(crate) fn put(&self, row: &str, path: &str, metric: &str, rounds: &[f64]) {
        self.put_under(&self.workload, row, path, metric, rounds);
    }

    /// The same, under another name than the workload's.
    pub(crate) fn put_under(&self, workload: &str, row: &str, path: &str, metric: &str, rounds: &[f64]) {
        println!(
            "{}",
            json!({"row": row, "workload": workload, "path": path, "metric": metric, "rounds": rounds})
        );
    }
}

/// The value that `percent` of 100 stay under; NaN of nothing.
pub(crate) fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    sorted.get((sorted.len() * percent / 100).min(last)).copied().unwrap_or(f64::NAN)
}
