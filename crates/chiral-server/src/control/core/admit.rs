//! What the core takes: everything that moves the robot passes here. Commands of a session that is not the
//! controller's are refused, and actions of another episode, during a reset, or with an invalid shape or value;
//! actions that are late are dropped.

use std::sync::{Arc, Mutex};

use chiral_proto::{ActionChunk, Code, Fault, Timestamp, message::ActionMessage};

use super::{ControlCore, Origin, Request, RequestKind, Rows, Running};
use crate::{
    control::{
        command::{Command, MAX_WAITING_ROWS, Refusal},
        events::{ActionId, ControlEvent},
        rows::{Dropped, Timing},
    },
    robot::{Execution, ResetRequest},
};

impl<R> ControlCore<R> {
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
        self.end_episode(now);
        self.watchdog.disarm();
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
        let max_lateness = self.limits.max_action_lateness;
        let late_by = lateness.unwrap_or_default();
        let rows = actions.rows();
        if [max_lateness, valid_for].into_iter().flatten().any(|limit| late_by > limit) {
            self.note_dropped(id.session, Dropped { late: rows as u64, superseded: 0 }, now);
            return Ok(None);
        }
        let timing = Timing {
            sent_at,
            arrived_at: now,
            max_lateness: max_lateness.map(|limit| limit.saturating_sub(late_by)),
            valid_until: valid_for.map(|valid_for| now + valid_for.saturating_sub(late_by)),
        };
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
            && let Some(Running::Apply(Rows { origin, is_replaced, .. })) = &mut self.running
        {
            // The chunk that the robot executes is replaced, too.
            *is_replaced = true;
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

    pub(super) fn is_resetting(&self) -> bool {
        self.awaited == Some(RequestKind::Reset)
            || matches!(self.running, Some(Running::Reset))
            || self.requests.iter().any(|request| matches!(request, Request::Reset { .. }))
    }
}
