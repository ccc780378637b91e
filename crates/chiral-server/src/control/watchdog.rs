//! When the robot must hold because no action has been applied for too long. Pure: `now` is passed in.

use std::time::Duration;

use chiral_proto::Timestamp;

/// Armed by every applied row, disarmed by a hold and while the robot is lent to a reset or step.
#[derive(Debug)]
pub(crate) struct Watchdog {
    timeout: Option<Duration>,
    due_at: Option<Timestamp>,
}

impl Watchdog {
    /// A watchdog without a timeout is never due.
    pub(crate) fn new(timeout: Option<Duration>) -> Watchdog {
        Watchdog { timeout, due_at: None }
    }

    /// Rows begin at `now` and take `duration`. The watchdog is due one timeout after their end.
    pub(crate) fn arm(&mut self, now: Timestamp, duration: Duration) {
        self.due_at = self.timeout.map(|timeout| now + duration + timeout);
    }

    pub(crate) fn disarm(&mut self) {
        self.due_at = None;
    }

    /// When it is due, if it is armed.
    pub(crate) fn due_at(&self) -> Option<Timestamp> {
        self.due_at
    }

    pub(crate) fn is_due(&self, now: Timestamp) -> bool {
        self.due_at.is_some_and(|due_at| due_at <= now)
    }
}
