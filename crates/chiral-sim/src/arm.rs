//! The Franka Panda's arm: joint limits, forward and inverse kinematics, and [`Arm`], the rate-limited joint
//! servo.
//!
//! What the arm looks like is in `scene`, what it has to do in `task` and `policy`. There is no clock here:
//! time is passed in as `dt`.
//!
//! The world frame is the robot's base: x forward, y left, z up, metres. Angles are radians, and arrays count
//! joints from 0. The numbers are those published by Franka Emika (Franka Control Interface documentation,
//! "Robot and interface specifications").

use nalgebra::{Isometry3, Matrix3, Point3, SMatrix, SVector, Translation3, UnitQuaternion, Vector3};

/// One value for each of the seven joints, base to hand: positions in rad or velocities in rad/s.
pub type Joints = [f64; 7];

/// The lowest position of each joint, rad.
pub const LOWER: Joints = [-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973];
/// The highest position of each joint, rad.
pub const UPPER: Joints = [2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973];
/// The highest speed of each joint, rad/s.
pub const MAX_VELOCITY: Joints = [2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61];
/// The highest acceleration of each joint, rad/s².
pub const MAX_ACCELERATION: Joints = [15.0, 7.5, 10.0, 12.5, 15.0, 20.0, 20.0];

/// Franka's "ready" posture: the hand points straight down in front of the base. Inverse kinematics prefers
/// postures close to it.
pub const READY: Joints = {
    use std::f64::consts::{FRAC_PI_2, FRAC_PI_4};
    [0.0, -FRAC_PI_4, 0.0, -3.0 * FRAC_PI_4, 0.0, FRAC_PI_2, FRAC_PI_4]
};

/// From the flange to the point between the fingertips along the flange's z axis, m (Franka Hand's `F_T_EE`).
pub const TOOL_LENGTH: f64 = 0.1034;

/// Modified Denavit-Hartenberg rows `(a, d, alpha in quarter turns)` in Craig's convention, where `a` and
/// `alpha` lie before the joint: `T = RotX(alpha) TransX(a) RotZ(q) TransZ(d)` (J. J. Craig, Introduction to
/// Robotics, section 3.4).
const DH: [(f64, f64, f64); 7] = [
    (0.0, 0.333, 0.0),
    (0.0, 0.0, -1.0),
    (0.0, 0.316, 1.0),
    (0.0825, 0.0, 1.0),
    (-0.0825, 0.384, -1.0),
    (0.0, 0.0, 1.0),
    (0.088, 0.0, 1.0),
];
const FLANGE: f64 = 0.107;

/// The poses of all links in one posture. Each maps a point of the link's frame to the base frame.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Links {
    /// The frame of each of the seven links. It sits at the link's joint and turns with it, about its z axis.
    pub joints: [Isometry3<f64>; 7],
    /// The flange, to which the gripper is screwed; z points out of the arm.
    pub flange: Isometry3<f64>,
    /// The hand: z is the approach direction, the fingers open along y, the origin lies between the
    /// fingertips.
    pub hand: Isometry3<f64>,
}

impl Links {
    /// Forward kinematics of the posture `q` (rad).
    pub fn at(q: &Joints) -> Self {
        let mut pose = Isometry3::identity();
        let joints = std::array::from_fn(|i| {
            let (a, d, alpha) = DH[i];
            let before =
                UnitQuaternion::from_axis_angle(&Vector3::x_axis(), alpha * std::f64::consts::FRAC_PI_2);
            let turn = UnitQuaternion::from_axis_angle(&Vector3::z_axis(), q[i]);
            pose = pose * before * Translation3::new(a, 0.0, 0.0) * turn * Translation3::new(0.0, 0.0, d);
            pose
        });
        let flange = pose * Translation3::new(0.0, 0.0, FLANGE);
        // The Franka Hand is mounted an eighth of a turn back, so that at `READY` its fingers open along the
        // base's y axis.
        let mounting = UnitQuaternion::from_axis_angle(&Vector3::z_axis(), -std::f64::consts::FRAC_PI_4);
        Self { joints, flange, hand: flange * mounting * Translation3::new(0.0, 0.0, TOOL_LENGTH) }
    }

    /// The point between the fingertips in the base frame, m.
    pub fn hand_point(&self) -> Point3<f64> {
        self.hand.translation.vector.into()
    }

    /// The geometric Jacobian of the hand, 6 x 7: multiplied by joint velocities (rad/s) it gives the linear
    /// velocity of the hand point (rows 0 to 2, m/s) and the hand's angular velocity (rows 3 to 5, rad/s),
    /// both in the base frame.
    ///
    /// Column i is `(z_i x (p_hand - o_i), z_i)` with joint i's axis `z_i` through `o_i` (Siciliano et al.,
    /// Robotics, section 3.1).
    pub fn jacobian(&self) -> SMatrix<f64, 6, 7> {
        let hand = self.hand.translation.vector;
        let mut jacobian = SMatrix::<f64, 6, 7>::zeros();
        for (i, frame) in self.joints.iter().enumerate() {
            let axis = frame.rotation * Vector3::z();
            let linear = axis.cross(&(hand - frame.translation.vector));
            jacobian.fixed_view_mut::<3, 1>(0, i).copy_from(&linear);
            jacobian.fixed_view_mut::<3, 1>(3, i).copy_from(&axis);
        }
        jacobian
    }
}

/// Clamps every joint of `q` to its limits.
pub fn clamp_to_limits(q: &Joints) -> Joints {
    std::array::from_fn(|i| q[i].clamp(LOWER[i], UPPER[i]))
}

/// Inverse kinematics: returns a posture within the joint limits whose hand point is within 0.1 mm of `point`
/// (base frame, m), or `None` if the point is out of reach.
///
/// The search begins at `start` and uses the freedom that the point leaves to approach `rest`. If it gets
/// stuck, it begins again at `rest` and then at a few fixed postures. The same arguments always give the same
/// result.
pub fn inverse_kinematics(point: &Point3<f64>, start: &Joints, rest: &Joints) -> Option<Joints> {
    const RESTARTS: usize = 8;
    let spread = |k: usize| -> Joints {
        std::array::from_fn(|i| {
            let (middle, half) = ((UPPER[i] + LOWER[i]) / 2.0, (UPPER[i] - LOWER[i]) / 2.0);
            middle + 0.7 * half * (1.7 * k as f64 + 2.3 * i as f64).sin()
        })
    };
    [*start, *rest]
        .into_iter()
        .chain((0..RESTARTS).map(spread))
        .find_map(|seed| descend(point, clamp_to_limits(&seed), rest))
}

/// Damped least squares from one posture, with the pull towards `rest` in the null space (Y. Nakamura and H.
/// Hanafusa, 1986; A. Liegeois, 1977). A joint that is at its limit and would leave it is frozen for that
/// step, so that the others make up for it.
fn descend(point: &Point3<f64>, mut q: Joints, rest: &Joints) -> Option<Joints> {
    const ITERATIONS: usize = 120;
    const TOLERANCE: f64 = 1e-4;
    const LONGEST_STEP: f64 = 0.3;
    for _ in 0..ITERATIONS {
        let links = Links::at(&q);
        let error = point - links.hand_point();
        let jacobian = links.jacobian();
        let mut linear: SMatrix<f64, 3, 7> = jacobian.fixed_rows::<3>(0).into();
        let mut pull = SVector::<f64, 7>::from_fn(|i, _| 0.2 * (rest[i] - q[i]));
        let mut step = damped_step(&linear, &error, &pull);
        for i in 0..7 {
            let next = q[i] + step[i];
            if (q[i] <= LOWER[i] && next < LOWER[i]) || (q[i] >= UPPER[i] && next > UPPER[i]) {
                linear.column_mut(i).fill(0.0);
                pull[i] = 0.0;
            }
        }
        step = damped_step(&linear, &error, &pull);
        let largest = step.amax();
        if error.norm() < TOLERANCE / 10.0 && largest < 1e-3 {
            return Some(q);
        }
        step *= (LONGEST_STEP / largest).min(1.0);
        q = clamp_to_limits(&std::array::from_fn(|i| q[i] + step[i]));
    }
    ((point - Links::at(&q).hand_point()).norm() < TOLERANCE).then_some(q)
}

fn damped_step(linear: &SMatrix<f64, 3, 7>, error: &Vector3<f64>, pull: &SVector<f64, 7>) -> SVector<f64, 7> {
    // Far from the point the damping is strong, for calm steps near singular postures. Close to it the
    // damping fades, for fast convergence.
    let damping = 1e-6 + 0.01 * error.norm_squared().min(0.25);
    let gram = linear * linear.transpose() + Matrix3::identity() * damping;
    let inverse = gram.try_inverse().expect("a Gram matrix plus a positive diagonal is positive definite");
    linear.transpose() * inverse * (error - linear * pull) + pull
}

/// The shortest time, s, in which [`Arm`] can move from rest at `from` to rest at `to`: the trapezoidal
/// profile of the slowest joint.
pub fn travel_time(from: &Joints, to: &Joints) -> f64 {
    (0..7)
        .map(|i| {
            let (distance, v, a) = ((to[i] - from[i]).abs(), MAX_VELOCITY[i], MAX_ACCELERATION[i]);
            if distance < v * v / a { 2.0 * (distance / a).sqrt() } else { distance / v + v / a }
        })
        .fold(0.0, f64::max)
}

/// A joint-position servo. Every joint moves to its commanded position as fast as its velocity and
/// acceleration limits allow, and stops there exactly. It overshoots only if the command changed too late to
/// brake.
#[derive(Debug, Clone, PartialEq)]
pub struct Arm {
    position: Joints,
    velocity: Joints,
    target: Joints,
}

impl Arm {
    /// An arm at rest at `position` (rad), clamped to the limits.
    pub fn new(position: &Joints) -> Self {
        let position = clamp_to_limits(position);
        Self { position, velocity: [0.0; 7], target: position }
    }

    /// Joint positions, rad.
    pub fn position(&self) -> &Joints {
        &self.position
    }

    /// Joint velocities over the last `advance`, rad/s.
    pub fn velocity(&self) -> &Joints {
        &self.velocity
    }

    /// The commanded joint positions, rad.
    pub fn target(&self) -> &Joints {
        &self.target
    }

    /// The poses of the links now.
    pub fn links(&self) -> Links {
        Links::at(&self.position)
    }

    /// Commands the joints to move to `target` (rad), clamped to the limits. The numbers must be finite,
    /// which is validated on entry to the program.
    pub fn command(&mut self, target: &Joints) {
        self.target = clamp_to_limits(target);
    }

    /// Brakes every joint as fast as its acceleration limit allows.
    pub fn stop(&mut self) {
        let ahead = |i: usize| self.velocity[i] * self.velocity[i].abs() / (2.0 * MAX_ACCELERATION[i]);
        self.target = clamp_to_limits(&std::array::from_fn(|i| self.position[i] + ahead(i)));
    }

    /// Whether every joint is at rest at its commanded position.
    pub fn is_settled(&self) -> bool {
        self.position == self.target && self.velocity == [0.0; 7]
    }

    /// Advances the joints by `dt` seconds (more than 0). Many short calls follow the trapezoid more closely
    /// than one long call.
    pub fn advance(&mut self, dt: f64) {
        for i in 0..7 {
            let ahead = self.target[i] - self.position[i];
            let reach = MAX_ACCELERATION[i] * dt;
            // The rest of the way is so short that the joint can cover it and stop within one step's change
            // of velocity.
            if ahead.abs() <= reach * dt && self.velocity[i].abs() <= reach * 2.0 {
                self.position[i] = self.target[i];
                self.velocity[i] = 0.0;
                continue;
            }
            let wanted =
                braking_speed(ahead.abs(), MAX_ACCELERATION[i], dt).min(MAX_VELOCITY[i]).copysign(ahead);
            let velocity = wanted.clamp(self.velocity[i] - reach, self.velocity[i] + reach);
            self.velocity[i] = velocity;
            self.position[i] = (self.position[i] + velocity * dt).clamp(LOWER[i], UPPER[i]);
        }
    }
}

/// The highest speed that, kept for `dt`, leaves room to brake within `distance`: the root of
/// `v dt + v²/(2a) = distance`.
fn braking_speed(distance: f64, acceleration: f64, dt: f64) -> f64 {
    acceleration * ((dt * dt + 2.0 * distance / acceleration).sqrt() - dt)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Postures spread over the whole joint space, the same in every run.
    fn postures() -> impl Iterator<Item = Joints> + Clone {
        (0..200).map(|k| {
            std::array::from_fn(|i| {
                let fraction =
                    (0.5 + f64::from(k) * [0.618, 0.414, 0.732, 0.236, 0.162, 0.317, 0.873][i]).fract();
                LOWER[i] + fraction * (UPPER[i] - LOWER[i])
            })
        })
    }

    /// Points in a volume slightly larger than the one in which `scene` places targets.
    fn work_volume() -> impl Iterator<Item = Point3<f64>> {
        let axis = |low: f64, high: f64| (0..7).map(move |k| low + (high - low) * f64::from(k) / 6.0);
        axis(0.32, 0.77).flat_map(move |x| {
            axis(-0.27, 0.27).flat_map(move |y| axis(0.06, 0.44).map(move |z| Point3::new(x, y, z)))
        })
    }

    #[test]
    fn forward_kinematics_agrees_with_known_postures() {
        let check = |q: Joints, flange: [f64; 3], approach: [f64; 3]| {
            let links = Links::at(&q);
            assert!(
                (links.flange.translation.vector - Vector3::from(flange)).norm() < 1e-9,
                "{q:?}: {}",
                links.flange
            );
            assert!(
                (links.hand.rotation * Vector3::z() - Vector3::from(approach)).norm() < 1e-9,
                "{q:?}: {}",
                links.hand
            );
            let tool = links.hand.translation.vector - links.flange.translation.vector;
            assert!((tool - Vector3::from(approach) * TOOL_LENGTH).norm() < 1e-9);
        };
        let quarter = std::f64::consts::FRAC_PI_2;
        check([0.0; 7], [0.088, 0.0, 0.333 + 0.316 + 0.384 - 0.107], [0.0, 0.0, -1.0]);
        check([quarter, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.088, 0.926], [0.0, 0.0, -1.0]);
        check([0.0, quarter, 0.0, 0.0, 0.0, 0.0, 0.0], [0.7 - 0.107, 0.0, 0.333 - 0.088], [-1.0, 0.0, 0.0]);
        // An upright upper arm and a level forearm: 0.0825 forward, 0.0825 up again, then 0.384 + 0.088 along
        // x.
        check(
            [0.0, 0.0, 0.0, -quarter, 0.0, quarter, 0.0],
            [0.0825 + 0.384 + 0.088, 0.0, 0.649 + 0.0825 - 0.107],
            [0.0, 0.0, -1.0],
        );
    }

    #[test]
    fn the_fingers_open_along_y_when_ready() {
        let hand = Links::at(&READY).hand;
        assert!((hand.rotation * Vector3::z() + Vector3::z()).norm() < 1e-9);
        assert!((hand.rotation * Vector3::y()).y.abs() > 1.0 - 1e-9);
    }

    #[test]
    fn the_jacobian_is_the_derivative_of_the_hand() {
        const H: f64 = 1e-6;
        for q in postures() {
            let jacobian = Links::at(&q).jacobian();
            for i in 0..7 {
                let (mut before, mut after) = (q, q);
                before[i] -= H;
                after[i] += H;
                let (before, after) = (Links::at(&before).hand, Links::at(&after).hand);
                let linear = (after.translation.vector - before.translation.vector) / (2.0 * H);
                let angular = (after.rotation * before.rotation.inverse()).scaled_axis() / (2.0 * H);
                assert!((jacobian.fixed_view::<3, 1>(0, i) - linear).norm() < 1e-6);
                assert!((jacobian.fixed_view::<3, 1>(3, i) - angular).norm() < 1e-6);
            }
        }
    }

    #[test]
    fn inverse_kinematics_reaches_the_whole_work_volume_from_anywhere() {
        for (point, start) in work_volume().zip(postures().cycle()) {
            for start in [READY, start] {
                let q = inverse_kinematics(&point, &start, &READY)
                    .unwrap_or_else(|| panic!("{point} from {start:?}"));
                assert!((Links::at(&q).hand_point() - point).norm() < 1e-4, "{point}");
                assert_eq!(q, clamp_to_limits(&q));
            }
        }
    }

    #[test]
    fn inverse_kinematics_inverts_forward_kinematics() {
        for q in postures() {
            let point = Links::at(&q).hand_point();
            let found = inverse_kinematics(&point, &q, &q).expect("the search begins at a solution");
            assert!((Links::at(&found).hand_point() - point).norm() < 1e-4);
        }
        assert_eq!(inverse_kinematics(&Point3::new(1.5, 0.0, 0.3), &READY, &READY), None);
    }

    #[test]
    fn the_servo_keeps_its_limits_and_stops_at_its_target() {
        let check = |from: Joints, to: Joints, dt: f64| {
            let mut arm = Arm::new(&from);
            arm.command(&to);
            let (target, mut time) = (*arm.target(), 0.0);
            while !arm.is_settled() {
                let (before, rate) = (*arm.position(), *arm.velocity());
                arm.advance(dt);
                time += dt;
                for i in 0..7 {
                    assert!(arm.velocity()[i].abs() <= MAX_VELOCITY[i] + 1e-12);
                    assert!((arm.position()[i] - before[i]).abs() <= MAX_VELOCITY[i] * dt + 1e-12);
                    assert!((arm.velocity()[i] - rate[i]).abs() <= 2.0 * MAX_ACCELERATION[i] * dt + 1e-12);
                    let passed = (target[i] - arm.position()[i]) * (target[i] - before[i]) < 0.0;
                    assert!(!passed, "joint {i} overshot at {time} s");
                }
                assert!(time < 10.0, "still moving after {time} s");
            }
            let ideal = travel_time(&clamp_to_limits(&from), &target);
            assert!((time - ideal).abs() < 6.0 * dt, "took {time} s instead of {ideal} s");
        };
        for (from, to) in postures().zip(postures().skip(7)) {
            check(from, to, 0.002);
            check(from, to, 0.02);
        }
        check(READY, [9.0; 7], 0.002);
    }

    #[test]
    fn stop_brakes_at_once() {
        let mut arm = Arm::new(&READY);
        arm.command(&UPPER);
        (0..200).for_each(|_| arm.advance(0.002));
        assert!(arm.velocity()[0] > 2.0);
        let before = *arm.position();
        arm.stop();
        (0..300).for_each(|_| arm.advance(0.002));
        assert!(arm.is_settled());
        assert!(arm.position()[0] - before[0] < 0.2);
    }
}
