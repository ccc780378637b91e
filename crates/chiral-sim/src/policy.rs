//! A policy that knows only what came over the wire: pixels, depth, K, T and joint positions.
//!
//! Lives here: finding the red ball, saying where it is, and planning towards it. Does not live here: how
//! observations come and actions go (`episode`). Of an observation nothing is used but the cameras and
//! `joint_pos`: no reward, no `extra`, no metadata.
//!
//! Each camera that sees red measures the ball by itself: its red pixels are back-projected and must lie on a
//! ball of the known size. The cameras must then agree. **Where they contradict each other, or what they saw
//! is no ball, the arm stands still**: something between the sensors and here is wrong, and it is not for a
//! policy to guess what.

use chiral_proto::{ActionChunk, Camera, Observation};
use nalgebra::{Matrix3, Point3, Vector3, Vector4};

use crate::arm::{Joints, MAX_VELOCITY, READY, inverse_kinematics};

/// Rows of a chunk.
pub const HORIZON: usize = 16;
/// Rows of a chunk that are carried out before the next one is planned, where policy and robot are in step.
pub const EXECUTION_HORIZON: usize = 4;

/// The ball's radius, m: what the policy was told of its task, with the ball's colour.
const RADIUS: f64 = 0.025;
/// Cameras that see fewer red pixels say nothing.
const FEWEST_PIXELS: usize = 6;
/// Red points may lie this far from the ball's surface (root of mean squares), m.
const ROUNDNESS: f64 = 0.002;
/// Points that lie this close to one plane (root of mean squares), m, may be of two balls, one on each side
/// of it: too little to tell.
const FLATNESS: f64 = 0.003;
/// Two cameras may differ by this much, m.
const AGREEMENT: f64 = 0.025;

/// What one camera says of the ball.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoutedRobot {
    /// Name of the camera.
    pub camera: String,
    /// The ball's centre in the world, m.
    pub center: Point3<f64>,
    /// How far the points lie from the ball's surface (root of mean squares), m.
    pub roundness: f64,
    /// Red pixels.
    pub pixels: usize,
}

/// What is to be done, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// [`HORIZON`] rows of seven joint positions, rad.
    pub chunk: ActionChunk,
    /// Where the target is, by all cameras together; `None` where none sees it, or they contradict each
    /// other.
    pub target: Option<Point3<f64>>,
}

/// Plans, one observation after another.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Seconds between two rows.
    period: f64,
    /// Where the arm is going: to where the target was seen last, or looking for it.
    goal: Option<Joints>,
    sweep: f64,
}

/// What the cameras say together.
enum Belief {
    Unseen,
    Contradiction,
    At(Point3<f64>),
}

impl Policy {
    /// A policy at the beginning of an episode, for a robot that runs `control_hz` rows a second.
    pub fn new(control_hz: f64) -> Policy {
        Policy { period: 1.0 / control_hz, goal: None, sweep: 1.0 }
    }

    /// The next [`HORIZON`] rows. An observation without usable `joint_pos` leads nowhere: the chunk then is
    /// empty.
    pub fn plan(&mut self, obs: &Observation) -> Plan {
        let Some(joints) = joints(obs) else {
            return Plan { chunk: ActionChunk::from(Vec::<f32>::new()), target: None };
        };
        let sightings: Vec<ScoutedRobot> = obs.cameras.iter().filter_map(|camera| measure(camera)).collect();
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

    /// The arm turned to one side, and once it is there to the other.
    fn look_around(&mut self, joints: &Joints) -> Joints {
        const REACH: f64 = 0.9;
        if (joints[0] - self.sweep * REACH).abs() < 0.1 {
            self.sweep = -self.sweep;
        }
        let mut goal = *joints;
        goal[0] = self.sweep * REACH;
        goal
    }

    /// Rows from where the joints are towards `goal`, straight in joint space and as fast as the slowest
    /// joint may.
    fn waypoints(&self, from: &Joints, goal: &Joints) -> ActionChunk {
        // The servo brakes before each waypoint; these rows ahead of it, it does not come near one before the
        // last.
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

fn believe(sightings: &[ScoutedRobot]) -> Belief {
    let pairs = || sightings.iter().flat_map(|a| sightings.iter().map(move |b| (a, b)));
    let round = sightings.iter().all(|sighting| sighting.roundness < ROUNDNESS);
    let pixels: usize = sightings.iter().map(|sighting| sighting.pixels).sum();
    if sightings.is_empty() {
        Belief::Unseen
    } else if !round || pairs().any(|(a, b)| (a.center - b.center).norm() > AGREEMENT) {
        Belief::Contradiction
    } else {
        // The nearer a camera, the more pixels, the better it can tell.
        let weighted = sightings.iter().map(|sighting| sighting.center.coords * sighting.pixels as f64);
        Belief::At(Point3::from(weighted.sum::<Vector3<f64>>() / pixels as f64))
    }
}

/// Where this camera sees the ball; `None` if it sees too little of it.
pub fn measure(camera: &Camera) -> Option<ScoutedRobot> {
    let points = red_points(camera)?;
    if points.len() < FEWEST_PIXELS {
        return None;
    }
    let eye = camera.extrinsics.fixed_view::<3, 1>(0, 3).into_owned();
    let (center, roundness) = fit_ball(&points, &eye);
    if roundness < ROUNDNESS && flatness(&points) < FLATNESS {
        return None;
    }
    Some(ScoutedRobot {
        camera: camera.name.to_string(),
        center: center.into(),
        roundness,
        pixels: points.len(),
    })
}

/// The world points of all red pixels whose depth is known.
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

/// How far the points lie from the plane that fits them best, root of mean squares, m.
fn flatness(points: &[Vector3<f64>]) -> f64 {
    let mean = points.iter().sum::<Vector3<f64>>() / points.len() as f64;
    let spread: Matrix3<f64> = points.iter().map(|point| (point - mean) * (point - mean).transpose()).sum();
    (spread.symmetric_eigenvalues().min().max(0.0) / points.len() as f64).sqrt()
}

/// The centre of the ball of the known radius on whose surface the points lie, as seen from `eye`, and the
/// root of their mean squared distance from it. Gauss-Newton on the distances, from the points' mean pushed
/// on by two thirds of the radius.
fn fit_ball(points: &[Vector3<f64>], eye: &Vector3<f64>) -> (Vector3<f64>, f64) {
    const ROUNDS: usize = 12;
    const MOST_POINTS: usize = 500;
    let points = || points.iter().step_by(points.len().div_ceil(MOST_POINTS));
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
    // Points that are no ball may lead anywhere.
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

    /// What two cameras and the joints say at the beginning of an episode.
    fn first_obs(scene: &Scene) -> Observation {
        const SIZE: [usize; 2] = [120, 160];
        let links = Links::at(&scene.start);
        let instant = Instant::new(scene.bodies(&links));
        let camera = |mount: Mount| {
            let pinhole = mount.camera(&links, SIZE[1], SIZE[0]);
            let (mut image, mut depth) = (vec![0; SIZE[0] * SIZE[1] * 3], vec![0.0; SIZE[0] * SIZE[1]]);
            instant.render(&pinhole, &mut image, &mut depth);
            Arc::new(Camera {
                name: mount.name().into(),
                seq: 1,
                captured_at: Timestamp(1),
                image: Tensor::from_vec([SIZE[0], SIZE[1], 3], image).unwrap(),
                depth: Some(Tensor::from_vec(SIZE, depth).unwrap()),
                intrinsics: pinhole.intrinsics,
                extrinsics: pinhole.extrinsics,
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

    fn stands_still(plan: &Plan) -> bool {
        let first = plan.chunk.iter().next().unwrap();
        plan.chunk.iter().all(|row| row == first)
    }

    #[test]
    fn the_ball_is_measured_to_a_millimetre() {
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
    fn rows_keep_the_joints_limits() {
        let plan = Policy::new(20.0).plan(&first_obs(&Scene::sample(1)));
        let rows: Vec<_> = plan.chunk.iter().collect();
        for pair in rows.windows(2) {
            for i in 0..7 {
                assert!(f64::from((pair[1][i] - pair[0][i]).abs()) <= MAX_VELOCITY[i] / 20.0 + 1e-6);
            }
        }
    }

    #[test]
    fn a_contradiction_stops_the_arm() {
        let scene = Scene::sample(3);
        let sound = first_obs(&scene);
        let mut policy = Policy::new(20.0);
        assert!(!stands_still(&policy.plan(&sound)));
        for camera in 0..2 {
            let mut obs = sound.clone();
            Arc::make_mut(&mut obs.cameras[camera]).extrinsics[(0, 3)] += 0.05;
            let plan = policy.plan(&obs);
            assert!(stands_still(&plan) && plan.target.is_none());
        }
        assert!(!stands_still(&policy.plan(&sound)));
    }

    #[test]
    fn out_of_sight_is_not_out_of_mind() {
        let sound = first_obs(&Scene::sample(3));
        let blind = Observation { cameras: Vec::new(), ..sound.clone() };
        let mut policy = Policy::new(20.0);
        let seen = policy.plan(&sound);
        let from_memory = policy.plan(&blind);
        assert_eq!((from_memory.chunk, from_memory.target), (seen.chunk, None));
        assert!(!stands_still(&Policy::new(20.0).plan(&blind)), "it looks around for what it has never seen");
        assert_eq!(policy.plan(&Observation::default()).chunk.rows(), 0);
    }
}
