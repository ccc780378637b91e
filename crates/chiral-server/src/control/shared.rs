//! What the threads of the control side share: the core behind one lock, and what wakes them. The user's clock
//! is never read under the lock.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use chiral_proto::{Clock, Fault, StepResult, Timestamp, ValueMap, lock};

use super::{core::ControlCore, events::EventTap};
use crate::sampler::Sampler;

/// Called with the outcome of a request.
pub(crate) type OnReply<T> = Box<dyn FnOnce(Result<T, Fault>) + Send>;

/// Called only if an action is refused, or the robot fails at it.
pub(crate) type OnFailure = Box<dyn FnOnce(Fault) + Send>;

/// The observation after a reset, and the robot's info.
pub(crate) type ResetReply = (Arc<chiral_proto::Observation>, ValueMap);

/// The way to reply to a command.
pub(crate) enum OnDone {
    Reset(OnReply<ResetReply>),
    Step(OnReply<StepResult>),
    Action(OnFailure),
}

impl OnDone {
    /// Says that the command came to nothing.
    pub(crate) fn refuse(self, fault: Fault) {
        match self {
            OnDone::Reset(on_reply) => on_reply(Err(fault)),
            OnDone::Step(on_reply) => on_reply(Err(fault)),
            OnDone::Action(on_failure) => on_failure(fault),
        }
    }
}

/// What the threads share.
pub(crate) struct Shared {
    core: Mutex<ControlCore<OnDone>>,
    /// Notified when the robot may have something to do.
    work: Condvar,
    /// Notified when the stopper may be due earlier than before.
    stop: Condvar,
    metadata: Mutex<Result<ValueMap, Fault>>,
    pub(super) tap: EventTap,
    pub(crate) sampler: Arc<Sampler>,
    pub(crate) clock: Clock,
}

impl Shared {
    pub(super) fn new(
        core: ControlCore<OnDone>,
        metadata: ValueMap,
        sampler: Arc<Sampler>,
        clock: Clock,
    ) -> Shared {
        Shared {
            core: Mutex::new(core),
            work: Condvar::new(),
            stop: Condvar::new(),
            metadata: Mutex::new(Ok(metadata)),
            tap: EventTap::new(),
            sampler,
            clock,
        }
    }

    /// Locks the core to look at it.
    pub(super) fn core(&self) -> MutexGuard<'_, ControlCore<OnDone>> {
        lock(&self.core)
    }

    /// Changes the core, and publishes what that makes happen.
    pub(super) fn update<T>(&self, change: impl FnOnce(&mut ControlCore<OnDone>, Timestamp) -> T) -> T {
        let now = self.clock.now();
        let mut core = self.core();
        let outcome = change(&mut core, now);
        self.tap.publish(core.take_events());
        outcome
    }

    pub(super) fn wake_robot(&self) {
        self.work.notify_one();
    }

    pub(super) fn wake_supervisor(&self) {
        self.stop.notify_one();
    }

    pub(super) fn metadata(&self) -> Result<ValueMap, Fault> {
        lock(&self.metadata).clone()
    }

    pub(super) fn set_metadata(&self, metadata: Result<ValueMap, Fault>) {
        *lock(&self.metadata) = metadata;
    }

    /// Waits for [`Shared::wake_robot`], at most until `at`.
    pub(super) fn wait_for_work(
        &self,
        core: MutexGuard<'_, ControlCore<OnDone>>,
        now: Timestamp,
        at: Option<Timestamp>,
    ) {
        wait(&self.work, core, now, at);
    }

    /// Waits for [`Shared::wake_supervisor`], at most until `at`.
    pub(super) fn wait_for_stop(
        &self,
        core: MutexGuard<'_, ControlCore<OnDone>>,
        now: Timestamp,
        at: Option<Timestamp>,
    ) {
        wait(&self.stop, core, now, at);
    }
}

fn wait<T>(condvar: &Condvar, guard: MutexGuard<'_, T>, now: Timestamp, at: Option<Timestamp>) {
    match at {
        Some(at) => {
            drop(condvar.wait_timeout(guard, at.since(now)).unwrap_or_else(PoisonError::into_inner));
        }
        None => drop(condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)),
    }
}
