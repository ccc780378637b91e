//! What goes into the control core and what comes out of it.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use chiral_proto::{ActionChunk, ActionSpec, Code, Fault, Timestamp, message::ActionMessage};

use super::events::HoldReason;
use crate::robot::{ActionContext, Execution, ResetRequest};

/// What the robot is, as far as the core must know.
#[derive(Clone, Debug)]
pub(crate) struct Traits {
    pub(crate) spec: ActionSpec,
    pub(crate) execution: Execution,
    pub(crate) is_lock_step: bool,
}

/// The limits that keep the robot safe from what is late or missing. `None` means none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// How much longer than usual an action may have been in transit, and how long after it was due a row may
    /// still be applied.
    pub(crate) max_action_lateness: Option<Duration>,
    /// How long after the last applied row the robot holds.
    pub(crate) command_timeout: Option<Duration>,
    pub(crate) on_timeout: OnTimeout,
    /// How old the observation may be from which an action was chosen.
    pub(crate) max_observation_age: Option<Duration>,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            max_action_lateness: Some(Duration::from_millis(250)),
            command_timeout: Some(Duration::from_millis(500)),
            on_timeout: OnTimeout::Resume,
            max_observation_age: None,
        }
    }
}

/// What follows after the robot has held because no action was applied for the command timeout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnTimeout {
    /// The next action that is not late goes on.
    #[default]
    Resume,
    /// Actions and steps are refused until a reset.
    RequireReset,
}

/// Single rows are refused while this many rows wait.
pub(crate) const MAX_WAITING_ROWS: usize = 256;

/// What a session asks of the robot.
#[derive(Debug)]
pub(crate) enum Command {
    Reset(ResetRequest),
    /// The session and the episode are those that the client stated.
    Step {
        session: u64,
        episode: u64,
        chunk: ActionChunk,
    },
    Act(ActionMessage),
}

/// What the control thread does next. It says with [`ControlCore::done`] what came of it, except after
/// `Refuse` and `Observe`.
#[derive(Debug)]
pub(crate) enum Work<R> {
    /// Make the robot hold, and with `ControllerLost` tell it so.
    Hold(HoldReason),
    Reset {
        request: ResetRequest,
        reply: R,
    },
    /// The robot's own step. If it has none, [`ControlCore::step_by_rows`] says so.
    Step {
        chunk: ActionChunk,
        context: ActionContext,
        reply: R,
    },
    Apply(Application<R>),
    /// A step whose rows are applied: take the observation of its reply.
    Observe {
        session: u64,
        reply: R,
    },
    /// A request that came to nothing.
    Refuse {
        reply: R,
        fault: Fault,
    },
    /// Nothing until then.
    SleepUntil(Timestamp),
    /// Nothing until something is admitted.
    Idle,
    /// The thread ends.
    End,
}

/// Rows to apply with one call.
#[derive(Debug)]
pub(crate) struct Application<R> {
    pub(crate) rows: ActionChunk,
    pub(crate) context: ActionContext,
    /// None if they belong to a step.
    pub(crate) on_failure: Option<OnFirstFailure<R>>,
}

/// Where the first failure of an action's rows is reported.
pub(crate) type OnFirstFailure<R> = Arc<Mutex<Option<R>>>;

/// A command that was refused.
#[derive(Debug)]
pub(crate) struct Refusal<R> {
    pub(crate) fault: Fault,
    pub(crate) reply: R,
}

/// Counts of what became of actions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ControlCounts {
    /// Rows that the robot applied.
    pub(crate) applied: u64,
    /// Actions that were refused on arrival, or dropped or cut short by a hold, a reset or the end of the
    /// controller's session.
    pub(crate) refused: u64,
    /// Actions for which the robot's own code failed.
    pub(crate) failed: u64,
    /// Rows that were late.
    pub(crate) late: u64,
    /// Rows that newer ones overtook.
    pub(crate) superseded: u64,
    /// Times that the robot was made to hold.
    pub(crate) holds: u64,
}

/// When the robot's stopper is to be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StopDue {
    Now,
    At(Timestamp),
    Never,
    /// The thread that calls it ends.
    End,
}

/// Why rows were not applied, or not all of them.
pub(crate) fn episode_ended() -> Fault {
    Fault::new(Code::Stale, "the action was over before all its rows were applied")
}
