//! What the server reports of rows that it dropped. Pure: `now` is passed in.

use std::time::Duration;

use chiral_proto::{Timestamp, message::ActionsDropped};

use crate::error::Error;

/// The rows that the server dropped. One stall of the network is no failure: only if rows are dropped and none
/// is accepted for as long as `late_limit`, the caller gets an error.
#[derive(Debug)]
pub(crate) struct DroppedRows {
    late_limit: Duration,
    /// Since the session began.
    totals: ActionsDropped,
    unaccepted: Option<Unaccepted>,
    /// The error that the next `put_*` returns.
    failure: Option<Error>,
    logged_at: Option<Timestamp>,
}

/// A time in which rows were dropped and none was accepted.
#[derive(Clone, Copy, Debug)]
struct Unaccepted {
    since: Timestamp,
    /// The newest report of dropped rows.
    until: Timestamp,
    /// Rows dropped before it began.
    dropped_before: u64,
}

impl DroppedRows {
    /// The least time between two log lines.
    const LOG_PERIOD: Duration = Duration::from_secs(1);

    pub(crate) fn new(late_limit: Duration) -> DroppedRows {
        let totals = ActionsDropped::default();
        DroppedRows { late_limit, totals, unaccepted: None, failure: None, logged_at: None }
    }

    /// The server dropped rows; `totals` counts since the session began.
    pub(crate) fn report(&mut self, totals: ActionsDropped, now: Timestamp) {
        let dropped_before = dropped(&self.totals);
        let accepts = totals.accepted > self.totals.accepted;
        self.totals = totals;
        if dropped(&totals) == dropped_before {
            return;
        }
        if self.logged_at.is_none_or(|logged_at| now.since(logged_at) >= Self::LOG_PERIOD) {
            self.logged_at = Some(now);
            let ActionsDropped { late, superseded, accepted } = totals;
            tracing::warn!(
                "the server dropped actions: in all {late} rows too late, {superseded} overtaken by newer \
                 ones, {accepted} accepted"
            );
        }
        if accepts {
            (self.unaccepted, self.failure) = (None, None);
        }
        // After a pause in which nothing was dropped, the policy may just have sent nothing.
        let ongoing = self.unaccepted.filter(|unaccepted| now.since(unaccepted.until) < self.late_limit);
        let Unaccepted { since, dropped_before, .. } =
            ongoing.unwrap_or(Unaccepted { since: now, until: now, dropped_before });
        self.unaccepted = Some(Unaccepted { since, until: now, dropped_before });
        let waited = now.since(since);
        if waited >= self.late_limit {
            let dropped = dropped(&totals).saturating_sub(dropped_before);
            self.failure = Some(Error::ActionsLate { waited, dropped });
            self.unaccepted = None;
        }
    }

    /// Fails if rows were dropped and none was accepted for too long, once.
    pub(crate) fn check(&mut self) -> Result<(), Error> {
        self.failure.take().map_or(Ok(()), Err)
    }

    /// A reset is being requested: what was sent before it does not matter any more.
    pub(crate) fn reset_started(&mut self) {
        (self.unaccepted, self.failure) = (None, None);
    }

    /// The server's counts since the session began.
    pub(crate) fn totals(&self) -> ActionsDropped {
        self.totals
    }
}

fn dropped(totals: &ActionsDropped) -> u64 {
    totals.late.saturating_add(totals.superseded)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATE_LIMIT: Duration = Duration::from_secs(5);

    /// Reports (ms, rows that were late, rows that were accepted), both since the session began. Returns after
    /// which of them the next `put_*` failed, with how many rows and after how long.
    fn check(reports: &[(i64, u64, u64)]) -> Vec<(i64, u64, Duration)> {
        let mut rows = DroppedRows::new(LATE_LIMIT);
        let mut failures = Vec::new();
        for &(ms, late, accepted) in reports {
            let totals = ActionsDropped { late, superseded: 0, accepted };
            rows.report(totals, Timestamp(ms * 1_000_000));
            match rows.check() {
                Ok(()) => {}
                Err(Error::ActionsLate { waited, dropped }) => failures.push((ms, dropped, waited)),
                Err(error) => panic!("{error}"),
            }
            assert!(rows.check().is_ok(), "returned once");
        }
        failures
    }

    #[test]
    fn one_stall_is_no_failure() {
        // 4 s at 20 Hz arrive at once, then all goes well for a minute; then it happens again.
        assert_eq!(check(&[(0, 10, 100), (50, 80, 100), (60_000, 160, 1300)]), []);
        // Now and then a row is late.
        let reports: Vec<_> = (0..100).map(|n| (n * 500, n as u64 + 1, n as u64 * 9)).collect();
        assert_eq!(check(&reports), []);
        // 4.9 s of nothing but late rows, then one that is not.
        assert_eq!(check(&[(0, 1, 7), (4900, 99, 7), (5100, 100, 8), (9900, 150, 8)]), []);
        // The policy sends nothing between two stalls.
        assert_eq!(check(&[(0, 10, 7), (3000, 20, 7), (60_000, 30, 7)]), []);
    }

    #[test]
    fn rows_that_are_all_late_for_5_s_are_a_failure() {
        let reports: Vec<_> = (0..=120).map(|n| (n * 100, 40 + 2 * (n as u64 + 1), 7)).collect();
        let expected = [(5000, 102 + 40, Duration::from_secs(5)), (10_100, 100 + 2, Duration::from_secs(5))];
        assert_eq!(check(&reports), expected);
    }

    #[test]
    fn rows_that_are_accepted_before_the_next_put_clear_the_failure() {
        let mut rows = DroppedRows::new(LATE_LIMIT);
        for (s, late, accepted) in [(0, 1, 0), (3, 2, 0), (6, 3, 0), (7, 4, 50)] {
            let totals = ActionsDropped { late, superseded: 0, accepted };
            rows.report(totals, Timestamp(s * 1_000_000_000));
        }
        assert!(rows.check().is_ok());
    }

    #[test]
    fn a_reset_starts_anew() {
        let mut rows = DroppedRows::new(LATE_LIMIT);
        let late = |late| ActionsDropped { late, ..ActionsDropped::default() };
        rows.report(late(1), Timestamp(0));
        rows.reset_started();
        rows.report(late(2), Timestamp(4_000_000_000));
        rows.report(late(3), Timestamp(6_000_000_000));
        assert!(rows.check().is_ok());
    }
}
