//! What a robot must be able to do, and what it is told with every action.

use std::{
    fmt,
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use chiral_proto::{ActionChunk, ActionSpec, Timestamp, ValueMap, action::Action};
use chiral_transport::lock;

use crate::error::RobotError;

/// The robot, or its simulator.
///
/// Its methods are called on one thread that owns it, the *control thread*, so they may block: a `reset` that
/// homes the arm for 10 s stops neither the observation stream nor anything else. (`action_spec`, and
/// `metadata` for the first time, are called where the server is made.) A panic in one of them is caught; the
/// robot is then out of service, which every peer is told, and the server goes on serving observations.
pub trait Robot: Send + 'static {
    /// What an action of this robot is. Asked once, when the server is made.
    fn action_spec(&self) -> ActionSpec;

    /// Starts a new episode, repeatable by `seed` where the robot can. Returns the application's `info`.
    ///
    /// # Errors
    /// Whatever keeps the robot from it; the peer is told.
    fn reset(&mut self, seed: Option<u64>, options: &ValueMap) -> Result<ValueMap, RobotError>;

    /// Carries one action out, or sets it going. It has the dimension that the spec says, and every value is
    /// finite; clamping is the robot's own.
    ///
    /// # Errors
    /// Whatever keeps the robot from it; the peer is told.
    fn apply_action(&mut self, action: &Action, context: &ActionContext) -> Result<(), RobotError>;

    /// Carries N actions out that were predicted together; a single one comes by [`Robot::apply_action`]. By
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

    /// Carries the rows of a chunk out and says what came of it. By default [`Robot::apply_chunk`], no
    /// reward, no end. The observation of the reply is taken by the server, after this returned.
    ///
    /// # Errors
    /// As [`Robot::apply_action`].
    fn step(&mut self, chunk: &ActionChunk, context: &ActionContext) -> Result<StepOutcome, RobotError> {
        self.apply_chunk(chunk, context)?;
        Ok(StepOutcome::default())
    }

    /// What `get_metadata` answers: free-form. Asked when the server is made and after every reset that
    /// succeeded, so that the answer never waits for the robot.
    fn metadata(&self) -> ValueMap {
        ValueMap::new()
    }

    /// Whether `reset` and `step` publish every sensor themselves before they return, as a simulator in
    /// lock-step does. If not, the observation of their reply is taken once every sensor has published
    /// something captured after they returned.
    fn is_lock_step(&self) -> bool {
        false
    }

    /// Brings the robot to a safe stop where it is. Called when the controller leaves or is lost, and after a
    /// panic.
    fn hold(&mut self) {}

    /// Called when the controller left or was lost, after [`Robot::hold`].
    fn on_disconnect(&mut self) {}
}

/// What came of a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutcome {
    /// Summed over the rows.
    pub reward: f64,
    /// The episode reached an end of the task's own.
    pub terminated: bool,
    /// The episode was cut off, by a time limit for instance.
    pub truncated: bool,
    /// The application's own values.
    pub info: ValueMap,
}

/// What is known about an action, and whether it still counts. The default is good for a robot's own tests:
/// an episode that does not end.
#[derive(Clone, Debug, Default)]
pub struct ActionContext {
    /// The session it came in.
    pub session: u64,
    /// The episode it was chosen in.
    pub episode: u64,
    /// The client's number of it; 0 in a step.
    pub seq: u64,
    /// `seq` of the observation that the policy looked at; 0 where it did not say.
    pub observation_seq: u64,
    /// When it arrived, on this host's monotonic clock.
    pub received_at: Timestamp,
    /// The time between two rows of a chunk, 1 / `control_hz`.
    pub control_period: Duration,
    pub(crate) end: EpisodeEnd,
}

impl ActionContext {
    /// Whether the episode is over: a reset was asked for, or the controller has left. What is left of a
    /// chunk should not be carried out.
    pub fn is_over(&self) -> bool {
        *lock(&self.end.shared.over)
    }

    /// Waits, and returns whether the episode still runs; returns at once when it ends.
    pub fn wait_until(&self, deadline: Instant) -> bool {
        let mut over = lock(&self.end.shared.over);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if *over || left.is_zero() {
                return !*over;
            }
            over = self.end.shared.changed.wait_timeout(over, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The end of an episode, as those see it who work for it.
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
