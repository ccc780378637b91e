//! The results of all rows and guides: tables, JSON, and whether any of them failed.

use std::time::Duration;

use anyhow::{Result, bail};

use super::report::{Report, RowSpec};
use crate::table::table;

/// The results of a run.
pub(super) struct Outcome {
    pub(super) rows: Vec<Row>,
    pub(super) guides: Vec<(&'static str, Result<Duration>)>,
}

/// The result of one row.
pub(super) struct Row {
    pub(super) spec: RowSpec,
    pub(super) client_first: bool,
    /// `None` if the policy failed before it printed one.
    pub(super) report: Option<Report>,
    pub(super) result: Result<()>,
}

impl Outcome {
    /// Prints the tables, and fails if a row or a guide failed.
    pub(super) fn conclude(&self) -> Result<()> {
        let heading = "transport codec robot client mode first episodes successes obs_hz \
                       age_p50_ms age_p99_ms step_p50_ms step_p99_ms s/episode result";
        let mut cells = vec![heading.split(' ').map(str::to_owned).collect()];
        cells.extend(self.rows.iter().map(Row::cells));
        if !self.rows.is_empty() {
            println!("\n{}", table(&cells));
        }

        let mut cells = vec![["guide", "seconds", "result"].map(str::to_owned).to_vec()];
        cells.extend(self.guides.iter().map(|(name, result)| {
            let seconds = figure(result.as_ref().ok().map(Duration::as_secs_f64));
            vec![name.to_string(), seconds, status(result)]
        }));
        if !self.guides.is_empty() {
            println!("{}", table(&cells));
        }

        let rows = self.rows.iter().filter(|row| row.result.is_err()).count();
        let guides = self.guides.iter().filter(|(_, result)| result.is_err()).count();
        if rows + guides > 0 {
            bail!(
                "{rows} of {} rows and {guides} of {} guides failed, see above",
                self.rows.len(),
                self.guides.len()
            );
        }
        Ok(())
    }
}

impl Row {
    /// The policy's report under the row's own transport and robot, neither of which the policy knows: to it,
    /// shared memory and a router look like any Zenoh address.
    pub(super) fn json(&self) -> Option<serde_json::Value> {
        let mut json = serde_json::to_value(self.report.as_ref()?).ok()?;
        json["transport"] = self.spec.transport.into();
        json["robot"] = self.spec.robot.into();
        Some(json)
    }

    fn cells(&self) -> Vec<String> {
        let spec = &self.spec;
        let first = if self.client_first { "client" } else { "robot" };
        let report = self.report.as_ref();
        let mut cells = [spec.transport, spec.codec, spec.robot, spec.client, spec.mode, first]
            .map(str::to_owned)
            .to_vec();
        cells.push(spec.episodes.to_string());
        cells.push(report.map_or("-".to_owned(), |report| report.successes.to_string()));
        let figures = [
            report.and_then(|report| report.obs_hz),
            report.and_then(|report| report.obs_age_ms_p50),
            report.and_then(|report| report.obs_age_ms_p99),
            report.and_then(|report| report.step_ms_p50),
            report.and_then(|report| report.step_ms_p99),
            report.map(|report| report.seconds / f64::from(report.episodes)),
        ];
        cells.extend(figures.map(figure));
        cells.push(status(&self.result));
        cells
    }
}

fn figure(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.2}"))
}

fn status<T>(result: &Result<T>) -> String {
    if result.is_ok() { "ok" } else { "FAILED" }.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_has_the_transport_and_the_robot_of_the_row() {
        let report = r#"{"client":"async","mode":"step","transport":"zenoh-tcp","codec":"protobuf",
            "episodes":1,            "successes":1,"obs_hz":null,"obs_age_ms_p50":null,"obs_age_ms_p99":null,"step_ms_p50":1.0,
            "step_ms_p99":2.0,"seconds":3.0}"#;
        for (transport, robot) in [("zenoh-shm", "rust"), ("zenoh-router", "rust-homing")] {
            let spec = RowSpec {
                robot,
                client: "async",
                mode: "step",
                transport,
                reported: "zenoh-tcp",
                codec: "protobuf",
                episodes: 1,
            };
            let report = Report::read(report).ok();
            let json = Row { spec, client_first: false, report, result: Ok(()) }.json().unwrap();
            assert_eq!((&json["transport"], &json["robot"]), (&transport.into(), &robot.into()));
            assert_eq!(json["step_ms_p99"], 2.0);
        }
    }
}
