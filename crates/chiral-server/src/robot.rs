//! The trait that a robot implements, and the context that it gets with every action.

use std::{
    fmt,
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use chiral_proto::{ActionChunk, ActionSpec, Timestamp, ValueMap, action::Action, lock};

use crate::error::RobotError;

/// The robot, or its simulator.
///
/// Its methods are called on one thread that owns it, the *control thread*, so they may block: a `reset` that
/// homes the arm for 10 s stops neither the observation stream nor anything else. (`action_spec`, and
/// `metadata` for the first time, are called by the thread that builds the server.) A panic in one of them is
/// caught: the robot is then out of service, every peer's commands get that as an error, and the server still
/// serves observations.
pub trait Robot: Send + 'static {
    /// Describes the actions of this robot. Called once, when the server is built.
    fn action_spec(&self) -> ActionSpec;

    /// Starts a new episode, reproducible with `seed` where the robot supports that. Returns the
    /// application's `info`.
    ///
    /// # Errors
    /// Why the robot cannot do it; the peer receives the text.
    fn reset(&mut self, seed: Option<u64>, options: &ValueMap) -> Result<ValueMap, RobotError>;

    /// Applies one action, or starts it. It has the dimension of the spec, and every value is finite; the
    /// robot clamps values itself.
    ///
    /// # Errors
    /// Why the robot cannot do it; the peer receives the text.
    fn apply_action(&mut self, action: &Action, context: &ActionContext) -> Result<(), RobotError>;

    /// Applies N actions that were predicted together; a single one goes to [`Robot::apply_action`]. By
    /// default row after row at `control_hz`, until the episode is over.
    ///
    /// # Errors
    /// As [`Robot::apply_action`].
    fn apply_chunk(&mut self, chunk: &ActionChunk, context: &ActionContext) -> Result<(), RobotError> {
        let start = Instant::now();
        for (i, row) in chunk.iter().enumerate() {
            if !context.wait_until(start + context.control_period * i as u32) {
                break;
            }
            self.apply_action(&row.into(), context)?;
        }
        Ok(())
    }

    /// Applies the rows of a chunk and returns the outcome. By default [`Robot::apply_chunk`], with no reward
    /// and no end of the episode. The server takes the observation of the reply after this has returned.
    ///
    /// # Errors
    /// As [`Robot::apply_action`].
    fn step(&mut self, chunk: &ActionChunk, context: &ActionContext) -> Result<StepOutcome, RobotError> {
        self.apply_chunk(chunk, context)?;
        Ok(StepOutcome::default())
    }

    /// Returns what `get_metadata` replies, in free form. Called when the server is built and after every
    /// successful reset, so that the reply never waits for the robot.
    fn metadata(&self) -> ValueMap {
        ValueMap::new()
    }

    /// Whether `reset` and `step` publish every sensor themselves before they return, as a simulator in
    /// lock-step does. If not, the observation of their reply is taken once every sensor has published
    /// something captured after they returned.
    fn is_lock_step(&self) -> bool {
        false
    }

    /// Brings the robot to a safe stop where it is. Called when the controller has disconnected or is lost,
    /// and after a panic.
    fn hold(&mut self) {}

    /// Called when the controller has disconnected or is lost, after [`Robot::hold`].
    fn on_disconnect(&mut self) {}
}

/// The outcome of a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutcome {
    /// Summed over the rows.
    pub reward: f64,
    /// Whether the episode reached a terminal state of the task.
    pub terminated: bool,
    /// Whether the episode was cut off, for instance by a time limit.
    pub truncated: bool,
    /// The application's own values.
    pub info: ValueMap,
}

/// Where an action comes from, and whether its episode is over. The default, an episode that does not end,
/// suits a robot's own tests.
#[derive(Clone, Debug, Default)]
pub struct ActionContext {
    /// The session that sent it.
    pub session: u64,
    /// The episode it was chosen in.
    pub episode: u64,
    /// The client's sequence number of the action; 0 in a step.
    pub seq: u64,
    /// `seq` of the observation that the policy used; 0 if the client did not state it.
    pub observation_seq: u64,
    /// When it arrived, on this host's monotonic clock.
    pub received_at: Timestamp,
    /// The time between two rows of a chunk, 1 / `control_hz`.
    pub control_period: Duration,
    pub(crate) end: EpisodeEnd,
}

impl ActionContext {
    /// Whether the episode is over: a reset was requested, or the controller has disconnected. The rest of a
    /// chunk should not be applied.
    pub fn is_over(&self) -> bool {
        *lock(&self.end.shared.over)
    }

    /// Waits until `deadline` or the end of the episode, and returns whether the episode still runs.
    pub fn wait_until(&self, deadline: Instant) -> bool {
        let mut over = lock(&self.end.shared.over);
        loop {
            let remaining = deadline.saturating_duration_since(Instant::now());
            if *over || remaining.is_zero() {
                return !*over;
            }
            over = self
                .end
                .shared
                .changed
                .wait_timeout(over, remaining)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// The end of an episode, shared by the actions in it.
#[derive(Clone, Default)]
pub(crate) struct EpisodeEnd {
    shared: Arc<EndState>,
}

#[derive(Default)]
struct EndState {
    over: Mutex<bool>,
    changed: Condvar,
}

impl EpisodeEnd {
    pub(crate) fn set(&self) {
        *lock(&self.shared.over) = true;
        self.shared.changed.notify_all();
    }
}

impl fmt::Debug for EpisodeEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EpisodeEnd({})", *lock(&self.shared.over))
    }
}
