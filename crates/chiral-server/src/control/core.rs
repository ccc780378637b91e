//! The control core: what the robot does next, and what must never reach it. Pure: `now` is passed in, nothing
//! here waits, and `R`, the way to reply, is only kept and given back.
//!
//! Sessions [`admit`](ControlCore::admit) commands. The control thread asks [`poll`](ControlCore::poll) what
//! to do, does it, and says with [`done`](ControlCore::done) what came of it.

mod admit;
#[cfg(test)]
mod tests;
mod work;

use std::{collections::VecDeque, time::Duration};

use chiral_proto::{ActionChunk, Code, Fault, Timestamp, clock::PingSample, message::ActionsDropped};

use super::{
    command::{ControlCounts, Limits, OnFirstFailure, StopDue, Traits, episode_ended},
    events::{ActionId, ControlEvent, HoldReason},
    rows::{Dropped, RowQueue},
    transit::Transit,
    watchdog::Watchdog,
};
use crate::robot::{EpisodeEnd, Execution, ResetRequest};

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
    /// Whether it was marked as over since a hold is due, and the robot's stopper called if there is one.
    has_stopped: bool,
    /// Whether the robot's stopper is being called.
    is_stopper_busy: bool,
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

/// The action or step that rows belong to.
#[derive(Clone, Debug)]
struct Origin {
    id: ActionId,
    is_single: bool,
    received_at: Timestamp,
    end: EpisodeEnd,
}

/// The origin of an action's rows.
type ActionOrigin<R> = (Origin, OnFirstFailure<R>);

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
    /// Whether a newer chunk replaces them.
    is_replaced: bool,
}

/// A step of a robot that has no step of its own.
#[derive(Debug)]
struct StepByRows<R> {
    chunk: ActionChunk,
    origin: Origin,
    reply: R,
    next_row: usize,
    /// When the next row is due.
    due_at: Timestamp,
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
            is_stopper_busy: false,
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
        self.rows.begin(now);
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
        self.end_episode(now);
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
        if self.is_moving && !self.is_resetting() {
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

    /// Drops the rows that wait, and marks the episode of the running ones as over.
    fn end_episode(&mut self, now: Timestamp) {
        self.drop_rows(now);
        std::mem::take(&mut self.episode_end).set();
    }

    /// Drops the rows that wait.
    fn drop_rows(&mut self, now: Timestamp) {
        for (origin, _) in self.rows.clear() {
            self.note_refused(origin.id, episode_ended(), now);
        }
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

    /// Whether the watchdog is armed and not due yet.
    pub(crate) fn is_watching(&self, now: Timestamp) -> bool {
        self.watchdog.due_at().is_some_and(|due_at| due_at > now)
    }

    /// A hold is due while the robot is busy: what it does is over, and its stopper is about to be called, if
    /// there is one. Happens once for each call of a method.
    pub(crate) fn begin_stop(&mut self, has_stopper: bool, now: Timestamp) {
        self.has_stopped = true;
        if let Some(Running::Apply(rows) | Running::Step(rows)) = &self.running {
            rows.origin.end.set();
        }
        if has_stopper {
            self.is_stopper_busy = true;
            if self.watchdog.is_due(now) && self.holds.is_empty() {
                // A robot that was stopped holds, also if a row has come meanwhile.
                self.holds.push_back(HoldReason::CommandTimeout);
            }
        }
    }

    /// The stopper has returned.
    pub(crate) fn end_stop(&mut self) {
        self.is_stopper_busy = false;
    }

    /// The robot's code has panicked and the robot was made to hold: nothing reaches it any more.
    pub(crate) fn take_out_of_service(&mut self, fault: Fault, now: Timestamp) {
        self.drop_rows(now);
        self.watchdog.disarm();
        self.is_moving = false;
        self.note_held(HoldReason::Panicked, now);
        self.out_of_service = Some(fault);
    }

    /// Why the robot is out of service, if it is.
    pub(crate) fn out_of_service(&self) -> Option<&Fault> {
        self.out_of_service.as_ref()
    }

    /// Lets the thread end once the robot holds.
    pub(crate) fn stop(&mut self) {
        self.is_stopping = true;
        self.holds.push_back(HoldReason::ShuttingDown);
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
