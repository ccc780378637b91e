//! The simulated world of one episode: scene, arm and task, advanced tick by tick.
//!
//! Clocks and threads are in `robot`, the cameras in `cameras`.

use chiral_proto::{Timestamp, ValueMap, value};

use crate::arm::{Arm, Joints, Links};
use crate::scene::Scene;
use crate::shape::Primitive;
use crate::task::{Outcome, Task};

/// What advances the world's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    /// Nothing yet. An episode's time begins with its first action, so that its first observation is the same
    /// whenever it is taken.
    Ready,
    /// The wall clock.
    RealTime,
    /// Only `step`.
    LockStep,
}

/// What a camera draws: one instant of the world.
#[derive(Clone, Debug)]
pub(crate) struct View {
    pub(crate) links: Links,
    pub(crate) bodies: Vec<Primitive>,
    pub(crate) captured_at: Timestamp,
}

/// One episode.
#[derive(Clone, Debug)]
pub(crate) struct World {
    scene: Scene,
    arm: Arm,
    task: Task,
    outcome: Outcome,
    /// The sum over the episode.
    reward: f64,
    ticks: u64,
    /// Seconds per tick.
    tick: f64,
    pub(crate) pace: Pace,
}

impl World {
    /// The start of an episode in `scene` with ticks of `tick` seconds, truncated after `limit` seconds.
    pub(crate) fn new(scene: Scene, limit: f64, tick: f64) -> World {
        let arm = Arm::new(&scene.start);
        let task = Task::new(scene.target, arm.links().hand_point(), limit);
        let outcome = Outcome { reward: 0.0, terminated: false, truncated: false, success: false };
        World { scene, arm, task, outcome, reward: 0.0, ticks: 0, tick, pace: Pace::Ready }
    }

    /// Commands the arm to move to these joint positions, rad.
    pub(crate) fn command(&mut self, values: &[f32]) {
        let mut target = *self.arm.target();
        target.iter_mut().zip(values).for_each(|(joint, value)| *joint = f64::from(*value));
        self.arm.command(&target);
    }

    /// Stops the arm where it is.
    pub(crate) fn stop(&mut self) {
        self.arm.stop();
    }

    /// Advances the world by one tick; returns its outcome.
    pub(crate) fn advance(&mut self) -> Outcome {
        self.arm.advance(self.tick);
        self.ticks += 1;
        self.outcome = self.task.advance(self.arm.links().hand_point(), self.tick);
        self.reward += self.outcome.reward;
        self.outcome
    }

    /// The outcome of the last tick.
    pub(crate) fn outcome(&self) -> Outcome {
        self.outcome
    }

    /// Seconds since the episode's time began.
    pub(crate) fn seconds(&self) -> f64 {
        self.ticks as f64 * self.tick
    }

    /// The current instant for the cameras.
    pub(crate) fn view(&self, captured_at: Timestamp) -> View {
        let links = self.arm.links();
        View { bodies: self.scene.bodies(&links), links, captured_at }
    }

    /// `joint_pos` (rad) and `joint_vel` (rad/s).
    pub(crate) fn joints(&self) -> [[f32; 7]; 2] {
        let rounded = |joints: &Joints| joints.map(|joint| joint as f32);
        [rounded(self.arm.position()), rounded(self.arm.velocity())]
    }

    /// The `extra` of observations: the state of the episode, for evaluating a policy. The policy must not
    /// use it.
    pub(crate) fn extra(&self) -> ValueMap {
        value::map([
            ("success", self.outcome.success.into()),
            ("reward", self.reward.into()),
            ("terminated", self.outcome.terminated.into()),
            ("truncated", self.outcome.truncated.into()),
            ("time", self.seconds().into()),
        ])
    }
}
