//! Turns measurements into rows: medians over the rounds, their spread, and ratios to baselines.

use serde::Serialize;

use super::Cores;
use super::peers::Measured;

/// The spread of a baseline, p75 / p25, above which its ratios are unreliable.
const NOISY: f64 = 1.5;

/// A figure, as written by `--json`. There is one row per baseline that the figure is compared with.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    pub(super) row: String,
    pub(super) workload: String,
    pub(super) metric: String,
    /// The median over the rounds; `p25` and `p75` are the quartiles.
    pub(super) value: f64,
    pub(super) p25: f64,
    pub(super) p75: f64,
    pub(super) ratio: Option<f64>,
    pub(super) against: Option<&'static str>,
    pub(super) cores: u8,
    pub(super) noisy: bool,
}

/// All measurements of a run.
#[derive(Default)]
pub(super) struct Figures {
    all: Vec<(Cores, Measured)>,
}

#[derive(Clone, Copy)]
struct Spread {
    p25: f64,
    p50: f64,
    p75: f64,
}

impl Spread {
    fn of(rounds: &[f64]) -> Spread {
        let mut sorted = rounds.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let at = |part: f64| {
            sorted
                .get(((sorted.len() as f64 - 1.0) * part).round().max(0.0) as usize)
                .copied()
                .unwrap_or(f64::NAN)
        };
        Spread { p25: at(0.25), p50: at(0.5), p75: at(0.75) }
    }

    fn is_noisy(self) -> bool {
        self.p75 / self.p25 > NOISY
    }
}

impl Figures {
    pub(super) fn add(&mut self, cores: Cores, measured: Vec<Measured>) {
        self.all.extend(measured.into_iter().map(|measured| (cores, measured)));
    }

    /// Returns a row for each baseline, and one per baseline for each figure of Chiral. The row of a path
    /// other than WebSocket has the path in its name.
    pub(super) fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        for (cores, measured) in &self.all {
            let spread = Spread::of(&measured.rounds);
            let raw = self.raw(*cores, measured);
            let naive = self.find(*cores, measured, &measured.workload, &["naive"]);
            let asked = self.find(*cores, measured, &measured.workload, &["asked"]);
            let idle =
                self.find(*cores, measured, "idle", &["chiral"]).filter(|_| measured.workload != "idle");
            let [query, put, protobuf, zenoh] =
                ["zenoh_query", "zenoh_put", "chiral", "zenoh_tcp"].map(|name| {
                    let found = self.find(*cores, measured, &measured.workload, &[name]);
                    found.map(|spread| (name, spread))
                });
            let row = |name: &str, against: Option<(&'static str, Spread)>| Row {
                row: name.to_owned(),
                workload: measured.workload.clone(),
                metric: measured.metric.clone(),
                value: spread.p50,
                p25: spread.p25,
                p75: spread.p75,
                ratio: against.map(|(_, base)| spread.p50 / base.p50),
                against: against.map(|(name, _)| name),
                cores: cores.count(),
                noisy: against.is_some_and(|(_, base)| base.is_noisy()),
            };
            let raw = raw.map(|spread| ("raw_tcp", spread));
            if measured.path == "asked" {
                continue;
            }
            let of_path = format!("{}.{}", measured.row, measured.path);
            let (name, bases) = match &*measured.path {
                "chiral" => {
                    let [naive, asked, idle] = [("naive", naive), ("asked", asked), ("idle", idle)]
                        .map(|(name, spread)| spread.map(|spread| (name, spread)));
                    (&measured.row, vec![raw, naive, asked, idle])
                }
                "msgpack" => (&of_path, vec![raw, protobuf]),
                "zenoh_tcp" => (&of_path, vec![raw, query, put]),
                "zenoh_shm" => (&of_path, vec![raw, query]),
                "zenoh_msgpack" => (&of_path, vec![raw, put, zenoh]),
                _ => (&of_path, vec![raw]),
            };
            let before = rows.len();
            // No ratio to zero.
            let bases = bases.into_iter().flatten().filter(|(_, base)| base.p50 > 0.0);
            rows.extend(bases.map(|base| row(name, Some(base))));
            if rows.len() == before {
                rows.push(row(name, None));
            }
        }
        rows
    }

    /// The raw TCP baseline: blocking or tokio, whichever has the faster `get_obs`, for every metric.
    fn raw(&self, cores: Cores, of: &Measured) -> Option<Spread> {
        let paths = ["raw_blocking", "raw_tokio"];
        let took = |path| {
            let found = self.all.iter().find(|(at, other)| {
                *at == cores && other.row == "get_obs" && other.workload == of.workload && other.path == path
            });
            found.map_or(f64::INFINITY, |(_, other)| Spread::of(&other.rounds).p50)
        };
        let order = if took(paths[1]) < took(paths[0]) { [paths[1], paths[0]] } else { paths };
        self.find(cores, of, &of.workload, &order)
    }

    /// The same metric and row of the first of these paths that has it.
    fn find(&self, cores: Cores, of: &Measured, workload: &str, paths: &[&str]) -> Option<Spread> {
        paths.iter().find_map(|path| {
            let (_, found) = self.all.iter().find(|(at, other)| {
                *at == cores
                    && other.row == of.row
                    && other.metric == of.metric
                    && other.workload == workload
                    && other.path == *path
            })?;
            Some(Spread::of(&found.rounds))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(workload: &str, path: &str, rounds: &[f64]) -> Measured {
        let [row, metric] = ["get_obs", "p50_ms"].map(str::to_owned);
        Measured {
            row,
            workload: workload.to_owned(),
            path: path.to_owned(),
            metric,
            rounds: rounds.to_vec(),
        }
    }

    #[test]
    fn a_ratio_is_against_the_better_baseline() {
        let mut figures = Figures::default();
        let paths =
            [("raw_blocking", [4.0, 5.0, 9.0]), ("raw_tokio", [3.9, 4.0, 4.1]), ("naive", [7.0, 8.0, 9.0])];
        figures.add(Cores::Two, paths.iter().map(|(path, rounds)| measured("L", path, rounds)).collect());
        figures.add(Cores::Two, vec![measured("L", "chiral", &[5.0, 6.0, 6.0])]);
        figures.add(Cores::One, vec![measured("L", "raw_tokio", &[1.0])]);
        let rows = figures.rows();
        let ours: Vec<_> =
            rows.iter().filter(|row| row.row == "get_obs").map(|row| (row.against, row.ratio)).collect();
        assert_eq!(ours, [(Some("raw_tcp"), Some(1.5)), (Some("naive"), Some(0.75))]);
    }

    #[test]
    fn zenoh_is_compared_with_raw_tcp_and_with_bare_zenoh() {
        let mut figures = Figures::default();
        let paths = [("raw_tokio", 2.0), ("zenoh_query", 4.0), ("zenoh_put", 2.5), ("zenoh_tcp", 5.0)];
        figures.add(Cores::Two, paths.iter().map(|(path, ms)| measured("S", path, &[*ms])).collect());
        let rows = figures.rows();
        let found: Vec<_> = rows.iter().map(|row| (&*row.row, row.against, row.ratio)).collect();
        let expected = [
            ("get_obs.raw_tokio", Some("raw_tcp"), Some(1.0)),
            ("get_obs.zenoh_query", Some("raw_tcp"), Some(2.0)),
            ("get_obs.zenoh_put", Some("raw_tcp"), Some(1.25)),
            ("get_obs.zenoh_tcp", Some("raw_tcp"), Some(2.5)),
            ("get_obs.zenoh_tcp", Some("zenoh_query"), Some(1.25)),
            ("get_obs.zenoh_tcp", Some("zenoh_put"), Some(2.0)),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_baseline_that_spreads_is_noisy() {
        let mut figures = Figures::default();
        figures.add(
            Cores::Two,
            vec![measured("S", "raw_tokio", &[1.0, 1.0, 2.0, 3.0, 3.0]), measured("S", "chiral", &[2.0])],
        );
        assert!(figures.rows().iter().all(|row| row.noisy));
    }
}
