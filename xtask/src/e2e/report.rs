//! What a policy says at its end, and what a row of the table makes of it.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// One JSON object, printed by the policy and passed on by `--json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) client: String,
    pub(crate) mode: String,
    pub(crate) transport: String,
    pub(crate) codec: String,
    pub(crate) episodes: u32,
    pub(crate) successes: u32,
    /// Observations a second, achieved.
    pub(crate) obs_hz: Option<f64>,
    /// Age of an observation when the policy had it.
    pub(crate) obs_age_ms_p50: Option<f64>,
    pub(crate) obs_age_ms_p99: Option<f64>,
    /// From the call of `step` to its result.
    pub(crate) step_ms_p50: Option<f64>,
    pub(crate) step_ms_p99: Option<f64>,
    /// From the first reset to the last episode's end.
    pub(crate) seconds: f64,
}

/// What a row asked for, in the report's words.
pub(crate) struct Asked {
    pub(crate) robot: &'static str,
    pub(crate) client: &'static str,
    pub(crate) mode: &'static str,
    pub(crate) transport: &'static str,
    /// What the policy calls the transport.
    pub(crate) reported: &'static str,
    pub(crate) codec: &'static str,
    pub(crate) episodes: u32,
}

impl Asked {
    /// The row's name, also that of its directory of logs.
    pub(crate) fn name(&self) -> String {
        [self.transport, self.codec, self.robot, self.client, self.mode].join("-")
    }
}

impl Report {
    /// Reads what the policy printed.
    pub(crate) fn read(text: &str) -> Result<Report> {
        serde_json::from_str(text).with_context(|| format!("the policy printed no report, but {text:?}"))
    }

    /// Checks that this is about what was asked, that every episode succeeded, and that no figure is missing.
    pub(crate) fn check(&self, asked: &Asked) -> Result<()> {
        let words = [
            ("client", &self.client, asked.client),
            ("mode", &self.mode, asked.mode),
            ("transport", &self.transport, asked.reported),
            ("codec", &self.codec, asked.codec),
        ];
        for (name, found, expected) in words {
            if found != expected {
                bail!("the report's {name} is {found:?}, expected {expected:?}");
            }
        }
        if self.episodes != asked.episodes {
            bail!("the report tells of {} episodes, expected {}", self.episodes, asked.episodes);
        }
        if self.successes != self.episodes {
            bail!("{} of {} episodes succeeded", self.successes, self.episodes);
        }
        for (name, figure) in self.figures_of_the_mode() {
            if !figure.is_some_and(|figure| figure.is_finite() && figure >= 0.0) {
                bail!("the report's {name} is {figure:?}, expected a number in mode {}", self.mode);
            }
        }
        Ok(())
    }

    /// The figures that a policy in this mode cannot lack.
    fn figures_of_the_mode(&self) -> Vec<(&'static str, Option<f64>)> {
        match self.mode.as_str() {
            // Over msgpack, nobody compares clocks.
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
    use super::{Asked, Report};

    const GOOD: &str = r#"{"client":"async","mode":"stream","transport":"websocket","codec":"protobuf","episodes":2,"successes":2,
        "obs_hz":29.9,"obs_age_ms_p50":3.0,"obs_age_ms_p99":5.0,"step_ms_p50":null,"step_ms_p99":null,"seconds":5.5}"#;

    /// Replaces `from` in a good report, which then must be refused with these words in the message, or
    /// accepted where there are none.
    fn check(from: &str, to: &str, refusal: &str) {
        let asked = Asked {
            robot: "rust",
            client: "async",
            mode: "stream",
            transport: "websocket",
            reported: "websocket",
            codec: "protobuf",
            episodes: 2,
        };
        let result = Report::read(&GOOD.replace(from, to)).and_then(|report| report.check(&asked));
        match result {
            Ok(_) => assert_eq!(refusal, "", "{from} -> {to} was accepted"),
            Err(error) => assert!(
                !refusal.is_empty() && format!("{error:#}").contains(refusal),
                "{from} -> {to}: {error:#}"
            ),
        }
    }

    #[test]
    fn only_a_good_report_is_accepted() {
        check("", "", "");
        check("29.9", "29.9, \"new\": 1", "");
        check("{", "", "printed no report");
        check("async", "blocking", "client is \"blocking\", expected \"async\"");
        check("websocket", "zenoh-tcp", "transport is \"zenoh-tcp\"");
        check("\"episodes\":2", "\"episodes\":3", "tells of 3 episodes, expected 2");
        check("\"successes\":2", "\"successes\":1", "1 of 2 episodes succeeded");
        check("29.9", "null", "obs_hz is None, expected a number in mode stream");
    }
}
