//! What may happen at any rate, and is told once a second.

use std::{sync::Mutex, time::Duration};

use chiral_proto::{Clock, Timestamp};
use chiral_transport::lock;

const PERIOD: Duration = Duration::from_secs(1);

/// Counts what happens between two times that it is told.
pub(crate) struct LogThrottle {
    clock: Clock,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    told_at: Option<Timestamp>,
    untold: u64,
}

impl LogThrottle {
    pub(crate) fn new(clock: Clock) -> LogThrottle {
        LogThrottle { clock, state: Mutex::default() }
    }

    /// It happened. If it is time to tell, `tell` gets how often it happened since it was told last.
    pub(crate) fn happened(&self, tell: impl FnOnce(u64)) {
        let now = self.clock.now();
        let mut state = lock(&self.state);
        state.untold += 1;
        if state.told_at.is_none_or(|told_at| now.since(told_at) >= PERIOD) {
            let State { untold, .. } =
                std::mem::replace(&mut *state, State { told_at: Some(now), untold: 0 });
            drop(state);
            tell(untold);
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
    fn what_happens_often_is_told_once_a_second_and_counted() {
        let now = Arc::new(AtomicI64::new(0));
        let clock = Arc::clone(&now);
        let log_throttle = LogThrottle::new(Clock::new(move || Timestamp(clock.load(Ordering::Relaxed))));
        let told = (0..25).filter_map(|i| {
            now.store(i * 100_000_000, Ordering::Relaxed);
            let mut told = None;
            log_throttle.happened(|count| told = Some((i, count)));
            told
        });
        assert_eq!(told.collect::<Vec<_>>(), [(0, 1), (10, 10), (20, 10)]);
    }
}
