//! Timestamps, ticks at a fixed rate, and the offset between the clocks of two hosts. Nothing here reads a
//! clock: `now` is passed in.

use std::{
    collections::VecDeque,
    fmt,
    ops::{Add, Sub},
    sync::Arc,
    time::Duration,
};

/// Nanoseconds of a host's monotonic clock (CLOCK_MONOTONIC on Linux). Never subtract timestamps of two hosts
/// without their clock offset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// The timestamp in seconds.
    pub fn as_secs_f64(self) -> f64 {
        self.0 as f64 * 1e-9
    }

    /// The time that has passed since `earlier`; zero if `earlier` is later.
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
    /// Nanoseconds; negative if the right operand is later.
    type Output = i64;

    fn sub(self, earlier: Timestamp) -> i64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// A function that reads the local monotonic clock. Tests pass a clock of their own.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> Timestamp + Send + Sync>);

impl Clock {
    /// Creates a clock that calls `now`.
    pub fn new(now: impl Fn() -> Timestamp + Send + Sync + 'static) -> Clock {
        Clock(Arc::new(now))
    }

    /// The current time.
    pub fn now(&self) -> Timestamp {
        (self.0)()
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Clock({:?})", self.now())
    }
}

/// A rate above 0 and at most [`Rate::MAX_HZ`] hertz.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Rate(f64);

/// The error for a number that is not a valid [`Rate`].
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("expected a rate above 0 and at most {} Hz, found {found}", Rate::MAX_HZ)]
pub struct InvalidRate {
    /// The number, in hertz.
    pub found: f64,
}

impl Rate {
    /// The highest rate, in hertz.
    pub const MAX_HZ: f64 = 1000.0;

    /// Creates a rate from hertz.
    ///
    /// # Errors
    /// [`InvalidRate`] if `hz` is not above 0 or is above [`Rate::MAX_HZ`].
    pub fn new(hz: f64) -> Result<Rate, InvalidRate> {
        // NaN fails both comparisons.
        if hz > 0.0 && hz <= Self::MAX_HZ { Ok(Rate(hz)) } else { Err(InvalidRate { found: hz }) }
    }

    /// The rate in hertz.
    pub fn hz(self) -> f64 {
        self.0
    }
}

/// Ticks at a fixed rate on absolute deadlines: tick `n` is due at `start + n / rate`, so that neither
/// rounding nor late wake-ups accumulate. A tick that is missed by more than a period is skipped; it is never
/// made up for.
#[derive(Clone, Debug)]
pub struct Ticker {
    rate: Rate,
    started: Timestamp,
    /// The number of the next tick.
    next: u64,
}

/// The result of [`Ticker::take`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tick {
    /// The number of ticks before this one that were skipped.
    pub skipped: u64,
    /// How long after its deadline the tick was taken.
    pub lateness: Duration,
}

impl Ticker {
    /// Creates a ticker whose first tick is due at `now`.
    pub fn new(rate: Rate, now: Timestamp) -> Ticker {
        Ticker { rate, started: now, next: 0 }
    }

    /// When the next tick is due.
    pub fn deadline(&self) -> Timestamp {
        self.deadline_of(self.next)
    }

    /// How long until the next tick is due; zero if it is overdue.
    pub fn due_in(&self, now: Timestamp) -> Duration {
        self.deadline().since(now)
    }

    /// The number of the next tick; the first is 0.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// The number of the tick that [`Ticker::take`] would take.
    pub fn current(&self, now: Timestamp) -> u64 {
        self.next.max(self.last_due(now))
    }

    /// The number of the first tick at or after `instant`; negative before the start, as if there had been
    /// ticks.
    pub fn first_from(&self, instant: Timestamp) -> i64 {
        if instant < self.started {
            // Half a nanosecond more, so that rounding loses no period.
            let before_ns = self.started.since(instant).as_nanos() as f64 + 0.5;
            return -((before_ns * 1e-9 * self.rate.0) as i64);
        }
        let last = self.last_due(instant);
        let first = if self.deadline_of(last) < instant { last + 1 } else { last };
        i64::try_from(first).unwrap_or(i64::MAX)
    }

    /// Takes the last tick that is due by `now`, or the next one if none is due. Ticks before it are skipped.
    pub fn take(&mut self, now: Timestamp) -> Tick {
        let tick = self.current(now);
        let skipped = tick - self.next;
        self.next = tick + 1;
        Tick { skipped, lateness: now.since(self.deadline_of(tick)) }
    }

    /// Skips the ticks that are due by `now`.
    pub fn skip_due(&mut self, now: Timestamp) {
        if self.deadline() <= now {
            self.next = self.last_due(now) + 1;
        }
    }

    /// When the tick of this number is due.
    pub fn deadline_of(&self, tick: u64) -> Timestamp {
        // At a rate close to 0 the deadline may not fit.
        self.started + Duration::try_from_secs_f64(tick as f64 / self.rate.0).unwrap_or(Duration::MAX)
    }

    /// The number of the last tick that is due at or before `now`; 0 before the first.
    fn last_due(&self, now: Timestamp) -> u64 {
        let estimate = (now.since(self.started).as_secs_f64() * self.rate.0) as u64;
        // Correct the estimate: deadlines are rounded to nanoseconds, the estimate is not.
        if self.deadline_of(estimate) > now {
            estimate.saturating_sub(1)
        } else if self.deadline_of(estimate + 1) <= now {
            estimate + 1
        } else {
            estimate
        }
    }
}

/// The four times of a ping and its pong (RFC 5905, section 8): `t1` and `t4` on the clock of the ping's
/// sender, `t2` and `t3` on the clock of the pong's sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PingSample {
    /// When the ping was sent.
    pub t1: Timestamp,
    /// When the ping was received.
    pub t2: Timestamp,
    /// When the pong was sent.
    pub t3: Timestamp,
    /// When the pong was received.
    pub t4: Timestamp,
}

impl PingSample {
    /// The time that ping and pong spent in transit.
    pub fn round_trip(&self) -> Duration {
        Duration::from_nanos(
            u64::try_from((self.t4 - self.t1).saturating_sub(self.t3 - self.t2)).unwrap_or(0),
        )
    }

    /// How many nanoseconds the clock of the pong's sender is ahead. The error is at most half the round
    /// trip.
    pub fn offset_ns(&self) -> i64 {
        ((i128::from(self.t2 - self.t1) + i128::from(self.t3 - self.t4)) / 2) as i64
    }
}

/// Keeps the last samples and uses the one with the shortest round trip, which was delayed least by other
/// traffic.
#[derive(Clone, Debug, Default)]
pub struct OffsetFilter {
    samples: VecDeque<PingSample>,
}

impl OffsetFilter {
    /// How many samples are kept. At one ping a second, the offset is at most this many seconds of drift old.
    pub const WINDOW: usize = 16;

    /// Adds a sample.
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

    /// How many nanoseconds the peer's clock is ahead of the local one; `None` before the first sample.
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
    fn a_rate_is_above_zero_and_at_most_1000_hz() {
        for hz in [0.0, -1.0, 1000.1, f64::NAN, f64::INFINITY] {
            assert!(Rate::new(hz).is_err(), "{hz}");
        }
        assert!(Rate::new(1e-3).is_ok() && Rate::new(1000.0).is_ok());
    }

    #[test]
    fn ticks_are_on_absolute_deadlines_and_missed_ones_are_skipped() {
        for hz in [0.3, 7.0, 30.0, 1000.0] {
            let mut ticker = Ticker::new(Rate::new(hz).unwrap(), Timestamp(17));
            for n in 0..5000 {
                let deadline = Timestamp(17) + Duration::from_secs_f64(n as f64 / hz);
                assert_eq!(ticker.deadline(), deadline, "{hz} Hz, tick {n}");
                assert_eq!(ticker.take(deadline), Tick { skipped: 0, lateness: Duration::ZERO });
            }
        }
        let mut slow = Ticker::new(Rate::new(1e-300).unwrap(), Timestamp(0));
        assert_eq!(slow.take(Timestamp(5)).skipped, 0);
        assert_eq!(slow.deadline(), Timestamp(i64::MAX));

        const MS: i64 = 1_000_000;
        let ticker = Ticker::new(Rate::new(10.0).unwrap(), Timestamp(50 * MS));
        for (ms, tick) in [(-51, -1), (-50, -1), (-49, 0), (50, 0), (51, 1), (149, 1), (150, 1), (1051, 11)] {
            assert_eq!(ticker.first_from(Timestamp(ms * MS)), tick, "{ms} ms");
        }
        let mut ticker = Ticker::new(Rate::new(10.0).unwrap(), Timestamp(0));
        assert_eq!(
            ticker.take(Timestamp(299 * MS)),
            Tick { skipped: 2, lateness: Duration::from_millis(99) }
        );
        assert_eq!(ticker.due_in(Timestamp(299 * MS)), Duration::from_millis(1));
        assert_eq!(ticker.take(Timestamp(299 * MS)).skipped, 0, "taken before it is due");
        ticker.skip_due(Timestamp(399 * MS));
        assert_eq!(ticker.deadline(), Timestamp(400 * MS), "no tick is due");
        ticker.skip_due(Timestamp(400 * MS));
        assert_eq!(ticker.deadline(), Timestamp(500 * MS));
    }

    #[test]
    fn the_sample_with_the_shortest_round_trip_is_used() {
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
