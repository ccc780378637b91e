//! The times of one sensor: when it published and captured, whether its capture times can be right, how often
//! it publishes, and what follows from that. Pure: `now` is passed in.

use std::{fmt, time::Duration};

use chiral_proto::Timestamp;

use crate::staleness::MaxAge;

/// How far a capture time may lie after its publication: clocks are read at slightly different instants.
const MAX_AHEAD: Duration = Duration::from_millis(1);

/// How far a capture time may lie before its publication.
const MAX_BEHIND: Duration = Duration::from_secs(60);

/// How many publications the measured period is the average of.
const MEASURED: usize = 10;

/// The least maximum age that follows from a measured period.
const MIN_MEASURED_AGE: Duration = Duration::from_secs(1);

/// What is known of one sensor's times.
#[derive(Debug, Default)]
pub(super) struct SensorTimes {
    /// How often it has published.
    count: u64,
    /// The times of the last publications: that of publication `n` is at `n % MEASURED`.
    published: [Timestamp; MEASURED],
    /// When the latest was captured: as its driver states, or when it was published if that cannot be right.
    captured_at: Timestamp,
    /// What the driver stated for the latest, right or wrong.
    stated: Option<Timestamp>,
    is_reported: bool,
}

/// Why a stated capture time cannot be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Implausible {
    /// It lies this long after its publication.
    Ahead(Duration),
    /// It lies this long before its publication.
    Behind(Duration),
    /// It lies this long before the one that was stated previously.
    Backwards(Duration),
}

/// Why a sensor's latest publication does not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotNew {
    /// There was no publication, or none in time.
    Unpublished,
    /// It was published in time, but what it states as its capture time is this long ago.
    CapturedBefore { age: Duration, published: u64 },
}

impl SensorTimes {
    /// Records a publication at `now` whose driver states this capture time; `None` if it states none, which
    /// means now. Returns what is wrong with the capture time, but only the first time that something is.
    pub(super) fn publish(&mut self, stated: Option<Timestamp>, now: Timestamp) -> Option<Implausible> {
        let implausible = stated.and_then(|stated| self.judge(stated, now));
        self.captured_at = stated.filter(|_| implausible.is_none()).unwrap_or(now);
        self.stated = stated;
        self.published[self.count as usize % MEASURED] = now;
        self.count += 1;
        implausible.filter(|_| !std::mem::replace(&mut self.is_reported, true))
    }

    fn judge(&self, stated: Timestamp, now: Timestamp) -> Option<Implausible> {
        let (ahead, behind) = (stated.since(now), now.since(stated));
        let backwards = self.stated.map_or(Duration::ZERO, |previous| previous.since(stated));
        if ahead > MAX_AHEAD {
            Some(Implausible::Ahead(ahead))
        } else if behind > MAX_BEHIND {
            Some(Implausible::Behind(behind))
        } else {
            (backwards > Duration::ZERO).then_some(Implausible::Backwards(backwards))
        }
    }

    /// When the latest publication was captured, as far as is known; 0 before the first.
    pub(super) fn captured_at(&self) -> Timestamp {
        self.captured_at
    }

    /// Fails if the latest publication was published or captured no later than `after`; with `None`, only if
    /// there is none.
    pub(super) fn check_new(&self, after: Option<Timestamp>, now: Timestamp) -> Result<(), NotNew> {
        let published_at = self.last_published().ok_or(NotNew::Unpublished)?;
        match after {
            Some(after) if published_at <= after => Err(NotNew::Unpublished),
            Some(after) if self.captured_at <= after => {
                Err(NotNew::CapturedBefore { age: self.age(now), published: self.count })
            }
            _ => Ok(()),
        }
    }

    /// Whether the latest publication is older than the rule allows.
    pub(super) fn is_stale(&self, rule: MaxAge, now: Timestamp) -> bool {
        let max_age = match rule {
            MaxAge::Measured => self.period().map(|period| (MEASURED as u32 * period).max(MIN_MEASURED_AGE)),
            MaxAge::Fixed(max_age) => Some(max_age),
            MaxAge::Unlimited => None,
        };
        max_age.is_some_and(|max_age| self.age(now) > max_age)
    }

    fn age(&self, now: Timestamp) -> Duration {
        now.since(self.captured_at)
    }

    fn last_published(&self) -> Option<Timestamp> {
        let last = self.count.checked_sub(1)?;
        Some(self.published[last as usize % MEASURED])
    }

    /// The average time between publications; `None` before [`MEASURED`] publications.
    fn period(&self) -> Option<Duration> {
        if self.count < MEASURED as u64 {
            return None;
        }
        let oldest = self.published[self.count as usize % MEASURED];
        Some(self.last_published()?.since(oldest) / (MEASURED as u32 - 1))
    }
}

impl fmt::Display for Implausible {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Implausible::Ahead(by) => {
                let limit = MAX_AHEAD.as_millis();
                write!(
                    f,
                    "expected captured_at at most {limit} ms after its publication, found {by:?} after it"
                )
            }
            Implausible::Behind(by) => {
                let limit = MAX_BEHIND.as_secs();
                write!(
                    f,
                    "expected captured_at at most {limit} s before its publication, found {by:?} before it"
                )
            }
            Implausible::Backwards(by) => {
                write!(f, "expected captured_at no earlier than the previous one, found it {by:?} earlier")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: i64 = 1_000_000;
    const S: i64 = 1000 * MS;
    /// The host has been up for 10 days when the sensor begins.
    const START: i64 = 864_000 * S;
    /// A 30 Hz camera whose images arrive 20 ms after they were captured.
    const PERIOD: i64 = 33 * MS;
    const LATENCY: i64 = 20 * MS;

    fn duration(nanos: i64) -> Duration {
        Duration::from_nanos(nanos.try_into().unwrap())
    }

    /// Publishes for 2 s what `state` makes of the true capture time. Returns the times, what was reported,
    /// and the time after the last publication.
    fn run(state: impl Fn(i64) -> i64) -> (SensorTimes, Vec<Implausible>, Timestamp) {
        let mut times = SensorTimes::default();
        let published: Vec<i64> = (0..60).map(|i| START + i * PERIOD).collect();
        let reported = published
            .iter()
            .filter_map(|&at| times.publish(Some(Timestamp(state(at - LATENCY))), Timestamp(at)))
            .collect();
        (times, reported, Timestamp(START + 59 * PERIOD + MS))
    }

    /// Checks whether the capture time is used, what is reported, and that a reset which ended just before,
    /// or 10 ms before, or 1 s before the last publication gets the right answer.
    #[track_caller]
    fn check(state: impl Fn(i64) -> i64, is_used: bool, expected: Option<Implausible>) {
        let (times, reported, now) = run(&state);
        assert_eq!(reported, Vec::from_iter(expected), "reported once, and only if something is wrong");
        let published = START + 59 * PERIOD;
        let captured = if is_used { state(published - LATENCY) } else { published };
        assert_eq!(times.captured_at(), Timestamp(captured));
        assert_eq!(times.check_new(Some(Timestamp(published)), now), Err(NotNew::Unpublished));
        for before in [1, 10 * MS, S] {
            let after = Timestamp(published - before);
            let is_new = times.check_new(Some(after), now).is_ok();
            assert_eq!(is_new, captured > after.0, "a reset ended {before} ns before the publication");
        }
    }

    #[test]
    fn a_good_capture_time_is_used_and_an_image_of_before_the_move_is_not_new() {
        check(|captured| captured, true, None);
        let (times, _, now) = run(|captured| captured);
        // Published after the reset, captured before it.
        let after = Timestamp(START + 59 * PERIOD - 5 * MS);
        let age = duration(LATENCY + MS);
        assert_eq!(times.check_new(Some(after), now), Err(NotNew::CapturedBefore { age, published: 60 }));
    }

    #[test]
    fn clocks_are_read_at_slightly_different_instants() {
        check(|captured| captured + LATENCY + MS, true, None);
    }

    #[test]
    fn a_capture_time_that_cannot_be_right_gives_way_to_that_of_the_publication() {
        let ahead = |by: i64| Some(Implausible::Ahead(duration(by - LATENCY)));
        check(|captured| captured + 40 * MS, false, ahead(40 * MS));
        check(|captured| captured + 2 * S, false, ahead(2 * S));
        let unix = 1_700_000_000 * S;
        check(|captured| captured + unix, false, ahead(unix));
        // Counted from when the camera was powered up, which was just now.
        let behind = Implausible::Behind(duration(START));
        check(|captured| captured - START + LATENCY, false, Some(behind));
        check(|_| i64::MIN, false, Some(Implausible::Behind(duration(i64::MAX))));
        check(|_| i64::MAX, false, Some(Implausible::Ahead(duration(i64::MAX - START))));
    }

    #[test]
    fn a_counter_of_32_bits_may_wrap() {
        const WRAP: i64 = (1 << 32) * MS;
        let mut times = SensorTimes::default();
        let mut reported = Vec::new();
        for i in -30..30 {
            let captured = WRAP + i * PERIOD;
            let now = Timestamp(captured + LATENCY);
            // Whole milliseconds, as the counter has.
            let counter = (captured / MS * MS) % WRAP;
            reported.extend(times.publish(Some(Timestamp(counter)), now));
            let expected = if i < 0 { Timestamp(counter) } else { now };
            assert_eq!(times.captured_at(), expected, "publication {i}");
            assert_eq!(times.check_new(Some(now.shifted(-1 - LATENCY)), now), Ok(()), "publication {i}");
        }
        assert_eq!(reported, [Implausible::Behind(duration(WRAP + LATENCY))]);
    }

    #[test]
    fn a_capture_time_before_the_previous_one_gives_way_and_the_next_one_does_not() {
        let mut times = SensorTimes::default();
        let mut publish = |stated: i64, now: i64| {
            let reported = times.publish(Some(Timestamp(stated)), Timestamp(now));
            (reported, times.captured_at().0)
        };
        assert_eq!(publish(S, S + MS), (None, S));
        assert_eq!(publish(S, S + 2 * MS), (None, S), "the same image may be published again");
        assert_eq!(publish(S - 1, S + 3 * MS), (Some(Implausible::Backwards(duration(1))), S + 3 * MS));
        assert_eq!(publish(S + 4 * MS, S + 5 * MS), (None, S + 4 * MS));
        assert_eq!(publish(S, S + 6 * MS), (None, S + 6 * MS), "reported already");
    }

    /// It may be the same image again, as far as anybody can tell, until it is a minute old.
    #[test]
    fn a_capture_time_that_is_stuck_is_never_new_and_its_age_is_told() {
        let stuck = |captured: i64| captured.min(START + 10 * PERIOD);
        let (times, reported, now) = run(stuck);
        assert_eq!((reported, times.captured_at()), (vec![], Timestamp(START + 10 * PERIOD)));
        let reason = NotNew::CapturedBefore { age: duration(49 * PERIOD + MS), published: 60 };
        assert_eq!(times.check_new(Some(Timestamp(START + 50 * PERIOD)), now), Err(reason));
        assert!(times.is_stale(MaxAge::Measured, now));
    }

    #[test]
    fn without_a_stated_capture_time_the_publication_counts() {
        let mut times = SensorTimes::default();
        assert_eq!(times.check_new(None, Timestamp(0)), Err(NotNew::Unpublished));
        assert_eq!(times.publish(None, Timestamp(S)), None);
        assert_eq!(times.captured_at(), Timestamp(S));
        assert_eq!(times.check_new(None, Timestamp(S)), Ok(()));
        assert_eq!(times.check_new(Some(Timestamp(S - 1)), Timestamp(S)), Ok(()));
        assert_eq!(times.check_new(Some(Timestamp(S)), Timestamp(S)), Err(NotNew::Unpublished));
    }

    /// Publishes `count` times at this period, and returns from which age on the sensor is stale.
    fn stale_after(count: i64, period: i64, rule: MaxAge) -> Option<i64> {
        let mut times = SensorTimes::default();
        for i in 0..count {
            times.publish(None, Timestamp(START + i * period));
        }
        let last = START + (count - 1) * period;
        let ages = [250 * MS, S, 2 * S, 20 * S, 1000 * S];
        let limit = ages.into_iter().find(|age| times.is_stale(rule, Timestamp(last + age + 1)))?;
        assert!(!times.is_stale(rule, Timestamp(last + limit)), "stale before {limit} ns");
        Some(limit)
    }

    #[test]
    fn a_sensor_is_stale_after_ten_of_its_periods_and_not_within_a_second() {
        assert_eq!(stale_after(10, PERIOD, MaxAge::Measured), Some(S), "at least a second");
        assert_eq!(stale_after(10, 200 * MS, MaxAge::Measured), Some(2 * S));
        assert_eq!(stale_after(500, 2 * S, MaxAge::Measured), Some(20 * S));
        assert_eq!(stale_after(9, PERIOD, MaxAge::Measured), None, "too few to measure its period");
        assert_eq!(stale_after(500, PERIOD, MaxAge::Unlimited), None);
        assert_eq!(stale_after(1, PERIOD, MaxAge::Fixed(duration(250 * MS))), Some(250 * MS));
    }

    #[test]
    fn a_pause_is_forgotten_after_ten_publications() {
        let mut times = SensorTimes::default();
        let mut now = 0;
        for i in 0..30 {
            now += if i == 19 { 60 * S } else { PERIOD };
            times.publish(None, Timestamp(now));
        }
        assert!(times.is_stale(MaxAge::Measured, Timestamp(now + S + 1)));
    }
}
