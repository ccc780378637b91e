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
    pub(crate) valid_for: Option<Duration>,
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

/// The rows that wait for the ticks of dispatch, in the order in which they are sent.
#[derive(Debug)]
pub(crate) struct RowQueue {
    rows: VecDeque<Queued>,
    capacity: usize,
    /// Runs while dispatch does.
    ticker: Option<Ticker>,
    /// Ticks that were missed by more than a period while a row waited.
    skipped: u64,
    /// Rows dropped because their tick had passed.
    missed: u64,
    /// By how much the last rows missed their ticks.
    lateness: VecDeque<Duration>,
}

#[derive(Debug)]
struct Queued {
    row: Row,
    /// The tick that the row was put for. Other rows take the next one when it is their turn.
    tick: Option<u64>,
}

impl RowQueue {
    /// Lateness is kept of this many rows.
    const LATENESS_ROWS: usize = 1024;

    pub(crate) fn new(capacity: usize) -> RowQueue {
        RowQueue {
            rows: VecDeque::new(),
            capacity,
            ticker: None,
            skipped: 0,
            missed: 0,
            lateness: VecDeque::new(),
        }
    }

    /// Starts dispatch, or changes its rate; the first tick is now.
    pub(crate) fn start(&mut self, rate: Rate, now: Timestamp) {
        self.drop_timed_rows();
        self.lateness.clear();
        self.ticker = Some(Ticker::new(rate, now));
    }

    pub(crate) fn stop(&mut self) {
        self.drop_timed_rows();
        self.ticker = None;
    }

    pub(crate) fn clear(&mut self) {
        self.rows.clear();
    }

    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }

    /// Queues all rows, or none. Returns whether one of them is due before what was next.
    pub(crate) fn put(
        &mut self,
        rows: impl ExactSizeIterator<Item = Row>,
        mode: PutMode,
        now: Timestamp,
    ) -> Result<bool, Error> {
        let kept = if mode == PutMode::Replace { 0 } else { self.rows.len() };
        self.check_room(kept, rows.len())?;
        let next_before = self.front_tick();
        self.rows.truncate(kept);
        self.skip_idle_ticks(now);
        self.rows.extend(rows.map(|row| Queued { row, tick: None }));
        Ok(self.front_tick() != next_before)
    }

    /// Queues rows for the ticks from the first one at or after `start_at` on, in place of the rows that would
    /// take these ticks. All rows or none; but those whose tick has passed are dropped. Returns whether one of
    /// them is due before what was next.
    pub(crate) fn put_at(
        &mut self,
        rows: impl ExactSizeIterator<Item = Row>,
        mode: PutMode,
        start_at: Timestamp,
        now: Timestamp,
    ) -> Result<bool, Error> {
        self.skip_idle_ticks(now);
        let Some(ticker) = &self.ticker else {
            return Err(Error::InvalidArgument {
                name: "start_at",
                expected: "action dispatch to run, whose ticks the rows take",
                found: "no action dispatch".to_owned(),
            });
        };
        let first = ticker.first_from(start_at);
        let next = ticker.current(now);
        let passed = (next as i64).saturating_sub(first).clamp(0, rows.len() as i64) as usize;
        let start = next.max(first.max(0) as u64);
        let ticks = start..start + (rows.len() - passed) as u64;
        let keeps = |tick: &u64| mode != PutMode::Replace && !ticks.contains(tick);
        let planned = self.planned_ticks(next);
        if !ticks.is_empty() {
            let kept = planned.iter().filter(|tick| keeps(tick)).count();
            self.check_room(kept, rows.len() - passed)?;
        }
        self.missed += passed as u64;
        if ticks.is_empty() {
            return Ok(false);
        }
        let next_before = self.front_tick();
        let old = std::mem::take(&mut self.rows);
        let kept = planned.into_iter().zip(old).filter(|(tick, _)| keeps(tick));
        let (before, after): (VecDeque<_>, VecDeque<_>) = kept.partition(|(tick, _)| *tick < ticks.start);
        let new = rows.skip(passed).zip(ticks).map(|(row, tick)| Queued { row, tick: Some(tick) });
        self.rows.extend(before.into_iter().map(|(_, queued)| queued));
        self.rows.extend(new);
        self.rows.extend(after.into_iter().map(|(_, queued)| queued));
        Ok(self.front_tick() != next_before)
    }

    /// The row that is due, or when the next one is.
    pub(crate) fn next(&mut self, now: Timestamp) -> Next {
        self.drop_passed_rows(now);
        let (Some(ticker), Some(front)) = (&mut self.ticker, self.rows.front()) else { return Next::Idle };
        let tick = front.tick.unwrap_or_else(|| ticker.current(now));
        let wait = ticker.deadline_of(tick).since(now);
        if !wait.is_zero() {
            return Next::In(wait);
        }
        let Some(Queued { row, tick }) = self.rows.pop_front() else { return Next::Idle };
        let Tick { skipped, lateness } = ticker.take(now);
        if tick.is_none() {
            self.skipped += skipped;
        }
        if self.lateness.len() == Self::LATENESS_ROWS {
            self.lateness.pop_front();
        }
        self.lateness.push_back(lateness);
        Next::Row(row)
    }

    /// Drops the rows of an episode before `episode`. Returns how many.
    pub(crate) fn discard_before(&mut self, episode: u64) -> u64 {
        let before = self.rows.len();
        self.rows.retain(|queued| queued.row.from.episode >= episode);
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

    /// Rows dropped because their tick had passed.
    pub(crate) fn missed(&self) -> u64 {
        self.missed
    }

    /// By how much the last rows missed their ticks, sorted.
    pub(crate) fn lateness(&self) -> Vec<Duration> {
        let mut lateness: Vec<_> = self.lateness.iter().copied().collect();
        lateness.sort_unstable();
        lateness
    }

    // ---- Helpers ------------------------------------------------------------------------------------------

    fn check_room(&self, kept: usize, rows: usize) -> Result<(), Error> {
        if kept + rows <= self.capacity {
            return Ok(());
        }
        let (queued, capacity) = (self.rows.len(), self.capacity);
        Err(Error::QueueFull { rows, queued, capacity, dispatching: self.ticker.is_some() })
    }

    /// Which tick the first row was put for, if there is a row.
    fn front_tick(&self) -> Option<Option<u64>> {
        self.rows.front().map(|queued| queued.tick)
    }

    /// The tick that each row takes if none is missed, where `next` is the next one.
    fn planned_ticks(&self, next: u64) -> Vec<u64> {
        let take = |free: &mut u64, queued: &Queued| {
            let tick = queued.tick.unwrap_or(*free);
            *free = tick.max(*free) + 1;
            Some(tick)
        };
        self.rows.iter().scan(next, take).collect()
    }

    /// Ticks that passed while there was nothing to send were not missed.
    fn skip_idle_ticks(&mut self, now: Timestamp) {
        if let Some(ticker) = &mut self.ticker
            && self.rows.front().is_none_or(|front| front.tick.is_some_and(|tick| tick > ticker.current(now)))
            && ticker.deadline() < now
        {
            ticker.skip_due(now);
        }
    }

    /// Drops the rows whose tick has passed. What waits before a row whose tick has come was delayed by missed
    /// ticks: the newer row takes its place.
    fn drop_passed_rows(&mut self, now: Timestamp) {
        let Some(ticker) = &self.ticker else { return };
        let current = ticker.current(now);
        let has_come = |queued: &Queued| queued.tick.is_some_and(|tick| tick <= current);
        if let Some(at) = self.rows.iter().rposition(has_come) {
            let passed = if self.rows[at].tick == Some(current) { at } else { at + 1 };
            self.missed += self.rows.drain(..passed).len() as u64;
        }
    }

    /// The ticks that rows were put for are no more.
    fn drop_timed_rows(&mut self) {
        let before = self.rows.len();
        self.rows.retain(|queued| queued.tick.is_none());
        self.missed += (before - self.rows.len()) as u64;
    }
}

#[cfg(test)]
mod tests;
