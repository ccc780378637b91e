//! A policy that finds the red ball and plans towards it, from pixels, depth, K, T and joint positions alone.
//!
//! It uses only the cameras and `joint_pos` of an observation: no reward, no `extra`, no metadata. How
//! observations are received and actions sent is in `episode`.
//!
//! Each camera that sees red measures the ball separately: its red pixels are back-projected and must lie on
//! a ball of the known size. The cameras must then agree. **If they contradict each other, or if what they
//! see is no ball, the arm does not move**: something between the sensors and the policy is wrong, and the
//! policy must not guess what.

use chiral_proto::{ActionChunk, Camera, Observation};
use nalgebra::{Matrix3, Point3, Vector3, Vector4};

use crate::arm::{Joints, MAX_VELOCITY, READY, inverse_kinematics};

/// Rows of a chunk.
pub const HORIZON: usize = 16;
/// Rows of a chunk that are executed before the next one is planned, if the robot waits for the policy.
pub const EXECUTION_HORIZON: usize = 4;

/// The ball's radius, m. Radius and colour are what the policy knows of its task.
const RADIUS: f64 = 0.025;
/// A camera that sees fewer red pixels is ignored.
const MIN_PIXELS: usize = 6;
/// How far red points may lie from the ball's surface (root mean square), m.
const MAX_ROUNDNESS: f64 = 0.002;
/// Points that lie closer than this to one plane (root mean square), m, fit two balls, one on each side of
/// it.
const MIN_FLATNESS: f64 = 0.003;
/// How far the measurements of two cameras may differ, m.
const MAX_DISAGREEMENT: f64 = 0.025;

/// One camera's measurement of the ball.
#[derive(Clone, Debug, PartialEq)]
pub struct Sighting {
    /// Name of the camera.
    pub camera: String,
    /// The ball's centre in the world, m.
    pub center: Point3<f64>,
    /// How far the points lie from the ball's surface (root mean square), m.
    pub roundness: f64,
    /// The number of red pixels.
    pub pixels: usize,
}

/// The next actions and the reason for them.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// [`HORIZON`] rows of seven joint positions, rad.
    pub chunk: ActionChunk,
    /// Where the target is, by all cameras together; `None` if none sees it or they contradict each other.
    pub target: Option<Point3<f64>>,
}

/// Plans from one observation after another.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Seconds between two rows.
    period: f64,
    /// The posture that reaches the target where it was seen last.
    goal: Option<Joints>,
    /// The direction in which the arm turns to look for the target, 1 or -1.
    sweep: f64,
}

/// What all cameras together measured.
enum Belief {
    Unseen,
    Contradiction,
    At(Point3<f64>),
}

impl Policy {
    /// A policy at the start of an episode, for a robot that executes `control_hz` rows per second.
    pub fn new(control_hz: f64) -> Policy {
        Policy { period: 1.0 / control_hz, goal: None, sweep: 1.0 }
    }

    /// Plans the next [`HORIZON`] rows. The chunk is empty if the observation has no usable `joint_pos`.
    pub fn plan(&mut self, obs: &Observation) -> Plan {
        let Some(joints) = joints(obs) else {
            return Plan { chunk: ActionChunk::from(Vec::<f32>::new()), target: None };
        };
        let sightings: Vec<Sighting> = obs.cameras.iter().filter_map(|camera| measure(camera)).collect();
        let (goal, target) = match believe(&sightings) {
            Belief::At(target) => {
                self.goal = inverse_kinematics(&target, &joints, &READY).or(self.goal);
                (self.goal.unwrap_or(joints), Some(target))
            }
            Belief::Contradiction => (joints, None),
            Belief::Unseen => (self.goal.unwrap_or_else(|| self.look_around(&joints)), None),
        };
        Plan { chunk: self.waypoints(&joints, &goal), target }
    }

    /// Turns the arm to one side and, once it is there, to the other.
    fn look_around(&mut self, joints: &Joints) -> Joints {
        const REACH: f64 = 0.9;
        if (joints[0] - self.sweep * REACH).abs() < 0.1 {
            self.sweep = -self.sweep;
        }
        let mut goal = *joints;
        goal[0] = self.sweep * REACH;
        goal
    }

    /// Rows from the current joints towards `goal`, straight in joint space, as fast as the slowest joint
    /// allows.
    fn waypoints(&self, from: &Joints, goal: &Joints) -> ActionChunk {
        // The servo brakes before each waypoint. With waypoints this many rows ahead, it comes close only to
        // the last one.
        const LEAD: usize = 3;
        const SPEED: f64 = 0.95;
        let rows = |i: usize| (goal[i] - from[i]).abs() / (MAX_VELOCITY[i] * SPEED * self.period);
        let needed = (0..7).map(rows).fold(1.0, f64::max);
        let row = |k: usize| {
            let share = ((k + LEAD) as f64 / needed).min(1.0);
            (0..7).map(move |i| (from[i] + (goal[i] - from[i]) * share) as f32)
        };
        ActionChunk::new(7, (0..HORIZON).flat_map(row).collect()).expect("whole rows of seven")
    }
}

fn joints(obs: &Observation) -> Option<Joints> {
    let values = obs.proprio("joint_pos").ok()?.values().into_owned();
    let joints = <[f32; 7]>::try_from(values).ok()?;
    joints.iter().all(|joint| joint.is_finite()).then(|| joints.map(f64::from))
}

fn believe(sightings: &[Sighting]) -> Belief {
    let pairs = || sightings.iter().flat_map(|a| sightings.iter().map(move |b| (a, b)));
    let round = sightings.iter().all(|sighting| sighting.roundness < MAX_ROUNDNESS);
    let pixels: usize = sightings.iter().map(|sighting| sighting.pixels).sum();
    if sightings.is_empty() {
        Belief::Unseen
    } else if !round || pairs().any(|(a, b)| (a.center - b.center).norm() > MAX_DISAGREEMENT) {
        Belief::Contradiction
    } else {
        // A camera that is closer sees more pixels and measures more precisely.
        let weighted = sightings.iter().map(|sighting| sighting.center.coords * sighting.pixels as f64);
        Belief::At(Point3::from(weighted.sum::<Vector3<f64>>() / pixels as f64))
    }
}

/// Measures the ball with this camera; `None` if it sees too little of it.
pub fn measure(camera: &Camera) -> Option<Sighting> {
    let points = red_points(camera)?;
    if points.len() < MIN_PIXELS {
        return None;
    }
    let eye = camera.extrinsics.fixed_view::<3, 1>(0, 3).into_owned();
    let (center, roundness) = fit_ball(&points, &eye);
    if roundness < MAX_ROUNDNESS && flatness(&points) < MIN_FLATNESS {
        return None;
    }
    Some(Sighting { camera: camera.name.to_string(), center: center.into(), roundness, pixels: points.len() })
}

/// The world points of all red pixels with a known depth.
fn red_points(camera: &Camera) -> Option<Vec<Vector3<f64>>> {
    let &[_, width, 3] = camera.image.shape() else { return None };
    let pixels = camera.image.values::<u8>().ok()?;
    let depth = camera.depth.as_ref()?.values::<f32>().ok()?;
    let rays = camera.intrinsics.try_inverse()?;
    let is_red = |rgb: &[u8]| rgb[0] > 60 && u32::from(rgb[0]) > 2 * u32::from(rgb[1].max(rgb[2]));
    let red = pixels
        .chunks_exact(3)
        .zip(&*depth)
        .enumerate()
        .filter(|(_, (rgb, z))| is_red(rgb) && z.is_finite() && **z > 0.0);
    let place = |(pixel, (_, z)): (usize, (&[u8], &f32))| {
        let local = rays * Vector3::new((pixel % width) as f64, (pixel / width) as f64, 1.0) * f64::from(*z);
        (camera.extrinsics * Vector4::new(local.x, local.y, local.z, 1.0)).xyz()
    };
    Some(red.map(place).collect())
}

/// How far the points lie from the plane that fits them best (root mean square), m.
fn flatness(points: &[Vector3<f64>]) -> f64 {
    let mean = points.iter().sum::<Vector3<f64>>() / points.len() as f64;
    let spread: Matrix3<f64> = points.iter().map(|point| (point - mean) * (point - mean).transpose()).sum();
    (spread.symmetric_eigenvalues().min().max(0.0) / points.len() as f64).sqrt()
}

/// Fits a ball of the known radius to points on its surface, seen from `eye`. Returns its centre and the
/// points' root mean square distance from its surface. Gauss-Newton on the distances; the search starts at
/// the points' mean, moved away from `eye` by two thirds of the radius.
fn fit_ball(points: &[Vector3<f64>], eye: &Vector3<f64>) -> (Vector3<f64>, f64) {
    const ROUNDS: usize = 12;
    const MAX_POINTS: usize = 500;
    let points = || points.iter().step_by(points.len().div_ceil(MAX_POINTS));
    let mean = points().sum::<Vector3<f64>>() / points().count() as f64;
    let start = mean + (mean - eye).normalize() * (RADIUS * 2.0 / 3.0);
    let mut center = start;
    for _ in 0..ROUNDS {
        let (mut normal, mut gradient) = (Matrix3::identity() * 1e-3, Vector3::zeros());
        for point in points() {
            let offset = center - point;
            let direction = offset / offset.norm().max(1e-9);
            normal += direction * direction.transpose();
            gradient += direction * (offset.norm() - RADIUS);
        }
        let Some(inverse) = normal.try_inverse() else { break };
        center -= inverse * gradient;
    }
    // With points that are no ball the search may end anywhere.
    let center = if (center - start).norm() < 2.0 * RADIUS { center } else { start };
    let squares: f64 = points().map(|point| ((center - point).norm() - RADIUS).powi(2)).sum();
    (center, (squares / points().count() as f64).sqrt())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use chiral_proto::{Proprio, Tensor, Timestamp};

    use super::*;
    use crate::arm::Links;
    use crate::camera::Mount;
    use crate::render::Instant;
    use crate::scene::Scene;

    /// The first observation of an episode, with two cameras.
    fn first_obs(scene: &Scene) -> Observation {
        const SIZE: [usize; 2] = [120, 160];
        let links = Links::at(&scene.start);
        let instant = Instant::new(scene.bodies(&links));
        let camera = |mount: Mount| {
            let pinhole = mount.camera(&links, SIZE[1], SIZE[0]);
            let (mut image, mut depth) = (vec![0; SIZE[0] * SIZE[1] * 3], vec![0.0; SIZE[0] * SIZE[1]]);
            instant.render(&pinhole, &mut image, &mut depth);
            Arc::new(Camera {
                seq: 1,
                captured_at: Timestamp(1),
                depth: Some(Tensor::from_vec(SIZE, depth).unwrap().into()),
                intrinsics: pinhole.intrinsics,
                extrinsics: pinhole.extrinsics,
                ..Camera::new(mount.name(), Tensor::from_vec([SIZE[0], SIZE[1], 3], image).unwrap())
            })
        };
        let joints = Tensor::from_vec([7], scene.start.map(|joint| joint as f32).to_vec()).unwrap();
        Observation {
            cameras: Mount::first(2).map(camera).collect(),
            proprios: vec![Arc::new(Proprio {
                name: "joint_pos".into(),
                captured_at: Timestamp(1),
                data: joints,
            })],
            ..Observation::default()
        }
    }

    fn does_not_move(plan: &Plan) -> bool {
        let first = plan.chunk.iter().next().unwrap();
        plan.chunk.iter().all(|row| row == first)
    }

    #[test]
    fn the_ball_is_located_to_within_a_millimetre() {
        for seed in 0..60 {
            let scene = Scene::sample(seed);
            let plan = Policy::new(20.0).plan(&first_obs(&scene));
            let error = (plan.target.unwrap() - scene.target).norm();
            assert!(error < 1e-3, "seed {seed}: {error} m");
            assert_eq!((plan.chunk.rows(), plan.chunk.dimension()), (HORIZON, 7));
            let last = plan.chunk.iter().last().unwrap();
            let reached = Links::at(&std::array::from_fn(|i| f64::from(last[i]))).hand_point();
            assert!(
                (reached - scene.target).norm()
                    < (Links::at(&scene.start).hand_point() - scene.target).norm()
            );
        }
    }

    #[test]
    fn rows_keep_the_joint_velocity_limits() {
        let plan = Policy::new(20.0).plan(&first_obs(&Scene::sample(1)));
        let rows: Vec<_> = plan.chunk.iter().collect();
        for pair in rows.windows(2) {
            for i in 0..7 {
                assert!(f64::from((pair[1][i] - pair[0][i]).abs()) <= MAX_VELOCITY[i] / 20.0 + 1e-6);
            }
        }
    }

    #[test]
    fn the_arm_does_not_move_if_two_cameras_contradict_each_other() {
        let scene = Scene::sample(3);
        let valid = first_obs(&scene);
        let mut policy = Policy::new(20.0);
        assert!(!does_not_move(&policy.plan(&valid)));
        for camera in 0..2 {
            let mut obs = valid.clone();
            Arc::make_mut(&mut obs.cameras[camera]).extrinsics[(0, 3)] += 0.05;
            let plan = policy.plan(&obs);
            assert!(does_not_move(&plan) && plan.target.is_none());
        }
        assert!(!does_not_move(&policy.plan(&valid)));
    }

    #[test]
    fn the_policy_moves_on_to_the_last_known_target_when_no_camera_sees_it() {
        let valid = first_obs(&Scene::sample(3));
        let blind = Observation { cameras: Vec::new(), ..valid.clone() };
        let mut policy = Policy::new(20.0);
        let seen = policy.plan(&valid);
        let from_memory = policy.plan(&blind);
        assert_eq!((from_memory.chunk, from_memory.target), (seen.chunk, None));
        assert!(
            !does_not_move(&Policy::new(20.0).plan(&blind)),
            "the policy searches for a target that it has never seen"
        );
        assert_eq!(policy.plan(&Observation::default()).chunk.rows(), 0);
    }
}
