//! The control thread, which alone calls the robot, and its queue: std only, no sockets.
//!
//! Everything that must never reach the robot is refused here, under one lock: commands of a session that is
//! not the controller's, and actions of another episode, with an invalid shape or value, or beyond the
//! queue's capacity.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::Duration,
};

use chiral_proto::{
    ActionChunk, ActionSpec, Clock, Code, Fault, Observation, StepResult, Timestamp, ValueMap,
    action::Action, lock, message::ActionMessage,
};

use crate::{
    error::{Error, panic_text},
    robot::{ActionContext, EpisodeEnd, Robot, StepOutcome},
    sampler::Sampler,
};

/// The most rows that may be pending. More would be old by the time they are applied.
pub(crate) const MAX_PENDING_ROWS: usize = 16;

/// Called with the outcome of a request.
pub(crate) type OnReply<T> = Box<dyn FnOnce(Result<T, Fault>) + Send>;

/// Called only if actions are refused or fail.
pub(crate) type OnFailure = Box<dyn FnOnce(Fault) + Send>;

/// The observation after a reset, and the robot's info.
pub(crate) type ResetReply = (Arc<Observation>, ValueMap);

/// The handle with which sessions use the control thread. Dropping it ends the thread.
pub(crate) struct Control {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    spec: ActionSpec,
    sampler: Arc<Sampler>,
    clock: Clock,
}

struct State {
    queue: VecDeque<Command>,
    pending_rows: usize,
    controller: Option<Controller>,
    /// Resets that are pending or running.
    resets: usize,
    metadata: Result<ValueMap, Fault>,
    out_of_service: Option<Fault>,
    end: EpisodeEnd,
    stopping: bool,
    counts: ControlCounts,
}

/// The session that may move the robot.
#[derive(Clone)]
struct Controller {
    session: u64,
    name: String,
}

/// Counts of what became of actions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ControlCounts {
    /// Rows that the robot applied.
    pub(crate) applied: u64,
    /// Actions that were refused on arrival, or dropped or cut short by a reset or the end of the
    /// controller's session.
    pub(crate) refused: u64,
    /// Actions for which the robot's own code failed.
    pub(crate) failed: u64,
}

enum Command {
    Reset { session: u64, seed: Option<u64>, options: ValueMap, on_reply: OnReply<ResetReply> },
    Step { chunk: ActionChunk, context: ActionContext, on_reply: OnReply<StepResult> },
    Apply { chunk: ActionChunk, context: ActionContext, on_failure: OnFailure },
    ControllerDisconnected,
}

impl Control {
    /// Starts the thread that owns `robot`. The thread calls `on_end` last.
    pub(crate) fn start(
        robot: Box<dyn Robot>,
        spec: ActionSpec,
        sampler: Arc<Sampler>,
        clock: Clock,
        on_end: impl FnOnce() + Send + 'static,
    ) -> Result<Control, Error> {
        let state = State {
            queue: VecDeque::new(),
            pending_rows: 0,
            controller: None,
            resets: 0,
            metadata: Ok(ValueMap::new()),
            out_of_service: None,
            end: EpisodeEnd::default(),
            stopping: false,
            counts: ControlCounts::default(),
        };
        let shared =
            Arc::new(Shared { state: Mutex::new(state), wake: Condvar::new(), spec, sampler, clock });
        let mut thread = Thread { robot, shared: Arc::clone(&shared) };
        thread.refresh_metadata();
        let run = move || {
            thread.run();
            on_end();
        };
        let spawned = thread::Builder::new().name("chiral-control".to_owned()).spawn(run);
        spawned.map_err(|source| Error::Start { what: "the control thread", source })?;
        Ok(Control { shared })
    }

    /// Makes this session the controller. The error names the controller if there is one already.
    pub(crate) fn claim(&self, session: u64, name: &str) -> Result<(), Fault> {
        let mut state = lock(&self.shared.state);
        if let Some(controller) = &state.controller {
            let text =
                format!("the robot is controlled by {:?} (session {})", controller.name, controller.session);
            return Err(Fault::new(Code::Busy, text).retryable());
        }
        state.controller = Some(Controller { session, name: name.to_owned() });
        Ok(())
    }

    /// The name of the controller, if there is one.
    pub(crate) fn controller(&self) -> Option<String> {
        lock(&self.shared.state).controller.as_ref().map(|controller| controller.name.clone())
    }

    /// Records that a session has ended. If it was the controller, its commands are dropped, the robot holds,
    /// and another session may claim it at once.
    pub(crate) fn release(&self, session: u64) {
        let mut state = lock(&self.shared.state);
        if state.controller.as_ref().is_some_and(|controller| controller.session == session) {
            state.controller = None;
            state.end_episode();
            let resets =
                state.queue.iter().filter(|command| matches!(command, Command::Reset { .. })).count();
            state.resets -= resets;
            // The robot must still hold for earlier controllers that have disconnected.
            state.queue.retain(|command| matches!(command, Command::ControllerDisconnected));
            state.queue.push_back(Command::ControllerDisconnected);
            self.shared.wake.notify_one();
        }
    }

    pub(crate) fn metadata(&self) -> Result<ValueMap, Fault> {
        lock(&self.shared.state).metadata.clone()
    }

    /// Counts an action that was refused before it reached the control thread.
    pub(crate) fn count_refused(&self) {
        lock(&self.shared.state).counts.refused += 1;
    }

    pub(crate) fn counts(&self) -> ControlCounts {
        lock(&self.shared.state).counts
    }

    /// Why the robot is out of service, if it is.
    pub(crate) fn out_of_service(&self) -> Option<Fault> {
        lock(&self.shared.state).out_of_service.clone()
    }

    /// Requests a new episode. Until the reply, actions are refused.
    pub(crate) fn reset(
        &self,
        session: u64,
        seed: Option<u64>,
        options: ValueMap,
        on_reply: OnReply<ResetReply>,
    ) {
        let mut state = lock(&self.shared.state);
        if let Err(fault) = state.check_controller(session) {
            drop(state);
            return on_reply(Err(fault));
        }
        state.end_episode();
        state.resets += 1;
        state.queue.push_back(Command::Reset { session, seed, options, on_reply });
        self.shared.wake.notify_one();
    }

    /// Requests a step.
    pub(crate) fn step(&self, request: StepRequest, on_reply: OnReply<StepResult>) {
        let StepRequest { session, stated_session, episode, chunk } = request;
        let mut state = lock(&self.shared.state);
        if let Err(fault) = self.check_actions(&state, session, stated_session, episode, &chunk) {
            drop(state);
            return on_reply(Err(fault));
        }
        let context = self.context(&state, session, episode, 0, 0);
        state.queue.push_back(Command::Step { chunk, context, on_reply });
        self.shared.wake.notify_one();
    }

    /// Queues actions. `on_failure` is called if they are refused, or if the robot's own code fails.
    pub(crate) fn submit_actions(&self, session: u64, message: ActionMessage, on_failure: OnFailure) {
        let mut state = lock(&self.shared.state);
        let rows = message.actions.rows();
        let allowed = self
            .check_actions(&state, session, message.session, message.episode, &message.actions)
            .and_then(|()| state.check_capacity(rows));
        if let Err(fault) = allowed {
            state.counts.refused += 1;
            drop(state);
            return on_failure(Fault { action_seq: message.seq, ..fault });
        }
        let context = self.context(&state, session, message.episode, message.seq, message.observation_seq);
        state.pending_rows += rows;
        state.queue.push_back(Command::Apply { chunk: message.actions, context, on_failure });
        self.shared.wake.notify_one();
    }

    /// Ends the thread once its queue is empty. Does not wait.
    pub(crate) fn stop(&self) {
        lock(&self.shared.state).stopping = true;
        self.shared.wake.notify_one();
    }

    fn check_actions(
        &self,
        state: &State,
        session: u64,
        stated_session: u64,
        episode: u64,
        chunk: &ActionChunk,
    ) -> Result<(), Fault> {
        state.check_controller(session)?;
        if state.resets > 0 {
            return Err(Fault::new(
                Code::Resetting,
                "expected actions after the reset's reply, found a reset in progress",
            )
            .retryable());
        }
        let current = self.shared.sampler.episode();
        if (stated_session, episode) != (session, current) {
            let text = format!(
                "expected actions of session {session}, episode {current}, \
                 found session {stated_session}, episode {episode}"
            );
            return Err(Fault::new(Code::Stale, text));
        }
        self.shared.spec.check(chunk).map_err(Fault::from)
    }

    fn context(
        &self,
        state: &State,
        session: u64,
        episode: u64,
        seq: u64,
        observation_seq: u64,
    ) -> ActionContext {
        ActionContext {
            session,
            episode,
            seq,
            observation_seq,
            received_at: self.shared.clock.now(),
            control_period: control_period(&self.shared.spec),
            end: state.end.clone(),
        }
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

impl State {
    fn check_controller(&self, session: u64) -> Result<(), Fault> {
        if let Some(fault) = &self.out_of_service {
            return Err(fault.clone());
        }
        match &self.controller {
            Some(controller) if controller.session == session => Ok(()),
            _ => Err(Fault::new(Code::NotController, "expected a controller, found an observer")),
        }
    }

    fn check_capacity(&self, rows: usize) -> Result<(), Fault> {
        if self.pending_rows + rows <= MAX_PENDING_ROWS {
            return Ok(());
        }
        let text = format!(
            "expected at most {MAX_PENDING_ROWS} rows not applied yet, found {} and {rows} more",
            self.pending_rows
        );
        Err(Fault::new(Code::QueueFull, text).retryable())
    }

    /// Drops the pending actions, and marks the episode of the running one as over.
    fn end_episode(&mut self) {
        let before = self.queue.len();
        let mut rows = 0;
        self.queue.retain(|command| match command {
            Command::Apply { chunk, .. } => {
                rows += chunk.rows();
                false
            }
            _ => true,
        });
        self.pending_rows -= rows;
        self.counts.refused += (before - self.queue.len()) as u64;
        std::mem::take(&mut self.end).set();
    }
}

fn control_period(spec: &ActionSpec) -> Duration {
    Duration::try_from_secs_f64(1.0 / spec.control_hz).unwrap_or_default()
}

/// Fails if the episode ended while the action was pending or being applied.
fn check_episode(context: &ActionContext) -> Result<(), Fault> {
    match context.is_over() {
        true => Err(Fault::new(Code::Stale, "the episode ended before all rows were applied")),
        false => Ok(()),
    }
}

/// What the control thread owns.
struct Thread {
    robot: Box<dyn Robot>,
    shared: Arc<Shared>,
}

impl Thread {
    fn run(&mut self) {
        while let Some(command) = self.next() {
            match command {
                Command::Reset { session, seed, options, on_reply } => {
                    self.reset(session, seed, &options, on_reply)
                }
                Command::Step { chunk, context, on_reply } => on_reply(self.step(&chunk, &context)),
                Command::Apply { chunk, context, on_failure } => self.apply(&chunk, &context, on_failure),
                Command::ControllerDisconnected => self.controller_disconnected(),
            }
        }
    }

    fn next(&self) -> Option<Command> {
        let mut state = lock(&self.shared.state);
        loop {
            if let Some(command) = state.queue.pop_front() {
                return Some(command);
            }
            if state.stopping {
                return None;
            }
            state = self.shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn reset(&mut self, session: u64, seed: Option<u64>, options: &ValueMap, on_reply: OnReply<ResetReply>) {
        let started_at = self.shared.clock.now();
        let outcome = self.call_robot("reset", |robot| robot.reset(seed, options).map_err(Fault::from));
        let outcome = outcome.and_then(|info| {
            self.refresh_metadata();
            Ok((self.observe_since(started_at)?, info))
        });
        // The episode is numbered only now: what was captured before the reset was done belongs to the old
        // one.
        let episode = self.shared.sampler.begin_episode();
        lock(&self.shared.state).resets -= 1;
        on_reply(
            outcome
                .map(|(observation, info)| (Arc::new(Observation { session, episode, ..observation }), info)),
        );
    }

    fn step(&mut self, chunk: &ActionChunk, context: &ActionContext) -> Result<StepResult, Fault> {
        check_episode(context)?;
        let started_at = self.shared.clock.now();
        let StepOutcome { reward, terminated, truncated, info } =
            self.call_robot("step", |robot| robot.step(chunk, context).map_err(Fault::from))?;
        lock(&self.shared.state).counts.applied += chunk.rows() as u64;
        check_episode(context)?;
        let obs = Arc::new(Observation { session: context.session, ..self.observe_since(started_at)? });
        Ok(StepResult { obs, reward, terminated, truncated, info })
    }

    fn apply(&mut self, chunk: &ActionChunk, context: &ActionContext, on_failure: OnFailure) {
        let outcome = match chunk.rows() {
            1 => {
                let action = Action { values: chunk.values().to_vec() };
                self.call_robot("apply_action", |robot| {
                    robot.apply_action(&action, context).map_err(Fault::from)
                })
            }
            _ => {
                self.call_robot("apply_chunk", |robot| robot.apply_chunk(chunk, context).map_err(Fault::from))
            }
        };
        let mut state = lock(&self.shared.state);
        state.pending_rows -= chunk.rows();
        match outcome {
            Ok(()) if context.is_over() => state.counts.refused += 1,
            Ok(()) => state.counts.applied += chunk.rows() as u64,
            Err(fault) => {
                state.counts.failed += 1;
                drop(state);
                on_failure(Fault { action_seq: context.seq, ..fault });
            }
        }
    }

    fn controller_disconnected(&mut self) {
        for (name, method) in
            [("hold", Robot::hold as fn(&mut dyn Robot)), ("on_disconnect", Robot::on_disconnect)]
        {
            let call = |robot: &mut dyn Robot| {
                method(robot);
                Ok(())
            };
            if self.call_robot(name, call).is_err() {
                return;
            }
        }
    }

    /// Takes the observation of a reply: captured after the robot's method returned or, in lock-step, while
    /// it ran.
    fn observe_since(&mut self, started_at: Timestamp) -> Result<Observation, Fault> {
        let lock_step = self.call_robot("is_lock_step", |robot| Ok(robot.is_lock_step()))?;
        let after = if lock_step { started_at.shifted(-1) } else { self.shared.clock.now() };
        self.shared.sampler.observe_blocking(Some(after))
    }

    fn refresh_metadata(&mut self) {
        let metadata = self.call_robot("metadata", |robot| Ok(robot.metadata()));
        lock(&self.shared.state).metadata = metadata;
    }

    /// Calls the robot. After a panic, holds it if possible and takes it out of service.
    fn call_robot<T>(
        &mut self,
        method: &'static str,
        call: impl FnOnce(&mut dyn Robot) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        if let Some(fault) = lock(&self.shared.state).out_of_service.clone() {
            return Err(fault);
        }
        let robot = &mut *self.robot;
        let panic = match catch_unwind(AssertUnwindSafe(|| call(robot))) {
            Ok(outcome) => return outcome,
            Err(panic) => panic,
        };
        let text = format!("the robot panicked in {method} and is out of service: {}", panic_text(&*panic));
        tracing::error!("{text}");
        if method != "hold" && catch_unwind(AssertUnwindSafe(|| self.robot.hold())).is_err() {
            tracing::error!("the robot panicked in hold, too");
        }
        let fault = Fault::new(Code::OutOfService, text);
        let mut state = lock(&self.shared.state);
        state.out_of_service = Some(fault.clone());
        Err(fault)
    }
}
