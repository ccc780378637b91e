//! The state of a session: its requests, observation stream, actions and the offset of the server's clock. No
//! IO happens here, and `now` is passed in. [`Core`](crate::core::Core) keeps it behind one lock.

use std::{collections::HashMap, time::Duration};

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

    /// Applies what a reply changes. Returns where to forward it, once the lock is released: the caller takes
    /// the lock as soon as it has the reply.
    pub(crate) fn complete(
        &mut self,
        id: u64,
        outcome: &Result<Reply, Error>,
        now: Timestamp,
    ) -> Option<ReplyTo> {
        let Some(Pending { kind, reply_to }) = self.pending.remove(&id) else {
            tracing::debug!("a reply to request {id}, which is not pending");
            return None;
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
        Some(reply_to)
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
