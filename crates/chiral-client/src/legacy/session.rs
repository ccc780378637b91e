//! A server of those that were there before us, behind the same calls: its wire has no request ids, no
//! stream, no episodes, and two generations of which a server may speak either or both. What is said here
//! goes out in msgpack; which answer is whose, `owed` decides.

use std::{
    future::Future,
    sync::{Arc, Weak},
    time::Duration,
};

use chiral_proto::{
    ActionChunk, Code, EncodeError, Fault, Frame, Message, Notice, Observation, Reply, Request, StepResult,
    Ticker, Timestamp, ValueMap,
    codec::msgpack::{self, Decoded},
    message::Subscribe,
};
use chiral_transport::IdleTimeout;
use tokio::{
    sync::{Mutex, oneshot},
    time::{sleep, timeout},
};

use crate::{
    error::Error,
    legacy::pending::{Answered, Kind, PendingRequests},
    lock,
    session::{self, Shared},
    state::{Outgoing, RequestKind, State, Stream},
};

/// What a request fails with that a later one's answer has overtaken.
const UNANSWERED: &str = "an answer to every request, in order,";
/// So long an answer may be held back on a network, and a bit.
const HELD_BACK: Duration = Duration::from_secs(2);
/// Where there is nothing to be said.
const NO_TIMES: &ValueMap = &ValueMap::new();

type Result<T, E = Error> = std::result::Result<T, E>;

/// How the server is talked to.
pub(crate) struct LegacySession {
    /// Held from a request to its answer, so that one is outstanding at a time; whoever waits for it gets it
    /// in his turn.
    pub(crate) turn: Mutex<()>,
    /// Held while something is decided and handed to the link, so that it goes out in the order of the
    /// decisions.
    pub(crate) order: Mutex<()>,
    /// For answers that take no time.
    pub(crate) request_timeout: Duration,
    /// For a reset's and a step's.
    pub(crate) reply_timeout: Duration,
    /// Of the connection, and what it is while the server resets or steps, when some answer no pings.
    pub(crate) idle_timeout: IdleTimeout,
    pub(crate) busy_idle_timeout: Duration,
    /// Whether what is sent may be lost, and nothing tells that the server is gone.
    pub(crate) is_lossy: bool,
    pub(crate) is_observer: bool,
}

/// What is known of the server, kept with the rest of a session's state.
#[derive(Debug, Default)]
pub(crate) struct LegacyState {
    owed: PendingRequests,
    /// Whether it answers `obs_request`, and so takes `apply_action`: the streaming generation.
    observes: Option<bool>,
    /// Whether it answers `action`: the gym-like generation.
    steps: Option<bool>,
    last_seq: u64,
    /// Of the last reset or step, for as long as the server may be one that observes only then.
    newest: Option<Arc<Observation>>,
    /// Of every observation that somebody still holds, as the server put them.
    capture_times: Vec<(Weak<Observation>, Arc<ValueMap>)>,
    polling: Option<Polling>,
    polls_begun: u64,
}

/// The stream, which is asked for one by one.
#[derive(Debug)]
struct Polling {
    number: u64,
    ticker: Ticker,
    cameras: Vec<String>,
    depth: bool,
}

impl LegacyState {
    /// Of a server that was asked for metadata so often before it answered once: the other answers may still
    /// come.
    pub(crate) fn after_probes(probes: u64) -> LegacyState {
        let mut known = LegacyState::default();
        (1..probes).for_each(|_| known.owed.ask(0, Kind::Metadata));
        known
    }

    /// When the cameras of an observation that is still held were captured.
    pub(crate) fn capture_times(&self, obs: &Arc<Observation>) -> Option<Arc<ValueMap>> {
        let held = self.capture_times.iter().find(|(held, _)| std::ptr::eq(held.as_ptr(), Arc::as_ptr(obs)));
        held.map(|(_, times)| Arc::clone(times))
    }

    fn remember(&mut self, obs: &Arc<Observation>, times: Arc<ValueMap>) {
        self.capture_times.retain(|(held, _)| held.strong_count() > 0);
        self.capture_times.push((Arc::downgrade(obs), times));
    }
}

/// What is not on the wire: the observation's number and episode. It was just decoded, so that nobody else
/// has it.
fn number(state: &mut State, reply: &mut Reply, times: ValueMap) {
    let (obs, episode) = match reply {
        Reply::Reset { obs, .. } => (obs, state.episode + 1),
        Reply::Observation(obs) => (obs, state.episode),
        Reply::Step(result) => (&mut result.obs, state.episode),
        _ => return,
    };
    let known = &mut state.legacy;
    known.last_seq += 1;
    let numbered = Arc::make_mut(obs);
    (numbered.seq, numbered.episode) = (known.last_seq, episode);
    known.remember(obs, Arc::new(times));
    let obs = Arc::clone(obs);
    if known.observes != Some(true) && !matches!(reply, Reply::Observation(_)) {
        known.newest = Some(obs);
    }
}

/// A frame has come: finds whose answer it is.
pub(crate) fn heard(shared: &Shared, frame: Frame) -> Result<()> {
    let now = shared.now();
    let (kind, outcome) = match msgpack::decode(frame) {
        Ok(Decoded { message: Message::Reply { mut reply, .. }, capture_times }) => {
            number(&mut lock(&shared.state), &mut reply, capture_times);
            (Kind::of_answer(&reply), Ok(reply))
        }
        Ok(Decoded { message: Message::Unknown { .. }, .. }) => {
            tracing::debug!("the server said something of a type that this client does not know");
            return Ok(());
        }
        Ok(_) => (None, Err(Error::Protocol { expected: "answers" })),
        // Only the request that it answers has failed.
        Err(error) => (error.field.split('.').next().and_then(Kind::named), Err(Error::Malformed(error))),
    };
    let Some(kind) = kind else { return outcome.map(drop) };
    let answered = {
        let mut state = lock(&shared.state);
        let mut owed = std::mem::take(&mut state.legacy.owed);
        let answered = owed.answered(kind, |id| state.is_waited_for(id));
        if let Some(legacy) = &shared.legacy
            && !legacy.is_lossy
            && !owed.is_owed(Kind::Reset)
            && !owed.is_owed(Kind::Step)
        {
            legacy.idle_timeout.set_limit(shared.idle_timeout);
        }
        state.legacy.owed = owed;
        answered
    };
    // On keys that all share it may be the answer to somebody else who asked whether the server is there.
    if answered.is_none()
        && kind == Kind::Metadata
        && shared.legacy.as_ref().is_some_and(|legacy| legacy.is_lossy)
    {
        return Ok(());
    }
    let Some(Answered { id, unanswered }) = answered else {
        return Err(Error::UnaskedAnswer { found: kind.name() });
    };
    session::settle(shared, id, outcome, now);
    for id in unanswered {
        session::settle(shared, id, Err(Error::Protocol { expected: UNANSWERED }), now);
    }
    Ok(())
}

impl LegacySession {
    /// Asks as a server of ours would be asked, and answers as that would.
    pub(crate) async fn ask(&self, shared: &Shared, request: Request) -> Result<Reply> {
        match request {
            Request::GetMetadata => {
                let _turn = self.turn.lock().await;
                self.exchange(shared, request, None).await
            }
            Request::Reset { .. } => {
                self.check_controller()?;
                let _turn = self.turn.lock().await;
                self.patiently("an answer to the reset", self.exchange(shared, request, None)).await
            }
            Request::GetObs => self.get_obs(shared).await,
            Request::Step { actions, .. } => {
                self.check_controller()?;
                let times = lock(&shared.state).seen.capture_times.clone();
                let _turn = self.turn.lock().await;
                self.patiently("an answer to the step", self.step(shared, actions, times)).await
            }
            Request::Subscribe(wanted) => self.subscribe(shared, wanted).await,
            Request::Unsubscribe => {
                lock(&shared.state).legacy.polling = None;
                let reason = "as asked".to_owned();
                settled(shared, RequestKind::Unsubscribe, Reply::StreamEnd { reason })
            }
            Request::Hello(_) => Err(EncodeError::NoWords { what: "a hello" }.into()),
        }
    }

    async fn get_obs(&self, shared: &Shared) -> Result<Reply> {
        let _turn = self.turn.lock().await;
        if let Some(obs) = self.observe(shared).await? {
            return Ok(Reply::Observation(obs));
        }
        let newest = lock(&shared.state).legacy.newest.clone();
        newest.map(Reply::Observation).ok_or(Error::Unsupported {
            what: "observe when it is asked to",
            why: "it observes in reset and step only, and neither was done yet",
        })
    }

    // ---- Actions ------------------------------------------------------------------------------------------

    /// Sends actions, of which the robot's part is nobody's to wait for.
    ///
    /// A gym-like server knows no such thing. It gets an `action`, in its turn, whose answer becomes the
    /// newest observation and is otherwise nobody's: so the robot moves as it does elsewhere, where an
    /// `apply_action` would be ignored without a word.
    pub(crate) async fn act(&self, shared: &Shared, outgoing: Outgoing) -> Result<()> {
        self.check_controller()?;
        let observes = lock(&shared.state).legacy.observes;
        let observes = match observes {
            Some(observes) => observes,
            None => {
                let _turn = self.turn.lock().await;
                within(self.request_timeout, "a word on how the server observes", self.observes(shared))
                    .await?
                    .0
            }
        };
        if observes {
            return self.apply(shared, outgoing).await;
        }
        let _turn = self.turn.lock().await;
        check_current(&lock(&shared.state), &outgoing)?;
        let step = Request::Step { session: 0, episode: 0, actions: outgoing.message.actions };
        let stepped = self.exchange(shared, step, outgoing.capture_times.as_deref());
        self.patiently("an answer to an action", stepped).await.map(drop)
    }

    /// Sends actions to a server of the streaming generation.
    async fn apply(&self, shared: &Shared, outgoing: Outgoing) -> Result<()> {
        let _order = self.order.lock().await;
        // A reset that was sent since they were chosen would not stop them on their way.
        check_current(&lock(&shared.state), &outgoing)?;
        let Outgoing { message, capture_times } = outgoing;
        let frame = msgpack::encode(
            &Message::Notice(Notice::Action(message)),
            capture_times.as_deref().unwrap_or(NO_TIMES),
        )?;
        shared.send(&shared.control, frame).await
    }

    /// Has actions carried out and observes, in a turn that the caller has. A server that ignores `action` is
    /// told to apply and asked to observe.
    async fn step(
        &self,
        shared: &Shared,
        actions: ActionChunk,
        times: Option<Arc<ValueMap>>,
    ) -> Result<Reply> {
        let (steps, observes) = {
            let known = &lock(&shared.state).legacy;
            (known.steps, known.observes)
        };
        let step = Request::Step { session: 0, episode: 0, actions: actions.clone() };
        // Who does not observe when asked can only step.
        if steps == Some(true) || observes == Some(false) {
            return self.exchange(shared, step, times.as_deref()).await;
        }
        if steps.is_none()
            && let Some(stepped) = self.probe(shared, step, times.as_deref()).await?
        {
            lock(&shared.state).legacy.steps = Some(true);
            return Ok(stepped);
        }
        let message = {
            let mut state = lock(&shared.state);
            let from = state.seen.clone();
            state.action(actions, from).message
        };
        self.apply(shared, Outgoing { message, capture_times: times }).await?;
        let observed =
            within(self.request_timeout, "an observation after the actions", self.observe(shared)).await?;
        // Who neither steps nor observes knows steps, but not this one, and has ignored the rest.
        let why = "it passed over the request, and may have found the actions wrong";
        let obs = observed.ok_or(Error::Unsupported { what: "carry out this step", why })?;
        if lock(&shared.state).legacy.steps.replace(false).is_none() {
            tracing::warn!(
                "the server takes no steps: they are made of apply_action and obs_request, without reward or an end of the episode, \
                 and what is observed may be from before the actions"
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

    // ---- The stream ---------------------------------------------------------------------------------------

    async fn subscribe(&self, shared: &Shared, wanted: Subscribe) -> Result<Reply> {
        let Subscribe { rate, cameras, depth, .. } = wanted;
        {
            let _turn = self.turn.lock().await;
            let (observes, told) = self.observes(shared).await?;
            if !observes {
                return Err(Error::Unsupported {
                    what: "stream observations",
                    why: "it observes in reset and step only",
                });
            }
            if !cameras.is_empty() {
                let obs = match told {
                    Some(obs) => obs,
                    None => self.exchange_obs(shared).await?,
                };
                cameras.iter().try_for_each(|name| obs.camera(name).map(drop))?;
            }
        }
        let subscribed = settled(
            shared,
            RequestKind::Subscribe,
            Reply::Subscribed { hz: rate.hz(), cameras: cameras.clone() },
        )?;
        let now = shared.now();
        {
            let known = &mut lock(&shared.state).legacy;
            known.polls_begun += 1;
            known.polling =
                Some(Polling { number: known.polls_begun, ticker: Ticker::new(rate, now), cameras, depth });
        }
        shared.control.changed.notify_one();
        Ok(subscribed)
    }

    /// Asks for the stream's observations, for as long as the session lives.
    pub(crate) async fn poll(&self, shared: &Shared) {
        loop {
            let polling = lock(&shared.state)
                .legacy
                .polling
                .as_ref()
                .map(|polling| (polling.number, polling.due_in(shared.now())));
            let changed = shared.control.changed.notified();
            let (number, wait) = match polling {
                None => {
                    changed.await;
                    continue;
                }
                Some(polling) => polling,
            };
            if !wait.is_zero() {
                tokio::select! {
                    () = changed => {}
                    () = sleep(wait) => {}
                }
                continue;
            }
            if let Err(error) = self.poll_once(shared, number).await {
                let mut state = lock(&shared.state);
                if state.legacy.polling.take_if(|polling| polling.number == number).is_some() {
                    state.stream = Stream::Failed(Error::StreamEnded { reason: error.to_string() });
                    drop(state);
                    shared.latest.send_modify(|_| ());
                }
            }
        }
    }

    async fn poll_once(&self, shared: &Shared, number: u64) -> Result<()> {
        let _turn = self.turn.lock().await;
        match lock(&shared.state).polling(number) {
            // Ticks that passed before it was the stream's turn are skipped.
            Some(polling) => polling.ticker.skip_due(shared.now()),
            None => return Ok(()),
        }
        let obs = within(self.request_timeout, "an observation", self.exchange_obs(shared)).await?;
        let now = shared.now();
        let mut state = lock(&shared.state);
        let Some(polling) = state.polling(number) else { return Ok(()) };
        let obs = match polling.select(&obs) {
            None => obs,
            Some(selected) => {
                let selected = Arc::new(selected);
                if let Some(times) = state.legacy.capture_times(&obs) {
                    state.legacy.remember(&selected, times);
                }
                selected
            }
        };
        let is_current = state.arrived(&obs, now);
        drop(state);
        if is_current {
            shared.latest.send_replace(Some(obs));
        }
        Ok(())
    }

    // ---- Helpers ------------------------------------------------------------------------------------------

    /// An observation, if the server observes when it is asked to, in a turn that the caller has.
    async fn observe(&self, shared: &Shared) -> Result<Option<Arc<Observation>>> {
        match self.observes(shared).await? {
            (true, None) => self.exchange_obs(shared).await.map(Some),
            (_, told) => Ok(told),
        }
    }

    async fn exchange_obs(&self, shared: &Shared) -> Result<Arc<Observation>> {
        match self.exchange(shared, Request::GetObs, None).await? {
            Reply::Observation(obs) => Ok(obs),
            _ => Err(Error::Protocol { expected: "an observation" }),
        }
    }

    /// Whether the server observes when it is asked to, and what it observed if it was asked just now, in a
    /// turn that the caller has.
    async fn observes(&self, shared: &Shared) -> Result<(bool, Option<Arc<Observation>>)> {
        let known = lock(&shared.state).legacy.observes;
        if let Some(observes) = known {
            return Ok((observes, None));
        }
        let observed = match self.probe(shared, Request::GetObs, None).await? {
            Some(Reply::Observation(obs)) => Some(obs),
            _ => None,
        };
        let known = &mut lock(&shared.state).legacy;
        known.observes = Some(observed.is_some());
        if observed.is_some() {
            known.newest = None;
        }
        Ok((observed.is_some(), observed))
    }

    /// Asks what a server may ignore, and for metadata, which every server answers: if that comes first, the
    /// other was ignored. Otherwise the metadata is waited for only where it may be late: our own servers
    /// hold it back on keys that several clients may share, and take what is asked meanwhile for another's.
    async fn probe(
        &self,
        shared: &Shared,
        request: Request,
        times: Option<&ValueMap>,
    ) -> Result<Option<Reply>> {
        if self.is_lossy && lock(&shared.state).legacy.owed.is_owed(Kind::Metadata) {
            let why = "answers to earlier questions may still come, and only those to a reset end that: reset first";
            return Err(Error::Unsupported { what: "tell what it understands", why });
        }
        self.settle_owed(shared, &request).await?;
        let answered = self.request(shared, request, times).await?;
        let metadata = self.request(shared, Request::GetMetadata, None).await?;
        match answered.await.unwrap_or(Err(Error::Closed)) {
            Ok(reply) => {
                if self.is_lossy {
                    let _ = timeout(HELD_BACK, metadata).await;
                }
                Ok(Some(reply))
            }
            Err(Error::Protocol { expected: UNANSWERED }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Asks, and waits for the answer, in a turn that the caller has.
    async fn exchange(&self, shared: &Shared, request: Request, times: Option<&ValueMap>) -> Result<Reply> {
        self.settle_owed(shared, &request).await?;
        let answered = self.request(shared, request, times).await?;
        answered.await.unwrap_or(Err(Error::Closed))
    }

    /// If somebody gave up waiting for an answer that looks like this request's, makes sure first that it has
    /// come or never will: the answer to a question that was asked after it proves either.
    async fn settle_owed(&self, shared: &Shared, request: &Request) -> Result<()> {
        let is_owed = Kind::of(request)
            .is_some_and(|kind| kind != Kind::Metadata && lock(&shared.state).legacy.owed.is_owed(kind));
        if is_owed {
            self.request(shared, Request::GetMetadata, None).await?.await.unwrap_or(Err(Error::Closed))?;
        }
        Ok(())
    }

    /// Asks; where the answer will come.
    async fn request(
        &self,
        shared: &Shared,
        request: Request,
        times: Option<&ValueMap>,
    ) -> Result<oneshot::Receiver<Result<Reply>>> {
        let kind = Kind::of(&request);
        let (is_reset, keeps_busy) =
            (kind == Some(Kind::Reset), matches!(kind, Some(Kind::Reset | Kind::Step)));
        let _order = self.order.lock().await;
        let (frame, answered) = {
            let mut state = lock(&shared.state);
            let id = state.next_request()?;
            let frame = msgpack::encode(&Message::Request { id, request }, times.unwrap_or(NO_TIMES))?;
            if let Some(kind) = kind {
                state.legacy.owed.ask(id, kind);
            }
            (frame, state.asked(id, if is_reset { RequestKind::Reset } else { RequestKind::Other }))
        };
        if keeps_busy && !self.is_lossy {
            self.idle_timeout.set_limit(self.busy_idle_timeout);
        }
        if is_reset {
            // It has emptied the action queue.
            shared.room.notify_waiters();
        }
        shared.send(&shared.control, frame).await?;
        Ok(answered)
    }

    /// For what takes as long as it takes, but not for ever.
    async fn patiently(
        &self,
        what: &'static str,
        asking: impl Future<Output = Result<Reply>>,
    ) -> Result<Reply> {
        within(self.reply_timeout, what, asking).await
    }

    /// The wire knows no observers, and the server would do as it is told.
    fn check_controller(&self) -> Result<()> {
        if self.is_observer {
            return Err(Error::Rejected(Fault::new(
                Code::NotController,
                "an observer may not move the robot",
            )));
        }
        Ok(())
    }
}

impl State {
    /// The stream, if it is still this one.
    fn polling(&mut self, number: u64) -> Option<&mut Polling> {
        self.legacy.polling.as_mut().filter(|polling| polling.number == number)
    }
}

impl Polling {
    fn due_in(&self, now: Timestamp) -> Duration {
        self.ticker.due_in(now)
    }

    /// Of an observation what was asked for; `None` if that is all of it.
    fn select(&self, obs: &Observation) -> Option<Observation> {
        if self.cameras.is_empty() && self.depth {
            return None;
        }
        let mut selected = obs.clone();
        selected.cameras.retain(|camera| {
            self.cameras.is_empty() || self.cameras.iter().any(|name| **name == *camera.name)
        });
        if !self.depth {
            selected.cameras.iter_mut().for_each(|camera| Arc::make_mut(camera).depth = None);
        }
        Some(selected)
    }
}

/// Waits for so long at most.
async fn within<T>(
    waited: Duration,
    what: &'static str,
    asking: impl Future<Output = Result<T>>,
) -> Result<T> {
    timeout(waited, asking).await.map_err(|_| Error::Timeout { what, waited })?
}

/// Whether these actions may still go out: no reset was asked for since they were chosen.
fn check_current(state: &State, Outgoing { message, .. }: &Outgoing) -> Result<()> {
    if state.dispatch.is_held_up() || message.episode < state.episode {
        let fault = Fault::new(Code::Stale, "a reset was asked for since the action was chosen");
        return Err(Error::ActionRefused(Fault { action_seq: message.seq, ..fault }));
    }
    Ok(())
}

/// What only this side needs to know.
fn settled(shared: &Shared, kind: RequestKind, reply: Reply) -> Result<Reply> {
    let id = {
        let mut state = lock(&shared.state);
        let id = state.next_request()?;
        drop(state.asked(id, kind));
        id
    };
    session::settle(shared, id, Ok(reply.clone()), shared.now());
    Ok(reply)
}
