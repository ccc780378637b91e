//! A core with a robot that takes time for its work, on virtual time.

use chiral_proto::{ActionChunk, ActionSpec, Code, Fault, Timestamp, message::ActionMessage};

use crate::{
    control::{
        command::{Application, Command, Limits, Traits, Work},
        core::ControlCore,
        events::HoldReason,
    },
    robot::{Execution, ResetRequest},
};

/// The session of the policy, and how far its clock is ahead of the server's.
pub(super) const SESSION: u64 = 7;
pub(super) const OFFSET_MS: f64 = -41_000.0;

pub(super) fn at(ms: f64) -> Timestamp {
    Timestamp((ms * 1e6).round() as i64)
}

pub(super) fn ms(timestamp: Timestamp) -> f64 {
    timestamp.0 as f64 / 1e6
}

pub(super) fn period(hz: f64) -> f64 {
    1000.0 / hz
}

/// What the robot did.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Did {
    /// Applied a row with this first value.
    Row(f32),
    Hold(HoldReason),
    Reset,
    Step,
    /// The reply to a reset or step was taken.
    Reply,
    Refuse(Code),
}

/// A core with a robot.
pub(super) struct Rig {
    pub(super) core: ControlCore<()>,
    pub(super) session: u64,
    pub(super) now_ms: f64,
    pub(super) did: Vec<(f64, Did)>,
    /// What a row and a reset take, and the observation after a reset or step.
    pub(super) row_ms: f64,
    pub(super) reset_ms: f64,
    pub(super) observe_ms: f64,
    pub(super) busy_until_ms: Option<f64>,
    pub(super) observed_at_ms: Option<f64>,
    pub(super) seq: u64,
}

impl Rig {
    pub(super) fn new(control_hz: f64) -> Rig {
        Rig::with(control_hz, Limits::default())
    }

    pub(super) fn with(control_hz: f64, limits: Limits) -> Rig {
        Rig::of(control_hz, limits, Execution::Rows, false)
    }

    pub(super) fn of(control_hz: f64, limits: Limits, execution: Execution, is_lock_step: bool) -> Rig {
        let spec = match control_hz > 0.0 {
            true => ActionSpec::joint_positions(1, control_hz),
            false => ActionSpec::undeclared(),
        };
        let mut core = ControlCore::new(Traits { spec, execution, is_lock_step }, limits);
        core.claim(SESSION, "policy", at(0.0)).unwrap();
        Rig {
            core,
            session: SESSION,
            now_ms: 0.0,
            did: Vec::new(),
            row_ms: 0.0,
            reset_ms: 0.0,
            observe_ms: 0.0,
            busy_until_ms: None,
            observed_at_ms: None,
            seq: 0,
        }
    }

    /// Lets the robot work until then.
    pub(super) fn run(&mut self, until_ms: f64) {
        loop {
            let next = [self.busy_until_ms, self.observed_at_ms].into_iter().flatten().reduce(f64::min);
            if let Some(next) = next.filter(|next| *next <= self.now_ms) {
                if self.busy_until_ms == Some(next) {
                    self.busy_until_ms = None;
                    self.core.done(Ok(()), at(self.now_ms));
                } else {
                    self.observed_at_ms = None;
                    self.core.observed(at(self.now_ms));
                    self.did(Did::Reply);
                }
                continue;
            }
            let mut wake_ms = next;
            if self.busy_until_ms.is_none() {
                match self.core.poll(at(self.now_ms)) {
                    Work::SleepUntil(wake) => {
                        wake_ms = Some(wake_ms.map_or(ms(wake), |next| next.min(ms(wake))));
                    }
                    Work::Idle => {}
                    work => {
                        self.begin(work);
                        continue;
                    }
                }
            }
            match wake_ms.filter(|wake| *wake <= until_ms) {
                Some(wake) => self.now_ms = wake,
                None => {
                    self.now_ms = until_ms;
                    return;
                }
            }
        }
    }

    pub(super) fn begin(&mut self, work: Work<()>) {
        let busy_ms = match work {
            Work::Hold(reason) => {
                self.did(Did::Hold(reason));
                0.0
            }
            Work::Reset { .. } => {
                self.did(Did::Reset);
                self.observed_at_ms = Some(self.now_ms + self.reset_ms + self.observe_ms);
                self.reset_ms
            }
            Work::Step { chunk, .. } => {
                self.did(Did::Step);
                return self.core.step_by_rows(chunk, (), at(self.now_ms));
            }
            Work::Apply(Application { rows, .. }) => {
                self.did(Did::Row(rows.values()[0]));
                self.row_ms
            }
            Work::Observe { .. } => {
                self.observed_at_ms = Some(self.now_ms + self.observe_ms);
                return;
            }
            Work::Refuse { fault, .. } => return self.did(Did::Refuse(fault.code)),
            Work::SleepUntil(_) | Work::Idle | Work::End => unreachable!("handled by the caller"),
        };
        self.busy_until_ms = Some(self.now_ms + busy_ms);
    }

    pub(super) fn did(&mut self, did: Did) {
        self.did.push((self.now_ms, did));
    }

    /// An action that was sent at `sent_ms`, on the server's clock, arrives now.
    pub(super) fn arrive(&mut self, rows: impl Into<ActionChunk>, sent_ms: f64) -> Result<(), Fault> {
        self.act(rows, Some(at(sent_ms + OFFSET_MS)))
    }

    /// An action of a legacy client arrives now.
    pub(super) fn arrive_unstamped(&mut self, rows: impl Into<ActionChunk>) -> Result<(), Fault> {
        self.act(rows, None)
    }

    pub(super) fn act(
        &mut self,
        rows: impl Into<ActionChunk>,
        sent_at: Option<Timestamp>,
    ) -> Result<(), Fault> {
        self.seq += 1;
        let message = ActionMessage {
            session: self.session,
            episode: self.core.episode(),
            seq: self.seq,
            actions: rows.into(),
            sent_at,
            ..ActionMessage::default()
        };
        let admitted = self.core.admit(self.session, Command::Act(message), (), at(self.now_ms));
        admitted.map_err(|refusal| refusal.fault)
    }

    pub(super) fn ping(&mut self, transit_ms: f64) {
        self.core.note_ping(SESSION, at(self.now_ms - transit_ms + OFFSET_MS), at(self.now_ms));
    }

    pub(super) fn reset(&mut self) {
        self.core
            .admit(self.session, Command::Reset(ResetRequest::new(self.session)), (), at(self.now_ms))
            .unwrap();
    }

    pub(super) fn step(&mut self, rows: usize) {
        let chunk = ActionChunk::new(1, (0..rows).map(|i| i as f32).collect()).unwrap();
        let step = Command::Step { session: SESSION, episode: self.core.episode(), chunk };
        self.core.admit(SESSION, step, (), at(self.now_ms)).unwrap();
    }

    pub(super) fn rows(&self) -> Vec<(f64, f32)> {
        let row = |(at, did): &(f64, Did)| if let Did::Row(value) = did { Some((*at, *value)) } else { None };
        self.did.iter().filter_map(row).collect()
    }

    pub(super) fn holds(&self) -> Vec<(f64, HoldReason)> {
        let hold = |(at, did): &(f64, Did)| if let Did::Hold(why) = did { Some((*at, *why)) } else { None };
        self.did.iter().filter_map(hold).collect()
    }

    /// Sends one row every period of `hz`, the i-th with value i, from `from_ms` on, through a link that
    /// delivers nothing between `stall_ms` and `delivers_ms` and takes 2 ms otherwise.
    pub(super) fn stream(
        &mut self,
        hz: f64,
        from_ms: f64,
        until_ms: f64,
        stall: (f64, f64),
        is_stamped: bool,
    ) {
        let mut i = 0;
        loop {
            let sent_ms = from_ms + f64::from(i) * period(hz);
            if sent_ms >= until_ms {
                return;
            }
            let arrives_ms = sent_ms + 2.0;
            let is_stalled = arrives_ms >= stall.0 && arrives_ms < stall.1;
            self.run(if is_stalled { stall.1 } else { arrives_ms.max(self.now_ms) });
            let arrived = match is_stamped {
                true => self.arrive([i as f32], sent_ms),
                false => self.arrive_unstamped([i as f32]),
            };
            arrived.unwrap();
            i += 1;
        }
    }
}

pub(super) const NO_STALL: (f64, f64) = (0.0, 0.0);

/// Asserts that no two rows were applied closer than half a period.
pub(super) fn assert_no_burst(rows: &[(f64, f32)], hz: f64) {
    for pair in rows.windows(2) {
        assert!(pair[1].0 - pair[0].0 >= period(hz) / 2.0 - 1e-6, "{pair:?}");
    }
}
