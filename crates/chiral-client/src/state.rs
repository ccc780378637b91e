//! What a session knows, between its loops and the caller's calls: pure, `now` passed in, kept behind one
//! lock.

use std::{collections::HashMap, sync::Arc, time::Duration};

use chiral_proto::{
    ActionChunk, Fault, Message, Notice, Observation, Reply, Timestamp, ValueMap,
    clock::{OffsetFilter, PingSample},
    message::ActionMessage,
};
use tokio::sync::oneshot;

use crate::{
    dispatch::queue::{ActionQueue, Row, Source},
    error::Error,
    legacy::session::LegacyState,
    stats::{ClientStats, Recent, percentile},
};

/// How often the server is pinged; at first more often, for a quick estimate of the round trip.
const PING_PERIOD: Duration = Duration::from_secs(1);
const FIRST_PINGS: u32 = 5;
const FIRST_PING_PERIOD: Duration = Duration::from_millis(50);
/// The most stream observations that may be under way.
const MAX_WINDOW: u32 = 8;

/// The state of one session.
#[derive(Debug)]
pub(crate) struct State {
    session: u64,
    /// The newest episode that was heard of; older observations are discarded.
    pub(crate) episode: u64,
    /// The observation that the caller saw last: what its actions come from.
    pub(crate) seen: Source,
    pub(crate) stream: Stream,
    pub(crate) dispatch: ActionQueue,
    /// The refusal that the next `put_*` returns.
    pub(crate) refusal: Option<Fault>,
    /// Why the session ended.
    pub(crate) ended: Option<Error>,
    /// Of a server that is none of ours.
    pub(crate) legacy: LegacyState,
    pending: HashMap<u64, Pending>,
    last_request: u64,
    last_action: u64,
    /// The last action before the newest reset: that the reset overtook it is no failure.
    overtaken: u64,
    clocks: OffsetFilter,
    /// The handshake's, until pings tell better.
    first_round_trip: Duration,
    arrivals: Recent,
    actions_sent: u64,
    actions_refused: u64,
}

/// The observation stream, as the client sees it.
#[derive(Debug)]
pub(crate) enum Stream {
    Off,
    On {
        hz: f64,
        received: u64,
        /// Whether the server has yet to be told of `received`.
        credit_due: bool,
    },
    Failed(Error),
}

/// A request that is not answered yet.
#[derive(Debug)]
struct Pending {
    kind: RequestKind,
    answer: Answer,
}

type Answer = oneshot::Sender<Result<Reply, Error>>;

/// What the answer to a request changes, beyond being handed to who asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RequestKind {
    Reset,
    Subscribe,
    Unsubscribe,
    Other,
}

/// When the dispatcher has something to do.
pub(crate) enum Due {
    Now(Outgoing),
    In(Duration),
    /// Unless it is woken.
    Never,
    Ended,
}

/// Actions on their way out.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) message: ActionMessage,
    /// Of the observation that they come from: see [`Source`].
    pub(crate) capture_times: Option<Arc<ValueMap>>,
}

/// When one connection is pinged next. Each is, so that a dead one is noticed.
#[derive(Debug)]
pub(crate) struct Pings {
    next: Timestamp,
    sent: u32,
}

impl Pings {
    pub(crate) fn new(now: Timestamp) -> Pings {
        Pings { next: now, sent: 0 }
    }

    pub(crate) fn due_in(&self, now: Timestamp) -> Duration {
        self.next.since(now)
    }

    /// The ping that is due.
    pub(crate) fn take(&mut self, now: Timestamp) -> Message {
        self.sent += 1;
        self.next = now + if self.sent < FIRST_PINGS { FIRST_PING_PERIOD } else { PING_PERIOD };
        Message::Notice(Notice::Ping { t1: now })
    }
}

impl State {
    pub(crate) fn new(
        session: u64,
        episode: u64,
        queue_capacity: usize,
        first_round_trip: Duration,
    ) -> State {
        State {
            session,
            episode,
            seen: Source { episode, ..Source::default() },
            stream: Stream::Off,
            dispatch: ActionQueue::new(queue_capacity),
            refusal: None,
            ended: None,
            legacy: LegacyState::default(),
            pending: HashMap::new(),
            last_request: 1,
            last_action: 0,
            overtaken: 0,
            clocks: OffsetFilter::default(),
            first_round_trip,
            arrivals: Recent::default(),
            actions_sent: 0,
            actions_refused: 0,
        }
    }

    // ---- Requests -----------------------------------------------------------------------------------------

    /// A new request's id.
    pub(crate) fn next_request(&mut self) -> Result<u64, Error> {
        self.check_alive()?;
        self.last_request += 1;
        Ok(self.last_request)
    }

    /// The request is on its way; where its answer will come.
    pub(crate) fn asked(&mut self, id: u64, kind: RequestKind) -> oneshot::Receiver<Result<Reply, Error>> {
        let (answer, answered) = oneshot::channel();
        self.pending.insert(id, Pending { kind, answer });
        if kind == RequestKind::Reset {
            self.dispatch.reset_began();
            self.refusal = None;
            self.overtaken = self.last_action;
        }
        answered
    }

    /// Whether the caller of a request still waits for its answer.
    pub(crate) fn is_waited_for(&self, id: u64) -> bool {
        self.pending.get(&id).is_some_and(|pending| !pending.answer.is_closed())
    }

    /// An answer has come: follows what it changes. Where it is to be sent on to, once the lock is released:
    /// whoever waits for it wants the lock at once.
    pub(crate) fn settle(
        &mut self,
        id: u64,
        outcome: &Result<Reply, Error>,
        now: Timestamp,
    ) -> Option<Answer> {
        let Some(Pending { kind, answer }) = self.pending.remove(&id) else {
            tracing::debug!("an answer to request {id}, which nobody asked");
            return None;
        };
        if kind == RequestKind::Reset {
            let episode = if let Ok(Reply::Reset { obs, .. }) = outcome { Some(obs.episode) } else { None };
            self.episode = self.episode.max(episode.unwrap_or(0));
            self.dispatch.reset_ended(now);
        }
        match (outcome, kind) {
            (Ok(Reply::Subscribed { hz, .. }), RequestKind::Subscribe) => {
                self.stream = Stream::On { hz: *hz, received: 0, credit_due: false };
                self.arrivals = Recent::default();
            }
            (Ok(_), RequestKind::Unsubscribe) => self.stream = Stream::Off,
            _ => {}
        }
        Some(answer)
    }

    // ---- The stream ---------------------------------------------------------------------------------------

    /// An observation of the stream has arrived; whether it is to be kept.
    pub(crate) fn arrived(&mut self, observation: &Observation, now: Timestamp) -> bool {
        if let Stream::On { received, credit_due, .. } = &mut self.stream {
            *received += 1;
            *credit_due = true;
        }
        let cameras = observation.cameras.iter().map(|camera| camera.captured_at);
        let proprios = observation.proprios.iter().map(|proprio| proprio.captured_at);
        let oldest = cameras.min().or(proprios.min());
        self.arrivals.add(now, oldest.and_then(|captured_at| self.age(captured_at, now)));
        let is_current = observation.episode >= self.episode;
        self.episode = self.episode.max(observation.episode);
        is_current
    }

    /// What the server has yet to be told of the stream's arrivals.
    pub(crate) fn credit(&mut self) -> Option<Message> {
        let Stream::On { hz, received, credit_due: true } = self.stream else { return None };
        self.stream = Stream::On { hz, received, credit_due: false };
        Some(Message::Notice(Notice::Credit { received, window: self.window(hz) }))
    }

    /// How long ago the server's host captured something.
    pub(crate) fn age(&self, captured_at: Timestamp, now: Timestamp) -> Option<Duration> {
        Some(now.shifted(self.clocks.offset_ns()?).since(captured_at))
    }

    /// How many observations may be under way: enough to cover the round trip.
    pub(crate) fn window(&self, hz: f64) -> u32 {
        let under_way = (self.round_trip().as_secs_f64() * hz).ceil();
        1 + under_way.min(f64::from(MAX_WINDOW - 1)) as u32
    }

    fn round_trip(&self) -> Duration {
        self.clocks.round_trip().unwrap_or(self.first_round_trip)
    }

    // ---- Actions ------------------------------------------------------------------------------------------

    /// The rows of a chunk, as they wait for their ticks.
    pub(crate) fn rows(&self, chunk: &ActionChunk) -> Vec<Row> {
        chunk.iter().map(|row| Row { values: row.to_vec(), from: self.seen.clone() }).collect()
    }

    /// The caller has seen this observation: its next actions come from it, or from a newer one that it saw
    /// before.
    pub(crate) fn see(&mut self, obs: &Arc<Observation>) {
        if (obs.episode, obs.seq) >= (self.seen.episode, self.seen.observation_seq) {
            let capture_times = self.legacy.capture_times(obs);
            self.seen = Source { episode: obs.episode, observation_seq: obs.seq, capture_times };
        }
    }

    /// A chunk to be sent now.
    pub(crate) fn action(&mut self, actions: ActionChunk, from: Source) -> Outgoing {
        self.last_action += 1;
        self.actions_sent += 1;
        let Source { episode, observation_seq, capture_times } = from;
        let message =
            ActionMessage { session: self.session, episode, seq: self.last_action, actions, observation_seq };
        Outgoing { message, capture_times }
    }

    pub(crate) fn refused(&mut self, fault: Fault) {
        self.actions_refused += 1;
        if fault.action_seq <= self.overtaken {
            return tracing::debug!("action {} was overtaken by a reset: {fault}", fault.action_seq);
        }
        tracing::warn!("action {} was refused: {fault}", fault.action_seq);
        self.refusal = Some(fault);
    }

    /// The row that is due, or when the next one is.
    pub(crate) fn due(&mut self, now: Timestamp) -> Due {
        if self.ended.is_some() {
            return Due::Ended;
        }
        // Also what was queued while the reset's answer was on its way to the caller.
        self.dispatch.drop_older_than(self.episode);
        if let Some(row) = self.dispatch.take(now) {
            return Due::Now(self.action(row.values.into(), row.from));
        }
        self.dispatch.due_in(now).map_or(Due::Never, Due::In)
    }

    // ---- The loops ----------------------------------------------------------------------------------------

    pub(crate) fn pong(&mut self, sample: PingSample) {
        self.clocks.add(sample);
    }

    /// The session is over: whoever waits is told. Whether it was not over already.
    pub(crate) fn end(&mut self, error: Error) -> bool {
        for (_, pending) in self.pending.drain() {
            let _ = pending.answer.send(Err(error.clone()));
        }
        let is_first = self.ended.is_none();
        self.ended.get_or_insert(error);
        is_first
    }

    pub(crate) fn check_alive(&self) -> Result<(), Error> {
        self.ended.clone().map_or(Ok(()), Err)
    }

    pub(crate) fn stats(&self, now: Timestamp) -> ClientStats {
        let (recent, lateness) = (self.arrivals.summary(now), self.dispatch.lateness());
        ClientStats {
            observations: recent.total,
            observation_hz: recent.hz,
            observation_age_p50: recent.age_p50,
            observation_age_p99: recent.age_p99,
            round_trip: self.clocks.round_trip(),
            clock_offset_ns: self.clocks.offset_ns(),
            actions_queued: self.dispatch.queued(),
            actions_sent: self.actions_sent,
            actions_refused: self.actions_refused,
            actions_skipped: self.dispatch.skipped,
            actions_discarded: self.dispatch.discarded,
            action_lateness_p50: percentile(&lateness, 50),
            action_lateness_p99: percentile(&lateness, 99),
        }
    }
}

/// The newest observation, as waiters see it.
pub(crate) type Latest = Option<Arc<Observation>>;

#[cfg(test)]
mod tests {
    use chiral_proto::Code;

    use super::*;

    #[test]
    fn a_refusal_is_for_the_caller_unless_its_own_reset_overtook_the_action() {
        let mut state = State::new(1, 0, 4, Duration::ZERO);
        let refusal =
            |action_seq| Fault { action_seq, ..Fault::new(Code::Resetting, "a reset is under way") };
        let act = |state: &mut State| drop(state.action([0.0].into(), Source::default()));
        act(&mut state);
        state.refused(refusal(1));
        assert_eq!(state.refusal.take().map(|fault| fault.action_seq), Some(1), "no reset was asked for");

        act(&mut state);
        let id = state.next_request().unwrap();
        let _answered = state.asked(id, RequestKind::Reset);
        state.refused(refusal(2));
        assert_eq!(state.refusal, None, "on its way when the reset was asked for");
        act(&mut state);
        state.refused(refusal(3));
        assert_eq!(state.refusal.take().map(|fault| fault.action_seq), Some(3), "sent after that");
        assert_eq!(state.actions_refused, 3, "all are counted");
    }
}
