//! Limits the log lines of an event that may happen at any rate to one a second.

use std::{sync::Mutex, time::Duration};

use chiral_proto::{Clock, Timestamp, lock};

const PERIOD: Duration = Duration::from_secs(1);

/// Counts how often an event happens between two log lines.
pub(crate) struct LogThrottle {
    clock: Clock,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    logged_at: Option<Timestamp>,
    unlogged: u64,
}

impl LogThrottle {
    pub(crate) fn new(clock: Clock) -> LogThrottle {
        LogThrottle { clock, state: Mutex::default() }
    }

    /// Records an event. If the last log line is at least a second old, calls `log` with the number of events
    /// since.
    pub(crate) fn record(&self, log: impl FnOnce(u64)) {
        self.record_many(1, log);
    }

    /// The same for several events at once.
    pub(crate) fn record_many(&self, events: u64, log: impl FnOnce(u64)) {
        let now = self.clock.now();
        let mut state = lock(&self.state);
        state.unlogged += events;
        if state.logged_at.is_none_or(|logged_at| now.since(logged_at) >= PERIOD) {
            let State { unlogged, .. } =
                std::mem::replace(&mut *state, State { logged_at: Some(now), unlogged: 0 });
            drop(state);
            log(unlogged);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    };

    use super::*;

    #[test]
    fn frequent_events_are_logged_once_a_second_with_a_count() {
        let now = Arc::new(AtomicI64::new(0));
        let clock = Arc::clone(&now);
        let throttle = LogThrottle::new(Clock::new(move || Timestamp(clock.load(Ordering::Relaxed))));
        let logged = (0..25).filter_map(|i| {
            now.store(i * 100_000_000, Ordering::Relaxed);
            let mut logged = None;
            throttle.record(|count| logged = Some((i, count)));
            logged
        });
        assert_eq!(logged.collect::<Vec<_>>(), [(0, 1), (10, 10), (20, 10)]);
    }
}
