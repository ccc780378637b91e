//! The task: bring the hand to the target and hold it there.
//!
//! A pure state machine that takes the hand's position and computes reward, success and the time limit. The
//! target's position is chosen in `scene`, the hand moves in `arm`. No outcome before the first movement
//! depends on the target, so that a policy can learn the target's position only from pixels.

use nalgebra::Point3;

/// The hand is at the target when it is no further than this from the target's centre, m.
pub const REACH: f64 = 0.02;
/// How long the hand must stay there, s.
pub const HOLD: f64 = 0.2;

/// The outcome of one advance of the world.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// How much closer the hand came to the target's centre, m; negative if it moved away. The rewards of an
    /// episode add up to the distance covered.
    pub reward: f64,
    /// The episode ended because the hand held the target.
    pub terminated: bool,
    /// The episode ended at its time limit.
    pub truncated: bool,
    /// Whether the target was held; with this task the same as `terminated`.
    pub success: bool,
}

/// One episode of reaching.
#[derive(Debug, Clone, PartialEq)]
pub struct Task {
    target: Point3<f64>,
    limit: f64,
    distance: f64,
    elapsed: f64,
    held: f64,
    ended: Option<Outcome>,
}

impl Task {
    /// An episode towards `target`, with the hand now at `hand` (both base frame, m), truncated after `limit`
    /// seconds of simulated time.
    pub fn new(target: Point3<f64>, hand: Point3<f64>, limit: f64) -> Self {
        Self { target, limit, distance: (target - hand).norm(), elapsed: 0.0, held: 0.0, ended: None }
    }

    /// Simulated time since the episode began, s.
    pub fn elapsed(&self) -> f64 {
        self.elapsed
    }

    /// Advances the task by `dt` seconds to the hand's position `hand` (base frame, m). An episode that has
    /// ended keeps its outcome, with no further reward.
    pub fn advance(&mut self, hand: Point3<f64>, dt: f64) -> Outcome {
        // By rounding, a sum of many small steps can be slightly below the limit.
        const ROUNDING: f64 = 1e-9;
        if let Some(outcome) = self.ended {
            return Outcome { reward: 0.0, ..outcome };
        }
        let distance = (self.target - hand).norm();
        let reward = self.distance - distance;
        self.distance = distance;
        self.elapsed += dt;
        self.held = if distance <= REACH { self.held + dt } else { 0.0 };

        let success = self.held >= HOLD - ROUNDING;
        let truncated = !success && self.elapsed >= self.limit - ROUNDING;
        let outcome = Outcome { reward, terminated: success, truncated, success };
        self.ended = (success || truncated).then_some(outcome);
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DT: f64 = 0.02;

    /// Moves the hand through `distances` from the target, one per step of `DT`, and checks at which step the
    /// episode ends and whether successfully.
    fn check(distances: impl IntoIterator<Item = f64>, limit: f64, expected: Option<(usize, bool)>) {
        let target = Point3::new(0.5, 0.1, 0.2);
        let at = |distance: f64| target + nalgebra::Vector3::new(0.0, 0.0, distance);
        let mut task = Task::new(target, at(0.5), limit);
        let (mut ended, mut covered, mut last): (Option<(usize, bool)>, _, _) = (None, 0.0, 0.5);
        for (k, distance) in distances.into_iter().enumerate() {
            let outcome = task.advance(at(distance), DT);
            assert_eq!(outcome.success, outcome.terminated);
            assert!(!(outcome.terminated && outcome.truncated));
            covered += outcome.reward;
            if let Some((_, held)) = ended {
                assert_eq!((outcome.reward, outcome.terminated, outcome.truncated), (0.0, held, !held));
            } else {
                last = distance;
                ended = (outcome.terminated || outcome.truncated).then_some((k + 1, outcome.terminated));
            }
        }
        assert_eq!(ended, expected);
        assert!((covered - (0.5 - last)).abs() < 1e-9, "rewards add up to the distance covered");
    }

    #[test]
    fn episodes_end_on_success_or_at_the_time_limit() {
        let steady = |distance: f64| std::iter::repeat_n(distance, 100);
        check(steady(0.0), 4.0, Some((10, true)));
        check(steady(0.0199), 4.0, Some((10, true)));
        check(steady(0.0201), 1.0, Some((50, false)));
        check(steady(0.3), 4.0, None);
        // Passing through is not holding, and leaving for one step restarts the hold.
        check((0..100).map(|k| if k % 9 == 8 { 0.03 } else { 0.01 }), 4.0, None);
        check((0..100).map(|k| if k == 5 { 0.03 } else { 0.01 }), 4.0, Some((16, true)));
        check((0..100).map(|k| 0.5 - 0.05 * f64::from(k.min(10))), 4.0, Some((20, true)));
    }

    #[test]
    fn no_movement_earns_no_reward() {
        let hand = Point3::new(0.3, 0.0, 0.5);
        let outcomes: Vec<_> = [Point3::new(0.5, 0.1, 0.2), Point3::new(0.7, -0.2, 0.4)]
            .map(|target| Task::new(target, hand, 4.0).advance(hand, DT))
            .into();
        assert_eq!(outcomes[0], outcomes[1]);
        assert_eq!(outcomes[0], Outcome { reward: 0.0, terminated: false, truncated: false, success: false });
    }
}
