//! How a session is doing, in numbers.

use std::{collections::VecDeque, time::Duration};

use chiral_proto::Timestamp;

/// How a session is doing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClientStats {
    /// Observations that the stream brought since it was started.
    pub observations: u64,
    /// Observations a second, over the last 10 s of the stream.
    pub observation_hz: f64,
    /// Median age of an observation on arrival, its oldest camera's, over the last 10 s; `None` before the
    /// clocks were compared.
    pub observation_age_p50: Option<Duration>,
    /// The age that 99 of 100 observations stay under.
    pub observation_age_p99: Option<Duration>,
    /// The shortest round trip of the last pings.
    pub round_trip: Option<Duration>,
    /// By how many nanoseconds the server's clock is ahead of this host's.
    pub clock_offset_ns: Option<i64>,
    /// Rows that wait for their tick.
    pub actions_queued: usize,
    /// Actions sent, by dispatch or at once.
    pub actions_sent: u64,
    /// Actions that the server refused, or the robot failed at.
    pub actions_refused: u64,
    /// Ticks of the dispatch that were missed by more than a period while a row waited.
    pub actions_skipped: u64,
    /// Rows dropped because a reset overtook them.
    pub actions_discarded: u64,
    /// By how much the dispatch's last thousand rows missed their ticks, median; `None` before the first.
    pub action_lateness_p50: Option<Duration>,
    /// The lateness that 99 of 100 of them stay under.
    pub action_lateness_p99: Option<Duration>,
}

/// The value that `percent` of 100 stay under; `None` of nothing.
pub(crate) fn percentile(sorted: &[Duration], percent: usize) -> Option<Duration> {
    sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1))).copied()
}

/// The arrivals of the last seconds.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    total: u64,
    arrivals: VecDeque<(Timestamp, Option<Duration>)>,
}

pub(crate) struct Summary {
    pub(crate) total: u64,
    pub(crate) hz: f64,
    pub(crate) age_p50: Option<Duration>,
    pub(crate) age_p99: Option<Duration>,
}

impl Recent {
    const SPAN: Duration = Duration::from_secs(10);

    pub(crate) fn add(&mut self, now: Timestamp, age: Option<Duration>) {
        self.total += 1;
        self.arrivals.push_back((now, age));
        while self.arrivals.front().is_some_and(|(at, _)| now.since(*at) > Self::SPAN) {
            self.arrivals.pop_front();
        }
    }

    pub(crate) fn summary(&self, now: Timestamp) -> Summary {
        let recent = self.arrivals.iter().filter(|(at, _)| now.since(*at) <= Self::SPAN);
        // From the first arrival on, so many periods have passed: a stream that stalls shows at once.
        let span = recent.clone().next().map_or(0.0, |(first, _)| now.since(*first).as_secs_f64());
        let periods = recent.clone().count().saturating_sub(1);
        let mut ages: Vec<Duration> = recent.filter_map(|(_, age)| *age).collect();
        ages.sort_unstable();
        Summary {
            total: self.total,
            hz: if span > 0.0 { periods as f64 / span } else { 0.0 },
            age_p50: percentile(&ages, 50),
            age_p99: percentile(&ages, 99),
        }
    }
}
