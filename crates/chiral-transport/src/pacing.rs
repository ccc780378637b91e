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
    began: Instant,
    /// Nanoseconds from then until it is not asked for any more.
    until: Arc<AtomicU64>,
}

impl Default for Pacing {
    fn default() -> Pacing {
        Pacing { began: Instant::now(), until: Arc::default() }
    }
}

impl Pacing {
    /// For so long it is granted each time.
    const PERIOD: Duration = Duration::from_secs(1);
    /// Bytes that are copied in one call.
    const PIECE: usize = 1024 * 1024;
    /// To programs that compute without end a message gives way only once or twice, or it would hardly ever
    /// arrive.
    const MOST: Duration = Duration::from_millis(2);

    /// An action is on its way.
    pub fn ask(&self) {
        self.until.store((self.began.elapsed() + Self::PERIOD).as_nanos() as u64, Ordering::Relaxed);
    }

    /// How the next message is to be copied.
    pub(crate) fn pieces(&self) -> Pieces {
        let is_asked_for = self.began.elapsed().as_nanos() < u128::from(self.until.load(Ordering::Relaxed));
        Pieces { size: if is_asked_for { Self::PIECE } else { usize::MAX }, left: Self::MOST }
    }
}

/// One message's pieces.
#[derive(Debug)]
pub(crate) struct Pieces {
    /// In bytes.
    pub(crate) size: usize,
    /// What is left of the time that the message gives to others.
    left: Duration,
}

impl Pieces {
    /// Between two pieces.
    pub(crate) fn give_way(&mut self) {
        if !self.left.is_zero() {
            let began = Instant::now();
            thread::yield_now();
            self.left = self.left.saturating_sub(began.elapsed());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_in_pieces_while_it_is_asked_for() {
        let pacing = Pacing::default();
        assert_eq!(pacing.pieces().size, usize::MAX);
        pacing.clone().ask();
        assert_eq!(pacing.pieces().size, Pacing::PIECE);
    }
}
