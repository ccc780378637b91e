//! The control thread, which alone calls the robot: it does the core's work, catches panics, and tells the core
//! what came of it.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc},
};

use chiral_proto::{ActionChunk, Code, Fault, Timestamp, action::Action, lock};

use super::{
    command::{Application, Work, episode_ended},
    events::HoldReason,
    replies::{Finished, Outcome},
    rows::Dropped,
    shared::{OnDone, Shared},
};
use crate::{
    error::panic_text,
    log_throttle::LogThrottle,
    robot::{ActionContext, Execution, ResetRequest, Robot},
};

/// What the control thread owns.
pub(super) struct ControlThread {
    robot: Box<dyn Robot>,
    execution: Execution,
    shared: Arc<Shared>,
    /// The thread that takes the observations of replies.
    replies: mpsc::Sender<Finished>,
    holds: LogThrottle,
}

impl ControlThread {
    pub(super) fn new(
        robot: Box<dyn Robot>,
        execution: Execution,
        shared: Arc<Shared>,
        replies: mpsc::Sender<Finished>,
    ) -> ControlThread {
        let holds = LogThrottle::new(shared.clock.clone());
        ControlThread { robot, execution, shared, replies, holds }
    }

    pub(super) fn run(&mut self) {
        loop {
            let (work, dropped) = self.next_work();
            match work {
                Work::Hold(reason) => self.hold(reason),
                Work::Reset { request, reply } => self.reset(&request, reply),
                Work::Step { chunk, context, reply } => self.step(chunk, &context, reply),
                Work::Apply(application) => self.apply(application),
                Work::Observe { session, reply } => {
                    self.finish_since(session, reply, Outcome::default(), self.shared.clock.now());
                }
                Work::Refuse { reply, fault } => reply.refuse(fault),
                Work::SleepUntil(_) | Work::Idle => {}
                Work::End => return,
            }
            // Last, since a log may block.
            self.shared.log_dropped(dropped);
        }
    }

    /// Returns the next work, or returns after waiting for some; also how many rows were dropped.
    fn next_work(&self) -> (Work<OnDone>, Dropped) {
        let now = self.shared.clock.now();
        let mut core = self.shared.core();
        let was_watching = core.is_watching(now);
        let work = core.poll(now);
        let dropped = self.shared.publish(&mut core);
        if core.is_watching(now) && !was_watching {
            self.shared.wake_supervisor();
        }
        match work {
            // Logged before waiting.
            _ if dropped != Dropped::default() => {}
            Work::SleepUntil(at) => self.shared.wait_for_work(core, now, Some(at)),
            Work::Idle => self.shared.wait_for_work(core, now, None),
            _ => {}
        }
        (work, dropped)
    }

    fn done(&self, outcome: Result<(), Fault>) {
        self.shared.update(|core, now| core.done(outcome, now));
    }

    fn hold(&mut self, reason: HoldReason) {
        let call = |method: fn(&mut dyn Robot)| {
            move |robot: &mut dyn Robot| {
                method(robot);
                Ok(())
            }
        };
        let held = self.call_robot("hold", call(|robot| robot.hold()));
        self.holds.record(|count| tracing::warn!(count, "the robot holds: {reason}"));
        if held.is_ok() && reason == HoldReason::ControllerLost {
            // A panic takes the robot out of service, and is logged.
            let _ = self.call_robot("on_disconnect", call(|robot| robot.on_disconnect()));
        }
        self.done(Ok(()));
    }

    fn reset(&mut self, request: &ResetRequest, reply: OnDone) {
        let started_at = self.shared.clock.now();
        let outcome = self.call_robot("reset", |robot| robot.reset(request).map_err(Fault::from));
        if outcome.is_ok() {
            let metadata = self.call_robot("metadata", |robot| Ok(robot.metadata()));
            self.shared.set_metadata(metadata);
        }
        self.done(outcome.as_ref().map(drop).map_err(Fault::clone));
        match outcome {
            Ok(outcome) => self.finish_since(request.session, reply, Outcome::from(outcome), started_at),
            Err(fault) => {
                self.shared.sampler.set_episode(self.shared.core().episode());
                reply.refuse(fault);
            }
        }
    }

    fn step(&mut self, chunk: ActionChunk, context: &ActionContext, reply: OnDone) {
        let started_at = self.shared.clock.now();
        let outcome = self.call_robot("step", |robot| robot.step(&chunk, context).map_err(Fault::from));
        match outcome {
            Ok(None) if self.execution == Execution::Rows => {
                self.shared.update(|core, now| core.step_by_rows(chunk, reply, now));
            }
            Ok(None) => {
                let applied = self.call_apply(&chunk, context);
                self.step_done(applied.map(|()| Outcome::default()), context, reply, started_at);
            }
            Ok(Some(outcome)) => self.step_done(Ok(Outcome::from(outcome)), context, reply, started_at),
            Err(fault) => self.step_done(Err(fault), context, reply, started_at),
        }
    }

    fn step_done(
        &self,
        outcome: Result<Outcome, Fault>,
        context: &ActionContext,
        reply: OnDone,
        started_at: Timestamp,
    ) {
        let is_over = context.is_over();
        let outcome = outcome.and_then(|outcome| match is_over {
            true => Err(episode_ended()),
            false => Ok(outcome),
        });
        self.done(outcome.as_ref().map(drop).map_err(Fault::clone));
        match outcome {
            Ok(outcome) => self.finish_since(context.session, reply, outcome, started_at),
            Err(fault) => reply.refuse(fault),
        }
    }

    fn apply(&mut self, application: Application<OnDone>) {
        let Application { rows, context, on_failure } = application;
        let outcome = self.call_apply(&rows, &context);
        self.done(outcome.clone());
        // What fails when it is over, since a newer chunk or a stop ended it, is no failure.
        if let (Err(fault), Some(on_failure), false) = (outcome, on_failure, context.is_over())
            && let Some(on_failure) = lock(&on_failure).take()
        {
            on_failure.refuse(Fault { action_seq: context.seq, ..fault });
        }
    }

    fn call_apply(&mut self, rows: &ActionChunk, context: &ActionContext) -> Result<(), Fault> {
        if rows.rows() > 1 {
            return self
                .call_robot("apply_chunk", |robot| robot.apply_chunk(rows, context).map_err(Fault::from));
        }
        let action = Action { values: rows.values().to_vec() };
        self.call_robot("apply_action", |robot| robot.apply_action(&action, context).map_err(Fault::from))
    }

    /// Has the observation of a reply taken that was captured after now or, in lock-step, since `started_at`.
    fn finish_since(&self, session: u64, reply: OnDone, outcome: Outcome, started_at: Timestamp) {
        let is_lock_step = self.shared.core().is_lock_step();
        let after = match is_lock_step {
            true => started_at.shifted(-1),
            false => self.shared.clock.now(),
        };
        let finished = Finished { session, reply, outcome, after };
        if let Err(mpsc::SendError(Finished { reply, .. })) = self.replies.send(finished) {
            reply.refuse(Fault::new(Code::ShuttingDown, "the server is shutting down"));
        }
    }

    /// Calls the robot. After a panic, holds it if possible and takes it out of service.
    fn call_robot<T>(
        &mut self,
        method: &'static str,
        call: impl FnOnce(&mut dyn Robot) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        if let Some(fault) = self.shared.core().out_of_service() {
            return Err(fault.clone());
        }
        let robot = &mut *self.robot;
        let panic = match catch_unwind(AssertUnwindSafe(|| call(robot))) {
            Ok(outcome) => return outcome,
            Err(panic) => panic,
        };
        let text = format!("the robot panicked in {method} and is out of service: {}", panic_text(&*panic));
        let panicked_again =
            method != "hold" && catch_unwind(AssertUnwindSafe(|| self.robot.hold())).is_err();
        tracing::error!("{text}");
        if panicked_again {
            tracing::error!("the robot panicked in hold, too");
        }
        let fault = Fault::new(Code::OutOfService, text);
        self.shared.update(|core, now| core.take_out_of_service(fault.clone(), now));
        Err(fault)
    }
}
