//! The action queue: which row is due when. Pure: `now` is passed in.

use std::{collections::VecDeque, time::Duration};

use chiral_proto::{
    Timestamp,
    clock::{Rate, Tick, Ticker},
};

use super::put::{ObservationRef, PutMode};
use crate::error::Error;

/// One queued action.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) values: Vec<f32>,
    pub(crate) from: ObservationRef,
}

/// What is due.
#[derive(Debug)]
pub(crate) enum Next {
    /// This row, now.
    Row(Row),
    /// A row, after this long.
    In(Duration),
    /// Nothing.
    Idle,
}

/// The rows that wait for the ticks of dispatch.
#[derive(Debug)]
pub(crate) struct RowQueue {
    rows: VecDeque<Row>,
    capacity: usize,
    /// Runs while dispatch does.
    ticker: Option<Ticker>,
    /// Ticks that were missed by more than a period while a row waited.
    skipped: u64,
    /// By how much the last rows missed their ticks.
    lateness: VecDeque<Duration>,
}

impl RowQueue {
    /// Lateness is kept of this many rows.
    const LATENESS_ROWS: usize = 1024;

    pub(crate) fn new(capacity: usize) -> RowQueue {
        RowQueue { rows: VecDeque::new(), capacity, ticker: None, skipped: 0, lateness: VecDeque::new() }
    }

    /// Starts dispatch, or changes its rate; the first tick is now.
    pub(crate) fn start(&mut self, rate: Rate, now: Timestamp) {
        self.lateness.clear();
        self.ticker = Some(Ticker::new(rate, now));
    }

    pub(crate) fn stop(&mut self) {
        self.ticker = None;
    }

    pub(crate) fn clear(&mut self) {
        self.rows.clear();
    }

    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }

    /// Queues all rows, or none.
    pub(crate) fn put(
        &mut self,
        rows: impl ExactSizeIterator<Item = Row>,
        mode: PutMode,
        now: Timestamp,
    ) -> Result<(), Error> {
        let kept = if mode == PutMode::Replace { 0 } else { self.rows.len() };
        if kept + rows.len() > self.capacity {
            return Err(Error::QueueFull {
                rows: rows.len(),
                queued: self.rows.len(),
                capacity: self.capacity,
                dispatching: self.ticker.is_some(),
            });
        }
        self.rows.truncate(kept);
        if let Some(ticker) = &mut self.ticker
            && self.rows.is_empty()
            && ticker.deadline() < now
        {
            // Ticks that passed while there was nothing to send were not missed.
            ticker.skip_due(now);
        }
        self.rows.extend(rows);
        Ok(())
    }

    /// The row that is due, or when the next one is.
    pub(crate) fn next(&mut self, now: Timestamp) -> Next {
        let Some(ticker) = &mut self.ticker else { return Next::Idle };
        let wait = ticker.due_in(now);
        if !wait.is_zero() {
            return if self.rows.is_empty() { Next::Idle } else { Next::In(wait) };
        }
        let Some(row) = self.rows.pop_front() else { return Next::Idle };
        let Tick { skipped, lateness } = ticker.take(now);
        self.skipped += skipped;
        if self.lateness.len() == Self::LATENESS_ROWS {
            self.lateness.pop_front();
        }
        self.lateness.push_back(lateness);
        Next::Row(row)
    }

    /// Drops the rows of an episode before `episode`. Returns how many.
    pub(crate) fn discard_before(&mut self, episode: u64) -> u64 {
        let before = self.rows.len();
        self.rows.retain(|row| row.from.episode >= episode);
        (before - self.rows.len()) as u64
    }

    /// The ticks until now do not count as missed.
    pub(crate) fn skip_due(&mut self, now: Timestamp) {
        if let Some(ticker) = &mut self.ticker {
            ticker.skip_due(now);
        }
    }

    /// Ticks that were missed by more than a period while a row waited.
    pub(crate) fn skipped(&self) -> u64 {
        self.skipped
    }

    /// By how much the last rows missed their ticks, sorted.
    pub(crate) fn lateness(&self) -> Vec<Duration> {
        let mut lateness: Vec<_> = self.lateness.iter().copied().collect();
        lateness.sort_unstable();
        lateness
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: i64 = 1_000_000;

    fn queue(capacity: usize, hz: Option<f64>) -> RowQueue {
        let mut queue = RowQueue::new(capacity);
        if let Some(hz) = hz {
            queue.start(Rate::new(hz).unwrap(), Timestamp(0));
        }
        queue
    }

    fn rows(count: usize) -> impl ExactSizeIterator<Item = Row> {
        (0..count).map(|_| Row { values: vec![0.0], from: ObservationRef::default() })
    }

    fn put(queue: &mut RowQueue, count: usize, mode: PutMode, ms: i64) -> Result<(), Error> {
        queue.put(rows(count), mode, Timestamp(ms * MS))
    }

    fn is_sent(queue: &mut RowQueue, ms: i64) -> bool {
        matches!(queue.next(Timestamp(ms * MS)), Next::Row(_))
    }

    /// Runs dispatch for `seconds`, woken `late_ns` after each deadline. Returns how many rows it sent and
    /// how many ticks it skipped.
    fn check(hz: f64, seconds: i64, late_ns: impl Fn(u64) -> i64) -> (u64, u64) {
        let mut queue = queue(16, Some(hz));
        let (mut now, mut sent) = (Timestamp(0), 0);
        loop {
            if queue.len() == 0 {
                queue.put(rows(16), PutMode::Append, now).unwrap();
            }
            now =
                now + queue.ticker.as_ref().unwrap().due_in(now) + Duration::from_nanos(late_ns(sent) as u64);
            if now >= Timestamp(seconds * 1000 * MS) {
                return (sent, queue.skipped());
            }
            sent += u64::from(matches!(queue.next(now), Next::Row(_)));
        }
    }

    #[test]
    fn the_rate_is_held_on_absolute_deadlines() {
        assert_eq!(check(100.0, 60, |_| 0), (6000, 0));
        assert_eq!(check(100.0, 60, |n| (n % 9) as i64 * MS), (6000, 0));
        assert_eq!(check(30.0, 60, |_| 100_000), (1800, 0));
    }

    #[test]
    fn missed_ticks_are_skipped_and_counted() {
        let (sent, skipped) = check(100.0, 60, |n| if n == 1000 { 255 * MS } else { 0 });
        assert_eq!((sent, skipped), (6000 - 25, 25));
    }

    #[test]
    fn a_row_that_is_queued_late_waits_for_the_next_tick() {
        let mut queue = queue(4, Some(10.0));
        put(&mut queue, 2, PutMode::Append, 250).unwrap();
        assert!(
            matches!(queue.next(Timestamp(250 * MS)), Next::In(wait) if wait == Duration::from_millis(50))
        );
        assert!(is_sent(&mut queue, 300));
        assert!(!is_sent(&mut queue, 301), "one row a tick");
        assert_eq!(queue.skipped(), 0);
    }

    #[test]
    fn lateness_is_counted_from_the_tick_that_a_row_was_sent_at() {
        let mut queue = queue(4, Some(10.0));
        put(&mut queue, 3, PutMode::Append, 0).unwrap();
        for ms in [3, 100, 457] {
            assert!(is_sent(&mut queue, ms));
        }
        assert_eq!(queue.lateness(), [0, 3, 57].map(Duration::from_millis));
    }

    #[test]
    fn all_rows_fit_or_none() {
        let mut queue = queue(4, None);
        put(&mut queue, 3, PutMode::Append, 0).unwrap();
        assert!(put(&mut queue, 2, PutMode::Append, 0).is_err());
        assert_eq!(queue.len(), 3);
        put(&mut queue, 4, PutMode::Replace, 0).unwrap();
        assert_eq!(queue.len(), 4);
        assert!(put(&mut queue, 5, PutMode::Replace, 0).is_err());
    }
}
