//! Output of the figures: tables and JSON.

use anyhow::{Context, Result};
use serde::Serialize;

use super::figures::Row;
use super::targets;
use crate::table::table;

/// A table of all figures, and one of those that have a target.
pub(super) fn tables(rows: &[Row]) -> String {
    let mut figures = vec![heading(&[
        "row", "workload", "cores", "metric", "median", "p25", "p75", "ratio", "against", "",
    ])];
    let mut judged = vec![heading(&["target", "workload", "cores", "metric", "found", "required", ""])];
    for row in rows {
        let number = |value: f64| digits(value);
        let ratio = row.ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
        let noisy = if row.noisy { "noisy" } else { "" };
        let cores = row.cores.to_string();
        let mut cells = vec![row.row.clone(), row.workload.clone(), cores.clone(), row.metric.clone()];
        cells.extend([row.value, row.p25, row.p75].map(number));
        cells.extend([ratio, row.against.unwrap_or("-").to_owned(), noisy.to_owned()]);
        figures.push(cells);
        if let Some((bound, found, met)) = targets::judge(row) {
            let name =
                row.against.map_or_else(|| row.row.clone(), |against| format!("{} / {against}", row.row));
            let verdict = [if met { "met" } else { "missed" }, noisy].join(" ");
            let found = format!("{found:.3}");
            judged.push(vec![
                name,
                row.workload.clone(),
                cores,
                row.metric.clone(),
                found,
                bound.to_string(),
                verdict,
            ]);
        }
    }
    format!("{}\n{}", table(&figures), table(&judged))
}

/// The content of the file that `--json` writes.
pub(super) fn json(rows: &[Row]) -> Result<String> {
    #[derive(Serialize)]
    struct Report<'a> {
        rows: &'a [Row],
    }
    serde_json::to_string_pretty(&Report { rows }).context("writing JSON")
}

fn heading(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

/// The value with four significant digits.
fn digits(value: f64) -> String {
    let before = value.abs().max(1.0).log10().floor() as usize;
    format!("{value:.*}", 3_usize.saturating_sub(before))
}
