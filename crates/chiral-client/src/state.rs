//! The state of a session: its requests, observation stream, actions and the offset of the server's clock. No
//! IO happens here, and `now` is passed in. [`Core`](crate::core::Core) keeps it behind one lock.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use chiral_proto::{
    ActionChunk, Message, Notice, Observation, Reply, Timestamp,
    clock::{OffsetFilter, PingSample},
};
use tokio::sync::oneshot;

use crate::{
    dispatch::{
        actions::Actions,
        put::{ObservationRef, PutOptions},
    },
    error::Error,
    stats::{ClientStats, Recent, percentile},
};

/// How many requests that were given up are remembered.
const MAX_GIVEN_UP: usize = 256;
/// The most stream observations that may be unacknowledged.
const MAX_WINDOW: u32 = 8;

/// The state of one session.
#[derive(Debug)]
pub(crate) struct State {
    /// The newest episode. Observations of older ones are discarded.
    pub(crate) episode: u64,
    pub(crate) stream: Stream,
    pub(crate) actions: Actions,
    /// Why the session ended.
    ended: Option<Error>,
    pending: HashMap<u64, Pending>,
    /// Requests whose callers have given up, the newest last: they may still have a reply.
    given_up: VecDeque<(u64, RequestKind)>,
    last_request: u64,
    clocks: OffsetFilter,
    /// Measured at the handshake; used until the first pong.
    first_round_trip: Duration,
    arrivals: Recent,
}

/// The observation stream.
#[derive(Debug)]
pub(crate) enum Stream {
    Off,
    On {
        hz: f64,
        received: u64,
        /// Whether `received` has yet to be reported to the server.
        credit_due: bool,
    },
    Failed(Error),
}

/// A request that has no reply yet.
#[derive(Debug)]
struct Pending {
    kind: RequestKind,
    reply_to: ReplyTo,
}

/// Where the reply to a request goes.
pub(crate) type ReplyTo = oneshot::Sender<Result<Reply, Error>>;

/// What the reply to a request changes, beyond being returned to the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RequestKind {
    Reset,
    Subscribe,
    Unsubscribe,
    Other,
}

impl State {
    pub(crate) fn new(episode: u64, actions: Actions, first_round_trip: Duration) -> State {
        State {
            episode,
            stream: Stream::Off,
            actions,
            ended: None,
            pending: HashMap::new(),
            given_up: VecDeque::new(),
            last_request: 1,
            clocks: OffsetFilter::default(),
            first_round_trip,
            arrivals: Recent::default(),
        }
    }

    // ---- Requests -----------------------------------------------------------------------------------------

    /// The id of a new request.
    pub(crate) fn next_request(&mut self) -> Result<u64, Error> {
        self.check_alive()?;
        self.last_request += 1;
        Ok(self.last_request)
    }

    /// Registers a request that is about to be sent. Its reply arrives at the receiver.
    pub(crate) fn add_request(
        &mut self,
        id: u64,
        kind: RequestKind,
    ) -> oneshot::Receiver<Result<Reply, Error>> {
        let (reply_to, reply) = oneshot::channel();
        self.pending.insert(id, Pending { kind, reply_to });
        if kind == RequestKind::Reset {
            self.actions.reset_started();
        }
        reply
    }

    /// Whether the caller of a request still waits for its reply.
    pub(crate) fn is_waited_for(&self, id: u64) -> bool {
        self.pending.get(&id).is_some_and(|pending| !pending.reply_to.is_closed())
    }

    /// The caller of a request no longer waits for its reply.
    pub(crate) fn give_up(&mut self, id: u64, now: Timestamp) {
        let Some(Pending { kind, .. }) = self.pending.remove(&id) else { return };
        if self.given_up.len() == MAX_GIVEN_UP
            && let Some((_, RequestKind::Reset)) = self.given_up.pop_front()
        {
            self.actions.reset_finished(now);
        }
        self.given_up.push_back((id, kind));
    }

    /// Applies what a reply changes. Returns where to forward it, once the lock is released: the caller takes
    /// the lock as soon as it has the reply. A late reply to a request that was given up is forwarded to
    /// nobody; what it says of the session, such as that a reset is over, counts all the same.
    ///
    /// # Errors
    /// If there was no such request.
    pub(crate) fn complete(
        &mut self,
        id: u64,
        outcome: &Result<Reply, Error>,
        now: Timestamp,
    ) -> Result<Option<ReplyTo>, Error> {
        if id > self.last_request {
            let found = format!("one to request {id}; the last request was {}", self.last_request);
            return Err(Error::UnexpectedReply { found });
        }
        let given_up = self.given_up.iter().position(|(given_up, _)| *given_up == id);
        let (kind, reply_to) = match (self.pending.remove(&id), given_up) {
            (Some(Pending { kind, reply_to }), _) => (kind, Some(reply_to)),
            (None, Some(at)) => (self.given_up.remove(at).map_or(RequestKind::Other, |(_, kind)| kind), None),
            (None, None) => {
                tracing::debug!("another reply to request {id}, or one that was given up long ago");
                return Ok(None);
            }
        };
        if kind == RequestKind::Reset {
            let episode = if let Ok(Reply::Reset { obs, .. }) = outcome { obs.episode } else { 0 };
            self.episode = self.episode.max(episode);
            self.actions.reset_finished(now);
        }
        match (outcome, kind) {
            (Ok(Reply::Subscribed { hz, .. }), RequestKind::Subscribe) => {
                self.stream = Stream::On { hz: *hz, received: 0, credit_due: false };
                self.arrivals = Recent::default();
            }
            (Ok(_), RequestKind::Unsubscribe) => self.stream = Stream::Off,
            _ => {}
        }
        Ok(reply_to)
    }

    // ---- The stream ---------------------------------------------------------------------------------------

    /// Counts an observation of the stream. Returns whether it is current: of the newest episode.
    pub(crate) fn add_arrival(&mut self, observation: &Observation, now: Timestamp) -> bool {
        if let Stream::On { received, credit_due, .. } = &mut self.stream {
            *received += 1;
            *credit_due = true;
        }
        let captured_at = ObservationRef::from(observation).captured_at;
        self.arrivals.add(now, captured_at.and_then(|captured_at| self.age(captured_at, now)));
        let is_current = observation.episode >= self.episode;
        self.episode = self.episode.max(observation.episode);
        is_current
    }

    /// The credit to send, if observations arrived since the last.
    pub(crate) fn take_credit(&mut self) -> Option<Message> {
        let Stream::On { hz, received, credit_due: true } = self.stream else { return None };
        self.stream = Stream::On { hz, received, credit_due: false };
        Some(Message::Notice(Notice::Credit { received, window: self.window(hz) }))
    }

    /// Fails if the session has ended, or the stream was ended by anything but its caller.
    pub(crate) fn check_stream(&self) -> Result<(), Error> {
        self.check_alive()?;
        if let Stream::Failed(error) = &self.stream { Err(error.clone()) } else { Ok(()) }
    }

    /// How many observations may be unacknowledged: enough to cover the round trip.
    pub(crate) fn window(&self, hz: f64) -> u32 {
        let round_trip = self.clocks.round_trip().unwrap_or(self.first_round_trip);
        let in_flight = (round_trip.as_secs_f64() * hz).ceil();
        1 + in_flight.min(f64::from(MAX_WINDOW - 1)) as u32
    }

    // ---- Actions ------------------------------------------------------------------------------------------

    /// Queues the rows of a chunk, or none. Returns whether one is due before what was next.
    pub(crate) fn put(
        &mut self,
        chunk: &ActionChunk,
        options: &PutOptions,
        now: Timestamp,
    ) -> Result<bool, Error> {
        self.check_alive()?;
        self.actions.check()?;
        let start_at = match options.start_at {
            Some(start_at) => {
                let ahead_ns = self.clocks.offset_ns().ok_or(Error::ClockUnknown)?;
                Some(start_at.shifted(-ahead_ns))
            }
            None => None,
        };
        self.actions.put(chunk, options, start_at, self.episode, now)
    }

    // ---- The server's clock -------------------------------------------------------------------------------

    pub(crate) fn add_ping_sample(&mut self, sample: PingSample) {
        self.clocks.add(sample);
    }

    /// How long ago the server's host captured something.
    pub(crate) fn age(&self, captured_at: Timestamp, now: Timestamp) -> Option<Duration> {
        Some(now.shifted(self.clocks.offset_ns()?).since(captured_at))
    }

    // ---- The session's end --------------------------------------------------------------------------------

    /// Ends the session: every pending request fails with this error. Returns whether it had not ended
    /// before.
    pub(crate) fn end(&mut self, error: Error) -> bool {
        for (_, pending) in self.pending.drain() {
            let _ = pending.reply_to.send(Err(error.clone()));
        }
        self.actions.end();
        let is_first = self.ended.is_none();
        self.ended.get_or_insert(error);
        is_first
    }

    /// From now on the caller's own close is the reason, also if the connection was lost before.
    pub(crate) fn close(&mut self) {
        self.ended = Some(Error::Closed);
    }

    pub(crate) fn check_alive(&self) -> Result<(), Error> {
        self.ended.clone().map_or(Ok(()), Err)
    }

    pub(crate) fn stats(&self, now: Timestamp) -> ClientStats {
        let (recent, actions) = (self.arrivals.summary(now), self.actions.stats());
        let lateness = self.actions.lateness();
        ClientStats {
            observations: recent.total,
            observation_hz: recent.hz,
            observation_age_p50: recent.age_p50,
            observation_age_p99: recent.age_p99,
            round_trip: self.clocks.round_trip(),
            clock_offset_ns: self.clocks.offset_ns(),
            silent_for: None,
            actions_queued: self.actions.queued(),
            actions_sent: actions.sent,
            actions_refused: actions.refused,
            actions_skipped: actions.skipped,
            actions_missed: actions.missed,
            actions_discarded: actions.discarded,
            actions_late: actions.dropped.late,
            actions_superseded: actions.dropped.superseded,
            action_lateness_p50: percentile(&lateness, 50),
            action_lateness_p99: percentile(&lateness, 99),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use chiral_proto::ValueMap;

    use super::*;

    const NOW: Timestamp = Timestamp(0);

    fn state() -> State {
        State::new(1, Actions::new(1, 1, 4, Duration::from_secs(5)), Duration::ZERO)
    }

    fn request(state: &mut State, kind: RequestKind) -> u64 {
        let id = state.next_request().unwrap();
        drop(state.add_request(id, kind));
        id
    }

    fn metadata() -> Result<Reply, Error> {
        Ok(Reply::Metadata(ValueMap::new()))
    }

    #[test]
    fn a_late_reply_is_ignored_and_one_to_no_request_is_an_error() {
        let mut state = state();
        let ids: Vec<u64> = (0..300).map(|_| request(&mut state, RequestKind::Other)).collect();
        ids.iter().for_each(|&id| state.give_up(id, NOW));
        assert_eq!(state.given_up.len(), MAX_GIVEN_UP, "the others are forgotten");
        for &id in &ids {
            assert!(matches!(state.complete(id, &metadata(), NOW), Ok(None)), "{id}");
        }
        assert!(state.given_up.is_empty());
        let id = request(&mut state, RequestKind::Other);
        assert!(matches!(state.complete(id, &metadata(), NOW), Ok(Some(_))));
        assert!(matches!(state.complete(id, &metadata(), NOW), Ok(None)), "a second reply");
        let error = state.complete(id + 1, &metadata(), NOW).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "expected replies to requests, found one to request {}; the last request was {id}",
                id + 1
            )
        );
    }

    #[test]
    fn a_reset_that_was_given_up_still_begins_its_episode() {
        let mut state = state();
        let id = request(&mut state, RequestKind::Reset);
        state.give_up(id, NOW);
        assert!(state.actions.is_resetting(), "the robot still moves");
        let obs = Arc::new(Observation { episode: 2, ..Observation::default() });
        let reply = Ok(Reply::Reset { obs, info: ValueMap::new() });
        assert!(matches!(state.complete(id, &reply, NOW), Ok(None)));
        assert!(!state.actions.is_resetting());
        assert_eq!(state.episode, 2);
    }

    #[test]
    fn resets_that_never_get_a_reply_do_not_stop_dispatch_for_ever() {
        let mut state = state();
        let id = request(&mut state, RequestKind::Reset);
        state.give_up(id, NOW);
        for _ in 0..MAX_GIVEN_UP {
            assert!(state.actions.is_resetting());
            let id = request(&mut state, RequestKind::Other);
            state.give_up(id, NOW);
        }
        assert!(!state.actions.is_resetting());
    }
}
