//! The msgpack wire, behind the same calls. It has no request ids, no stream and no episodes, and two
//! generations, of which a server may speak either or both. `pending` matches replies to requests, and
//! `stream` times the requests that take the place of a stream.

use std::{
    collections::VecDeque,
    future::Future,
    sync::{Arc, Mutex},
    time::Duration,
};

use chiral_proto::{
    ActionChunk, Code, Fault, Frame, Message, Notice, Observation, Reply, Request, StepResult,
    TransportError, ValueMap,
    codec::msgpack::{self, TimedMessage},
    error::EncodeError,
    lock,
    message::{ActionMessage, Subscribe},
};
use tokio::{
    sync::Mutex as AsyncMutex,
    time::{sleep, timeout},
};

use super::{
    pending::{Kind, Matched, PendingRequests},
    stream::PolledStream,
};
use crate::{
    connection::Connection,
    core::{Core, PendingReply},
    dispatch::thread::ActionSink,
    error::Error,
    native,
    state::{RequestKind, State},
    transport::BoxFuture,
    wire::Wire,
};

/// What a request fails with if the reply to a later one arrived first.
const UNANSWERED: &str = "a reply to every request, in order,";
/// For how long, and a bit, our own servers hold metadata back on keys that several clients share.
const HOLD_BACK_TIMEOUT: Duration = Duration::from_secs(2);
/// Capture times are kept of this many observations: more than two minutes at 30 Hz.
const MAX_CAPTURE_TIMES: usize = 4096;
const NO_CAPTURE_TIMES: &ValueMap = &ValueMap::new();
/// Why one of our own servers closes a WebSocket when the robot is taken (IANA's registry of close codes).
const TRY_AGAIN_LATER: u16 = 1013;

type Result<T, E = Error> = std::result::Result<T, E>;

/// How a session with a legacy server behaves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LegacyOptions {
    /// For replies that take the server no time.
    pub(crate) request_timeout: Duration,
    /// For the reply to a step, and to what may have to wait for one.
    pub(crate) step_timeout: Duration,
    /// For the reply to a reset.
    pub(crate) reset_timeout: Duration,
    /// The connection's idle timeout, if it has one that the server's pongs keep from expiring.
    pub(crate) idle_timeout: Option<Duration>,
    /// Whether what is sent may be lost, and nothing shows that the server has gone.
    pub(crate) is_lossy: bool,
    /// The client only watches.
    pub(crate) is_observer: bool,
}

/// A session's msgpack wire.
pub(crate) struct LegacyWire {
    core: Arc<Core>,
    connection: Arc<Connection>,
    options: LegacyOptions,
    /// Locked after `core`'s state or alone, never before it.
    known: Mutex<Known>,
    stream: Mutex<PolledStream>,
    /// Held from a request to its reply, so that one is pending at a time. Waiting callers get it in their
    /// order.
    request_lock: AsyncMutex<()>,
    /// Held while a frame is prepared and handed to the link, so that frames leave in the order of the
    /// decisions.
    send_lock: AsyncMutex<()>,
}

/// What is known of the server.
#[derive(Debug, Default)]
struct Known {
    pending: PendingRequests,
    /// Whether it replies to `obs_request`, and so applies `apply_action`: the streaming generation.
    observes: Option<bool>,
    /// Whether it replies to `action`: the gym-like generation.
    steps: Option<bool>,
    last_seq: u64,
    /// Of the last reset or step, for as long as the server may be one that observes only then.
    newest: Option<Arc<Observation>>,
    /// Sequence number and capture times of the last observations, as the server wrote them.
    capture_times: VecDeque<(u64, Arc<ValueMap>)>,
}

impl Known {
    /// When the cameras of an observation were captured, if that is still known.
    fn capture_times(&self, observation_seq: u64) -> Option<Arc<ValueMap>> {
        let at = self.capture_times.binary_search_by_key(&observation_seq, |(seq, _)| *seq).ok()?;
        Some(Arc::clone(&self.capture_times[at].1))
    }

    /// Adds what is not on the wire: an observation's sequence number and episode.
    fn number(&mut self, reply: &mut Reply, episode: u64, capture_times: ValueMap) {
        let (obs, episode) = match reply {
            Reply::Reset { obs, .. } => (obs, episode + 1),
            Reply::Observation(obs) => (obs, episode),
            Reply::Step(result) => (&mut result.obs, episode),
            _ => return,
        };
        self.last_seq += 1;
        // It was just decoded, so that nobody else has it.
        let numbered = Arc::make_mut(obs);
        (numbered.seq, numbered.episode) = (self.last_seq, episode);
        if self.capture_times.len() == MAX_CAPTURE_TIMES {
            self.capture_times.pop_front();
        }
        self.capture_times.push_back((self.last_seq, Arc::new(capture_times)));
        let obs = Arc::clone(obs);
        if self.observes != Some(true) && !matches!(reply, Reply::Observation(_)) {
            self.newest = Some(obs);
        }
    }
}

impl Wire for LegacyWire {
    fn request(&self, request: Request) -> BoxFuture<'_, Result<Reply>> {
        Box::pin(self.serve_request(request))
    }

    fn receive(&self, _connection: &Connection, frame: Frame) -> Result<()> {
        let (kind, outcome) = match msgpack::decode(frame) {
            Ok(TimedMessage { message: Message::Reply { mut reply, .. }, capture_times }) => {
                let episode = self.core.state().episode;
                lock(&self.known).number(&mut reply, episode, capture_times);
                (Kind::of_reply(&reply), Ok(reply))
            }
            Ok(TimedMessage { message: Message::Unknown { .. }, .. }) => {
                tracing::debug!("ignored a message of a type that is unknown to this client");
                return Ok(());
            }
            Ok(_) => (None, Err(Error::Protocol { expected: "replies" })),
            // Only the request that it belongs to has failed.
            Err(error) => (error.field.split('.').next().and_then(Kind::named), Err(Error::Malformed(error))),
        };
        let Some(kind) = kind else { return outcome.map(drop) };
        let matched = {
            let state = self.core.state();
            let mut known = lock(&self.known);
            let matched = known.pending.take(kind, |id| state.is_waited_for(id));
            let is_busy = known.pending.contains(Kind::Reset) || known.pending.contains(Kind::Step);
            if !is_busy && let Some(idle_timeout) = self.options.idle_timeout {
                self.connection.idle_timeout.set_limit(idle_timeout);
            }
            matched
        };
        // On keys that several clients share it may be the reply to another client's probe.
        if matched.is_none() && kind == Kind::Metadata && self.options.is_lossy {
            return Ok(());
        }
        let Some(Matched { id, unanswered }) = matched else {
            let found = format!("a {} while no such request is pending", kind.name());
            return Err(Error::UnexpectedReply { found });
        };
        self.core.complete_request(id, outcome)?;
        for id in unanswered {
            self.core.complete_request(id, Err(Error::Protocol { expected: UNANSWERED }))?;
        }
        Ok(())
    }

    fn run_sender<'a>(&'a self, _connection: &'a Connection) -> BoxFuture<'a, Error> {
        Box::pin(self.poll())
    }

    /// On shared keys there is nothing that a server could close.
    fn awaits_close(&self) -> bool {
        !self.options.is_lossy
    }
}

impl ActionSink for LegacyWire {
    fn send_actions(&self, message: ActionMessage) -> BoxFuture<'_, Result<()>> {
        self.connection.note_action();
        Box::pin(self.act(message))
    }
}

/// The end of a session whose connection failed. One of our own servers that refuses a legacy client can say
/// so only when it closes the WebSocket.
pub(crate) fn lost(cause: TransportError) -> Error {
    match cause {
        TransportError::Closed { code: TRY_AGAIN_LATER, reason }
            if reason.starts_with("the robot is controlled by") =>
        {
            Error::Busy(Fault::new(Code::Busy, reason).retryable())
        }
        cause => native::lost(cause),
    }
}

impl LegacyWire {
    /// The wire of a server that was asked for metadata `probes` times before it replied once: the other
    /// replies may still arrive.
    pub(crate) fn new(
        core: Arc<Core>,
        connection: Arc<Connection>,
        options: LegacyOptions,
        probes: u64,
    ) -> LegacyWire {
        let mut known = Known::default();
        (1..probes).for_each(|_| known.pending.push(0, Kind::Metadata));
        LegacyWire {
            core,
            connection,
            options,
            known: Mutex::new(known),
            stream: Mutex::default(),
            request_lock: AsyncMutex::default(),
            send_lock: AsyncMutex::default(),
        }
    }

    // ---- Requests -----------------------------------------------------------------------------------------

    /// Carries out a request as far as this wire can.
    async fn serve_request(&self, request: Request) -> Result<Reply> {
        match request {
            Request::GetMetadata => {
                let _one_request = self.request_lock.lock().await;
                self.exchange(request, None).await
            }
            Request::Reset { .. } => {
                self.check_controller()?;
                let _one_request = self.request_lock.lock().await;
                self.exchange(request, None).await
            }
            Request::GetObs => self.get_obs().await,
            Request::Step { actions, .. } => {
                self.check_controller()?;
                let seen = self.core.state().actions.seen();
                let times = lock(&self.known).capture_times(seen.seq);
                let _one_request = self.request_lock.lock().await;
                self.step(actions, times).await
            }
            Request::Subscribe(wanted) => self.subscribe(wanted).await,
            Request::Unsubscribe => {
                lock(&self.stream).stop();
                let reason = "unsubscribed".to_owned();
                self.complete_locally(RequestKind::Unsubscribe, Reply::StreamEnd { reason })
            }
            Request::Hello(_) => {
                Err(EncodeError::Unsupported { wire: msgpack::NAME, what: "a hello" }.into())
            }
        }
    }

    async fn get_obs(&self) -> Result<Reply> {
        let _one_request = self.request_lock.lock().await;
        if let Some(obs) = self.observe().await? {
            return Ok(Reply::Observation(obs));
        }
        let newest = lock(&self.known).newest.clone();
        newest.map(Reply::Observation).ok_or(Error::Unsupported {
            what: "observe on request",
            why: "it observes in reset and step only, and there was neither yet",
        })
    }

    /// Requests a step and observes, with the request lock held. A server that ignores `action` gets an
    /// `apply_action` and an `obs_request` instead.
    async fn step(&self, actions: ActionChunk, times: Option<Arc<ValueMap>>) -> Result<Reply> {
        let (steps, observes) = {
            let known = lock(&self.known);
            (known.steps, known.observes)
        };
        let step = Request::Step { session: 0, episode: 0, actions: actions.clone() };
        // A server that does not observe on request can only step.
        if steps == Some(true) || observes == Some(false) {
            return self.exchange(step, times.as_deref()).await;
        }
        if steps.is_none()
            && let Some(stepped) = self.probe(step, times.as_deref()).await?
        {
            lock(&self.known).steps = Some(true);
            return Ok(stepped);
        }
        let message = self.core.state().actions.message(actions, self.core.now());
        self.apply(message).await?;
        let observed = self.observe().await?;
        // A server that neither steps nor observes knows steps, but ignored this one, and the rest with it.
        let why = "it ignored the request, maybe because it found the actions invalid";
        let obs = observed.ok_or(Error::Unsupported { what: "apply this step", why })?;
        if lock(&self.known).steps.replace(false).is_none() {
            tracing::warn!(
                "the server does not know steps: apply_action and obs_request take their place, without \
                 reward or end of the episode, and the observation may be from before the actions"
            );
        }
        Ok(Reply::Step(StepResult {
            obs,
            reward: 0.0,
            terminated: false,
            truncated: false,
            info: ValueMap::new(),
        }))
    }

    // ---- Actions ------------------------------------------------------------------------------------------

    /// Sends actions without waiting for the robot.
    ///
    /// A gym-like server would ignore an `apply_action`. It gets an `action` in its order, whose reply
    /// becomes the newest observation and is otherwise dropped: so the robot moves as it would elsewhere.
    async fn act(&self, message: ActionMessage) -> Result<()> {
        self.check_controller()?;
        let observes = lock(&self.known).observes;
        let observes = match observes {
            Some(observes) => observes,
            None => {
                let _one_request = self.request_lock.lock().await;
                let what = "a reply to the first obs_request";
                self.connection.within(self.options.request_timeout, what, self.observes()).await?.0
            }
        };
        if observes {
            return self.apply(message).await;
        }
        let _one_request = self.request_lock.lock().await;
        check_current(&self.core.state(), &message)?;
        let times = lock(&self.known).capture_times(message.observation_seq);
        let step = Request::Step { session: 0, episode: 0, actions: message.actions };
        let stepped = self.exchange(step, times.as_deref());
        within(self.options.step_timeout, "a reply to an action", stepped).await.map(drop)
    }

    /// Sends actions to a server of the streaming generation.
    async fn apply(&self, message: ActionMessage) -> Result<()> {
        let _in_order = self.send_lock.lock().await;
        // A reset that was sent since they were chosen would not stop them on their way.
        check_current(&self.core.state(), &message)?;
        let times = lock(&self.known).capture_times(message.observation_seq);
        let message = Message::Notice(Notice::Action(message));
        let frame = msgpack::encode(&message, times.as_deref().unwrap_or(NO_CAPTURE_TIMES))?;
        self.connection.send(frame).await
    }

    // ---- The stream ---------------------------------------------------------------------------------------

    async fn subscribe(&self, wanted: Subscribe) -> Result<Reply> {
        let Subscribe { rate, cameras, depth, .. } = wanted;
        {
            let _one_request = self.request_lock.lock().await;
            let (observes, observed) = self.observes().await?;
            if !observes {
                let why = "it observes in reset and step only";
                return Err(Error::Unsupported { what: "stream observations", why });
            }
            if !cameras.is_empty() {
                let obs = match observed {
                    Some(obs) => obs,
                    None => self.exchange_obs().await?,
                };
                cameras.iter().try_for_each(|name| obs.camera(name).map(drop))?;
            }
        }
        let reply = Reply::Subscribed { hz: rate.hz(), cameras: cameras.clone() };
        let subscribed = self.complete_locally(RequestKind::Subscribe, reply)?;
        lock(&self.stream).start(rate, cameras, depth, self.core.now());
        self.connection.changed.notify_one();
        Ok(subscribed)
    }

    /// Requests the stream's observations, for as long as the session lives.
    async fn poll(&self) -> Error {
        loop {
            let due = lock(&self.stream).due_in(self.core.now());
            let changed = self.connection.changed.notified();
            let Some((number, wait)) = due else {
                changed.await;
                continue;
            };
            if !wait.is_zero() {
                tokio::select! {
                    () = changed => {}
                    () = sleep(wait) => {}
                }
                continue;
            }
            if let Err(error) = self.poll_once(number).await
                && lock(&self.stream).fail(number)
            {
                self.core.fail_stream(error.to_string());
            }
        }
    }

    async fn poll_once(&self, number: u64) -> Result<()> {
        let _one_request = self.request_lock.lock().await;
        if !lock(&self.stream).take_tick(number, self.core.now()) {
            return Ok(());
        }
        // The server may carry out an action first.
        let obs = within(self.options.step_timeout, "an observation", self.exchange_obs()).await?;
        let selected = lock(&self.stream).select(number, obs);
        if let Some(obs) = selected {
            self.core.add_arrival(obs);
        }
        Ok(())
    }

    // ---- Helpers ------------------------------------------------------------------------------------------

    /// An observation, if the server observes on request; with the request lock held.
    async fn observe(&self) -> Result<Option<Arc<Observation>>> {
        match self.observes().await? {
            (true, None) => self.exchange_obs().await.map(Some),
            (_, observed) => Ok(observed),
        }
    }

    async fn exchange_obs(&self) -> Result<Arc<Observation>> {
        match self.exchange(Request::GetObs, None).await? {
            Reply::Observation(obs) => Ok(obs),
            _ => Err(Error::Protocol { expected: "an observation" }),
        }
    }

    /// Whether the server observes on request, and its observation if that was found out just now; in a turn
    /// that the caller holds.
    async fn observes(&self) -> Result<(bool, Option<Arc<Observation>>)> {
        let observes = lock(&self.known).observes;
        if let Some(observes) = observes {
            return Ok((observes, None));
        }
        let observed = match self.probe(Request::GetObs, None).await? {
            Some(Reply::Observation(obs)) => Some(obs),
            _ => None,
        };
        let mut known = lock(&self.known);
        known.observes = Some(observed.is_some());
        if observed.is_some() {
            known.newest = None;
        }
        Ok((observed.is_some(), observed))
    }

    /// Sends a request that the server may ignore, and then one for metadata, to which every server replies:
    /// if that reply arrives first, the request was ignored. Otherwise the metadata is waited for only where
    /// it may be late: our own servers hold it back on keys that several clients may share, and take what is
    /// requested meanwhile for another client's.
    async fn probe(&self, request: Request, times: Option<&ValueMap>) -> Result<Option<Reply>> {
        if self.options.is_lossy && lock(&self.known).pending.contains(Kind::Metadata) {
            let why = "replies to earlier requests may still arrive; call reset first, whose reply ends that";
            return Err(Error::Unsupported { what: "be probed for what it supports", why });
        }
        self.settle_pending(&request).await?;
        let replied = self.send_request(request, times).await?;
        let metadata = self.send_request(Request::GetMetadata, None).await?;
        match replied.wait().await {
            Ok(reply) => {
                if self.options.is_lossy {
                    let _ = timeout(HOLD_BACK_TIMEOUT, metadata.wait()).await;
                }
                Ok(Some(reply))
            }
            Err(Error::Protocol { expected: UNANSWERED }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends a request and returns its reply, with the request lock held.
    async fn exchange(&self, request: Request, times: Option<&ValueMap>) -> Result<Reply> {
        self.settle_pending(&request).await?;
        self.send_request(request, times).await?.wait().await
    }

    /// If an earlier caller gave up waiting for a reply that looks like this request's, first makes sure that
    /// it has arrived or never will: the reply to a later request for metadata proves either.
    async fn settle_pending(&self, request: &Request) -> Result<()> {
        let is_pending = Kind::of(request)
            .is_some_and(|kind| kind != Kind::Metadata && lock(&self.known).pending.contains(kind));
        if is_pending {
            self.send_request(Request::GetMetadata, None).await?.wait().await?;
        }
        Ok(())
    }

    /// Sends a request, whose reply is yet to be waited for.
    async fn send_request(&self, request: Request, times: Option<&ValueMap>) -> Result<PendingReply> {
        let kind = Kind::of(&request);
        let is_reset = kind == Some(Kind::Reset);
        let _in_order = self.send_lock.lock().await;
        let (frame, replied) = {
            let mut state = self.core.state();
            let id = state.next_request()?;
            let message = Message::Request { id, request };
            let frame = msgpack::encode(&message, times.unwrap_or(NO_CAPTURE_TIMES))?;
            if let Some(kind) = kind {
                lock(&self.known).pending.push(id, kind);
            }
            let request_kind = if is_reset { RequestKind::Reset } else { RequestKind::Other };
            (frame, PendingReply::new(&self.core, id, state.add_request(id, request_kind)))
        };
        // Some servers send no pongs while they reset or step. The caller's own timeout comes first.
        let busy_timeout = match kind {
            Some(Kind::Reset) => Some(self.options.reset_timeout),
            Some(Kind::Step) => Some(self.options.step_timeout),
            _ => None,
        };
        if let (Some(idle_timeout), Some(busy_timeout)) = (self.options.idle_timeout, busy_timeout) {
            self.connection.idle_timeout.set_limit(idle_timeout.saturating_add(busy_timeout));
        }
        if is_reset {
            // It has emptied the action queue.
            self.core.room.notify_waiters();
        }
        self.connection.send(frame).await?;
        Ok(replied)
    }

    /// This wire has no observers: the server would apply an observer's actions.
    fn check_controller(&self) -> Result<()> {
        if self.options.is_observer {
            return Err(Error::Rejected(Fault::new(
                Code::NotController,
                "an observer may not move the robot",
            )));
        }
        Ok(())
    }

    /// Completes a request that concerns only this side.
    fn complete_locally(&self, kind: RequestKind, reply: Reply) -> Result<Reply> {
        let id = {
            let mut state = self.core.state();
            let id = state.next_request()?;
            drop(state.add_request(id, kind));
            id
        };
        self.core.complete_request(id, Ok(reply.clone()))?;
        Ok(reply)
    }
}

async fn within<T>(
    waited: Duration,
    what: &'static str,
    exchange: impl Future<Output = Result<T>>,
) -> Result<T> {
    timeout(waited, exchange).await.map_err(|_| Error::Timeout { what, waited })?
}

/// Whether these actions may still be sent: no reset was requested since they were chosen.
fn check_current(state: &State, message: &ActionMessage) -> Result<()> {
    if state.actions.is_resetting() || message.episode < state.episode {
        let fault = Fault::new(Code::Stale, "a reset was requested since the action was chosen");
        return Err(Error::ActionRefused(Fault { action_seq: message.seq, ..fault }));
    }
    Ok(())
}
