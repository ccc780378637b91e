//! The rows that wait to be applied, and when each is due. Pure: `now` is passed in.
//!
//! Of the rows whose time has come only the newest is applied, and no two rows closer than half a control
//! period. Whatever delays rows, the network, a stalled client or a robot that was busy, they are therefore
//! dropped and never caught up in a burst:
//!
//! - The rows of a chunk are due one control period after the other, and replace what is left of earlier
//!   actions.
//! - Single rows that were sent together, less than half a period apart, are a queue: each is due one period
//!   after the one before. Rows that go on coming like that are no queue, but come faster than the robot can
//!   apply them: after half a second the newest replaces the others.
//! - Single rows that were sent apart but arrive together come from a stall: the newest replaces the others.
//! - All other single rows are due as they arrive, or in their turn after what is queued.
//!
//! Without a declared control rate rows are due as they arrive, in order, and none is dropped.

use std::{collections::VecDeque, time::Duration};

use chiral_proto::{ActionChunk, Timestamp};

/// For how long rows may go on coming less than half a period apart and count as sent together.
const TOGETHER_LIMIT: Duration = Duration::from_millis(500);

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
    /// Until when it may be applied at all, whenever it is due.
    pub(crate) valid_until: Option<Timestamp>,
}

/// When an action was sent, when it arrived, and how late it may be applied.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timing {
    /// On the client's clock, where it says.
    pub(crate) sent_at: Option<Timestamp>,
    pub(crate) arrived_at: Timestamp,
    pub(crate) max_lateness: Option<Duration>,
    /// Until when its first row may be applied; the others, as much later as they are due.
    pub(crate) valid_until: Option<Timestamp>,
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
    /// When the session or the episode began, before which nothing arrived.
    began_at: Option<Timestamp>,
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
    /// When the first of the rows arrived that came together with it.
    together_since: Timestamp,
}

/// How a single row relates to what arrived before it.
#[derive(Clone, Copy, Debug)]
struct Related {
    relation: Relation,
    is_after_gap: bool,
    together_since: Timestamp,
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
            began_at: None,
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

    /// Forgets when the last row arrived, since a session or an episode begins and the next rows do not follow
    /// it.
    pub(crate) fn begin(&mut self, now: Timestamp) {
        self.began_at = Some(now);
        self.last_arrival = None;
        self.is_after_gap = false;
    }

    /// Drops all rows. Returns the origins of the actions they belong to.
    pub(crate) fn clear(&mut self) -> Vec<O> {
        let mut actions: Vec<(u64, O)> = self.items.drain(..).map(|item| (item.order, item.origin)).collect();
        actions.dedup_by_key(|(order, _)| *order);
        actions.into_iter().map(|(_, origin)| origin).collect()
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
        rows.rows() > 1 || self.relate(timing).relation == Relation::Replaces
    }

    /// Adds the rows of an action. Returns how many rows it replaces.
    pub(crate) fn push(&mut self, rows: ActionChunk, timing: Timing, order: u64, origin: O) -> u64 {
        let Timing { sent_at, arrived_at, max_lateness, valid_until } = timing;
        let is_chunk = rows.rows() > 1;
        let Related { relation, is_after_gap, together_since } = self.relate(timing);
        self.is_after_gap = is_after_gap;
        let replaced = if is_chunk || relation == Relation::Replaces { self.take_all() } else { 0 };
        let period = self.period.unwrap_or_default();
        let due_at = match (relation, self.last_arrival) {
            (Relation::SentTogether, Some(last)) if !is_chunk => arrived_at.max(last.due_at + period),
            // Also behind a chunk that the robot was given whole.
            (Relation::Apart(spacing), Some(last))
                if !is_chunk
                    && (!self.items.is_empty() || (self.takes_chunks && last.due_at > arrived_at)) =>
            {
                arrived_at.max(last.due_at + spacing.min(period))
            }
            _ => arrived_at,
        };
        let last_due_at = due_at + period * (rows.rows() as u32).saturating_sub(1);
        let together_since = if is_chunk { arrived_at } else { together_since };
        self.last_arrival = Some(Arrival { at: arrived_at, sent_at, due_at: last_due_at, together_since });
        let item = |rows, origin, after: Duration| Item {
            rows,
            origin,
            order,
            due_at: due_at + after,
            max_lateness,
            valid_until: valid_until.map(|until| until + after),
        };
        if is_chunk && !self.takes_chunks {
            let row = |(i, row)| item(ActionChunk::from(row), origin.clone(), period * i as u32);
            self.items.extend(rows.iter().enumerate().map(row));
        } else {
            self.items.push_back(item(rows, origin, Duration::ZERO));
        }
        replaced
    }

    /// Drops the rows that were overtaken, and those that are late.
    pub(crate) fn prune(&mut self, now: Timestamp) -> Dropped {
        let mut dropped = Dropped::default();
        while self.period.is_some() && self.items.get(1).is_some_and(|second| second.due_at <= now) {
            dropped.superseded += self.pop_rows();
        }
        while self.items.front().is_some_and(|first| self.is_late(first, now)) {
            dropped.late += self.pop_rows();
        }
        dropped
    }

    fn is_late(&self, item: &Item<O>, now: Timestamp) -> bool {
        let start = self.start_of(item);
        let is_overdue = item.max_lateness.is_some_and(|limit| now.since(start) > limit);
        let is_invalid = item.valid_until.is_some_and(|until| now.max(start) > until);
        (is_overdue && self.period.is_some()) || is_invalid
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

    /// How a single row relates to the action before it.
    fn relate(&self, timing: Timing) -> Related {
        let Timing { arrived_at, .. } = timing;
        let period = self.period.unwrap_or_default();
        let is_stall = |gap: Duration| self.stall_limit.is_some_and(|limit| gap > limit.max(period));
        let (Some(last), Some(_)) = (self.last_arrival, self.period) else {
            let is_after_gap = self.began_at.is_some_and(|began_at| is_stall(arrived_at.since(began_at)));
            return Related { relation: Relation::First, is_after_gap, together_since: arrived_at };
        };
        let gap = arrived_at.since(last.at);
        let arrived_together = gap < period / 2;
        let is_gap = is_stall(gap);
        let is_after_gap = is_gap || (self.is_after_gap && arrived_together);
        let (spacing, sent_together) = match (timing.sent_at, last.sent_at) {
            (Some(sent_at), Some(last_sent_at)) => {
                let spacing = Duration::from_nanos((sent_at - last_sent_at).unsigned_abs());
                (spacing, spacing < period / 2)
            }
            _ => (gap, arrived_together && !is_after_gap),
        };
        let together_since = if sent_together { last.together_since } else { arrived_at };
        let relation = match (sent_together, arrived_together) {
            (true, _) if arrived_at.since(together_since) <= TOGETHER_LIMIT => Relation::SentTogether,
            (true, _) | (false, true) => Relation::Replaces,
            (false, false) => Relation::Apart(spacing),
        };
        Related { relation, is_after_gap, together_since }
    }
}

/// How a row relates to the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Relation {
    /// There is none, or no rate by which to judge.
    First,
    SentTogether,
    /// Sent apart, and arrived together; or sent faster than the robot can apply them, for too long.
    Replaces,
    /// Sent or, where that is unknown, arrived this far apart.
    Apart(Duration),
}
