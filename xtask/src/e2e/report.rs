//! The report that a policy prints, and the checks that a row makes on it.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// A JSON object that the policy prints when it exits, and that `--json` passes on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) client: String,
    pub(crate) mode: String,
    pub(crate) transport: String,
    pub(crate) codec: String,
    pub(crate) episodes: u32,
    pub(crate) successes: u32,
    /// Achieved observations per second.
    pub(crate) obs_hz: Option<f64>,
    /// Age of an observation when the policy received it.
    pub(crate) obs_age_ms_p50: Option<f64>,
    pub(crate) obs_age_ms_p99: Option<f64>,
    /// Duration of a call of `step`.
    pub(crate) step_ms_p50: Option<f64>,
    pub(crate) step_ms_p99: Option<f64>,
    /// From the first reset to the last episode's end.
    pub(crate) seconds: f64,
}

/// The combination that a row plays, in the report's terms.
pub(crate) struct RowSpec {
    pub(crate) robot: &'static str,
    pub(crate) client: &'static str,
    pub(crate) mode: &'static str,
    pub(crate) transport: &'static str,
    /// The transport that the policy reports.
    pub(crate) reported: &'static str,
    pub(crate) codec: &'static str,
    pub(crate) episodes: u32,
}

impl RowSpec {
    /// The row's name, also of the directory with its logs.
    pub(crate) fn name(&self) -> String {
        [self.transport, self.codec, self.robot, self.client, self.mode].join("-")
    }
}

impl Report {
    /// Reads what the policy printed.
    pub(crate) fn read(text: &str) -> Result<Report> {
        serde_json::from_str(text)
            .with_context(|| format!("expected a report from the policy, found {text:?}"))
    }

    /// Checks that the report matches the row, that every episode succeeded and that no figure is missing.
    pub(crate) fn check(&self, spec: &RowSpec) -> Result<()> {
        let names = [
            ("client", &self.client, spec.client),
            ("mode", &self.mode, spec.mode),
            ("transport", &self.transport, spec.reported),
            ("codec", &self.codec, spec.codec),
        ];
        for (name, found, expected) in names {
            if found != expected {
                bail!("the report's {name} is {found:?}, expected {expected:?}");
            }
        }
        if self.episodes != spec.episodes {
            bail!("the report is about {} episodes, expected {}", self.episodes, spec.episodes);
        }
        if self.successes != self.episodes {
            bail!("{} of {} episodes succeeded", self.successes, self.episodes);
        }
        for (name, figure) in self.required_figures() {
            if !figure.is_some_and(|figure| figure.is_finite() && figure >= 0.0) {
                bail!("the report's {name} is {figure:?}, expected a number in mode {}", self.mode);
            }
        }
        Ok(())
    }

    /// The figures that a report must have in this mode.
    fn required_figures(&self) -> Vec<(&'static str, Option<f64>)> {
        match self.mode.as_str() {
            // Over msgpack clock offsets are not measured, so ages are unknown.
            "stream" if self.codec == "msgpack" => vec![("obs_hz", self.obs_hz)],
            "stream" => {
                vec![
                    ("obs_hz", self.obs_hz),
                    ("obs_age_ms_p50", self.obs_age_ms_p50),
                    ("obs_age_ms_p99", self.obs_age_ms_p99),
                ]
            }
            _ => vec![("step_ms_p50", self.step_ms_p50), ("step_ms_p99", self.step_ms_p99)],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Report, RowSpec};

    const GOOD: &str = r#"{"client":"async","mode":"stream","transport":"websocket","codec":"protobuf",
        "episodes":2,"successes":2,
        "obs_hz":29.9,"obs_age_ms_p50":3.0,"obs_age_ms_p99":5.0,
        "step_ms_p50":null,"step_ms_p99":null,"seconds":5.5}"#;

    /// Replaces `from` in a good report. The result must be rejected with this text in the error, or accepted
    /// if the text is empty.
    fn check(from: &str, to: &str, expected: &str) {
        let spec = RowSpec {
            robot: "rust",
            client: "async",
            mode: "stream",
            transport: "websocket",
            reported: "websocket",
            codec: "protobuf",
            episodes: 2,
        };
        let result = Report::read(&GOOD.replace(from, to)).and_then(|report| report.check(&spec));
        match result {
            Ok(_) => assert_eq!(expected, "", "{from} -> {to} was accepted"),
            Err(error) => assert!(
                !expected.is_empty() && format!("{error:#}").contains(expected),
                "{from} -> {to}: {error:#}"
            ),
        }
    }

    #[test]
    fn only_a_good_report_is_accepted() {
        check("", "", "");
        check("29.9", "29.9, \"new\": 1", "");
        check("{", "", "expected a report from the policy");
        check("async", "blocking", "client is \"blocking\", expected \"async\"");
        check("websocket", "zenoh-tcp", "transport is \"zenoh-tcp\"");
        check("\"episodes\":2", "\"episodes\":3", "is about 3 episodes, expected 2");
        check("\"successes\":2", "\"successes\":1", "1 of 2 episodes succeeded");
        check("29.9", "null", "obs_hz is None, expected a number in mode stream");
    }
}
