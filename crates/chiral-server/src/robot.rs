//! The trait that a robot implements, and the context that it gets with every action.

use std::{
    fmt,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use chiral_proto::{ActionChunk, ActionSpec, Observation, Timestamp, ValueMap, action::Action, lock};

use crate::error::RobotError;

/// Stops a robot that is busy with a call of one of its methods, from another thread.
pub type Stopper = Arc<dyn Fn() + Send + Sync>;

/// The robot, or its simulator.
///
/// Its methods are called on one thread that owns it, the *control thread*, so they may block: a `reset` that
/// homes the arm for 10 s stops neither the observation stream nor anything else. (`action_spec`,
/// `execution`, `is_lock_step`, `stopper`, and `metadata` for the first time, are called by the thread that
/// builds the server.) A panic in one of them is caught: the robot is then out of service, every peer's
/// commands get that as an error, and the server still serves observations.
///
/// The server times the rows: each arrives in [`Robot::apply_action`] when it is due, and none that is late or
/// was overtaken. When no row has been applied for the command timeout, or the controller is lost, the server
/// calls [`Robot::hold`].
pub trait Robot: Send + 'static {
    /// Describes the actions of this robot. Called once, when the server is built.
    fn action_spec(&self) -> ActionSpec;

    /// Starts a new episode, reproducible with the request's seed where the robot supports that.
    ///
    /// # Errors
    /// Why the robot cannot do it; the peer receives the text.
    fn reset(&mut self, request: &ResetRequest) -> Result<ResetOutcome, RobotError>;

    /// Applies one action, or starts it. It has the dimension of the spec, and every value is finite; the
    /// robot clamps values itself.
    ///
    /// # Errors
    /// Why the robot cannot do it; the peer receives the text.
    fn apply_action(&mut self, action: &Action, context: &ActionContext) -> Result<(), RobotError>;

    /// Whether the server times the rows of a chunk, or the robot executes whole chunks by itself, as one
    /// with native trajectories does. Called once.
    fn execution(&self) -> Execution {
        Execution::Rows
    }

    /// Executes N actions that were predicted together, at `control_hz`. Called only with
    /// [`Execution::Chunks`], with at least two rows; a single one goes to [`Robot::apply_action`]. Returns
    /// early once [`ActionContext::is_over`].
    ///
    /// # Errors
    /// As [`Robot::apply_action`].
    fn apply_chunk(&mut self, chunk: &ActionChunk, context: &ActionContext) -> Result<(), RobotError> {
        let _ = (chunk, context);
        Err("expected apply_chunk of a robot whose execution() is Chunks, found none".into())
    }

    /// Applies the rows of a chunk and returns the outcome, where the robot has a step of its own, as a
    /// simulator in lock-step does. `None`, the default, makes the server apply the rows, as it applies those
    /// of an action; there is then no reward and no end of the episode.
    ///
    /// # Errors
    /// As [`Robot::apply_action`].
    fn step(
        &mut self,
        chunk: &ActionChunk,
        context: &ActionContext,
    ) -> Result<Option<StepOutcome>, RobotError> {
        let _ = (chunk, context);
        Ok(None)
    }

    /// Returns what `get_metadata` replies, in free form. Called when the server is built and after every
    /// successful reset, so that the reply never waits for the robot.
    fn metadata(&self) -> ValueMap {
        ValueMap::new()
    }

    /// Whether `reset` and `step` publish every sensor themselves before they return, as a simulator in
    /// lock-step does. If not, the observation of their reply is taken once every sensor has published
    /// something captured after they returned. Called once.
    fn is_lock_step(&self) -> bool {
        false
    }

    /// Brings the robot to a safe stop where it is. Called when no action was applied for the command
    /// timeout, when the controller falls silent, has disconnected or is lost, and after a panic.
    fn hold(&mut self) {}

    /// Returns a function that stops the robot where it is while one of its methods blocks, so that the
    /// method returns. It is called from another thread: when [`Robot::hold`] is due while `apply_action`,
    /// `apply_chunk` or `step` blocks, and when the controller is lost whatever blocks. `hold` follows as
    /// soon as the method has returned. Called once.
    fn stopper(&self) -> Option<Stopper> {
        None
    }

    /// Called when the controller has disconnected or is lost, after [`Robot::hold`].
    fn on_disconnect(&mut self) {}
}

/// Who takes chunks apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Execution {
    /// The server: it calls [`Robot::apply_action`] for each row when it is due.
    #[default]
    Rows,
    /// The robot: it is given each chunk whole, in [`Robot::apply_chunk`].
    Chunks,
}

/// The request that starts an episode.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct ResetRequest {
    /// The session that sent it.
    pub session: u64,
    /// Makes the episode repeatable, if the robot supports it.
    pub seed: Option<u64>,
    /// The application's own options.
    pub options: ValueMap,
}

impl ResetRequest {
    /// A request of this session, without a seed and options.
    pub fn new(session: u64) -> ResetRequest {
        ResetRequest { session, ..ResetRequest::default() }
    }
}

/// The outcome of a reset. `ResetOutcome::default()` and `ValueMap`s convert to it.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct ResetOutcome {
    /// The application's own values.
    pub info: ValueMap,
    /// The first observation of the episode, if the robot has it at hand. Otherwise the server takes it from
    /// the sensors.
    pub observation: Option<Observation>,
}

impl From<ValueMap> for ResetOutcome {
    fn from(info: ValueMap) -> ResetOutcome {
        ResetOutcome { info, observation: None }
    }
}

impl ResetOutcome {
    /// Replies with this observation.
    #[must_use]
    pub fn with_observation(mut self, observation: Observation) -> ResetOutcome {
        self.observation = Some(observation);
        self
    }
}

/// The outcome of a step.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct StepOutcome {
    /// Summed over the rows.
    pub reward: f64,
    /// Whether the episode reached a terminal state of the task.
    pub terminated: bool,
    /// Whether the episode was cut off, for instance by a time limit.
    pub truncated: bool,
    /// The application's own values.
    pub info: ValueMap,
    /// The observation after the rows, if the robot has it at hand. Otherwise the server takes it from the
    /// sensors.
    pub observation: Option<Observation>,
}

impl StepOutcome {
    /// An outcome with this reward, in an episode that goes on.
    pub fn new(reward: f64) -> StepOutcome {
        StepOutcome { reward, ..StepOutcome::default() }
    }

    /// Ends the episode: in a terminal state of the task, cut off, or both.
    #[must_use]
    pub fn with_end(mut self, terminated: bool, truncated: bool) -> StepOutcome {
        (self.terminated, self.truncated) = (terminated, truncated);
        self
    }

    /// Adds the application's own values.
    #[must_use]
    pub fn with_info(mut self, info: ValueMap) -> StepOutcome {
        self.info = info;
        self
    }

    /// Replies with this observation.
    #[must_use]
    pub fn with_observation(mut self, observation: Observation) -> StepOutcome {
        self.observation = Some(observation);
        self
    }
}

/// Where an action comes from, and whether its episode is over. The default, an episode that does not end,
/// suits a robot's own tests.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ActionContext {
    /// The session that sent it.
    pub session: u64,
    /// The episode it was chosen in.
    pub episode: u64,
    /// The client's sequence number of the action; 0 in a step and on the legacy wire.
    pub seq: u64,
    /// `seq` of the observation that the policy used; 0 if the client did not state it.
    pub observation_seq: u64,
    /// The oldest capture time in that observation, on this host's clock; `None` if unknown.
    pub observed_at: Option<Timestamp>,
    /// When it arrived, on this host's monotonic clock.
    pub received_at: Timestamp,
    /// Whether the policy gave one action of shape (D), not a chunk of shape (N, D).
    pub is_single: bool,
    /// The time between two rows of a chunk, 1 / `control_hz`; `None` if the robot declares no rate.
    pub control_period: Option<Duration>,
    /// How long ago the last row was applied, so that a robot can ramp after a gap; `None` for the first.
    pub since_last_row: Option<Duration>,
    pub(crate) end: EpisodeEnd,
}

impl ActionContext {
    /// Whether the action is over: a reset was requested, the controller has disconnected, a newer chunk
    /// replaces this one, or the robot must hold. The rest of a chunk should not be applied.
    pub fn is_over(&self) -> bool {
        self.end.is_set()
    }

    /// Waits until `deadline` or the end of the action, and returns whether it goes on.
    pub fn wait_until(&self, deadline: Instant) -> bool {
        self.end.wait_until(deadline)
    }
}

/// The end of an episode, and of one action in it.
#[derive(Clone, Default)]
pub(crate) struct EpisodeEnd {
    episode: Arc<EndState>,
    /// The action's own end, where it is of one.
    action: Option<Arc<AtomicBool>>,
}

#[derive(Default)]
struct EndState {
    is_over: Mutex<bool>,
    changed: Condvar,
}

impl EpisodeEnd {
    /// The end of an action in this episode, which ends no later than the episode.
    pub(crate) fn of_action(&self) -> EpisodeEnd {
        EpisodeEnd { episode: Arc::clone(&self.episode), action: Some(Arc::default()) }
    }

    pub(crate) fn set(&self) {
        let mut is_over = lock(&self.episode.is_over);
        match &self.action {
            Some(action) => action.store(true, Ordering::Relaxed),
            None => *is_over = true,
        }
        drop(is_over);
        self.episode.changed.notify_all();
    }

    pub(crate) fn is_set(&self) -> bool {
        self.is_set_in(*lock(&self.episode.is_over))
    }

    fn is_set_in(&self, is_episode_over: bool) -> bool {
        is_episode_over || self.action.as_ref().is_some_and(|action| action.load(Ordering::Relaxed))
    }

    fn wait_until(&self, deadline: Instant) -> bool {
        let mut is_over = lock(&self.episode.is_over);
        loop {
            let remaining = deadline.saturating_duration_since(Instant::now());
            if self.is_set_in(*is_over) || remaining.is_zero() {
                return !self.is_set_in(*is_over);
            }
            is_over = self
                .episode
                .changed
                .wait_timeout(is_over, remaining)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl fmt::Debug for EpisodeEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EpisodeEnd({})", self.is_set())
    }
}
