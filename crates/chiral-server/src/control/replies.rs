//! Takes the observations of replies to resets and steps, on a thread of its own: waiting for a camera keeps
//! nobody from making the robot hold.

use std::sync::{Arc, mpsc};

use chiral_proto::{Observation, StepResult, Timestamp, ValueMap};

use super::shared::{OnDone, Shared};
use crate::robot::{ResetOutcome, StepOutcome};

/// A reset or step that the robot has finished.
pub(super) struct Finished {
    pub(super) session: u64,
    pub(super) reply: OnDone,
    pub(super) outcome: Outcome,
    /// The observation is captured later than this.
    pub(super) after: Timestamp,
}

/// What the robot returned.
#[derive(Default)]
pub(super) struct Outcome {
    reward: f64,
    terminated: bool,
    truncated: bool,
    info: ValueMap,
    observation: Option<Observation>,
}

impl From<ResetOutcome> for Outcome {
    fn from(ResetOutcome { info, observation }: ResetOutcome) -> Outcome {
        Outcome { info, observation, ..Outcome::default() }
    }
}

impl From<StepOutcome> for Outcome {
    fn from(outcome: StepOutcome) -> Outcome {
        let StepOutcome { reward, terminated, truncated, info, observation } = outcome;
        Outcome { reward, terminated, truncated, info, observation }
    }
}

/// Replies to everything that is finished, until the control thread has ended.
pub(super) fn run(shared: &Arc<Shared>, finished: &mpsc::Receiver<Finished>) {
    while let Ok(Finished { session, reply, outcome, after }) = finished.recv() {
        let Outcome { reward, terminated, truncated, info, observation } = outcome;
        let observed = match observation {
            Some(observation) => shared.sampler.checked(observation),
            None => shared.sampler.observe_blocking(Some(after)),
        };
        // A new episode is numbered only now: what was captured before the reset was done belongs to the old
        // one.
        let episode = shared.update(|core, now| core.observed(now));
        shared.sampler.set_episode(episode);
        shared.wake_robot();
        let observed = observed.map(|observation| {
            Arc::new(Observation { session, ..shared.sampler.label(observation, episode) })
        });
        match reply {
            OnDone::Reset(on_reply) => on_reply(observed.map(|obs| (obs, info))),
            OnDone::Step(on_reply) => {
                let result = |obs| StepResult { obs, reward, terminated, truncated, info };
                on_reply(observed.map(result));
            }
            OnDone::Action(_) => unreachable!("an action gets no reply"),
        }
    }
}
