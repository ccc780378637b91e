//! The action queue: which row is due when, and from which observation it comes. Pure: `now` is passed in.

use std::{collections::VecDeque, time::Duration};

use chiral_proto::{
    ActionChunk, Fault, Observation, Timestamp,
    clock::{Rate, Tick, Ticker},
    message::ActionMessage,
};

use crate::error::Error;

/// What `put_chunk` does with the rows that are still queued.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PutMode {
    /// Keeps them; the new rows follow.
    #[default]
    Append,
    /// Drops them; the new rows are next.
    Replace,
}

/// The observation that an action was chosen from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Source {
    pub(crate) episode: u64,
    /// The observation's sequence number; 0 before the first.
    pub(crate) observation_seq: u64,
}

/// What the dispatch thread does next.
#[derive(Debug)]
pub(crate) enum Due {
    /// Sends this.
    Now(ActionMessage),
    /// Waits this long.
    In(Duration),
    /// Waits until it is woken.
    Idle,
    /// Ends with the session.
    Ended,
}

/// The actions of one session: those that are queued, and what became of those that were sent.
#[derive(Debug)]
pub(crate) struct ActionQueue {
    session: u64,
    rows: VecDeque<Row>,
    capacity: usize,
    /// Runs while dispatch does.
    ticker: Option<Ticker>,
    /// Resets in progress: while there are any, nothing is due.
    resets: usize,
    /// The newest observation that the caller was given. Its next actions come from it.
    seen: Source,
    last_seq: u64,
    /// The last action before the newest reset. That a reset overtook it is not a failure.
    last_seq_before_reset: u64,
    /// The refusal that the next `put_*` returns.
    refusal: Option<Fault>,
    has_ended: bool,
    stats: ActionStats,
    /// By how much the last rows missed their ticks.
    lateness: VecDeque<Duration>,
}

/// Counts since the session began.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ActionStats {
    pub(crate) sent: u64,
    pub(crate) refused: u64,
    /// Ticks that were missed by more than a period while a row waited.
    pub(crate) skipped: u64,
    /// Rows dropped because a reset overtook them.
    pub(crate) discarded: u64,
}

/// One queued action.
#[derive(Debug)]
struct Row {
    values: Vec<f32>,
    source: Source,
}

impl ActionQueue {
    /// Lateness is kept of this many rows.
    const LATENESS_ROWS: usize = 1024;

    pub(crate) fn new(session: u64, episode: u64, capacity: usize) -> ActionQueue {
        ActionQueue {
            session,
            rows: VecDeque::new(),
            capacity,
            ticker: None,
            resets: 0,
            seen: Source { episode, observation_seq: 0 },
            last_seq: 0,
            last_seq_before_reset: 0,
            refusal: None,
            has_ended: false,
            stats: ActionStats::default(),
            lateness: VecDeque::new(),
        }
    }

    // ---- The caller's side --------------------------------------------------------------------------------

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

    /// Queues all rows of a chunk, or none.
    pub(crate) fn put(&mut self, chunk: &ActionChunk, mode: PutMode, now: Timestamp) -> Result<(), Error> {
        let kept = if mode == PutMode::Replace { 0 } else { self.rows.len() };
        if kept + chunk.rows() > self.capacity {
            return Err(Error::QueueFull {
                rows: chunk.rows(),
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
        let source = self.seen;
        self.rows.extend(chunk.iter().map(|row| Row { values: row.to_vec(), source }));
        Ok(())
    }

    /// The message that sends a chunk now, past the queue.
    pub(crate) fn message(&mut self, actions: ActionChunk) -> ActionMessage {
        self.message_from(actions, self.seen)
    }

    /// The caller was given this observation. Its next actions come from it, or from a newer one that it was
    /// given before.
    pub(crate) fn see(&mut self, observation: &Observation) {
        let source = Source { episode: observation.episode, observation_seq: observation.seq };
        self.seen = self.seen.max(source);
    }

    pub(crate) fn seen(&self) -> Source {
        self.seen
    }

    /// Fails with the refusal of an earlier action, once.
    pub(crate) fn check_refusal(&mut self) -> Result<(), Error> {
        self.refusal.take().map_or(Ok(()), |fault| Err(Error::ActionRefused(fault)))
    }

    // ---- The dispatch thread's side -----------------------------------------------------------------------

    /// The row that is due, or when the next one is. Rows of an episode before `episode` are dropped: they
    /// may have been queued while the reset's reply was on its way to the caller.
    pub(crate) fn due(&mut self, episode: u64, now: Timestamp) -> Due {
        if self.has_ended {
            return Due::Ended;
        }
        let before = self.rows.len();
        self.rows.retain(|row| row.source.episode >= episode);
        self.stats.discarded += (before - self.rows.len()) as u64;
        let Some(ticker) = self.ticker.as_mut().filter(|_| self.resets == 0) else { return Due::Idle };
        let wait = ticker.due_in(now);
        if !wait.is_zero() {
            return if self.rows.is_empty() { Due::Idle } else { Due::In(wait) };
        }
        let Some(Row { values, source }) = self.rows.pop_front() else { return Due::Idle };
        let Tick { skipped, lateness } = ticker.take(now);
        self.stats.skipped += skipped;
        if self.lateness.len() == Self::LATENESS_ROWS {
            self.lateness.pop_front();
        }
        self.lateness.push_back(lateness);
        Due::Now(self.message_from(values.into(), source))
    }

    fn message_from(&mut self, actions: ActionChunk, source: Source) -> ActionMessage {
        self.last_seq += 1;
        self.stats.sent += 1;
        let Source { episode, observation_seq } = source;
        ActionMessage {
            session: self.session,
            episode,
            seq: self.last_seq,
            actions,
            observation_seq,
            ..ActionMessage::default()
        }
    }

    // ---- The session's side -------------------------------------------------------------------------------

    /// A reset is being requested. What is queued was chosen in the old episode, and is dropped.
    pub(crate) fn reset_started(&mut self) {
        self.resets += 1;
        self.stats.discarded += self.rows.len() as u64;
        self.rows.clear();
        self.refusal = None;
        self.last_seq_before_reset = self.last_seq;
    }

    /// Whether a reset is in progress.
    pub(crate) fn is_resetting(&self) -> bool {
        self.resets > 0
    }

    /// The reset has its reply, or will have none.
    pub(crate) fn reset_finished(&mut self, now: Timestamp) {
        self.resets = self.resets.saturating_sub(1);
        if let Some(ticker) = &mut self.ticker {
            ticker.skip_due(now);
        }
    }

    /// An action was refused. The next `put_*` returns the fault, unless the caller's own reset overtook the
    /// action.
    pub(crate) fn refused(&mut self, fault: Fault) {
        self.stats.refused += 1;
        if fault.action_seq <= self.last_seq_before_reset {
            return tracing::debug!("action {} was overtaken by a reset: {fault}", fault.action_seq);
        }
        tracing::warn!("action {} was refused: {fault}", fault.action_seq);
        self.refusal = Some(fault);
    }

    /// The session has ended: nothing is due any more.
    pub(crate) fn end(&mut self) {
        self.has_ended = true;
    }

    pub(crate) fn stats(&self) -> ActionStats {
        self.stats
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
    use chiral_proto::Code;

    use super::*;

    const MS: i64 = 1_000_000;

    fn queue(capacity: usize, hz: Option<f64>) -> ActionQueue {
        let mut queue = ActionQueue::new(1, 1, capacity);
        if let Some(hz) = hz {
            queue.start(Rate::new(hz).unwrap(), Timestamp(0));
        }
        queue
    }

    fn put(queue: &mut ActionQueue, rows: usize, mode: PutMode, ms: i64) -> Result<(), Error> {
        queue.put(&ActionChunk::new(1, vec![0.0; rows]).unwrap(), mode, Timestamp(ms * MS))
    }

    fn is_sent(queue: &mut ActionQueue, ms: i64) -> bool {
        matches!(queue.due(1, Timestamp(ms * MS)), Due::Now(_))
    }

    /// Runs dispatch for `seconds`, woken `late_ns` after each deadline. Returns how many rows it sent and
    /// how many ticks it skipped.
    fn check(hz: f64, seconds: i64, late_ns: impl Fn(u64) -> i64) -> (u64, u64) {
        let mut queue = queue(16, Some(hz));
        let (mut now, mut sent) = (Timestamp(0), 0);
        loop {
            if queue.len() == 0 {
                queue.put(&ActionChunk::new(1, vec![0.0; 16]).unwrap(), PutMode::Append, now).unwrap();
            }
            now =
                now + queue.ticker.as_ref().unwrap().due_in(now) + Duration::from_nanos(late_ns(sent) as u64);
            if now >= Timestamp(seconds * 1000 * MS) {
                return (sent, queue.stats.skipped);
            }
            sent += u64::from(matches!(queue.due(1, now), Due::Now(_)));
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
            matches!(queue.due(1, Timestamp(250 * MS)), Due::In(wait) if wait == Duration::from_millis(50))
        );
        assert!(is_sent(&mut queue, 300));
        assert!(!is_sent(&mut queue, 301), "one row a tick");
        assert_eq!(queue.stats.skipped, 0);
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

    #[test]
    fn a_reset_drops_the_rows_that_were_chosen_before_it() {
        let mut queue = queue(4, Some(10.0));
        put(&mut queue, 2, PutMode::Append, 0).unwrap();
        queue.reset_started();
        put(&mut queue, 1, PutMode::Append, 0).unwrap();
        assert!(matches!(queue.due(1, Timestamp(0)), Due::Idle), "a reset is in progress");
        queue.reset_finished(Timestamp(50 * MS));
        assert!(matches!(queue.due(2, Timestamp(100 * MS)), Due::Idle), "the row is of the old episode");
        assert_eq!((queue.len(), queue.stats.discarded), (0, 3));
    }

    #[test]
    fn a_refusal_is_returned_unless_the_callers_own_reset_overtook_the_action() {
        let mut queue = queue(4, None);
        let refusal =
            |action_seq| Fault { action_seq, ..Fault::new(Code::Resetting, "a reset is in progress") };
        let act = |queue: &mut ActionQueue| drop(queue.message([0.0].into()));
        act(&mut queue);
        queue.refused(refusal(1));
        assert!(queue.check_refusal().is_err(), "no reset was requested");

        act(&mut queue);
        queue.reset_started();
        queue.refused(refusal(2));
        assert!(queue.check_refusal().is_ok(), "in flight when the reset was requested");
        act(&mut queue);
        queue.refused(refusal(3));
        assert!(queue.check_refusal().is_err(), "sent after that");
        assert!(queue.check_refusal().is_ok(), "returned once");
        assert_eq!(queue.stats.refused, 3, "all are counted");
    }
}
