//! The actions of one session: which observation the next ones come from, their numbers and times, and what
//! became of those that were sent. Pure: `now` is passed in.

use std::time::Duration;

use chiral_proto::{
    ActionChunk, Fault, Observation, Timestamp,
    clock::Rate,
    message::{ActionMessage, ActionsDropped},
};

use super::{
    dropped::DroppedRows,
    put::{ObservationRef, PutOptions},
    queue::{Next, Row, RowQueue},
};
use crate::error::Error;

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
pub(crate) struct Actions {
    session: u64,
    queue: RowQueue,
    /// Resets in progress: while there are any, nothing is due.
    resets: usize,
    /// The newest observation that the caller was given. Its next actions come from it.
    seen: ObservationRef,
    last_seq: u64,
    /// The last action before the newest reset. That a reset overtook it is not a failure.
    last_seq_before_reset: u64,
    /// The refusal that the next `put_*` returns.
    refusal: Option<Fault>,
    dropped: DroppedRows,
    has_ended: bool,
    stats: ActionStats,
}

/// Counts since the session began.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ActionStats {
    pub(crate) sent: u64,
    pub(crate) refused: u64,
    /// Ticks that were missed by more than a period while a row waited.
    pub(crate) skipped: u64,
    /// Rows dropped because their tick had passed.
    pub(crate) missed: u64,
    /// Rows dropped because a reset overtook them.
    pub(crate) discarded: u64,
    /// As the server reports them.
    pub(crate) dropped: ActionsDropped,
}

impl Actions {
    pub(crate) fn new(session: u64, episode: u64, queue_capacity: usize, late_limit: Duration) -> Actions {
        Actions {
            session,
            queue: RowQueue::new(queue_capacity),
            resets: 0,
            seen: ObservationRef { episode, ..ObservationRef::default() },
            last_seq: 0,
            last_seq_before_reset: 0,
            refusal: None,
            dropped: DroppedRows::new(late_limit),
            has_ended: false,
            stats: ActionStats::default(),
        }
    }

    // ---- The caller's side --------------------------------------------------------------------------------

    /// Starts dispatch, or changes its rate; the first tick is now.
    pub(crate) fn start(&mut self, rate: Rate, now: Timestamp) {
        self.queue.start(rate, now);
    }

    pub(crate) fn stop(&mut self) {
        self.queue.stop();
    }

    pub(crate) fn clear(&mut self) {
        self.queue.clear();
    }

    /// Rows that are queued.
    pub(crate) fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Queues all rows of a chunk, or none; with `start_at`, the options' start on the local clock, for ticks
    /// of their own. Rows that the options say to be of an episode before `episode`, or of another session, are
    /// dropped, and replace nothing. Returns whether one is due before what was next.
    pub(crate) fn put(
        &mut self,
        chunk: &ActionChunk,
        options: &PutOptions,
        start_at: Option<Timestamp>,
        episode: u64,
        now: Timestamp,
    ) -> Result<bool, Error> {
        let PutOptions { mode, from, valid_for, .. } = *options;
        let is_stale = |from: &ObservationRef| {
            (from.session != 0 && from.session != self.session) || from.episode < episode
        };
        if from.as_ref().is_some_and(is_stale) {
            self.stats.discarded += chunk.rows() as u64;
            return Ok(false);
        }
        // Without a name, all that is queued is as old: the rows wait for room, and are dropped when due.
        let from = from.unwrap_or(self.seen);
        let rows = chunk.iter().map(|row| Row { values: row.to_vec(), from, valid_for });
        match start_at {
            Some(start_at) => self.queue.put_at(rows, mode, start_at, now),
            None => self.queue.put(rows, mode, now),
        }
    }

    /// The message that sends a chunk now, past the queue.
    pub(crate) fn message(&mut self, actions: ActionChunk, now: Timestamp) -> ActionMessage {
        self.message_from(actions, self.seen, None, now)
    }

    /// The caller was given this observation. Its next actions come from it, or from a newer one that it was
    /// given before.
    pub(crate) fn see(&mut self, observation: &Observation) {
        self.seen = self.seen.max(observation.into());
    }

    pub(crate) fn seen(&self) -> ObservationRef {
        self.seen
    }

    /// Fails with the refusal of an earlier action, once; or if the server has accepted none for too long.
    pub(crate) fn check(&mut self) -> Result<(), Error> {
        self.refusal.take().map_or(Ok(()), |fault| Err(Error::ActionRefused(fault)))?;
        self.dropped.check()
    }

    // ---- The dispatch thread's side -----------------------------------------------------------------------

    /// The row that is due, or when the next one is. Rows of an episode before `episode` are dropped: they
    /// may have been queued while the reset's reply was on its way to the caller.
    pub(crate) fn due(&mut self, episode: u64, now: Timestamp) -> Due {
        if self.has_ended {
            return Due::Ended;
        }
        self.stats.discarded += self.queue.discard_before(episode);
        if self.resets > 0 {
            return Due::Idle;
        }
        match self.queue.next(now) {
            // One row that is sent alone is a single action.
            Next::Row(Row { values, from, valid_for }) => {
                Due::Now(self.message_from(values.into(), from, valid_for, now))
            }
            Next::In(wait) => Due::In(wait),
            Next::Idle => Due::Idle,
        }
    }

    /// The message that sends these rows, stamped before the socket: what they wait for there counts as
    /// transit.
    fn message_from(
        &mut self,
        actions: ActionChunk,
        from: ObservationRef,
        valid_for: Option<Duration>,
        now: Timestamp,
    ) -> ActionMessage {
        self.last_seq += 1;
        self.stats.sent += 1;
        ActionMessage {
            session: self.session,
            episode: from.episode,
            seq: self.last_seq,
            actions,
            observation_seq: from.seq,
            sent_at: Some(now),
            valid_for,
            observed_at: from.captured_at,
        }
    }

    // ---- The session's side -------------------------------------------------------------------------------

    /// A reset is being requested. What is queued was chosen in the old episode, and is dropped.
    pub(crate) fn reset_started(&mut self) {
        self.resets += 1;
        self.stats.discarded += self.queue.len() as u64;
        self.queue.clear();
        self.refusal = None;
        self.dropped.reset_started();
        self.last_seq_before_reset = self.last_seq;
    }

    /// Whether a reset is in progress.
    pub(crate) fn is_resetting(&self) -> bool {
        self.resets > 0
    }

    /// The reset has its reply, or will have none.
    pub(crate) fn reset_finished(&mut self, now: Timestamp) {
        self.resets = self.resets.saturating_sub(1);
        self.queue.skip_due(now);
    }

    /// An action was refused. The next `put_*` returns the fault, unless the caller's own reset overtook the
    /// action.
    pub(crate) fn refused(&mut self, fault: Fault) {
        self.stats.refused += 1;
        if fault.action_seq <= self.last_seq_before_reset {
            return tracing::debug!("action {} was overtaken by a reset: {fault}", fault.action_seq);
        }
        if self.refusal.is_none() {
            // Those that follow before the caller learns of it are of the same kind.
            tracing::warn!("action {} was refused: {fault}", fault.action_seq);
        }
        self.refusal = Some(fault);
    }

    /// The server dropped rows that were late, or that newer ones overtook.
    pub(crate) fn dropped(&mut self, totals: ActionsDropped, now: Timestamp) {
        self.dropped.report(totals, now);
    }

    /// The session has ended: nothing is due any more.
    pub(crate) fn end(&mut self) {
        self.has_ended = true;
    }

    pub(crate) fn stats(&self) -> ActionStats {
        ActionStats {
            skipped: self.queue.skipped(),
            missed: self.queue.missed(),
            dropped: self.dropped.totals(),
            ..self.stats
        }
    }

    /// By how much the last rows missed their ticks, sorted.
    pub(crate) fn lateness(&self) -> Vec<Duration> {
        self.queue.lateness()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use chiral_proto::{Code, DType, Proprio, Tensor};

    use super::{super::put::PutMode, *};

    const MS: i64 = 1_000_000;

    fn actions(hz: Option<f64>) -> Actions {
        let mut actions = Actions::new(1, 1, 4, Duration::from_secs(5));
        if let Some(hz) = hz {
            actions.start(Rate::new(hz).unwrap(), Timestamp(0));
        }
        actions
    }

    fn put(actions: &mut Actions, rows: usize, options: PutOptions) {
        let chunk = ActionChunk::new(1, vec![0.0; rows]).unwrap();
        actions.put(&chunk, &options, None, 1, Timestamp(0)).unwrap();
    }

    fn observation(episode: u64, seq: u64, captured_ms: &[i64]) -> Observation {
        let proprio = |ms: &i64| {
            let data = Tensor::new(DType::F32, [0], Vec::new()).unwrap();
            Arc::new(Proprio { name: "joints".into(), captured_at: Timestamp(ms * MS), data })
        };
        Observation {
            episode,
            seq,
            proprios: captured_ms.iter().map(proprio).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn an_action_says_when_it_was_sent_and_what_it_was_chosen_from() {
        let mut actions = actions(Some(10.0));
        actions.see(&observation(1, 7, &[30, 20]));
        put(&mut actions, 2, PutOptions::default());
        actions.see(&observation(1, 8, &[]));
        let Due::Now(row) = actions.due(1, Timestamp(3 * MS)) else { panic!("expected a row") };
        assert_eq!(row.sent_at, Some(Timestamp(3 * MS)));
        assert_eq!((row.observation_seq, row.observed_at), (7, Some(Timestamp(20 * MS))));
        assert!(row.actions.is_single(), "a row that is sent alone");

        let message = actions.message([[0.0]].into(), Timestamp(5 * MS));
        assert_eq!((message.seq, message.sent_at), (2, Some(Timestamp(5 * MS))));
        assert_eq!((message.observation_seq, message.observed_at), (8, None));
        assert!(!message.actions.is_single(), "the policy gave a chunk");
    }

    #[test]
    fn a_chunk_may_say_what_it_was_predicted_from_and_how_long_it_is_valid() {
        let mut actions = actions(Some(10.0));
        let (old, new) = (observation(1, 3, &[10]), observation(1, 9, &[90]));
        actions.see(&new);
        let options = PutOptions::default().predicted_from(&old).valid_for(Duration::from_millis(70));
        put(&mut actions, 1, options);
        let Due::Now(row) = actions.due(1, Timestamp(0)) else { panic!("expected a row") };
        assert_eq!((row.observation_seq, row.observed_at), (3, Some(Timestamp(10 * MS))));
        assert_eq!(row.valid_for, Some(Duration::from_millis(70)));
    }

    #[test]
    fn rows_from_an_older_episode_or_another_session_replace_nothing() {
        let mut actions = actions(None);
        actions.see(&observation(1, 3, &[]));
        put(&mut actions, 2, PutOptions::default());
        let foreign = Observation { session: 2, ..observation(1, 3, &[]) };
        for stale in [observation(0, 1, &[]), foreign] {
            put(&mut actions, 1, PutOptions::new(PutMode::Replace).predicted_from(&stale));
        }
        assert_eq!((actions.queued(), actions.stats().discarded), (2, 2));
    }

    #[test]
    fn a_reset_drops_the_rows_that_were_chosen_before_it() {
        let mut actions = actions(Some(10.0));
        put(&mut actions, 2, PutOptions::default());
        actions.reset_started();
        put(&mut actions, 1, PutOptions::default());
        assert!(matches!(actions.due(1, Timestamp(0)), Due::Idle), "a reset is in progress");
        actions.reset_finished(Timestamp(50 * MS));
        assert!(matches!(actions.due(2, Timestamp(100 * MS)), Due::Idle), "the row is of the old episode");
        assert_eq!((actions.queued(), actions.stats().discarded), (0, 3));
    }

    #[test]
    fn a_refusal_is_returned_unless_the_callers_own_reset_overtook_the_action() {
        let mut actions = actions(None);
        let refusal =
            |action_seq| Fault { action_seq, ..Fault::new(Code::Resetting, "a reset is in progress") };
        let act = |actions: &mut Actions| drop(actions.message([0.0].into(), Timestamp(0)));
        act(&mut actions);
        actions.refused(refusal(1));
        assert!(actions.check().is_err(), "no reset was requested");

        act(&mut actions);
        actions.reset_started();
        actions.refused(refusal(2));
        assert!(actions.check().is_ok(), "in flight when the reset was requested");
        act(&mut actions);
        actions.refused(refusal(3));
        assert!(actions.check().is_err(), "sent after that");
        assert!(actions.check().is_ok(), "returned once");
        assert_eq!(actions.stats().refused, 3, "all are counted");
    }
}
