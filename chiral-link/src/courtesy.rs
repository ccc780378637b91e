//! How a large message leaves the core to others in between: an action that arrives meanwhile is not to wait for 17 MB to be copied.

use std::{
    thread,
    time::{Duration, Instant},
};

/// Bytes that are copied at once, in one call into the kernel, within which nobody else gets the core.
pub(crate) const MAX_AT_ONCE: usize = 1024 * 1024;

/// What is left of the time that one message gives to others. The scheduler by itself would let the copying go on for milliseconds, until its next tick. To
/// programs that compute without end a message gives way only once or twice, or it would hardly ever arrive.
#[derive(Debug)]
pub(crate) struct Courtesy {
    left: Duration,
}

impl Default for Courtesy {
    fn default() -> Courtesy {
        Courtesy { left: Duration::from_millis(2) }
    }
}

impl Courtesy {
    pub(crate) fn give_way(&mut self) {
        if !self.left.is_zero() {
            let began = Instant::now();
            thread::yield_now();
            self.left = self.left.saturating_sub(began.elapsed());
        }
    }
}
