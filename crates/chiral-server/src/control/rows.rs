//! The rows that wait to be applied, and when each is due. Pure: `now` is passed in.
//!
//! Of the rows whose time has come only the newest is applied, and no two rows closer than half a control
//! period. Whatever delays rows, the network, a stalled client or a robot that was busy, they are therefore
//! dropped and never caught up in a burst:
//!
//! - The rows of a chunk are due one control period after the other, and replace what is left of earlier
//!   actions.
//! - Single rows that were sent together, less than half a period apart, are a queue: each is due one period
//!   after the one before.
//! - Single rows that were sent apart but arrive together come from a stall: the newest replaces the others.
//! - All other single rows are due as they arrive, or in their turn after what is queued.
//!
//! Without a declared control rate rows are due as they arrive, in order, and none is dropped.

use std::{collections::VecDeque, time::Duration};

use chiral_proto::{ActionChunk, Timestamp};

/// Rows that are applied by one call: one of them, or a whole chunk for a robot that executes chunks itself.
#[derive(Debug)]
pub(crate) struct Item<O> {
    pub(crate) rows: ActionChunk,
    /// Where they come from.
    pub(crate) origin: O,
    /// Its place among all actions and steps of the session.
    pub(crate) order: u64,
    pub(crate) due_at: Timestamp,
    /// How long after that it may still be applied; `None` for any time.
    pub(crate) max_lateness: Option<Duration>,
}

/// When an action was sent, when it arrived, and how late it may be applied.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timing {
    /// On the client's clock, where it says.
    pub(crate) sent_at: Option<Timestamp>,
    pub(crate) arrived_at: Timestamp,
    pub(crate) max_lateness: Option<Duration>,
}

/// What can be done now.
#[derive(Debug)]
pub(crate) enum Next<O> {
    Apply(Item<O>),
    WaitUntil(Timestamp),
    Empty,
}

/// How many rows were dropped, and why.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Dropped {
    pub(crate) late: u64,
    pub(crate) superseded: u64,
}

/// The queue of rows.
#[derive(Debug)]
pub(crate) struct RowQueue<O> {
    period: Option<Duration>,
    /// Without sending times, a longer gap between two rows is a stall.
    stall_limit: Option<Duration>,
    takes_chunks: bool,
    items: VecDeque<Item<O>>,
    last_arrival: Option<Arrival>,
    /// Whether rows without sending times are arriving after a gap, as they do after a stall.
    is_after_gap: bool,
    last_applied_at: Option<Timestamp>,
}

/// The action that arrived last.
#[derive(Clone, Copy, Debug)]
struct Arrival {
    at: Timestamp,
    sent_at: Option<Timestamp>,
    /// When its last row is due.
    due_at: Timestamp,
}

impl<O: Clone> RowQueue<O> {
    /// A queue for a robot that applies a row every `period`, or as they come. With `takes_chunks`, chunks are
    /// not taken apart.
    pub(crate) fn new(
        period: Option<Duration>,
        stall_limit: Option<Duration>,
        takes_chunks: bool,
    ) -> RowQueue<O> {
        RowQueue {
            period,
            stall_limit,
            takes_chunks,
            items: VecDeque::new(),
            last_arrival: None,
            is_after_gap: false,
            last_applied_at: None,
        }
    }

    /// The number of rows that wait.
    pub(crate) fn len(&self) -> usize {
        self.items.iter().map(|item| item.rows.rows()).sum()
    }

    /// The place of the first row among actions and steps.
    pub(crate) fn first_order(&self) -> Option<u64> {
        self.items.front().map(|item| item.order)
    }

    /// Drops all rows, and forgets when the last one arrived, since the next ones do not follow them. Returns
    /// how many actions they belong to.
    pub(crate) fn restart(&mut self) -> u64 {
        self.last_arrival = None;
        self.is_after_gap = false;
        self.clear()
    }

    /// Drops all rows. Returns how many actions they belong to.
    pub(crate) fn clear(&mut self) -> u64 {
        let mut orders: Vec<u64> = self.items.drain(..).map(|item| item.order).collect();
        orders.dedup();
        orders.len() as u64
    }

    /// Records that a row, or the last one of several, was applied at `now`.
    pub(crate) fn note_applied(&mut self, now: Timestamp) {
        self.last_applied_at = Some(now);
    }

    /// When a row was last applied.
    pub(crate) fn last_applied_at(&self) -> Option<Timestamp> {
        self.last_applied_at
    }

    /// The first time at which a row may be applied: half a period after the last one.
    pub(crate) fn earliest(&self) -> Option<Timestamp> {
        Some(self.last_applied_at? + self.period? / 2)
    }

    /// Whether this action replaces the rows that wait.
    pub(crate) fn replaces(&self, rows: &ActionChunk, timing: Timing) -> bool {
        rows.rows() > 1 || self.relate(timing).0 == Relation::AfterStall
    }

    /// Adds the rows of an action. Returns how many rows it replaces.
    pub(crate) fn push(&mut self, rows: ActionChunk, timing: Timing, order: u64, origin: O) -> u64 {
        let Timing { sent_at, arrived_at, max_lateness } = timing;
        let (relation, is_after_gap) = self.relate(timing);
        self.is_after_gap = is_after_gap;
        let is_chunk = rows.rows() > 1;
        let replaced = if is_chunk || relation == Relation::AfterStall { self.take_all() } else { 0 };
        let period = self.period.unwrap_or_default();
        let due_at = match (relation, self.last_arrival) {
            (Relation::SentTogether, Some(last)) if !is_chunk => arrived_at.max(last.due_at + period),
            (Relation::Apart(spacing), Some(last)) if !self.items.is_empty() => {
                arrived_at.max(last.due_at + spacing.min(period))
            }
            _ => arrived_at,
        };
        let last_due_at = due_at + period * (rows.rows() as u32).saturating_sub(1);
        self.last_arrival = Some(Arrival { at: arrived_at, sent_at, due_at: last_due_at });
        let item = |rows, origin, due_at| Item { rows, origin, order, due_at, max_lateness };
        if is_chunk && !self.takes_chunks {
            let row = |(i, row)| item(ActionChunk::from(row), origin.clone(), due_at + period * i as u32);
            self.items.extend(rows.iter().enumerate().map(row));
        } else {
            self.items.push_back(item(rows, origin, due_at));
        }
        replaced
    }

    /// Drops the rows that were overtaken, and those that are late.
    pub(crate) fn prune(&mut self, now: Timestamp) -> Dropped {
        let mut dropped = Dropped::default();
        if self.period.is_none() {
            return dropped;
        }
        while self.items.get(1).is_some_and(|second| second.due_at <= now) {
            dropped.superseded += self.pop_rows();
        }
        // No other row is due, or this one would have been overtaken.
        if let Some(first) = self.items.front()
            && first.max_lateness.is_some_and(|limit| now.since(self.start_of(first)) > limit)
        {
            dropped.late += self.pop_rows();
        }
        dropped
    }

    /// Returns the rows to apply now, or when to ask again.
    pub(crate) fn next(&mut self, now: Timestamp) -> Next<O> {
        let Some(first) = self.items.front() else { return Next::Empty };
        let at = self.start_of(first);
        match at <= now {
            true => self.items.pop_front().map_or(Next::Empty, Next::Apply),
            false => Next::WaitUntil(at),
        }
    }

    /// When an item may be applied, if it is the next one.
    fn start_of(&self, item: &Item<O>) -> Timestamp {
        self.earliest().map_or(item.due_at, |earliest| earliest.max(item.due_at))
    }

    /// Drops the first item and returns its number of rows.
    fn pop_rows(&mut self) -> u64 {
        self.items.pop_front().map_or(0, |item| item.rows.rows() as u64)
    }

    fn take_all(&mut self) -> u64 {
        let rows = self.len() as u64;
        self.items.clear();
        rows
    }

    /// How a single row relates to the action before it, and whether rows are arriving after a gap.
    fn relate(&self, timing: Timing) -> (Relation, bool) {
        let (Some(last), Some(period)) = (self.last_arrival, self.period) else {
            return (Relation::First, false);
        };
        let gap = timing.arrived_at.since(last.at);
        let arrived_together = gap < period / 2;
        let is_gap = self.stall_limit.is_some_and(|limit| gap > limit.max(period));
        let is_after_gap = is_gap || (self.is_after_gap && arrived_together);
        let (spacing, sent_together) = match (timing.sent_at, last.sent_at) {
            (Some(sent_at), Some(last_sent_at)) => {
                let spacing = Duration::from_nanos((sent_at - last_sent_at).unsigned_abs());
                (spacing, spacing < period / 2)
            }
            _ => (gap, arrived_together && !is_after_gap),
        };
        let relation = match (sent_together, arrived_together) {
            (true, _) => Relation::SentTogether,
            (false, true) => Relation::AfterStall,
            (false, false) => Relation::Apart(spacing),
        };
        (relation, is_after_gap)
    }
}

/// How a row relates to the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Relation {
    /// There is none, or no rate by which to judge.
    First,
    SentTogether,
    /// Sent apart, and arrived together.
    AfterStall,
    /// Sent or, where that is unknown, arrived this far apart.
    Apart(Duration),
}
