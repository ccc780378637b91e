//! Everything that moves the robot. `core` decides, `thread` calls the robot, `replies` takes the observations
//! of replies, `supervisor` stops a robot that blocks, `events` tells whoever subscribes. [`Control`] is the
//! handle that sessions use.

mod command;
mod core;
mod events;
mod replies;
mod rows;
mod shared;
mod supervisor;
mod thread;
mod transit;
mod watchdog;

use std::{
    sync::{Arc, mpsc},
    thread::Builder,
};

use chiral_proto::{
    ActionChunk, Clock, Fault, StepResult, Timestamp, ValueMap,
    clock::PingSample,
    message::{ActionMessage, ActionsDropped},
};

pub use self::{
    command::OnTimeout,
    events::{ActionId, ControlEvent, ControlEvents, HoldReason, NextEvent},
};
use self::{
    command::{Command, Refusal},
    core::ControlCore,
    shared::{OnDone, Shared},
    thread::ControlThread,
};
pub(crate) use self::{
    command::{ControlCounts, Limits, MAX_WAITING_ROWS, Traits},
    shared::{OnFailure, OnReply, ResetReply},
};
use crate::{
    error::Error,
    robot::{ResetRequest, Robot, Stopper},
    sampler::Sampler,
};

/// The handle with which sessions use the robot. Dropping it ends the control thread.
pub(crate) struct Control {
    shared: Arc<Shared>,
}

/// A robot, and what it said of itself when the server was built.
pub(crate) struct ControlledRobot {
    pub(crate) robot: Box<dyn Robot>,
    pub(crate) traits: Traits,
    pub(crate) stopper: Option<Stopper>,
    pub(crate) metadata: ValueMap,
}

impl Control {
    /// Starts the thread that owns the robot, and its helpers. The thread calls `on_end` last.
    pub(crate) fn start(
        robot: ControlledRobot,
        limits: Limits,
        sampler: Arc<Sampler>,
        clock: Clock,
        on_end: impl FnOnce() + Send + 'static,
    ) -> Result<Control, Error> {
        let ControlledRobot { robot, traits, stopper, metadata } = robot;
        let execution = traits.execution;
        let shared = Arc::new(Shared::new(ControlCore::new(traits, limits), metadata, sampler, clock));
        // Made before the first thread: if another one cannot be started, this ends the others.
        let control = Control { shared: Arc::clone(&shared) };
        let (replies, finished) = mpsc::channel();
        let for_replies = Arc::clone(&shared);
        spawn("chiral-replies", move || replies::run(&for_replies, &finished))?;
        let for_supervisor = Arc::clone(&shared);
        spawn("chiral-stopper", move || supervisor::run(&for_supervisor, stopper.as_ref()))?;
        let mut thread = ControlThread::new(robot, execution, Arc::clone(&shared), replies);
        spawn("chiral-control", move || {
            thread.run();
            shared.wake_supervisor();
            on_end();
        })?;
        Ok(control)
    }

    // ---- Sessions -----------------------------------------------------------------------------------------

    /// Makes this session the controller. The error names the controller if there is one already.
    pub(crate) fn claim(&self, session: u64, name: &str) -> Result<(), Fault> {
        self.shared.update(|core, now| core.claim(session, name, now))
    }

    /// The name of the controller, if there is one.
    pub(crate) fn controller(&self) -> Option<String> {
        self.shared.core().controller().map(str::to_owned)
    }

    /// Records that a session has ended. If it was the controller, its commands are dropped, the robot holds,
    /// and another session may claim it at once.
    pub(crate) fn release(&self, session: u64, why: &str) {
        if self.shared.update(|core, now| core.release(session, why, now)) {
            self.wake();
        }
    }

    /// Nothing has arrived from this session's client for a while: the robot holds, if it may be moving.
    pub(crate) fn note_silence(&self, session: u64) {
        self.shared.update(|core, now| core.note_silence(session, now));
        self.wake();
    }

    /// A ping of this session's client, sent at `sent_at` on its clock and received at `received_at`.
    pub(crate) fn note_ping(&self, session: u64, sent_at: Timestamp, received_at: Timestamp) {
        self.shared.core().note_ping(session, sent_at, received_at);
    }

    /// The answer to a ping of the server's.
    pub(crate) fn note_pong(&self, session: u64, sample: PingSample) {
        let jumped_back = self.shared.core().note_pong(session, sample);
        if let Some(jumped_back) = jumped_back {
            let seconds = jumped_back.as_secs_f64();
            self.shared.clock_jumps.record(|count| {
                tracing::warn!(
                    session,
                    count,
                    "the client's clock has jumped back by {seconds:.1} s: its actions are timed anew"
                );
            });
        }
    }

    /// How many of this session's rows were dropped, if that has changed since the last call.
    pub(crate) fn take_dropped(&self, session: u64) -> Option<ActionsDropped> {
        self.shared.core().take_dropped(session)
    }

    // ---- Commands -----------------------------------------------------------------------------------------

    /// Requests a new episode. Until the reply, actions are refused.
    pub(crate) fn reset(&self, request: ResetRequest, on_reply: OnReply<ResetReply>) {
        self.admit(request.session, Command::Reset(request), OnDone::Reset(on_reply));
    }

    /// Requests a step.
    pub(crate) fn step(&self, request: StepRequest, on_reply: OnReply<StepResult>) {
        let StepRequest { session, stated_session, episode, chunk } = request;
        let command = Command::Step { session: stated_session, episode, chunk };
        self.admit(session, command, OnDone::Step(on_reply));
    }

    /// Queues actions. `on_failure` is called if they are refused, or if the robot's own code fails.
    pub(crate) fn submit_actions(&self, session: u64, message: ActionMessage, on_failure: OnFailure) {
        self.admit(session, Command::Act(message), OnDone::Action(on_failure));
    }

    /// Counts an action that was refused before it reached the control thread.
    pub(crate) fn note_refused(&self, session: u64, fault: &Fault) {
        let id = ActionId { session, ..ActionId::default() };
        self.shared.update(|core, now| core.note_refused(id, fault.clone(), now));
    }

    fn admit(&self, session: u64, command: Command, reply: OnDone) {
        match self.shared.update(|core, now| core.admit(session, command, reply, now)) {
            Ok(()) => self.shared.wake_robot(),
            Err(Refusal { fault, reply }) => reply.refuse(fault),
        }
    }

    // ---- State --------------------------------------------------------------------------------------------

    pub(crate) fn metadata(&self) -> Result<ValueMap, Fault> {
        self.shared.metadata()
    }

    pub(crate) fn counts(&self) -> ControlCounts {
        self.shared.core().counts()
    }

    /// Why the robot is out of service, if it is.
    pub(crate) fn out_of_service(&self) -> Option<Fault> {
        self.shared.core().out_of_service().cloned()
    }

    /// Subscribes to what happens from now on.
    pub(crate) fn events(&self) -> ControlEvents {
        self.shared.tap.subscribe()
    }

    /// Ends the thread once the robot holds. Does not wait.
    pub(crate) fn stop(&self) {
        self.shared.core().stop();
        self.wake();
    }

    fn wake(&self) {
        self.shared.wake_robot();
        self.shared.wake_supervisor();
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A step request.
pub(crate) struct StepRequest {
    /// The session that sent it.
    pub(crate) session: u64,
    /// The session and the episode that the actions were chosen in, as the client stated.
    pub(crate) stated_session: u64,
    pub(crate) episode: u64,
    pub(crate) chunk: ActionChunk,
}

fn spawn(name: &'static str, run: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    let spawned = Builder::new().name(name.to_owned()).spawn(run);
    spawned.map(drop).map_err(|source| Error::Start { what: "the control thread", source })
}
