//! Pacing: large messages yield the core while actions flow, so that an action does not wait until 17 MB are
//! copied.
#![cfg_attr(not(feature = "websocket"), expect(dead_code, reason = "only the WebSocket transport is paced"))]

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Makes large messages yield the core while actions flow, on all connections that share it. A clone is the
/// same pacing.
///
/// The kernel copies a large message in a few long calls, and its scheduler would let that go on for
/// milliseconds, until its next tick. So the message is copied in parts, and the core is yielded between them
/// to threads that are ready to run. Without actions no thread waits, and parts only cost.
#[derive(Clone, Debug)]
pub struct Pacing {
    started: Instant,
    /// Active until this many nanoseconds after `started`.
    until_ns: Arc<AtomicU64>,
}

impl Default for Pacing {
    fn default() -> Pacing {
        Pacing { started: Instant::now(), until_ns: Arc::default() }
    }
}

impl Pacing {
    /// How long an action keeps pacing active.
    const ACTIVE_PERIOD: Duration = Duration::from_secs(1);
    /// Bytes that are copied in one call while pacing is active.
    const MAX_COPY_BYTES: usize = 1024 * 1024;
    /// How long one message yields in total: only once or twice to programs that compute without pause, or it
    /// would hardly ever arrive.
    const MAX_YIELD: Duration = Duration::from_millis(2);

    /// Records that an action is on its way: activates pacing for a second.
    pub fn note_action(&self) {
        let until = self.started.elapsed() + Self::ACTIVE_PERIOD;
        self.until_ns.store(until.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Returns how the next message is to be copied.
    pub(crate) fn for_message(&self) -> MessagePacing {
        let is_active = self.started.elapsed().as_nanos() < u128::from(self.until_ns.load(Ordering::Relaxed));
        let max_copy = if is_active { Self::MAX_COPY_BYTES } else { usize::MAX };
        MessagePacing { max_copy, yield_left: Self::MAX_YIELD }
    }
}

/// How one message is copied.
#[derive(Debug)]
pub(crate) struct MessagePacing {
    /// The most bytes to copy in one call.
    pub(crate) max_copy: usize,
    /// How long this message may still yield.
    yield_left: Duration,
}

impl MessagePacing {
    /// Yields the core between two copies.
    pub(crate) fn yield_core(&mut self) {
        if !self.yield_left.is_zero() {
            let started = Instant::now();
            thread::yield_now();
            self.yield_left = self.yield_left.saturating_sub(started.elapsed());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_limited_while_actions_flow() {
        let pacing = Pacing::default();
        assert_eq!(pacing.for_message().max_copy, usize::MAX);
        pacing.clone().note_action();
        assert_eq!(pacing.for_message().max_copy, Pacing::MAX_COPY_BYTES);
    }
}
