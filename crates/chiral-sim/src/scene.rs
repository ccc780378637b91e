//! The bodies in the world at one instant, with their colours: table, target, decoys and the arm, from one
//! seed.
//!
//! The arm's motion is in `arm`, the cameras are in `camera`, drawing is in `render`.
//!
//! The frame is the robot's base (`arm`); the table top is at z = 0. Start posture, decoys and target each
//! have a random stream of their own, and the target is sampled last. **Moving the target changes nothing
//! else**, so that only pixels and depth reveal where it is. The target is the only red body:
//! `r > 2 max(g, b)` holds for its pixels and for no others.

use nalgebra::{Matrix3, Point3, Vector3};

use crate::arm::{Joints, Links, READY, clamp_to_limits};
use crate::camera::Mount;
use crate::shape::{Pattern, Primitive, Ray, Shape, Surface};

/// Lowest corner of the volume in which targets' centres are placed, base frame, m.
pub const VOLUME_LOW: [f64; 3] = [0.34, -0.26, 0.08];
/// Highest corner of the volume in which targets' centres are placed, base frame, m.
pub const VOLUME_HIGH: [f64; 3] = [0.75, 0.26, 0.40];

/// Radius of the target, a sphere, m. A camera sees the sphere's surface, which is nearer than its centre: by
/// two thirds of the radius along the ray, averaged over the visible pixels of a small sphere.
pub const TARGET_RADIUS: f64 = 0.025;

/// The posture close to which every episode starts, rad: the hand is raised and drawn back, clear of the
/// volume, and the wrist camera looks down into it.
pub const START: Joints = [0.0, -0.95, 0.0, -2.45, 0.0, 2.17, READY[6]];

/// The smallest distance between a decoy and the target's surface, m.
const CLEARANCE: f64 = 0.05;

const RED: Surface = plain([0.80, 0.008, 0.012], 0.1);
const BLUE: Surface = plain([0.012, 0.09, 0.80], 0.1);
const STALK: Surface = plain([0.16, 0.17, 0.19], 0.3);
const SHELL: Surface = plain([0.78, 0.80, 0.83], 0.55);
const JOINT: Surface = plain([0.07, 0.08, 0.10], 0.5);

const fn plain(color: [f32; 3], gloss: f32) -> Surface {
    Surface { color, pattern: Pattern::Plain, gloss }
}

/// The parts of an episode's world that do not change: all but the arm's posture.
#[derive(Debug, Clone, PartialEq)]
pub struct Scene {
    /// The target's centre, base frame, m.
    pub target: Point3<f64>,
    /// The arm's posture at the start, rad.
    pub start: Joints,
    /// Bodies of other colours, some of other shapes.
    pub decoys: Vec<Primitive>,
}

impl Scene {
    /// The scene of a seed, the same for the same seed.
    pub fn sample(seed: u64) -> Self {
        let start = sample_start(&mut Stream::new(seed, 1));
        let decoys = sample_decoys(&mut Stream::new(seed, 2));
        let target = sample_target(&mut Stream::new(seed, 3), &start, &decoys);
        Self { target, start, decoys }
    }

    /// The same scene with the target at another position (base frame, m). The position is not checked: it
    /// may be hidden or out of reach.
    pub fn with_target(self, target: Point3<f64>) -> Self {
        Self { target, ..self }
    }

    /// All bodies while the arm's links are at `links`.
    pub fn bodies(&self, links: &Links) -> Vec<Primitive> {
        let mut bodies = surroundings(links, &self.decoys);
        bodies.extend(on_stalk(self.target, RED));
        bodies
    }
}

fn surroundings(links: &Links, decoys: &[Primitive]) -> Vec<Primitive> {
    let mut bodies = furniture();
    bodies.extend_from_slice(decoys);
    bodies.extend(arm_body(links));
    bodies
}

/// A ball of the target's size with the stalk under it.
fn on_stalk(center: Point3<f64>, surface: Surface) -> [Primitive; 2] {
    let stalk = [Point3::new(center.x, center.y, 0.0), center - Vector3::z() * (TARGET_RADIUS + 0.002)];
    let foot = Shape::Capsule { ends: stalk, radius: 0.004 };
    [
        Primitive { shape: Shape::Sphere { center, radius: TARGET_RADIUS }, surface },
        Primitive { shape: foot, surface: STALK },
    ]
}

fn furniture() -> Vec<Primitive> {
    const FLOOR: f64 = -0.72;
    let floor = Surface { color: [0.50, 0.51, 0.53], pattern: Pattern::Plain, gloss: 0.0 };
    let wood = Surface { color: [0.56, 0.37, 0.21], pattern: Pattern::Wood, gloss: 0.0 };
    let mat = Surface { color: [0.045, 0.085, 0.10], pattern: Pattern::Grid, gloss: 0.0 };
    let boxed = |center: [f64; 3], half: [f64; 3], surface| Primitive {
        shape: Shape::upright_box(center.into(), half.into()),
        surface,
    };
    let mut bodies = vec![
        Primitive { shape: Shape::Plane { normal: Vector3::z(), height: FLOOR }, surface: floor },
        boxed([0.38, 0.0, -0.023], [0.66, 0.58, 0.02], wood),
        boxed([0.54, 0.0, -0.002], [0.26, 0.32, 0.002], mat),
    ];
    for (x, y) in [(-0.22, -0.52), (-0.22, 0.52), (0.98, -0.52), (0.98, 0.52)] {
        bodies.push(boxed([x, y, (FLOOR - 0.043) / 2.0], [0.03, 0.03, (-0.043 - FLOOR) / 2.0], STALK));
    }
    bodies
}

/// The arm and its gripper, close to the real proportions, placed by the frames of the links.
fn arm_body(links: &Links) -> Vec<Primitive> {
    let [_, shoulder, upper, elbow, wrist, _, last] = links.joints;
    let origin = |i: usize| Point3::from(links.joints[i].translation.vector);
    // A point given in a link's frame.
    let point = |frame: &nalgebra::Isometry3<f64>, x: f64, y: f64, z: f64| frame * Point3::new(x, y, z);
    let across = |frame: &nalgebra::Isometry3<f64>, half: f64| {
        [point(frame, 0.0, 0.0, -half), point(frame, 0.0, 0.0, half)]
    };
    // Where the forearm begins: joint 5's axis, level with the elbow.
    let (forearm, hand) = (point(&elbow, -0.0825, 0.0, 0.0), links.hand);
    let capsules = [
        ([Point3::new(0.0, 0.0, 0.03), Point3::new(0.0, 0.0, 0.19)], 0.082, SHELL),
        ([Point3::new(0.0, 0.0, 0.19), origin(0)], 0.066, SHELL),
        (across(&shoulder, 0.062), 0.064, JOINT),
        ([origin(1), point(&upper, 0.0, 0.0, -0.10)], 0.060, SHELL),
        ([point(&upper, 0.0, 0.0, -0.13), origin(2)], 0.066, SHELL),
        ([origin(2), origin(3)], 0.060, SHELL),
        (across(&elbow, 0.055), 0.058, JOINT),
        ([origin(3), forearm], 0.056, SHELL),
        ([forearm, point(&wrist, 0.0, 0.0, -0.20)], 0.062, SHELL),
        ([point(&wrist, 0.0, 0.0, -0.22), origin(4)], 0.048, SHELL),
        (across(&links.joints[5], 0.048), 0.052, JOINT),
        ([origin(5), origin(6)], 0.050, SHELL),
        ([origin(6), point(&last, 0.0, 0.0, 0.06)], 0.047, SHELL),
        ([point(&last, 0.0, 0.0, 0.06), point(&last, 0.0, 0.0, 0.085)], 0.040, JOINT),
    ];
    let axes: Matrix3<f64> = *hand.rotation.to_rotation_matrix().matrix();
    let in_hand = |center: [f64; 3], half: [f64; 3], surface| Primitive {
        shape: Shape::Box { center: hand * Point3::from(center), axes, half: half.into() },
        surface,
    };
    let mut bodies: Vec<_> = capsules
        .map(|(ends, radius, surface)| Primitive { shape: Shape::Capsule { ends, radius }, surface })
        .into();
    bodies.extend([
        in_hand([0.0, 0.0, -0.073], [0.030, 0.100, 0.030], SHELL),
        in_hand([0.0, 0.0, -0.040], [0.020, 0.092, 0.006], JOINT),
        in_hand([0.0, 0.042, -0.014], [0.010, 0.007, 0.024], JOINT),
        in_hand([0.0, -0.042, -0.014], [0.010, 0.007, 0.024], JOINT),
        // The wrist camera's housing, entirely behind its lens.
        in_hand([0.054, 0.0, -0.106], [0.026, 0.036, 0.011], JOINT),
    ]);
    bodies
}

fn sample_start(stream: &mut Stream) -> Joints {
    clamp_to_limits(&START.map(|q| q + stream.uniform(-0.06, 0.06)))
}

fn sample_decoys(stream: &mut Stream) -> Vec<Primitive> {
    let colors = [
        BLUE,
        plain([0.03, 0.42, 0.09], 0.1),
        plain([0.85, 0.60, 0.03], 0.1),
        plain([0.22, 0.05, 0.45], 0.1),
        plain([0.02, 0.40, 0.42], 0.1),
        plain([0.75, 0.76, 0.74], 0.1),
    ];
    // Positions around the volume, low where the head camera looks over them.
    let mut places = [
        (0.24, 0.42),
        (0.50, 0.44),
        (0.77, 0.42),
        (0.93, 0.16),
        (0.93, -0.20),
        (0.66, -0.44),
        (0.34, -0.44),
        (0.10, -0.42),
    ];
    stream.shuffle(&mut places);
    let mut decoys = Vec::new();
    for (k, (x, y)) in places.into_iter().enumerate() {
        let surface = colors[k % colors.len()];
        let foot = Point3::new(x + stream.uniform(-0.03, 0.03), y + stream.uniform(-0.03, 0.03), 0.0);
        decoys.push(standing(k % 4, foot, surface, stream));
    }
    // A blue copy of the target inside the volume: a policy that confuses red and blue moves there.
    let twin =
        Point3::new(stream.uniform(0.40, 0.70), stream.uniform(-0.22, 0.22), stream.uniform(0.10, 0.22));
    decoys.extend(on_stalk(twin, BLUE));
    decoys
}

/// A small body of one of four kinds that stands on the table at `foot`.
fn standing(kind: usize, foot: Point3<f64>, surface: Surface, stream: &mut Stream) -> Primitive {
    let size = stream.uniform(0.024, 0.036);
    let (sin, cos) = stream.uniform(0.0, std::f64::consts::TAU).sin_cos();
    let raised = |height: f64| foot + Vector3::z() * height;
    let shape = match kind {
        0 => Shape::Sphere { center: raised(size), radius: size },
        1 => {
            let axes = Matrix3::new(cos, -sin, 0.0, sin, cos, 0.0, 0.0, 0.0, 1.0);
            Shape::Box { center: raised(size), axes, half: Vector3::repeat(size) }
        }
        2 => {
            let along = Vector3::new(cos, sin, 0.0) * 0.04;
            Shape::Capsule {
                ends: [raised(size * 0.7) - along, raised(size * 0.7) + along],
                radius: size * 0.7,
            }
        }
        _ => Shape::Capsule { ends: [raised(size * 0.8), raised(0.09)], radius: size * 0.8 },
    };
    Primitive { shape, surface }
}

/// A position in the volume that is clear of the decoys and fully visible to the head camera.
fn sample_target(stream: &mut Stream, start: &Joints, decoys: &[Primitive]) -> Point3<f64> {
    let links = Links::at(start);
    let bodies = surroundings(&links, decoys);
    let eye = Mount::Head.camera(&links, 1, 1);
    let candidates = std::iter::repeat_with(|| {
        Point3::from(std::array::from_fn(|i| stream.uniform(VOLUME_LOW[i], VOLUME_HIGH[i])))
    });
    let axes = eye.rotation();
    let edge = |x: f64, y: f64| (axes.column(0) * x + axes.column(1) * y) * (TARGET_RADIUS * 1.2);
    let edges = [edge(0.0, 0.0), edge(1.0, 0.0), edge(-1.0, 0.0), edge(0.0, 1.0), edge(0.0, -1.0)];
    let in_sight = |target: &Point3<f64>| {
        edges.iter().all(|edge| {
            let ray = Ray { origin: eye.position(), direction: target + edge - eye.position() };
            bodies.iter().all(|body| body.shape.hit(&ray).is_none_or(|t| t > 1.0))
        })
    };
    let clear = |target: &Point3<f64>| {
        decoys.iter().all(|decoy| {
            let (low, high) =
                decoy.shape.extent(&Matrix3::identity(), target).expect("decoys are not planes");
            let nearest = Vector3::zeros().sup(&low).inf(&high);
            nearest.norm() > TARGET_RADIUS + CLEARANCE
        })
    };
    candidates
        .take(1000)
        .find(|target| clear(target) && in_sight(target))
        .expect("most of the volume is clear and in sight")
}

/// A stream of random numbers (splitmix64: S. Vigna, prng.di.unimi.it/splitmix64.c), the same for the same
/// seed and purpose.
struct Stream(u64);

impl Stream {
    fn new(seed: u64, purpose: u64) -> Self {
        let mut mixed = Self(seed);
        Self(mixed.next() ^ purpose.wrapping_mul(0xd134_2543_de82_ef95))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * ((self.next() >> 11) as f64 / (1u64 << 53) as f64)
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, (self.next() % (last as u64 + 1)) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arm::{inverse_kinematics, travel_time};
    use crate::camera::Pinhole;
    use crate::render::Instant;

    const SEEDS: u64 = 200;

    /// Draws the first instant of a scene; returns the camera and the world points of all red pixels.
    fn red_points(scene: &Scene, mount: Mount) -> (Pinhole, Vec<Point3<f64>>) {
        let (width, height) = (160, 120);
        let links = Links::at(&scene.start);
        let camera = mount.camera(&links, width, height);
        let (mut rgb, mut depth) = (vec![0; width * height * 3], vec![0.0; width * height]);
        Instant::new(scene.bodies(&links)).render(&camera, &mut rgb, &mut depth);
        let is_red = |pixel: &usize| {
            let [r, g, b] = [0, 1, 2].map(|c| u32::from(rgb[3 * pixel + c]));
            r > 60 && r > 2 * g.max(b)
        };
        let place = |pixel: usize| {
            camera.back_project((pixel % width) as f64, (pixel / width) as f64, f64::from(depth[pixel]))
        };
        (camera, (0..width * height).filter(is_red).map(place).collect())
    }

    #[test]
    fn the_head_camera_alone_locates_the_target() {
        for seed in 0..SEEDS {
            let scene = Scene::sample(seed);
            let (camera, points) = red_points(&scene, Mount::Head);
            assert!(points.len() >= 8, "seed {seed}: {} red pixels", points.len());
            let mean = points.iter().map(|point| point.coords).sum::<Vector3<f64>>() / points.len() as f64;
            let ahead = (mean - camera.position().coords).normalize() * (TARGET_RADIUS * 2.0 / 3.0);
            let error = (Point3::from(mean + ahead) - scene.target).norm();
            assert!(error < 0.01, "seed {seed}: the estimate is off by {error} m");
        }
    }

    #[test]
    fn the_wrist_camera_mostly_sees_the_target_from_the_start() {
        let seen =
            (0..SEEDS).filter(|&seed| red_points(&Scene::sample(seed), Mount::Wrist).1.len() >= 8).count();
        assert!(seen > 180, "visible in {seen} scenes of {SEEDS}");
    }

    #[test]
    fn nothing_but_the_target_is_red() {
        for seed in 0..20 {
            let elsewhere = Scene::sample(seed).with_target(Point3::new(0.0, 0.0, -9.0));
            for mount in Mount::first(6) {
                assert_eq!(red_points(&elsewhere, mount).1, [], "seed {seed}, {}", mount.name());
            }
        }
    }

    #[test]
    fn targets_fill_their_volume() {
        let targets: Vec<_> = (0..SEEDS).map(|seed| Scene::sample(seed).target).collect();
        for (axis, size) in [0.4, 0.5, 0.3].into_iter().enumerate() {
            let (low, high) = (VOLUME_LOW[axis], VOLUME_HIGH[axis]);
            assert!(high - low >= size);
            let (first, last) = targets
                .iter()
                .fold((high, low), |(first, last), target| (target[axis].min(first), target[axis].max(last)));
            assert!(low <= first && last <= high && last - first > 0.95 * size, "{first} to {last}");
        }
    }

    #[test]
    fn targets_and_the_points_around_them_are_within_2_s_of_reach() {
        for seed in 0..SEEDS {
            let Scene { target, start, .. } = Scene::sample(seed);
            let outward = Vector3::new(target.x, target.y, 0.0).normalize() * 0.03;
            for point in [
                target,
                target + outward,
                target - outward,
                target + Vector3::z() * 0.03,
                target - Vector3::z() * 0.03,
            ] {
                let q = inverse_kinematics(&point, &start, &READY)
                    .unwrap_or_else(|| panic!("seed {seed}: {point}"));
                assert!(travel_time(&start, &q) < 2.0, "seed {seed}");
            }
        }
    }

    #[test]
    fn targets_keep_clear_of_decoys() {
        for seed in 0..SEEDS {
            let Scene { target, decoys, .. } = Scene::sample(seed);
            for decoy in decoys {
                if let Shape::Sphere { center, radius } = decoy.shape {
                    assert!(
                        (center - target).norm() > radius + TARGET_RADIUS + CLEARANCE - 1e-9,
                        "seed {seed}"
                    );
                }
            }
        }
    }

    #[test]
    fn moving_the_target_changes_nothing_else() {
        for seed in 0..20 {
            let (scene, moved) =
                (Scene::sample(seed), Scene::sample(seed).with_target(Point3::new(0.5, 0.0, 0.3)));
            assert_ne!(scene.target, moved.target);
            assert_eq!((scene.start, &scene.decoys), (moved.start, &moved.decoys));
            let [bodies, others] = [&scene, &moved].map(|scene| scene.bodies(&Links::at(&scene.start)));
            let different = bodies.iter().zip(&others).filter(|(body, other)| body != other).count();
            assert_eq!((bodies.len(), different), (others.len(), 2), "the ball and its stalk");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_scene() {
        assert_eq!(Scene::sample(7), Scene::sample(7));
        assert_ne!(Scene::sample(7).target, Scene::sample(8).target);
        assert_ne!(Scene::sample(7).start, Scene::sample(8).start);
        assert_ne!(Scene::sample(7).decoys, Scene::sample(8).decoys);
    }
}
