//! The action queue, and which row is due when. Pure: std only, `now` is passed in.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use chiral_proto::{Rate, Ticker, Timestamp, ValueMap, clock::Tick};

/// What `put_chunk` does with the rows that are still queued.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PutMode {
    /// Keeps them; the new rows follow.
    #[default]
    Append,
    /// Drops them; the new rows are next.
    Replace,
}

/// One action that waits for its tick.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Row {
    pub(crate) values: Vec<f32>,
    pub(crate) from: Source,
}

/// What an action was chosen by.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Source {
    pub(crate) episode: u64,
    /// The observation's number.
    pub(crate) observation_seq: u64,
    /// When its cameras' frames were captured, as a legacy server put it; nobody else is told.
    pub(crate) capture_times: Option<Arc<ValueMap>>,
}

/// The queue and its clockwork: one row a tick, on absolute deadlines.
#[derive(Debug)]
pub(crate) struct ActionQueue {
    queue: VecDeque<Row>,
    capacity: usize,
    ticker: Option<Ticker>,
    /// Resets under way: while there are any, nothing is due.
    resets: usize,
    /// Ticks that were missed by more than a period while a row waited.
    pub(crate) skipped: u64,
    /// Rows dropped because a reset overtook them.
    pub(crate) discarded: u64,
    /// By how much the last rows missed their ticks.
    lateness: VecDeque<Duration>,
}

impl ActionQueue {
    /// So many of the last rows tell how late they are.
    const REMEMBERED: usize = 1024;

    pub(crate) fn new(capacity: usize) -> ActionQueue {
        ActionQueue {
            queue: VecDeque::new(),
            capacity,
            ticker: None,
            resets: 0,
            skipped: 0,
            discarded: 0,
            lateness: VecDeque::new(),
        }
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    pub(crate) fn queued(&self) -> usize {
        self.queue.len()
    }

    pub(crate) fn is_running(&self) -> bool {
        self.ticker.is_some()
    }

    /// By how much the last rows missed their ticks, in order of size.
    pub(crate) fn lateness(&self) -> Vec<Duration> {
        let mut lateness: Vec<_> = self.lateness.iter().copied().collect();
        lateness.sort_unstable();
        lateness
    }

    pub(crate) fn start(&mut self, rate: Rate, now: Timestamp) {
        self.lateness.clear();
        self.ticker = Some(Ticker::new(rate, now));
    }

    pub(crate) fn stop(&mut self) {
        self.ticker = None;
    }

    pub(crate) fn clear(&mut self) {
        self.queue.clear();
    }

    /// Queues all of the rows; gives them back if there is no room for all.
    pub(crate) fn offer(&mut self, rows: Vec<Row>, mode: PutMode, now: Timestamp) -> Result<(), Vec<Row>> {
        let kept = if mode == PutMode::Replace { 0 } else { self.queue.len() };
        if kept + rows.len() > self.capacity {
            return Err(rows);
        }
        self.queue.truncate(kept);
        if let Some(ticker) = &mut self.ticker
            && self.queue.is_empty()
        {
            // Ticks that passed while there was nothing to send were not missed.
            if ticker.deadline() < now {
                ticker.skip_due(now);
            }
        }
        self.queue.extend(rows);
        Ok(())
    }

    /// A reset was asked for: what is queued was chosen in the old episode.
    pub(crate) fn reset_began(&mut self) {
        self.resets += 1;
        self.discarded += self.queue.len() as u64;
        self.queue.clear();
    }

    /// Whether a reset is under way.
    pub(crate) fn is_held_up(&self) -> bool {
        self.resets > 0
    }

    /// The reset was answered.
    pub(crate) fn reset_ended(&mut self, now: Timestamp) {
        self.resets = self.resets.saturating_sub(1);
        if let Some(ticker) = &mut self.ticker {
            ticker.skip_due(now);
        }
    }

    /// Drops the rows that were chosen in an episode before this one.
    pub(crate) fn drop_older_than(&mut self, episode: u64) {
        let before = self.queue.len();
        self.queue.retain(|row| row.from.episode >= episode);
        self.discarded += (before - self.queue.len()) as u64;
    }

    /// How long until a row is due; `None` while there is none, or dispatch does not run.
    pub(crate) fn due_in(&self, now: Timestamp) -> Option<Duration> {
        let ticker = self.ticker.as_ref().filter(|_| self.resets == 0 && !self.queue.is_empty())?;
        Some(ticker.due_in(now))
    }

    /// The row that is due, if one is. Ticks missed by more than a period are skipped and counted, never
    /// caught up.
    pub(crate) fn take(&mut self, now: Timestamp) -> Option<Row> {
        if self.due_in(now)? > Duration::ZERO {
            return None;
        }
        let Tick { skipped, lateness } = self.ticker.as_mut()?.take(now);
        self.skipped += skipped;
        if self.lateness.len() == Self::REMEMBERED {
            self.lateness.pop_front();
        }
        self.lateness.push_back(lateness);
        self.queue.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: i64 = 1_000_000;

    fn rows(n: usize) -> Vec<Row> {
        let from = Source { episode: 1, ..Source::default() };
        (0..n).map(|i| Row { values: vec![i as f32], from: from.clone() }).collect()
    }

    /// Runs dispatch for `seconds`, its thread woken `late` after each deadline; how many rows it sent.
    fn check(hz: f64, seconds: i64, late: impl Fn(u64) -> i64) -> (u64, u64) {
        let mut dispatch = ActionQueue::new(16);
        dispatch.start(Rate::new(hz).unwrap(), Timestamp(0));
        let (mut now, mut sent) = (Timestamp(0), 0);
        loop {
            if dispatch.queued() == 0 {
                dispatch.offer(rows(16), PutMode::Append, now).unwrap();
            }
            now = now + dispatch.due_in(now).unwrap() + Duration::from_nanos(late(sent) as u64);
            if now >= Timestamp(seconds * 1000 * MS) {
                return (sent, dispatch.skipped);
            }
            sent += u64::from(dispatch.take(now).is_some());
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
    fn a_row_that_comes_late_waits_for_the_next_tick() {
        let mut dispatch = ActionQueue::new(4);
        dispatch.start(Rate::new(10.0).unwrap(), Timestamp(0));
        dispatch.offer(rows(2), PutMode::Append, Timestamp(250 * MS)).unwrap();
        assert_eq!(dispatch.due_in(Timestamp(250 * MS)), Some(Duration::from_millis(50)));
        assert!(dispatch.take(Timestamp(300 * MS)).is_some());
        assert!(dispatch.take(Timestamp(301 * MS)).is_none(), "one row a tick");
        assert_eq!(dispatch.skipped, 0);
    }

    #[test]
    fn lateness_counts_from_the_tick_that_a_row_was_sent_at() {
        let mut dispatch = ActionQueue::new(4);
        dispatch.start(Rate::new(10.0).unwrap(), Timestamp(0));
        dispatch.offer(rows(3), PutMode::Append, Timestamp(0)).unwrap();
        for at in [3, 100, 457] {
            dispatch.take(Timestamp(at * MS)).unwrap();
        }
        assert_eq!(dispatch.lateness(), [0, 3, 57].map(Duration::from_millis));
    }

    #[test]
    fn all_rows_fit_or_none() {
        let mut dispatch = ActionQueue::new(4);
        dispatch.offer(rows(3), PutMode::Append, Timestamp(0)).unwrap();
        assert!(dispatch.offer(rows(2), PutMode::Append, Timestamp(0)).is_err());
        assert_eq!(dispatch.queued(), 3);
        dispatch.offer(rows(4), PutMode::Replace, Timestamp(0)).unwrap();
        assert_eq!(dispatch.queued(), 4);
        assert!(dispatch.offer(rows(5), PutMode::Replace, Timestamp(0)).is_err());
    }

    #[test]
    fn a_reset_drops_what_was_chosen_before_it() {
        let mut dispatch = ActionQueue::new(4);
        dispatch.start(Rate::new(10.0).unwrap(), Timestamp(0));
        dispatch.offer(rows(2), PutMode::Append, Timestamp(0)).unwrap();
        dispatch.reset_began();
        dispatch.offer(rows(1), PutMode::Append, Timestamp(0)).unwrap();
        assert_eq!(dispatch.due_in(Timestamp(0)), None);
        dispatch.reset_ended(Timestamp(50 * MS));
        dispatch.drop_older_than(2);
        assert_eq!((dispatch.queued(), dispatch.discarded), (0, 3));
    }
}
