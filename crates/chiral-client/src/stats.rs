//! A session's statistics.

use std::{collections::VecDeque, time::Duration};

use chiral_proto::Timestamp;

/// A session's statistics.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct ClientStats {
    /// Observations received since the stream was started.
    pub observations: u64,
    /// Observations per second, over the last 10 s of the stream.
    pub observation_hz: f64,
    /// Median age of an observation's oldest camera on arrival, over the last 10 s; `None` until the clocks
    /// were compared.
    pub observation_age_p50: Option<Duration>,
    /// 99th percentile of the same.
    pub observation_age_p99: Option<Duration>,
    /// The shortest round trip of the last pings.
    pub round_trip: Option<Duration>,
    /// By how many nanoseconds the server's clock is ahead of this host's.
    pub clock_offset_ns: Option<i64>,
    /// How long nothing has arrived from the server, not a byte, on the connection that has been silent
    /// longest. `None` while that is less than 2 s, since pongs arrive every second; and with legacy servers
    /// over Zenoh, which send nothing while there is nothing to say. The session ends after the builder's
    /// `idle_timeout`.
    pub silent_for: Option<Duration>,
    /// Rows in the action queue.
    pub actions_queued: usize,
    /// Actions sent, by dispatch or by `send_action`.
    pub actions_sent: u64,
    /// Actions that the server refused, or the robot failed at.
    pub actions_refused: u64,
    /// Ticks of the dispatch that were missed by more than a period while a row waited.
    pub actions_skipped: u64,
    /// Rows of chunks with `start_at` whose tick had passed, and rows before such that missed ticks had
    /// delayed beyond it.
    pub actions_missed: u64,
    /// Rows dropped because a reset overtook them, or because they were predicted from an older episode.
    pub actions_discarded: u64,
    /// Rows that the server dropped because they arrived too late. It does not report them one by one, and
    /// they fail no call.
    pub actions_late: u64,
    /// Rows that the server dropped because newer ones, with which they arrived after a stall, overtook them.
    pub actions_superseded: u64,
    /// Median delay of the last thousand dispatched rows behind their ticks; `None` before the first.
    pub action_lateness_p50: Option<Duration>,
    /// 99th percentile of the same.
    pub action_lateness_p99: Option<Duration>,
}

/// The value below which `percent` of 100 values lie; `None` if there are none.
pub(crate) fn percentile(sorted: &[Duration], percent: usize) -> Option<Duration> {
    sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1))).copied()
}

/// The arrivals of the last seconds, and how many there were in all.
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
        // Measured up to now, not up to the last arrival: a stream that stalls shows at once.
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
