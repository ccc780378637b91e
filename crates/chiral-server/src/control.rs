//! The control thread, which alone touches the robot, and the queue before it: std only, no sockets.
//!
//! Everything that must never reach the robot is refused here, under one lock: what is not the controller's,
//! not of this episode, not well-formed, or more than the queue may hold.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::Duration,
};

use chiral_proto::{
    ActionChunk, ActionSpec, Clock, Code, Fault, Observation, StepResult, Timestamp, ValueMap,
    action::Action, message::ActionMessage,
};
use chiral_transport::lock;

use crate::{
    error::{Error, panic_text},
    robot::{ActionContext, EpisodeEnd, Robot, StepOutcome},
    sampler::Sampler,
};

/// Rows that may wait for the robot at most. More would be old when their turn comes.
pub(crate) const MAX_HELD_ROWS: usize = 16;

/// How an answer finds its way back to whoever asked.
pub(crate) type Answer<T> = Box<dyn FnOnce(Result<T, Fault>) + Send>;

/// Called with what went wrong with an action, if anything did.
pub(crate) type Failed = Box<dyn FnOnce(Fault) + Send>;

/// The observation after a reset, and the robot's info.
pub(crate) type ResetAnswer = (Arc<Observation>, ValueMap);

/// The sessions' side of the control thread. Dropped, it ends the thread.
pub(crate) struct Control {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    spec: ActionSpec,
    observations: Arc<Sampler>,
    clock: Clock,
}

struct State {
    queue: VecDeque<Command>,
    held_rows: usize,
    controller: Option<Controller>,
    /// Resets that wait or run.
    resets: usize,
    metadata: Result<ValueMap, Fault>,
    out_of_service: Option<Fault>,
    end: EpisodeEnd,
    stopping: bool,
    counts: ControlCounts,
}

/// Who may move the robot.
#[derive(Clone)]
struct Controller {
    session: u64,
    name: String,
}

/// What became of actions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ControlCounts {
    /// Rows that the robot carried out.
    pub(crate) applied: u64,
    /// Actions that were refused on arrival, or dropped or cut short because a reset or the controller's end
    /// overtook them.
    pub(crate) refused: u64,
    /// Actions at which the robot's own code failed.
    pub(crate) failed: u64,
}

enum Command {
    Reset { session: u64, seed: Option<u64>, options: ValueMap, answer: Answer<ResetAnswer> },
    Step { chunk: ActionChunk, context: ActionContext, answer: Answer<StepResult> },
    Apply { chunk: ActionChunk, context: ActionContext, failed: Failed },
    Left,
}

impl Control {
    /// Starts the thread that owns `robot`, which calls `ended` last of all.
    pub(crate) fn start(
        robot: Box<dyn Robot>,
        spec: ActionSpec,
        observations: Arc<Sampler>,
        clock: Clock,
        ended: impl FnOnce() + Send + 'static,
    ) -> Result<Control, Error> {
        let state = State {
            queue: VecDeque::new(),
            held_rows: 0,
            controller: None,
            resets: 0,
            metadata: Ok(ValueMap::new()),
            out_of_service: None,
            end: EpisodeEnd::default(),
            stopping: false,
            counts: ControlCounts::default(),
        };
        let shared =
            Arc::new(Shared { state: Mutex::new(state), wake: Condvar::new(), spec, observations, clock });
        let mut thread = Thread { robot, shared: Arc::clone(&shared) };
        thread.ask_metadata();
        let run = move || {
            thread.run();
            ended();
        };
        let spawned = thread::Builder::new().name("chiral-control".to_owned()).spawn(run);
        spawned.map_err(|source| Error::Start { what: "the control thread", source })?;
        Ok(Control { shared })
    }

    /// Makes this session the controller, or says who is.
    pub(crate) fn claim(&self, session: u64, name: &str) -> Result<(), Fault> {
        let mut state = lock(&self.shared.state);
        if let Some(holder) = &state.controller {
            let text = format!("the robot is controlled by {:?} (session {})", holder.name, holder.session);
            return Err(Fault::new(Code::Busy, text).retryable());
        }
        state.controller = Some(Controller { session, name: name.to_owned() });
        Ok(())
    }

    /// The name of the controller, if there is one.
    pub(crate) fn controller(&self) -> Option<String> {
        lock(&self.shared.state).controller.as_ref().map(|holder| holder.name.clone())
    }

    /// The session has ended. If it was the controller, what it asked for is dropped, the robot holds, and
    /// another may claim it at once.
    pub(crate) fn release(&self, session: u64) {
        let mut state = lock(&self.shared.state);
        if state.controller.as_ref().is_some_and(|holder| holder.session == session) {
            state.controller = None;
            state.end_episode();
            let resets =
                state.queue.iter().filter(|command| matches!(command, Command::Reset { .. })).count();
            state.resets -= resets;
            // What is left of an earlier controller's end is still to be done.
            state.queue.retain(|command| matches!(command, Command::Left));
            state.queue.push_back(Command::Left);
            self.shared.wake.notify_one();
        }
    }

    pub(crate) fn metadata(&self) -> Result<ValueMap, Fault> {
        lock(&self.shared.state).metadata.clone()
    }

    /// An action was refused before it came here.
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

    /// Asks for a new episode. From now until it is answered, actions are refused.
    pub(crate) fn reset(
        &self,
        session: u64,
        seed: Option<u64>,
        options: ValueMap,
        answer: Answer<ResetAnswer>,
    ) {
        let mut state = lock(&self.shared.state);
        if let Err(fault) = state.may_command(session) {
            drop(state);
            return answer(Err(fault));
        }
        state.end_episode();
        state.resets += 1;
        state.queue.push_back(Command::Reset { session, seed, options, answer });
        self.shared.wake.notify_one();
    }

    /// Asks for a step.
    pub(crate) fn step(&self, request: StepRequest, answer: Answer<StepResult>) {
        let StepRequest { session, chosen_in, episode, chunk } = request;
        let mut state = lock(&self.shared.state);
        if let Err(fault) = self.may_act(&state, session, chosen_in, episode, &chunk) {
            drop(state);
            return answer(Err(fault));
        }
        let context = self.context(&state, session, episode, 0, 0);
        state.queue.push_back(Command::Step { chunk, context, answer });
        self.shared.wake.notify_one();
    }

    /// Takes actions in. `failed` is called if they are refused, or should the robot's own code fail at them.
    pub(crate) fn act(&self, session: u64, message: ActionMessage, failed: Failed) {
        let mut state = lock(&self.shared.state);
        let rows = message.actions.rows();
        let allowed = self
            .may_act(&state, session, message.session, message.episode, &message.actions)
            .and_then(|()| state.room_for(rows));
        if let Err(fault) = allowed {
            state.counts.refused += 1;
            drop(state);
            return failed(Fault { action_seq: message.seq, ..fault });
        }
        let context = self.context(&state, session, message.episode, message.seq, message.observation_seq);
        state.held_rows += rows;
        state.queue.push_back(Command::Apply { chunk: message.actions, context, failed });
        self.shared.wake.notify_one();
    }

    /// Ends the thread once it has done what it was asked for. Does not wait.
    pub(crate) fn stop(&self) {
        lock(&self.shared.state).stopping = true;
        self.shared.wake.notify_one();
    }

    fn may_act(
        &self,
        state: &State,
        session: u64,
        chosen_in: u64,
        episode: u64,
        chunk: &ActionChunk,
    ) -> Result<(), Fault> {
        state.may_command(session)?;
        if state.resets > 0 {
            return Err(Fault::new(
                Code::Resetting,
                "expected actions after the reset's reply, found a reset under way",
            )
            .retryable());
        }
        let current = self.shared.observations.episode();
        if (chosen_in, episode) != (session, current) {
            let text = format!(
                "expected actions of session {session}, episode {current}, found session {chosen_in}, episode {episode}"
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

/// A step as it arrived.
pub(crate) struct StepRequest {
    /// The session that asks.
    pub(crate) session: u64,
    /// The session and the episode that it says the actions were chosen in.
    pub(crate) chosen_in: u64,
    pub(crate) episode: u64,
    pub(crate) chunk: ActionChunk,
}

impl State {
    fn may_command(&self, session: u64) -> Result<(), Fault> {
        if let Some(fault) = &self.out_of_service {
            return Err(fault.clone());
        }
        match &self.controller {
            Some(holder) if holder.session == session => Ok(()),
            _ => Err(Fault::new(Code::NotController, "expected a controller, found an observer")),
        }
    }

    fn room_for(&self, rows: usize) -> Result<(), Fault> {
        if self.held_rows + rows <= MAX_HELD_ROWS {
            return Ok(());
        }
        let text = format!(
            "expected at most {MAX_HELD_ROWS} rows not applied yet, found {} and {rows} more",
            self.held_rows
        );
        Err(Fault::new(Code::QueueFull, text).retryable())
    }

    /// Drops the actions that wait, and tells the one that runs to stop.
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
        self.held_rows -= rows;
        self.counts.refused += (before - self.queue.len()) as u64;
        std::mem::take(&mut self.end).set();
    }
}

fn control_period(spec: &ActionSpec) -> Duration {
    Duration::try_from_secs_f64(1.0 / spec.control_hz).unwrap_or_default()
}

/// Fails if the episode ended while the action waited or was carried out.
fn overtaken(context: &ActionContext) -> Result<(), Fault> {
    match context.is_over() {
        true => Err(Fault::new(Code::Stale, "the episode ended before all of it was carried out")),
        false => Ok(()),
    }
}

/// The thread itself.
struct Thread {
    robot: Box<dyn Robot>,
    shared: Arc<Shared>,
}

impl Thread {
    fn run(&mut self) {
        while let Some(command) = self.next() {
            match command {
                Command::Reset { session, seed, options, answer } => {
                    self.reset(session, seed, &options, answer)
                }
                Command::Step { chunk, context, answer } => answer(self.step(&chunk, &context)),
                Command::Apply { chunk, context, failed } => self.apply(&chunk, &context, failed),
                Command::Left => self.left(),
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

    fn reset(&mut self, session: u64, seed: Option<u64>, options: &ValueMap, answer: Answer<ResetAnswer>) {
        let began = self.shared.clock.now();
        let outcome = self.guard("reset", |robot| robot.reset(seed, options).map_err(Fault::from));
        let outcome = outcome.and_then(|info| {
            self.ask_metadata();
            Ok((self.observe_since(began)?, info))
        });
        // Numbered only now: whatever was captured before the reset was done still belongs to the old
        // episode.
        let episode = self.shared.observations.begin_episode();
        lock(&self.shared.state).resets -= 1;
        answer(
            outcome
                .map(|(observation, info)| (Arc::new(Observation { session, episode, ..observation }), info)),
        );
    }

    fn step(&mut self, chunk: &ActionChunk, context: &ActionContext) -> Result<StepResult, Fault> {
        overtaken(context)?;
        let began = self.shared.clock.now();
        let StepOutcome { reward, terminated, truncated, info } =
            self.guard("step", |robot| robot.step(chunk, context).map_err(Fault::from))?;
        lock(&self.shared.state).counts.applied += chunk.rows() as u64;
        overtaken(context)?;
        let obs = Arc::new(Observation { session: context.session, ..self.observe_since(began)? });
        Ok(StepResult { obs, reward, terminated, truncated, info })
    }

    fn apply(&mut self, chunk: &ActionChunk, context: &ActionContext, failed: Failed) {
        let outcome = match chunk.rows() {
            1 => {
                let action = Action { values: chunk.values().to_vec() };
                self.guard("apply_action", |robot| robot.apply_action(&action, context).map_err(Fault::from))
            }
            _ => self.guard("apply_chunk", |robot| robot.apply_chunk(chunk, context).map_err(Fault::from)),
        };
        let mut state = lock(&self.shared.state);
        state.held_rows -= chunk.rows();
        match outcome {
            Ok(()) if context.is_over() => state.counts.refused += 1,
            Ok(()) => state.counts.applied += chunk.rows() as u64,
            Err(fault) => {
                state.counts.failed += 1;
                drop(state);
                failed(Fault { action_seq: context.seq, ..fault });
            }
        }
    }

    fn left(&mut self) {
        for (name, method) in
            [("hold", Robot::hold as fn(&mut dyn Robot)), ("on_disconnect", Robot::on_disconnect)]
        {
            let call = |robot: &mut dyn Robot| {
                method(robot);
                Ok(())
            };
            if self.guard(name, call).is_err() {
                return;
            }
        }
    }

    /// The observation of a reply: captured after the robot's method returned, or, in lock-step, while it
    /// ran.
    fn observe_since(&mut self, began: Timestamp) -> Result<Observation, Fault> {
        let lock_step = self.guard("is_lock_step", |robot| Ok(robot.is_lock_step()))?;
        let after = if lock_step { began.shifted(-1) } else { self.shared.clock.now() };
        self.shared.observations.observe_now(Some(after))
    }

    fn ask_metadata(&mut self) {
        let metadata = self.guard("metadata", |robot| Ok(robot.metadata()));
        lock(&self.shared.state).metadata = metadata;
    }

    /// Calls the robot. A panic takes it out of service, after one attempt to hold it.
    fn guard<T>(
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
