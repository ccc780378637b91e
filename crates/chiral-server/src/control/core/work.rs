//! What the core has done: which hold, reset, step or row is next, and what came of the last.

use std::time::Duration;

use chiral_proto::{ActionChunk, Fault, Timestamp};

use super::{ActionOrigin, ControlCore, Origin, Request, RequestKind, Rows, Running, StepByRows};
use crate::{
    control::{
        command::{Application, OnFirstFailure, OnTimeout, Work, episode_ended},
        events::{ActionId, ControlEvent, HoldReason},
        rows::{Dropped, Item, Next},
    },
    robot::ActionContext,
};

impl<R> ControlCore<R> {
    /// What the control thread does next. To be called when it has nothing to do.
    pub(crate) fn poll(&mut self, now: Timestamp) -> Work<R> {
        if let Some(reason) = self.next_hold() {
            return self.hold(reason, now);
        }
        if self.is_stopper_busy {
            // What begins now is not what it is to stop.
            return Work::Idle;
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
            return self.hold(HoldReason::CommandTimeout, now);
        }
        match [row_at, self.watchdog.due_at()].into_iter().flatten().min() {
            Some(at) => Work::SleepUntil(at),
            None => Work::Idle,
        }
    }

    /// The next hold that is due; other than for a lost controller, only if the robot does not hold already.
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
        let is_timeout = reason == HoldReason::CommandTimeout || self.watchdog.is_due(now);
        self.watchdog.disarm();
        self.is_moving = false;
        if is_timeout {
            self.is_latched = self.limits.on_timeout == OnTimeout::RequireReset;
        }
        // Only what arrives from now on is fresh.
        self.drop_rows(now);
        let waiting = self.requests.iter().filter_map(|request| match request {
            Request::Step { origin, .. } => Some(origin),
            Request::Reset { .. } => None,
        });
        for origin in waiting.chain(self.step.as_ref().map(|step| &step.origin)) {
            origin.end.set();
        }
        self.note_held(reason, now);
        self.start(Running::Hold);
        Work::Hold(reason)
    }

    pub(super) fn note_held(&mut self, reason: HoldReason, now: Timestamp) {
        self.counts.holds += 1;
        self.events.push(ControlEvent::Held { at: now, reason });
    }

    /// Goes on with a step whose rows are applied one by one.
    fn poll_step(&mut self, now: Timestamp) -> Option<Work<R>> {
        let step = self.step.as_mut()?;
        if step.origin.end.is_set() && step.fault.is_none() {
            step.fault = Some(episode_ended());
        }
        if let Some(fault) = self.out_of_service.clone().or_else(|| step.fault.clone()) {
            let refused = self.step.take().map(|StepByRows { reply, .. }| Work::Refuse { reply, fault });
            self.rearm(now);
            return refused;
        }
        let period = self.traits.spec.control_period().unwrap_or_default();
        let at = self.rows.earliest().map_or(step.due_at, |earliest| earliest.max(step.due_at));
        let Some(row) = step.chunk.iter().nth(step.next_row) else {
            self.awaited = Some(RequestKind::Step);
            let done = |StepByRows { origin, reply, .. }| Work::Observe { session: origin.id.session, reply };
            return self.step.take().map(done);
        };
        if at > now {
            return Some(Work::SleepUntil(at));
        }
        step.next_row += 1;
        // A robot that was slower than its rate does not catch up.
        let is_on_time = now.since(step.due_at) < period / 2;
        step.due_at = if is_on_time { step.due_at } else { now } + period;
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
                self.start(Running::Step(Rows::new(origin, &chunk, now)));
                Work::Step { chunk, context, reply }
            }
        })
    }

    /// The robot has no step of its own: its rows are applied one by one.
    pub(crate) fn step_by_rows(&mut self, chunk: ActionChunk, reply: R, now: Timestamp) {
        if let Some(Running::Step(Rows { origin, .. })) = self.running.take() {
            self.step = Some(StepByRows { chunk, origin, reply, next_row: 0, due_at: now, fault: None });
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
        let is_of_action = on_failure.is_some();
        if is_of_action && self.requests.is_empty() {
            self.watchdog.arm(now, period * rows.rows() as u32);
        }
        self.is_moving = is_of_action || !self.traits.is_lock_step;
        self.rows.note_applied(now);
        self.start(Running::Apply(Rows::new(origin, &rows, now)));
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
                Ok(()) => {
                    self.is_latched = false;
                    self.awaited = Some(RequestKind::Reset);
                }
                Err(_) => {
                    self.begin_episode(now);
                    self.rearm(now);
                }
            },
            Some(Running::Step(rows)) => {
                self.rows.note_applied(now);
                self.is_moving = !self.traits.is_lock_step;
                match &outcome {
                    Ok(()) => self.awaited = Some(RequestKind::Step),
                    Err(_) => self.rearm(now),
                }
                self.note_applied(rows, outcome, now);
            }
            Some(Running::Apply(rows)) => {
                if let (Err(fault), Some(step)) = (&outcome, &mut self.step) {
                    step.fault = Some(fault.clone());
                }
                if rows.rows.rows() > 1 {
                    self.rows.note_applied(now);
                }
                self.note_applied(rows, outcome, now);
            }
        }
    }

    fn note_applied(&mut self, applied: Rows, outcome: Result<(), Fault>, now: Timestamp) {
        let Rows { origin: Origin { id, end, .. }, rows, started_at, is_replaced } = applied;
        match outcome {
            // How many of its rows were applied is not known.
            _ if is_replaced => {
                let superseded = rows.rows() as u64;
                self.note_dropped(id.session, Dropped { late: 0, superseded }, now);
            }
            Ok(()) if rows.rows() > 1 && end.is_set() => self.note_refused(id, episode_ended(), now),
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
            Some(RequestKind::Step) => self.rearm(now),
            None => {}
        }
        self.episode
    }

    /// A reset or step has ended. If the robot may be moving, the watchdog counts again.
    fn rearm(&mut self, now: Timestamp) {
        if self.is_moving && !self.is_lent() && self.controller.is_some() {
            self.watchdog.arm(now, Duration::ZERO);
        }
    }

    /// Every reset that reached the robot begins an episode, also one that failed.
    fn begin_episode(&mut self, now: Timestamp) {
        self.episode += 1;
        self.rows.begin(now);
        self.events.push(ControlEvent::EpisodeBegan { at: now, episode: self.episode });
    }
}

impl Rows {
    fn new(origin: Origin, rows: &ActionChunk, now: Timestamp) -> Rows {
        Rows { origin, rows: rows.clone(), started_at: now, is_replaced: false }
    }
}
