//! The clock of this host.

use chiral_proto::{Clock, Timestamp};
use rustix::time::{ClockId, clock_gettime};

/// CLOCK_MONOTONIC, which all processes of this host share.
pub fn monotonic() -> Clock {
    Clock::new(|| {
        let now = clock_gettime(ClockId::Monotonic);
        Timestamp(now.tv_sec * 1_000_000_000 + now.tv_nsec)
    })
}
