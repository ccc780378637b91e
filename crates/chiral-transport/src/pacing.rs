//! How a large message leaves the core to others in between: an action that arrives meanwhile is not to wait
//! for 17 MB to be copied.
#![cfg_attr(not(feature = "websocket"), expect(dead_code, reason = "transports give way"))]

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Asked for while actions flow; large messages of connections that share it then give way. A clone is the
/// same.
///
/// The kernel copies a large message in few long calls, and its scheduler would let that go on for
/// milliseconds, until its next tick. So it is copied in pieces, and between them the core is offered to
/// whoever waits for it. While nobody acts there is nobody to wait, and pieces only cost.
#[derive(Clone, Debug)]
pub struct Pacing {
    started: Instant,
    /// Nanoseconds from then until it is not asked for any more.
    until_ns: Arc<AtomicU64>,
}

impl Default for Pacing {
    fn default() -> Pacing {
        Pacing { started: Instant::now(), until_ns: Arc::default() }
    }
}

impl Pacing {
    /// For so long it is granted each time.
    const ACTIVE_PERIOD: Duration = Duration::from_secs(1);
    /// Bytes that are copied in one call.
    const MAX_COPY_BYTES: usize = 1024 * 1024;
    /// To programs that compute without end a message gives way only once or twice, or it would hardly ever
    /// arrive.
    const MAX_YIELD: Duration = Duration::from_millis(2);

    /// An action is on its way.
    pub fn note_action(&self) {
        self.until_ns
            .store((self.started.elapsed() + Self::ACTIVE_PERIOD).as_nanos() as u64, Ordering::Relaxed);
    }

    /// How the next message is to be copied.
    pub(crate) fn for_message(&self) -> MessagePacing {
        let is_active = self.started.elapsed().as_nanos() < u128::from(self.until_ns.load(Ordering::Relaxed));
        MessagePacing {
            max_copy: if is_active { Self::MAX_COPY_BYTES } else { usize::MAX },
            yield_left: Self::MAX_YIELD,
        }
    }
}

/// One message's pieces.
#[derive(Debug)]
pub(crate) struct MessagePacing {
    /// In bytes.
    pub(crate) max_copy: usize,
    /// What is left of the time that the message gives to others.
    yield_left: Duration,
}

impl MessagePacing {
    /// Between two pieces.
    pub(crate) fn yield_core(&mut self) {
        if !self.yield_left.is_zero() {
            let began = Instant::now();
            thread::yield_now();
            self.yield_left = self.yield_left.saturating_sub(began.elapsed());
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
