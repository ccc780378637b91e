//! How late an action is: its time in transit, compared with the quickest message of its session. Pure: `now`
//! is passed in.
//!
//! The two hosts' clocks have an unknown offset, so a single message says nothing. The smallest difference
//! between when a message was received and when it was sent, each on its own clock, is the offset and the
//! usual transit together: the *baseline*. What a message takes beyond it is its lateness.

use std::time::Duration;

use chiral_proto::{Timestamp, clock::PingSample};

/// The baseline follows clocks that run apart by at most one part in this many: ten times what quartz does.
const DRIFT_LIMIT: i64 = 1000;

/// The transit times of one session's messages from the client.
#[derive(Debug, Default)]
pub(crate) struct Transit {
    baseline: Option<Baseline>,
}

#[derive(Clone, Copy, Debug)]
struct Baseline {
    /// Nanoseconds from `sent_at` on the client's clock to the arrival on the server's.
    transit_ns: i64,
    sampled_at: Timestamp,
}

impl Transit {
    /// Adds a message and returns how late it is.
    pub(crate) fn add(&mut self, sent_at: Timestamp, now: Timestamp) -> Duration {
        let sample_ns = now - sent_at;
        let transit_ns = match self.baseline {
            None => sample_ns,
            Some(Baseline { transit_ns, sampled_at }) => {
                let drift_ns = (now - sampled_at).max(0) / DRIFT_LIMIT;
                sample_ns.min(transit_ns.saturating_add(drift_ns))
            }
        };
        self.baseline = Some(Baseline { transit_ns, sampled_at: now });
        Duration::from_nanos(sample_ns.saturating_sub(transit_ns).unsigned_abs())
    }

    /// Adds the answer to a ping of the server's. Its way back cannot have taken longer than the round trip:
    /// if it seems to be later than that, the client's clock has jumped, and the baseline begins anew.
    /// Returns by how much it has jumped back.
    pub(crate) fn add_answer(&mut self, sample: PingSample) -> Option<Duration> {
        let PingSample { t3, t4, .. } = sample;
        let lateness = self.add(t3, t4);
        let jumped = lateness > sample.round_trip();
        if jumped {
            self.baseline = Some(Baseline { transit_ns: t4 - t3, sampled_at: t4 });
        }
        jumped.then_some(lateness)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: i64 = 1_000_000;
    /// The client's clock is this far ahead.
    const OFFSET: i64 = 77_000 * MS;

    fn ms(ms: i64) -> Duration {
        Duration::from_nanos((ms * MS) as u64)
    }

    /// A message that the server receives at `now`, after `transit` in ms.
    fn add(transit: &mut Transit, now: i64, took: i64) -> Duration {
        transit.add(Timestamp((now - took) * MS + OFFSET), Timestamp(now * MS))
    }

    #[test]
    fn lateness_is_what_a_message_takes_beyond_the_quickest() {
        let mut transit = Transit::default();
        assert_eq!(add(&mut transit, 0, 30), ms(0), "the first one is the baseline");
        assert_eq!(add(&mut transit, 0, 20), ms(0), "a quicker one");
        assert_eq!(add(&mut transit, 0, 60), ms(40));
        assert_eq!(add(&mut transit, 4000, 4020), ms(4000 - 4), "4 ms of drift may have happened in 4 s");
        assert_eq!(add(&mut transit, 4000, 20), ms(0));
    }

    #[test]
    fn clocks_that_run_apart_make_nothing_late() {
        for ppm in [-500, 500] {
            let mut transit = Transit::default();
            let mut worst = Duration::ZERO;
            for second in 0..8 * 3600 {
                let now = second * 1000 * MS;
                let client = now + now / 1_000_000 * ppm - 2 * MS;
                worst = worst.max(transit.add(Timestamp(client), Timestamp(now)));
            }
            assert_eq!(worst, ms(0), "{ppm} ppm");
        }
    }

    #[test]
    fn an_answered_ping_shows_that_the_clients_clock_has_jumped() {
        let mut transit = Transit::default();
        add(&mut transit, 0, 2);
        // The client's clock stood still for 5 s.
        let behind = |now: i64| Timestamp((now - 2 - 5000) * MS + OFFSET);
        assert!(transit.add(behind(6000), Timestamp(6000 * MS)) > ms(4900));
        let answer = |t1: i64, t3: Timestamp, t4: i64| PingSample {
            t1: Timestamp(t1 * MS),
            t2: t3,
            t3,
            t4: Timestamp(t4 * MS),
        };
        assert!(transit.add_answer(answer(6000, behind(6004), 6004)).is_some());
        assert_eq!(transit.add(behind(6050), Timestamp(6050 * MS)), ms(0));
        // A network that stalls for 5 s delays the answer, too.
        assert_eq!(transit.add_answer(answer(7000, behind(7002), 12_000)), None);
        assert!(transit.add(behind(8000), Timestamp(12_000 * MS)) > ms(3900));
    }
}
