//! The client's calls: the surface that policy code sees.

use std::{fmt, future::Future, pin::pin, sync::Arc, time::Duration};

use chiral_proto::{
    ActionChunk, Codec, Observation, Reply, Request, StepResult, Timestamp, ValueMap,
    action::{Action, InvalidAction},
    clock::{InvalidRate, Rate},
    message::{RobotInfo, Subscribe, Welcome},
};
use tokio::{task::coop::consume_budget, time::timeout};

use crate::{
    connect::options::ConnectOptions,
    dispatch::put::PutOptions,
    error::Error,
    session::Session,
    state::Stream,
    stats::ClientStats,
    stream_options::StreamOptions,
    waiting::{OnWaiting, Waiting},
};

type Result<T, E = Error> = std::result::Result<T, E>;

/// The policy's end of a connection to a robot. A clone is the same connection; the session ends when the
/// last one is dropped.
///
/// Observations and actions flow independently, each at its own rate: `start_obs_stream` and `latest_obs` for
/// the one, `start_action_dispatch` and `put_action` for the other. `step` couples them, for policies in
/// lock-step.
///
/// Every failure reaches the caller. After the session has ended, every call fails with the reason.
#[derive(Clone)]
pub struct PolicyClient {
    session: Arc<Session>,
    welcome: Arc<Welcome>,
    timeouts: Timeouts,
    on_waiting: OnWaiting,
}

/// How long requests may take.
#[derive(Clone, Copy)]
struct Timeouts {
    request: Duration,
    step: Duration,
    reset: Option<Duration>,
}

/// How often a reset that is waited for is reported.
const RESET_REPORT_PERIOD: Duration = Duration::from_secs(10);

impl PolicyClient {
    pub(crate) fn new(session: Session, welcome: Welcome, options: &ConnectOptions) -> Self {
        let timeouts = Timeouts {
            request: options.request_timeout,
            step: options.step_timeout,
            reset: options.reset_timeout(session.control.codec),
        };
        let on_waiting = options.on_waiting.clone();
        PolicyClient { session: Arc::new(session), welcome: Arc::new(welcome), timeouts, on_waiting }
    }

    /// The wire agreed with the server: [`Codec::Protobuf`] with one of ours, [`Codec::Msgpack`] with a
    /// legacy server or where the builder's `codec` forces it. All calls are the same; the client guide lists
    /// what the msgpack wire cannot do.
    pub fn codec(&self) -> Codec {
        self.session.control.codec
    }

    /// What the robot is: its name, its cameras and proprioception, its actions. A legacy server, of
    /// [`Codec::Msgpack`], declares nothing: its name is the address, there are no cameras and no
    /// proprioception, and `action_spec` has dimension 0, which stands for any, and 0 Hz.
    pub fn robot(&self) -> &RobotInfo {
        &self.welcome.robot
    }

    /// Requests the robot's own metadata. Call it once, before `reset`.
    ///
    /// # Errors
    /// The session's end, [`Error::Timeout`], or [`Error::Rejected`] if the robot failed at it.
    pub async fn get_metadata(&self) -> Result<ValueMap> {
        match self.request_within(Request::GetMetadata, "metadata").await? {
            Reply::Metadata(data) => Ok(data),
            _ => Err(Error::Protocol { expected: "metadata" }),
        }
    }

    /// Starts a new episode, and waits for as long as the robot takes, unless the builder's `reset_timeout`
    /// limits that; reports every 10 s that it waits. Drops the actions that are queued, also those queued
    /// before this returns: they were chosen from an observation of the old episode.
    ///
    /// # Errors
    /// The session's end, [`Error::Timeout`], or [`Error::Rejected`] if the robot failed at it.
    pub async fn reset(&self) -> Result<(Arc<Observation>, ValueMap)> {
        self.reset_with(None, ValueMap::new()).await
    }

    /// Starts a new episode with a seed, which makes it repeatable if the robot supports that, and with
    /// options of the application's own.
    ///
    /// # Errors
    /// As [`PolicyClient::reset`].
    pub async fn reset_with(
        &self,
        seed: Option<u64>,
        options: ValueMap,
    ) -> Result<(Arc<Observation>, ValueMap)> {
        let reset = self.session.wire.request(Request::Reset { seed, options });
        match self.report_while(within(self.timeouts.reset, "a reply to the reset", reset)).await? {
            Reply::Reset { obs, info } => Ok((self.see(obs), info)),
            _ => Err(Error::Protocol { expected: "the reset's observation" }),
        }
    }

    /// Requests the robot's newest observation.
    ///
    /// # Errors
    /// The session's end, [`Error::Timeout`], or [`Error::Rejected`] if a sensor published nothing in time.
    /// [`Error::Unsupported`] of a legacy server that observes in reset and step only, before the first.
    pub async fn get_obs(&self) -> Result<Arc<Observation>> {
        match self.request_within(Request::GetObs, "an observation").await? {
            Reply::Observation(obs) => Ok(self.see(obs)),
            _ => Err(Error::Protocol { expected: "an observation" }),
        }
    }

    /// Applies all rows of a chunk and returns the observation that follows.
    ///
    /// # Errors
    /// [`Error::InvalidAction`] before anything is sent, the session's end, [`Error::Rejected`], or
    /// [`Error::Timeout`] after the builder's `step_timeout`.
    pub async fn step(&self, chunk: impl Into<ActionChunk>) -> Result<StepResult> {
        let actions = self.checked_within(self.max_step_rows(), chunk.into())?;
        let episode = self.session.core.state().actions.seen().episode;
        let step = Request::Step { session: self.welcome.session, episode, actions };
        let step = self.session.wire.request(step);
        match within(Some(self.timeouts.step), "a reply to the step", step).await? {
            Reply::Step(result) => {
                self.see(Arc::clone(&result.obs));
                Ok(result)
            }
            _ => Err(Error::Protocol { expected: "the step's result" }),
        }
    }

    // ---- Observations -------------------------------------------------------------------------------------

    /// Starts the observation stream: `start_obs_stream(30.0)` for 30 Hz, or [`StreamOptions`] for some of
    /// the cameras. Replaces a stream that runs.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`], the session's end, [`Error::Timeout`], or [`Error::Rejected`] if there is
    /// no such camera or a sensor publishes nothing. With a legacy server [`Error::UnknownName`] for the
    /// former, and [`Error::Unsupported`] if it observes in reset and step only.
    pub async fn start_obs_stream(&self, options: impl Into<StreamOptions>) -> Result<()> {
        let StreamOptions { hz, cameras, depth } = options.into();
        let rate = rate("the stream's rate", hz)?;
        let cameras = cameras.into_iter().map(|camera| camera.name).collect();
        let window = self.session.core.state().window(hz);
        let subscribe = Request::Subscribe(Subscribe { rate, cameras, depth, window });
        match self.request_within(subscribe, "the observation stream").await? {
            Reply::Subscribed { .. } => Ok(()),
            _ => Err(Error::Protocol { expected: "the stream's beginning" }),
        }
    }

    /// Stops the stream. The latest observation stays.
    ///
    /// # Errors
    /// The session's end, or [`Error::Timeout`].
    pub async fn stop_obs_stream(&self) -> Result<()> {
        match self.request_within(Request::Unsubscribe, "the stream's end").await? {
            Reply::StreamEnd { .. } => Ok(()),
            _ => Err(Error::Protocol { expected: "the stream's end" }),
        }
    }

    /// The newest observation of the stream in this episode; `None` before the first.
    ///
    /// # Errors
    /// The session's end, or [`Error::StreamEnded`]: as soon as the stream was ended by anything but
    /// `stop_obs_stream`.
    pub fn latest_obs(&self) -> Result<Option<Arc<Observation>>> {
        self.session.core.state().check_stream()?;
        let latest = self.session.core.latest.borrow().clone();
        Ok(latest.map(|obs| self.see(obs)))
    }

    /// The newest observation of the stream that neither this client nor a clone has returned yet. Waits for
    /// it until `limit` has passed.
    ///
    /// # Errors
    /// [`Error::Timeout`] if none arrived, [`Error::NotStreaming`], the session's end, or
    /// [`Error::StreamEnded`].
    pub async fn next_obs(&self, limit: Duration) -> Result<Arc<Observation>> {
        let mut latest = self.session.core.latest.subscribe();
        let arrival = async {
            loop {
                self.session.core.state().check_stream()?;
                let seen = self.session.core.state().actions.seen().seq;
                let newest = latest.borrow_and_update().clone();
                match newest.filter(|obs| obs.seq > seen) {
                    Some(obs) => return Ok(self.see(obs)),
                    None if matches!(self.session.core.state().stream, Stream::Off) => {
                        return Err(Error::NotStreaming);
                    }
                    None => latest.changed().await.map_err(|_| Error::Closed)?,
                }
            }
        };
        timeout(limit, arrival).await.map_err(|_| Error::Timeout { what: "an observation", waited: limit })?
    }

    // ---- Actions ------------------------------------------------------------------------------------------

    /// Sends one queued action at every tick of this rate, in hertz. Deadlines are absolute, and missed ones
    /// are skipped.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`], or the session's end.
    pub fn start_action_dispatch(&self, hz: f64) -> Result<()> {
        let rate = rate("the dispatch's rate", hz)?;
        let core = &self.session.core;
        let mut state = core.state();
        state.check_alive()?;
        state.actions.start(rate, core.now());
        drop(state);
        core.room.notify_waiters();
        core.dispatch.wake();
        Ok(())
    }

    /// Stops sending. What is queued stays queued.
    pub fn stop_action_dispatch(&self) {
        let core = &self.session.core;
        core.state().actions.stop();
        core.room.notify_waiters();
    }

    /// Queues one action. While dispatch runs, waits for room. On an error nothing is queued.
    ///
    /// # Errors
    /// [`Error::InvalidAction`], [`Error::QueueFull`] without dispatch, [`Error::ActionRefused`] for an
    /// action sent earlier, [`Error::ActionsLate`], or the session's end.
    pub async fn put_action(&self, action: impl Into<Action>) -> Result<()> {
        self.put_chunk(action.into(), PutOptions::default()).await
    }

    /// Queues the rows of a chunk, all or none. While dispatch runs, waits for room. The options are a
    /// [`PutMode`](crate::PutMode), or [`PutOptions`] that also say from which observation the chunk was
    /// predicted, when it starts and how long it is valid.
    ///
    /// # Errors
    /// As [`PolicyClient::put_action`]; also [`Error::QueueFull`] for a chunk that could never fit. With a
    /// start, [`Error::InvalidArgument`] without dispatch and [`Error::ClockUnknown`] before the clocks were
    /// compared.
    pub async fn put_chunk(
        &self,
        chunk: impl Into<ActionChunk>,
        options: impl Into<PutOptions>,
    ) -> Result<()> {
        let (chunk, options) = (self.checked(chunk.into())?, options.into());
        // A loop that only puts must leave the runtime's thread to others now and then.
        consume_budget().await;
        loop {
            let room = self.session.core.room.notified();
            tokio::pin!(room);
            // From here on no notification is missed.
            room.as_mut().enable();
            match self.put(&chunk, &options) {
                Err(Error::QueueFull { rows, capacity, dispatching: true, .. }) if rows <= capacity => {
                    room.await
                }
                outcome => return outcome,
            }
        }
    }

    /// Queues one action, without waiting.
    ///
    /// # Errors
    /// As [`PolicyClient::put_action`], and [`Error::QueueFull`] also while dispatch runs.
    pub fn try_put_action(&self, action: impl Into<Action>) -> Result<()> {
        self.try_put_chunk(action.into(), PutOptions::default())
    }

    /// Queues the rows of a chunk, all or none, without waiting.
    ///
    /// # Errors
    /// As [`PolicyClient::try_put_action`].
    pub fn try_put_chunk(&self, chunk: impl Into<ActionChunk>, options: impl Into<PutOptions>) -> Result<()> {
        self.put(&self.checked(chunk.into())?, &options.into())
    }

    /// Drops the actions that are queued.
    pub fn clear_actions(&self) {
        let core = &self.session.core;
        core.state().actions.clear();
        core.room.notify_waiters();
    }

    /// Sends actions now, past the queue.
    ///
    /// # Errors
    /// [`Error::InvalidAction`], [`Error::ActionRefused`] for an action sent earlier, [`Error::ActionsLate`],
    /// or the session's end. With a legacy server also [`Error::Timeout`] and [`Error::ActionRefused`] for this
    /// action.
    pub async fn send_action(&self, actions: impl Into<ActionChunk>) -> Result<()> {
        let actions = self.checked_within(self.max_action_rows(), actions.into())?;
        let core = &self.session.core;
        let message = {
            let mut state = core.state();
            state.check_alive()?;
            state.actions.check()?;
            state.actions.message(actions, core.now())
        };
        self.session.sink.send_actions(message).await
    }

    /// How long ago, by this host's clock, the server's host captured something, such as
    /// `obs["wrist_cam"].captured_at`; `None` before the clocks were compared, which takes one round trip.
    pub fn age(&self, captured_at: Timestamp) -> Option<Duration> {
        let core = &self.session.core;
        core.state().age(captured_at, core.now())
    }

    /// How the session is doing.
    pub fn stats(&self) -> ClientStats {
        self.session.stats()
    }

    /// Closes the connection. Afterwards every call fails with [`Error::Closed`]. When this returns, the
    /// robot holds and is free for the next client; a server that does not respond is waited for 1 s.
    ///
    /// # Errors
    /// None so far: a connection that is lost already is closed, too.
    pub async fn close(&self) -> Result<()> {
        self.session.close().await;
        Ok(())
    }

    // ---- Helpers ------------------------------------------------------------------------------------------

    /// A request that the server answers at once; `what` is its reply.
    async fn request_within(&self, request: Request, what: &'static str) -> Result<Reply> {
        let connection = match request {
            Request::GetMetadata => &self.session.control,
            _ => &self.session.observations,
        };
        connection.within(self.timeouts.request, what, self.session.wire.request(request)).await
    }

    /// Reports every 10 s that a reset is waited for.
    async fn report_while<T>(&self, reset: impl Future<Output = T>) -> T {
        let mut reset = pin!(reset);
        let mut waited = Duration::ZERO;
        loop {
            match timeout(RESET_REPORT_PERIOD, reset.as_mut()).await {
                Ok(outcome) => return outcome,
                Err(_) => waited += RESET_REPORT_PERIOD,
            }
            self.on_waiting.call(&Waiting::ForReset { waited });
        }
    }

    /// Queues a chunk if there is room now.
    fn put(&self, chunk: &ActionChunk, options: &PutOptions) -> Result<()> {
        let core = &self.session.core;
        let is_next = core.state().put(chunk, options, core.now())?;
        if is_next {
            core.dispatch.wake();
        }
        Ok(())
    }

    /// The most rows that the server accepts in one action.
    fn max_action_rows(&self) -> usize {
        match self.welcome.max_chunk_rows {
            0 => ActionChunk::OLD_MAX_ROWS,
            rows => rows,
        }
    }

    /// The most rows that the server accepts in one step.
    fn max_step_rows(&self) -> usize {
        match self.welcome.max_chunk_rows {
            0 => ActionChunk::MAX_ROWS,
            rows => rows,
        }
    }

    /// Returns the chunk if it is what the robot declares, and of at most `limit` rows.
    fn checked_within(&self, limit: usize, chunk: ActionChunk) -> Result<ActionChunk> {
        if chunk.rows() > limit {
            return Err(InvalidAction::Rows { limit, found: chunk.rows() }.into());
        }
        self.checked(chunk)
    }

    /// Returns the chunk if it is what the robot declares.
    fn checked(&self, chunk: ActionChunk) -> Result<ActionChunk> {
        self.welcome.robot.action_spec.check(&chunk)?;
        Ok(chunk)
    }

    /// Notes that the caller was given this observation: its next actions come from it.
    fn see(&self, obs: Arc<Observation>) -> Arc<Observation> {
        self.session.core.state().actions.see(&obs);
        obs
    }
}

impl fmt::Debug for PolicyClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PolicyClient")
            .field("robot", &self.welcome.robot.name)
            .field("session", &self.welcome.session)
            .finish_non_exhaustive()
    }
}

/// Waits for a reply, without a limit for as long as that takes.
async fn within(
    limit: Option<Duration>,
    what: &'static str,
    reply: impl Future<Output = Result<Reply>>,
) -> Result<Reply> {
    match limit {
        Some(waited) => timeout(waited, reply).await.map_err(|_| Error::Timeout { what, waited })?,
        None => reply.await,
    }
}

fn rate(name: &'static str, hz: f64) -> Result<Rate> {
    let expected = "more than 0 and at most 1000 Hz";
    Rate::new(hz).map_err(|InvalidRate { found }| Error::InvalidArgument {
        name,
        expected,
        found: found.to_string(),
    })
}
