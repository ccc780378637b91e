//! The control core: what the robot does next, and what must never reach it. Pure: `now` is passed in, nothing
//! here waits, and `R`, the way to reply, is only kept and given back.
//!
//! Sessions [`admit`](ControlCore::admit) commands. The control thread asks [`poll`](ControlCore::poll) what
//! to do, does it, and says with [`done`](ControlCore::done) what came of it. Everything that moves the robot
//! passes `admit`: it refuses commands of a session that is not the controller's, actions of another episode,
//! during a reset, or with an invalid shape or value, and drops actions that are late.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use chiral_proto::{
    ActionChunk, ActionSpec, Code, Fault, Timestamp,
    clock::PingSample,
    message::{ActionMessage, ActionsDropped},
};

use super::{
    events::{ActionId, ControlEvent, HoldReason},
    rows::{Dropped, Item, Next, RowQueue, Timing},
    transit::Transit,
    watchdog::Watchdog,
};
use crate::robot::{ActionContext, EpisodeEnd, Execution, ResetRequest};

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
const MAX_WAITING_ROWS: usize = 256;

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

/// The action or step that rows belong to.
#[derive(Clone, Debug)]
struct Origin {
    id: ActionId,
    is_single: bool,
    received_at: Timestamp,
    end: EpisodeEnd,
}

/// Where the first failure of an action's rows is reported.
pub(crate) type OnFirstFailure<R> = Arc<Mutex<Option<R>>>;

/// The origin of an action's rows.
type ActionOrigin<R> = (Origin, OnFirstFailure<R>);

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
    /// Actions that were refused on arrival, or dropped or cut short by a reset or the end of the
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

/// The state of everything that moves the robot.
#[derive(Debug)]
pub(crate) struct ControlCore<R> {
    traits: Traits,
    limits: Limits,
    controller: Option<Controller>,
    episode: u64,
    /// Set when the episode ends, for robots that block.
    episode_end: EpisodeEnd,
    /// Resets and steps that wait, oldest first.
    requests: VecDeque<Request<R>>,
    rows: RowQueue<ActionOrigin<R>>,
    /// Numbers steps and actions in the order of their arrival.
    last_order: u64,
    running: Option<Running>,
    /// Whether the robot's stopper was called for it.
    has_stopped: bool,
    /// A step whose rows are being applied one by one.
    step: Option<StepByRows<R>>,
    /// The request whose reply waits for an observation.
    awaited: Option<RequestKind>,
    holds: VecDeque<HoldReason>,
    watchdog: Watchdog,
    /// Whether the robot may be moving: something was applied since it last held or was reset.
    is_moving: bool,
    /// Whether a reset is required after a hold.
    is_latched: bool,
    out_of_service: Option<Fault>,
    is_stopping: bool,
    counts: ControlCounts,
    events: Vec<ControlEvent>,
}

/// The session that may move the robot.
#[derive(Debug)]
struct Controller {
    session: u64,
    name: String,
    transit: Transit,
    dropped: ActionsDropped,
    /// What was reported of it.
    reported: ActionsDropped,
}

#[derive(Debug)]
enum Request<R> {
    Reset { request: ResetRequest, reply: R },
    Step { chunk: ActionChunk, origin: Origin, order: u64, reply: R },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RequestKind {
    Reset,
    Step,
}

/// What the control thread is doing.
#[derive(Debug)]
enum Running {
    Hold,
    Reset,
    /// The robot's own step.
    Step(Rows),
    Apply(Rows),
}

/// Rows that the robot is applying.
#[derive(Debug)]
struct Rows {
    origin: Origin,
    rows: ActionChunk,
    started_at: Timestamp,
}

/// A step of a robot that has no step of its own.
#[derive(Debug)]
struct StepByRows<R> {
    chunk: ActionChunk,
    origin: Origin,
    reply: R,
    next_row: usize,
    started_at: Timestamp,
    fault: Option<Fault>,
}

impl<R> ControlCore<R> {
    pub(crate) fn new(traits: Traits, limits: Limits) -> ControlCore<R> {
        let takes_chunks = traits.execution == Execution::Chunks;
        ControlCore {
            rows: RowQueue::new(traits.spec.control_period(), limits.max_action_lateness, takes_chunks),
            watchdog: Watchdog::new(limits.command_timeout),
            traits,
            limits,
            controller: None,
            episode: 0,
            episode_end: EpisodeEnd::default(),
            requests: VecDeque::new(),
            last_order: 0,
            running: None,
            has_stopped: false,
            step: None,
            awaited: None,
            holds: VecDeque::new(),
            is_moving: false,
            is_latched: false,
            out_of_service: None,
            is_stopping: false,
            counts: ControlCounts::default(),
            events: Vec::new(),
        }
    }

    // ---- Sessions -----------------------------------------------------------------------------------------

    /// Makes this session the controller. The error names the controller if there is one already.
    pub(crate) fn claim(&mut self, session: u64, name: &str, now: Timestamp) -> Result<(), Fault> {
        if let Some(controller) = &self.controller {
            let text =
                format!("the robot is controlled by {:?} (session {})", controller.name, controller.session);
            return Err(Fault::new(Code::Busy, text).retryable());
        }
        let name = name.to_owned();
        self.events.push(ControlEvent::SessionBegan { at: now, session, name: name.clone() });
        let (transit, dropped) = (Transit::default(), ActionsDropped::default());
        self.controller = Some(Controller { session, name, transit, dropped, reported: dropped });
        Ok(())
    }

    /// The name of the controller, if there is one.
    pub(crate) fn controller(&self) -> Option<&str> {
        self.controller.as_ref().map(|controller| &*controller.name)
    }

    /// Records that a session has ended. If it was the controller, its commands are dropped, the robot holds,
    /// and another session may claim it at once. Returns whether it was.
    pub(crate) fn release(&mut self, session: u64, why: &str, now: Timestamp) -> bool {
        if self.controller.take_if(|controller| controller.session == session).is_none() {
            return false;
        }
        self.end_episode();
        self.requests.clear();
        self.watchdog.disarm();
        self.holds.push_back(HoldReason::ControllerLost);
        self.events.push(ControlEvent::SessionEnded { at: now, session, why: why.to_owned() });
        true
    }

    /// Nothing arrives from the controller's host any more.
    pub(crate) fn note_silence(&mut self, session: u64, now: Timestamp) {
        if self.controlled_by(session).is_none() {
            return;
        }
        self.events.push(ControlEvent::Silent { at: now, session });
        if self.is_moving && !self.is_lent() {
            self.holds.push_back(HoldReason::Silence);
        }
    }

    /// A ping of the session's client, which shows how long messages are in transit.
    pub(crate) fn note_ping(&mut self, session: u64, sent_at: Timestamp, now: Timestamp) {
        if let Some(controller) = self.controlled_by(session) {
            controller.transit.add(sent_at, now);
        }
    }

    /// The answer to a ping of the server's. Returns by how much the client's clock has jumped back, if it
    /// has.
    pub(crate) fn note_pong(&mut self, session: u64, sample: PingSample) -> Option<Duration> {
        self.controlled_by(session)?.transit.add_answer(sample)
    }

    /// How many of the session's rows were dropped, if that has changed since the last call.
    pub(crate) fn take_dropped(&mut self, session: u64) -> Option<ActionsDropped> {
        let Controller { dropped, reported, .. } = self.controlled_by(session)?;
        let has_changed = (dropped.late, dropped.superseded) != (reported.late, reported.superseded);
        *reported = *dropped;
        has_changed.then_some(*dropped)
    }

    /// Whether a reset or step has the robot, or is about to.
    fn is_lent(&self) -> bool {
        let is_running = matches!(self.running, Some(Running::Reset | Running::Step(_)));
        is_running || self.step.is_some() || self.awaited.is_some() || !self.requests.is_empty()
    }

    fn controlled_by(&mut self, session: u64) -> Option<&mut Controller> {
        self.controller.as_mut().filter(|controller| controller.session == session)
    }

    // ---- Commands -----------------------------------------------------------------------------------------

    /// Takes a command of this session's, or refuses it. An action that is late is taken and dropped.
    pub(crate) fn admit(
        &mut self,
        session: u64,
        command: Command,
        reply: R,
        now: Timestamp,
    ) -> Result<(), Refusal<R>> {
        match command {
            Command::Reset(request) => match self.check_controller(session) {
                Ok(()) => {
                    self.admit_reset(request, reply, now);
                    Ok(())
                }
                Err(fault) => Err(Refusal { fault, reply }),
            },
            Command::Step { session: stated, episode, chunk } => {
                let id = ActionId { session, episode, ..ActionId::default() };
                if let Err(fault) = self.check_actions(session, stated, episode, &chunk) {
                    self.events.push(ControlEvent::Refused { at: now, action: id, fault: fault.clone() });
                    return Err(Refusal { fault, reply });
                }
                self.watchdog.disarm();
                let origin = self.origin(id, &chunk, now);
                let order = self.next_order();
                self.requests.push_back(Request::Step { chunk, origin, order, reply });
                Ok(())
            }
            Command::Act(message) => {
                let id = ActionId {
                    session,
                    episode: message.episode,
                    seq: message.seq,
                    observation_seq: message.observation_seq,
                    observed_at: message.observed_at,
                };
                match self.admit_actions(id, message, now) {
                    Ok(None) => Ok(()),
                    Ok(Some((rows, timing))) => {
                        self.queue(id, rows, timing, reply);
                        Ok(())
                    }
                    Err(fault) => {
                        self.note_refused(id, fault.clone(), now);
                        Err(Refusal { fault: Fault { action_seq: id.seq, ..fault }, reply })
                    }
                }
            }
        }
    }

    /// Counts an action that was refused before it came here.
    pub(crate) fn note_refused(&mut self, action: ActionId, fault: Fault, now: Timestamp) {
        self.counts.refused += 1;
        self.events.push(ControlEvent::Refused { at: now, action, fault });
    }

    fn admit_reset(&mut self, request: ResetRequest, reply: R, now: Timestamp) {
        self.end_episode();
        self.watchdog.disarm();
        self.is_latched = false;
        let ResetRequest { session, .. } = request;
        self.events.push(ControlEvent::ResetBegan { at: now, session, episode: self.episode });
        self.requests.push_back(Request::Reset { request, reply });
    }

    /// Checks actions. Returns them with their timing, or `None` if they are late.
    fn admit_actions(
        &mut self,
        id: ActionId,
        message: ActionMessage,
        now: Timestamp,
    ) -> Result<Option<(ActionChunk, Timing)>, Fault> {
        let ActionMessage { session, episode, actions, sent_at, valid_for, observed_at, .. } = message;
        // Also what is refused shows how long messages are in transit.
        let transit = self.controlled_by(id.session).map(|controller| &mut controller.transit);
        let lateness = transit.zip(sent_at).map(|(transit, sent_at)| transit.add(sent_at, now));
        self.check_actions(id.session, session, episode, &actions)?;
        self.check_observation_age(observed_at, now)?;
        let limits = [self.limits.max_action_lateness, valid_for];
        let max_lateness = limits.into_iter().flatten().min();
        let rows = actions.rows();
        if lateness.zip(max_lateness).is_some_and(|(lateness, limit)| lateness > limit) {
            self.note_dropped(id.session, Dropped { late: rows as u64, superseded: 0 }, now);
            return Ok(None);
        }
        let timing = Timing { sent_at, arrived_at: now, max_lateness };
        if !self.rows.replaces(&actions, timing) && self.rows.len() + rows > MAX_WAITING_ROWS {
            let text = format!(
                "expected at most {MAX_WAITING_ROWS} rows not applied yet, found {} and {rows} more: \
                 actions arrive faster than the robot applies them",
                self.rows.len()
            );
            return Err(Fault::new(Code::QueueFull, text).retryable());
        }
        self.events.push(ControlEvent::Admitted { at: now, action: id, rows, lateness });
        Ok(Some((actions, timing)))
    }

    fn queue(&mut self, id: ActionId, rows: ActionChunk, timing: Timing, reply: R) {
        if rows.rows() > 1
            && self.traits.execution == Execution::Chunks
            && let Some(Running::Apply(Rows { origin, .. })) = &self.running
        {
            // The chunk that the robot executes is replaced, too.
            origin.end.set();
        }
        let origin = self.origin(id, &rows, timing.arrived_at);
        let (count, order) = (rows.rows() as u64, self.next_order());
        let superseded = self.rows.push(rows, timing, order, (origin, Arc::new(Mutex::new(Some(reply)))));
        if let Some(controller) = self.controlled_by(id.session) {
            controller.dropped.accepted += count;
        }
        self.note_dropped(id.session, Dropped { late: 0, superseded }, timing.arrived_at);
    }

    fn origin(&self, id: ActionId, rows: &ActionChunk, now: Timestamp) -> Origin {
        Origin { id, is_single: rows.is_single(), received_at: now, end: self.episode_end.of_action() }
    }

    fn next_order(&mut self) -> u64 {
        self.last_order += 1;
        self.last_order
    }

    fn check_controller(&self, session: u64) -> Result<(), Fault> {
        if let Some(fault) = &self.out_of_service {
            return Err(fault.clone());
        }
        match &self.controller {
            Some(controller) if controller.session == session => Ok(()),
            _ => Err(Fault::new(Code::NotController, "expected a controller, found an observer")),
        }
    }

    fn check_actions(
        &self,
        session: u64,
        stated_session: u64,
        episode: u64,
        chunk: &ActionChunk,
    ) -> Result<(), Fault> {
        self.check_controller(session)?;
        if self.is_resetting() {
            let text = "expected actions after the reset's reply, found a reset in progress";
            return Err(Fault::new(Code::Resetting, text).retryable());
        }
        if self.is_latched {
            let text = "expected a reset, since the robot holds after no action came for the command timeout; \
                        found actions";
            return Err(Fault::new(Code::Holding, text));
        }
        if (stated_session, episode) != (session, self.episode) {
            let text = format!(
                "expected actions of session {session}, episode {}, \
                 found session {stated_session}, episode {episode}",
                self.episode
            );
            return Err(Fault::new(Code::Stale, text));
        }
        self.traits.spec.check(chunk).map_err(Fault::from)
    }

    fn check_observation_age(&self, observed_at: Option<Timestamp>, now: Timestamp) -> Result<(), Fault> {
        let age = observed_at.map(|observed_at| now.since(observed_at));
        match age.zip(self.limits.max_observation_age) {
            Some((age, limit)) if age > limit => {
                let text = format!(
                    "expected actions chosen from an observation of the last {} ms, found one {} ms old",
                    limit.as_millis(),
                    age.as_millis()
                );
                Err(Fault::new(Code::Stale, text))
            }
            _ => Ok(()),
        }
    }

    fn is_resetting(&self) -> bool {
        self.awaited == Some(RequestKind::Reset)
            || matches!(self.running, Some(Running::Reset))
            || self.requests.iter().any(|request| matches!(request, Request::Reset { .. }))
    }

    /// Drops the rows that wait, and marks the episode of the running ones as over.
    fn end_episode(&mut self) {
        self.counts.refused += self.rows.restart();
        std::mem::take(&mut self.episode_end).set();
    }

    fn note_dropped(&mut self, session: u64, dropped: Dropped, now: Timestamp) {
        let Dropped { late, superseded } = dropped;
        self.counts.late += late;
        self.counts.superseded += superseded;
        if let Some(controller) = self.controlled_by(session) {
            controller.dropped.late += late;
            controller.dropped.superseded += superseded;
        }
        if late > 0 {
            self.events.push(ControlEvent::Late { at: now, session, rows: late });
        }
        if superseded > 0 {
            self.events.push(ControlEvent::Superseded { at: now, session, rows: superseded });
        }
    }

    // ---- Work ---------------------------------------------------------------------------------------------

    /// What the control thread does next. To be called when it has nothing to do.
    pub(crate) fn poll(&mut self, now: Timestamp) -> Work<R> {
        if let Some(reason) = self.next_hold() {
            return self.hold(reason, now);
        }
        if let Some(work) = self.poll_step(now) {
            return work;
        }
        self.prune_rows(now);
        if let Some(work) = self.poll_requests(now) {
            return work;
        }
        if self.is_stopping {
            return Work::End;
        }
        let row_at = match self.poll_rows(now) {
            Next::Apply(Item { rows, origin: (origin, reply), .. }) => {
                return self.apply(rows, origin, Some(reply), now);
            }
            Next::WaitUntil(at) => Some(at),
            Next::Empty => None,
        };
        if self.watchdog.is_due(now) {
            self.is_latched = self.limits.on_timeout == OnTimeout::RequireReset;
            return self.hold(HoldReason::CommandTimeout, now);
        }
        match [row_at, self.watchdog.due_at()].into_iter().flatten().min() {
            Some(at) => Work::SleepUntil(at),
            None => Work::Idle,
        }
    }

    /// The next hold that somebody asked for. Holds because of silence are dropped if the robot holds already.
    fn next_hold(&mut self) -> Option<HoldReason> {
        loop {
            match self.holds.pop_front()? {
                _ if self.out_of_service.is_some() => {}
                HoldReason::ControllerLost => return Some(HoldReason::ControllerLost),
                reason if self.is_moving => return Some(reason),
                _ => {}
            }
        }
    }

    fn hold(&mut self, reason: HoldReason, now: Timestamp) -> Work<R> {
        self.watchdog.disarm();
        self.is_moving = false;
        // Only what arrives from now on is fresh.
        self.counts.refused += self.rows.clear();
        self.counts.holds += 1;
        self.events.push(ControlEvent::Held { at: now, reason });
        self.start(Running::Hold);
        Work::Hold(reason)
    }

    /// Goes on with a step whose rows are applied one by one.
    fn poll_step(&mut self, now: Timestamp) -> Option<Work<R>> {
        let step = self.step.as_mut()?;
        if step.origin.end.is_set() && step.fault.is_none() {
            step.fault = Some(episode_ended());
        }
        if let Some(fault) = self.out_of_service.clone().or_else(|| step.fault.clone()) {
            return self.step.take().map(|StepByRows { reply, .. }| Work::Refuse { reply, fault });
        }
        let period = self.traits.spec.control_period().unwrap_or_default();
        let due_at = step.started_at + period * step.next_row as u32;
        let at = self.rows.earliest().map_or(due_at, |earliest| earliest.max(due_at));
        let Some(row) = step.chunk.iter().nth(step.next_row) else {
            self.awaited = Some(RequestKind::Step);
            let done = |StepByRows { origin, reply, .. }| Work::Observe { session: origin.id.session, reply };
            return self.step.take().map(done);
        };
        if at > now {
            return Some(Work::SleepUntil(at));
        }
        step.next_row += 1;
        let (row, origin) = (ActionChunk::from(row), step.origin.clone());
        Some(self.apply(row, origin, None, now))
    }

    /// Takes the next reset or step, once the reply to the last one is taken and, for a step, the rows before
    /// it are applied.
    fn poll_requests(&mut self, now: Timestamp) -> Option<Work<R>> {
        if let (Some(fault), Some(_)) = (&self.out_of_service, self.requests.front()) {
            let fault = fault.clone();
            let (Request::Reset { reply, .. } | Request::Step { reply, .. }) = self.requests.pop_front()?;
            return Some(Work::Refuse { reply, fault });
        }
        if self.awaited.is_some() {
            return None;
        }
        if let Request::Step { order, .. } = self.requests.front()?
            && self.rows.first_order().is_some_and(|first| first < *order)
        {
            return None;
        }
        Some(match self.requests.pop_front()? {
            Request::Reset { request, reply } => {
                self.start(Running::Reset);
                Work::Reset { request, reply }
            }
            Request::Step { reply, origin, .. } if origin.end.is_set() => {
                Work::Refuse { reply, fault: episode_ended() }
            }
            Request::Step { chunk, origin, reply, .. } => {
                let context = self.context(&origin, now);
                self.start(Running::Step(Rows { origin, rows: chunk.clone(), started_at: now }));
                Work::Step { chunk, context, reply }
            }
        })
    }

    /// The robot has no step of its own: its rows are applied one by one.
    pub(crate) fn step_by_rows(&mut self, chunk: ActionChunk, reply: R, now: Timestamp) {
        if let Some(Running::Step(Rows { origin, .. })) = self.running.take() {
            self.step = Some(StepByRows { chunk, origin, reply, next_row: 0, started_at: now, fault: None });
        }
    }

    fn poll_rows(&mut self, now: Timestamp) -> Next<ActionOrigin<R>> {
        let step_order = self.requests.iter().find_map(|request| match request {
            Request::Step { order, .. } => Some(*order),
            Request::Reset { .. } => None,
        });
        if step_order.is_some_and(|step| self.rows.first_order().is_none_or(|first| step < first)) {
            return Next::Empty;
        }
        self.rows.next(now)
    }

    fn prune_rows(&mut self, now: Timestamp) {
        let dropped = self.rows.prune(now);
        if let Some(session) = self.controller.as_ref().map(|controller| controller.session) {
            self.note_dropped(session, dropped, now);
        }
    }

    fn apply(
        &mut self,
        rows: ActionChunk,
        origin: Origin,
        on_failure: Option<OnFirstFailure<R>>,
        now: Timestamp,
    ) -> Work<R> {
        let context = self.context(&origin, now);
        let period = self.traits.spec.control_period().unwrap_or_default();
        if !self.is_lent() {
            self.watchdog.arm(now, period * rows.rows() as u32);
        }
        self.is_moving = true;
        self.rows.note_applied(now);
        self.start(Running::Apply(Rows { origin, rows: rows.clone(), started_at: now }));
        Work::Apply(Application { rows, context, on_failure })
    }

    fn context(&self, origin: &Origin, now: Timestamp) -> ActionContext {
        let ActionId { session, episode, seq, observation_seq, observed_at } = origin.id;
        ActionContext {
            session,
            episode,
            seq,
            observation_seq,
            observed_at,
            received_at: origin.received_at,
            is_single: origin.is_single,
            control_period: self.traits.spec.control_period(),
            since_last_row: self.rows.last_applied_at().map(|last| now.since(last)),
            end: origin.end.clone(),
        }
    }

    fn start(&mut self, running: Running) {
        self.running = Some(running);
        self.has_stopped = false;
    }

    /// What came of the last work.
    pub(crate) fn done(&mut self, outcome: Result<(), Fault>, now: Timestamp) {
        match self.running.take() {
            None | Some(Running::Hold) => {}
            Some(Running::Reset) => match outcome {
                Ok(()) => self.awaited = Some(RequestKind::Reset),
                Err(_) => self.begin_episode(now),
            },
            Some(Running::Step(rows)) => {
                if outcome.is_ok() {
                    self.rows.note_applied(now);
                    self.is_moving = !self.traits.is_lock_step;
                    self.awaited = Some(RequestKind::Step);
                }
                self.note_applied(rows, outcome, now);
            }
            Some(Running::Apply(rows)) => {
                if let (Err(fault), Some(step)) = (&outcome, &mut self.step) {
                    step.fault = Some(fault.clone());
                }
                self.note_applied(rows, outcome, now);
            }
        }
    }

    fn note_applied(&mut self, applied: Rows, outcome: Result<(), Fault>, now: Timestamp) {
        let Rows { origin: Origin { id, end, .. }, rows, started_at } = applied;
        match outcome {
            Ok(()) if end.is_set() => self.note_refused(id, episode_ended(), now),
            Ok(()) => {
                self.counts.applied += rows.rows() as u64;
                self.events.push(ControlEvent::Applied {
                    at: started_at,
                    finished_at: now,
                    action: id,
                    rows: rows.rows(),
                    values: rows.values().into(),
                });
            }
            Err(fault) => {
                self.counts.failed += 1;
                self.events.push(ControlEvent::Failed { at: now, action: id, fault });
            }
        }
    }

    /// The observation of the reply to a reset or step was taken, or failed to be. Returns the episode of the
    /// reply.
    pub(crate) fn observed(&mut self, now: Timestamp) -> u64 {
        match self.awaited.take() {
            Some(RequestKind::Reset) => {
                self.is_moving = false;
                self.begin_episode(now);
            }
            Some(RequestKind::Step) if !self.traits.is_lock_step && self.controller.is_some() => {
                self.watchdog.arm(now, Duration::ZERO);
            }
            Some(RequestKind::Step) | None => {}
        }
        self.episode
    }

    /// Every reset that reached the robot begins an episode, also one that failed.
    fn begin_episode(&mut self, now: Timestamp) {
        self.episode += 1;
        self.events.push(ControlEvent::EpisodeBegan { at: now, episode: self.episode });
    }

    // ---- Stopping -----------------------------------------------------------------------------------------

    /// When the robot's stopper is to be called, since a hold is due and one of its methods blocks.
    pub(crate) fn stop_due(&self, now: Timestamp) -> StopDue {
        let is_busy = matches!(self.running, Some(Running::Step(_) | Running::Apply(_)));
        let is_lost = self.holds.contains(&HoldReason::ControllerLost);
        let is_hold_due = !self.holds.is_empty() || self.watchdog.is_due(now);
        match (&self.running, self.watchdog.due_at()) {
            (None, _) if self.is_stopping => StopDue::End,
            (Some(Running::Reset), _) if is_lost && !self.has_stopped => StopDue::Now,
            _ if is_busy && is_hold_due && !self.has_stopped => StopDue::Now,
            // Also while nothing runs, so that this need not be asked again with every row.
            (_, Some(due_at)) if due_at > now => StopDue::At(due_at),
            _ => StopDue::Never,
        }
    }

    /// Whether the watchdog is armed.
    pub(crate) fn is_armed(&self) -> bool {
        self.watchdog.due_at().is_some()
    }

    /// The stopper is being called. It is called once for each call of a method.
    pub(crate) fn note_stopped(&mut self) {
        self.has_stopped = true;
        if let Some(Running::Apply(rows) | Running::Step(rows)) = &self.running {
            rows.origin.end.set();
        }
    }

    /// The robot's code has panicked: nothing reaches it any more.
    pub(crate) fn take_out_of_service(&mut self, fault: Fault) {
        self.counts.refused += self.rows.clear();
        self.watchdog.disarm();
        self.out_of_service = Some(fault);
    }

    /// Why the robot is out of service, if it is.
    pub(crate) fn out_of_service(&self) -> Option<&Fault> {
        self.out_of_service.as_ref()
    }

    /// Lets the thread end once the robot holds.
    pub(crate) fn stop(&mut self) {
        self.is_stopping = true;
    }

    pub(crate) fn episode(&self) -> u64 {
        self.episode
    }

    pub(crate) fn is_lock_step(&self) -> bool {
        self.traits.is_lock_step
    }

    pub(crate) fn counts(&self) -> ControlCounts {
        self.counts
    }

    /// What has happened since the last call.
    pub(crate) fn take_events(&mut self) -> Vec<ControlEvent> {
        std::mem::take(&mut self.events)
    }
}

fn episode_ended() -> Fault {
    Fault::new(Code::Stale, "the episode ended before all rows were applied")
}

#[cfg(test)]
mod tests;
