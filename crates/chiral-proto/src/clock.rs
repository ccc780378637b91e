//! Times and the difference between two hosts' clocks. Nothing here reads a clock.

use std::{
    collections::VecDeque,
    fmt,
    ops::{Add, Sub},
    sync::Arc,
    time::Duration,
};

/// Nanoseconds of a host's monotonic clock (CLOCK_MONOTONIC on Linux). Two hosts' timestamps are never
/// subtracted without an offset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// In seconds.
    pub fn as_secs_f64(self) -> f64 {
        self.0 as f64 * 1e-9
    }

    /// The time that passed since `earlier`; zero if that is later.
    pub fn since(self, earlier: Timestamp) -> Duration {
        Duration::from_nanos(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }

    /// The same instant on a clock that is `offset_ns` ahead of this one.
    pub fn shifted(self, offset_ns: i64) -> Timestamp {
        Timestamp(self.0.saturating_add(offset_ns))
    }
}

impl Add<Duration> for Timestamp {
    type Output = Timestamp;

    fn add(self, duration: Duration) -> Timestamp {
        Timestamp(self.0.saturating_add(i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)))
    }
}

impl Sub for Timestamp {
    /// Nanoseconds, negative where the right one is later.
    type Output = i64;

    fn sub(self, earlier: Timestamp) -> i64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// Reads the local monotonic clock. Passed in, so that a test can be its own.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> Timestamp + Send + Sync>);

impl Clock {
    /// The clock that `now` reads.
    pub fn new(now: impl Fn() -> Timestamp + Send + Sync + 'static) -> Clock {
        Clock(Arc::new(now))
    }

    /// What it shows.
    pub fn now(&self) -> Timestamp {
        (self.0)()
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Clock({:?})", self.now())
    }
}

/// The four times of a ping and its pong (RFC 5905, section 8): sent and received back on the asker's clock,
/// received and answered on the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PingSample {
    /// The ping left, asker's clock.
    pub t1: Timestamp,
    /// The ping arrived, answerer's clock.
    pub t2: Timestamp,
    /// The pong left, answerer's clock.
    pub t3: Timestamp,
    /// The pong arrived, asker's clock.
    pub t4: Timestamp,
}

impl PingSample {
    /// The time that the two messages were under way.
    pub fn round_trip(&self) -> Duration {
        Duration::from_nanos(
            u64::try_from((self.t4 - self.t1).saturating_sub(self.t3 - self.t2)).unwrap_or(0),
        )
    }

    /// By how many nanoseconds the answerer's clock is ahead, half the round trip its greatest error.
    pub fn offset_ns(&self) -> i64 {
        ((i128::from(self.t2 - self.t1) + i128::from(self.t3 - self.t4)) / 2) as i64
    }
}

/// Keeps the last samples and trusts the one with the shortest round trip, which waited behind nothing.
#[derive(Clone, Debug, Default)]
pub struct OffsetFilter {
    samples: VecDeque<PingSample>,
}

impl OffsetFilter {
    /// How many samples it looks back on: at a ping a second, as many seconds of two clocks' drift.
    pub const WINDOW: usize = 16;

    /// Takes a sample in.
    pub fn add(&mut self, sample: PingSample) {
        if self.samples.len() == Self::WINDOW {
            self.samples.pop_front();
        }
        self.samples.push_back(sample);
    }

    /// The shortest round trip; `None` before the first sample.
    pub fn round_trip(&self) -> Option<Duration> {
        self.best().map(PingSample::round_trip)
    }

    /// By how many nanoseconds the peer's clock is ahead of ours; `None` before the first sample.
    pub fn offset_ns(&self) -> Option<i64> {
        self.best().map(PingSample::offset_ns)
    }

    fn best(&self) -> Option<&PingSample> {
        self.samples.iter().min_by_key(|sample| sample.round_trip())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shortest_round_trip_decides() {
        let mut filter = OffsetFilter::default();
        let ahead = 1_000_000;
        for (there, back) in [(900, 100), (20, 20), (50, 5_000)] {
            filter.add(PingSample {
                t1: Timestamp(0),
                t2: Timestamp(ahead + there),
                t3: Timestamp(ahead + there + 7),
                t4: Timestamp(there + 7 + back),
            });
        }
        assert_eq!(filter.round_trip(), Some(Duration::from_nanos(40)));
        assert_eq!(filter.offset_ns(), Some(ahead));
    }
}
