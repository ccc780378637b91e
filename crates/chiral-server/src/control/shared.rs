//! What the threads of the control side share: the core behind one lock, and what wakes them. The user's clock
//! is never read under the lock.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use chiral_proto::{Clock, Fault, StepResult, Timestamp, ValueMap, lock};

use super::{
    core::ControlCore,
    events::{ControlEvent, EventTap},
    rows::Dropped,
};
use crate::{log_throttle::LogThrottle, sampler::Sampler};

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
    late: LogThrottle,
    superseded: LogThrottle,
    pub(super) clock_jumps: LogThrottle,
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
            late: LogThrottle::new(clock.clone()),
            superseded: LogThrottle::new(clock.clone()),
            clock_jumps: LogThrottle::new(clock.clone()),
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
        let was_watching = core.is_watching(now);
        let outcome = change(&mut core, now);
        let dropped = self.publish(&mut core);
        let is_watching = core.is_watching(now);
        drop(core);
        if is_watching && !was_watching {
            self.wake_supervisor();
        }
        self.log_dropped(dropped);
        outcome
    }

    /// Hands the core's events to whoever subscribes, in their order, and returns how many rows were dropped.
    pub(super) fn publish(&self, core: &mut ControlCore<OnDone>) -> Dropped {
        let events = core.take_events();
        let mut dropped = Dropped::default();
        for event in &events {
            match event {
                ControlEvent::Late { rows, .. } => dropped.late += rows,
                ControlEvent::Superseded { rows, .. } => dropped.superseded += rows,
                _ => {}
            }
        }
        self.tap.publish(events);
        dropped
    }

    /// Logs that rows were dropped, once a second. Not to be called under the lock: a log may block.
    pub(super) fn log_dropped(&self, Dropped { late, superseded }: Dropped) {
        if late > 0 {
            self.late.record_many(late, |rows| tracing::warn!(rows, "rows of actions were late: dropped"));
        }
        if superseded > 0 {
            self.superseded.record_many(superseded, |rows| {
                tracing::warn!(rows, "rows of actions were overtaken by newer ones: dropped");
            });
        }
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
