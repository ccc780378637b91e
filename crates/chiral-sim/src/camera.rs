//! The pinhole model with its intrinsics K and extrinsics T, and the mounts of the robot's cameras.
//!
//! What is in front of a camera is in `scene`, drawing it in `render`.
//!
//! The conventions are OpenCV's: camera axes are x right, y down, z forward. T is camera-to-world,
//! `p_world = T p_camera`. Depth is z in the camera frame, not the distance along the ray. **The centre of
//! the pixel in column `u` and row `v` is at the image coordinates `(u, v)` themselves**, so the upper left
//! corner of the image is at (-0.5, -0.5), the principal point of a centred camera is
//! `((width - 1) / 2, (height - 1) / 2)`, and [`Pinhole::back_project`] takes a pixel's indices unchanged.

use nalgebra::{Isometry3, Matrix3, Matrix4, Point3, Rotation3, Translation3, UnitQuaternion, Vector3};

use crate::arm::Links;
use crate::shape::Ray;

/// A camera without lens distortion, at one instant.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pinhole {
    /// Columns of the image.
    pub width: usize,
    /// Rows of the image.
    pub height: usize,
    /// K: `[fx 0 cx; 0 fy cy; 0 0 1]`, pixels.
    pub intrinsics: Matrix3<f64>,
    /// T: camera-to-world, a rotation and the camera's position in metres.
    pub extrinsics: Matrix4<f64>,
}

impl Pinhole {
    /// A camera with square pixels and a centred principal point. `fov` is the horizontal field of view
    /// between the outer edges of the outermost columns, rad; `pose` maps camera points to the world.
    pub fn new(width: usize, height: usize, fov: f64, pose: &Isometry3<f64>) -> Self {
        let focal = width as f64 / 2.0 / (fov / 2.0).tan();
        let (cx, cy) = ((width as f64 - 1.0) / 2.0, (height as f64 - 1.0) / 2.0);
        let intrinsics = Matrix3::new(focal, 0.0, cx, 0.0, focal, cy, 0.0, 0.0, 1.0);
        Self { width, height, intrinsics, extrinsics: pose.to_homogeneous() }
    }

    /// The camera's position in the world, m.
    pub fn position(&self) -> Point3<f64> {
        Point3::from(self.extrinsics.fixed_view::<3, 1>(0, 3).into_owned())
    }

    /// The camera's axes in the world, as columns.
    pub fn rotation(&self) -> Matrix3<f64> {
        self.extrinsics.fixed_view::<3, 3>(0, 0).into_owned()
    }

    /// Image coordinates and depth `(u, v, z)` of a world point; `None` if it is not in front of the camera.
    /// The coordinates may lie outside the image.
    pub fn project(&self, point: &Point3<f64>) -> Option<(f64, f64, f64)> {
        let local = self.rotation().tr_mul(&(point - self.position()));
        let image = self.intrinsics * local;
        (local.z > 0.0).then(|| (image.x / image.z, image.y / image.z, local.z))
    }

    /// The world point at the image coordinates `(u, v)` and the depth `z` (m).
    pub fn back_project(&self, u: f64, v: f64, z: f64) -> Point3<f64> {
        self.ray(u, v).at(z)
    }

    /// The ray through the image coordinates `(u, v)`, scaled so that its parameter is the depth.
    pub fn ray(&self, u: f64, v: f64) -> Ray {
        let k = &self.intrinsics;
        let local = Vector3::new((u - k[(0, 2)]) / k[(0, 0)], (v - k[(1, 2)]) / k[(1, 1)], 1.0);
        Ray { origin: self.position(), direction: self.rotation() * local }
    }
}

/// The mount of a camera.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mount {
    /// On the gripper, beside the fingers and looking along them: it moves with the hand.
    Wrist,
    /// On a post at the robot's right, looking down at the arm (left in the image) and the workspace (right).
    Head,
    /// On one of any number of posts around the table, counted from 0.
    Extra(usize),
}

impl Mount {
    /// The first `count` cameras of a robot: wrist, head, then the posts.
    pub fn first(count: usize) -> impl Iterator<Item = Self> {
        [Self::Wrist, Self::Head].into_iter().chain((0..).map(Self::Extra)).take(count)
    }

    /// The camera's name on the wire: `wrist_cam`, `head_cam`, `table_cam_0`, `table_cam_1`, ...
    pub fn name(self) -> String {
        match self {
            Self::Wrist => "wrist_cam".to_owned(),
            Self::Head => "head_cam".to_owned(),
            Self::Extra(i) => format!("table_cam_{i}"),
        }
    }

    /// The camera as it sees the world while the arm's links are at `links`.
    pub fn camera(self, links: &Links, width: usize, height: usize) -> Pinhole {
        let degrees = |angle: f64| angle.to_radians();
        match self {
            Self::Wrist => Pinhole::new(width, height, degrees(78.0), &(links.hand * wrist_mount())),
            Self::Head => {
                // Aimed well to the left of the workspace, so that no target is near the optical axis,
                // where a wrong focal length would have no effect.
                let pose = look_at(Point3::new(0.62, -1.0, 0.86), Point3::new(0.2, 0.0, 0.22));
                Pinhole::new(width, height, degrees(66.0), &pose)
            }
            Self::Extra(i) => {
                // The golden angle spreads any number of posts evenly around the table.
                let angle = degrees(25.0 + 137.508 * i as f64);
                let height_above = 0.55 + 0.25 * (i % 3) as f64;
                let eye = Point3::new(0.4 + 1.25 * angle.cos(), 1.25 * angle.sin(), height_above);
                Pinhole::new(width, height, degrees(60.0), &look_at(eye, Point3::new(0.38, 0.0, 0.2)))
            }
        }
    }
}

/// The pose of the wrist camera in the hand's frame: beside the gripper, a little behind the fingertips,
/// tilted so that the point between the fingertips lies in the lower part of the image.
fn wrist_mount() -> Isometry3<f64> {
    // Camera x along the fingers' y, camera y towards the fingers.
    let axes = Matrix3::from_columns(&[Vector3::y(), -Vector3::x(), Vector3::z()]);
    let upright = UnitQuaternion::from_rotation_matrix(&Rotation3::from_matrix_unchecked(axes));
    let tilt = UnitQuaternion::from_axis_angle(&Vector3::x_axis(), -0.32);
    Isometry3::from_parts(Translation3::new(0.07, 0.0, -0.08), upright * tilt)
}

/// The pose of a camera at `eye` whose optical axis goes through `at`, with the world's z axis upwards in the
/// image. The line between them must not be vertical.
pub fn look_at(eye: Point3<f64>, at: Point3<f64>) -> Isometry3<f64> {
    let forward = (at - eye).normalize();
    let right = forward.cross(&Vector3::z()).normalize();
    let axes = Matrix3::from_columns(&[right, forward.cross(&right), forward]);
    let rotation = UnitQuaternion::from_rotation_matrix(&Rotation3::from_matrix_unchecked(axes));
    Isometry3::from_parts(eye.coords.into(), rotation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arm::READY;
    use crate::scene::START;

    /// Checks where a camera of 5 x 3 pixels and 90 degrees at `eye`, looking at `at`, sees `point`.
    fn check(eye: [f64; 3], at: [f64; 3], point: [f64; 3], expected: Option<(f64, f64, f64)>) {
        let camera = Pinhole::new(5, 3, std::f64::consts::FRAC_PI_2, &look_at(eye.into(), at.into()));
        let found = camera.project(&point.into());
        let close = match (found, expected) {
            (Some((u, v, z)), Some((eu, ev, ez))) => (u - eu).abs() + (v - ev).abs() + (z - ez).abs() < 1e-9,
            (found, expected) => found.is_none() && expected.is_none(),
        };
        assert!(close, "{point:?}: expected {expected:?}, found {found:?}");
    }

    #[test]
    fn x_is_right_y_is_down_z_is_forward() {
        // From the origin along the world's x axis, the world's y axis is left and its z axis up.
        let along_x = |point, expected| check([0.0; 3], [1.0, 0.0, 0.0], point, expected);
        along_x([2.0, 0.0, 0.0], Some((2.0, 1.0, 2.0)));
        along_x([1.0, -1.0, 0.0], Some((4.5, 1.0, 1.0)));
        along_x([1.0, 1.0, 0.0], Some((-0.5, 1.0, 1.0)));
        along_x([2.5, 0.0, 1.5], Some((2.0, -0.5, 2.5)));
        along_x([-1.0, 0.0, 0.0], None);
        check([1.0, 2.0, 3.0], [1.0, 5.0, 3.0], [2.0, 4.0, 3.0], Some((3.25, 1.0, 2.0)));
    }

    #[test]
    fn extrinsics_take_camera_points_to_the_world() {
        let pose = look_at(Point3::new(0.6, -1.0, 0.9), Point3::new(0.2, 0.1, 0.2));
        let camera = Pinhole::new(160, 120, 1.0, &pose);
        assert!((camera.rotation().determinant() - 1.0).abs() < 1e-9);
        let local = Point3::new(0.1, -0.2, 1.5);
        let world = camera.extrinsics.transform_point(&local);
        let (u, v, z) = camera.project(&world).unwrap();
        let image = camera.intrinsics * local.coords;
        assert!((image / image.z - Vector3::new(u, v, 1.0)).norm() < 1e-9 && (z - local.z).abs() < 1e-12);
    }

    #[test]
    fn back_projection_undoes_projection() {
        for mount in Mount::first(6) {
            let camera = mount.camera(&Links::at(&READY), 160, 120);
            for k in 0..100 {
                let (u, v, z) = (f64::from(k * 37 % 160), f64::from(k * 53 % 120), 0.2 + 0.02 * f64::from(k));
                let (found_u, found_v, found_z) = camera.project(&camera.back_project(u, v, z)).unwrap();
                assert!(
                    (u - found_u).abs() < 1e-9 && (v - found_v).abs() < 1e-9 && (z - found_z).abs() < 1e-9,
                    "{}",
                    mount.name()
                );
            }
        }
    }

    #[test]
    fn only_the_wrist_camera_moves() {
        for mount in Mount::first(5) {
            let views = [READY, START].map(|q| mount.camera(&Links::at(&q), 160, 120));
            assert_eq!(views[0] == views[1], mount != Mount::Wrist, "{}", mount.name());
        }
    }

    #[test]
    fn the_wrist_camera_sees_the_points_between_and_beyond_the_fingertips() {
        let links = Links::at(&READY);
        let camera = Mount::Wrist.camera(&links, 160, 120);
        for ahead in [0.0, 0.1, 0.5] {
            let (u, v, _) = camera.project(&(links.hand * Point3::new(0.0, 0.0, ahead))).unwrap();
            assert!((u - 79.5).abs() < 1e-9 && (20.0..115.0).contains(&v), "{ahead} m ahead is at {u}, {v}");
        }
    }

    #[test]
    fn names_are_distinct() {
        let names: Vec<_> = Mount::first(4).map(Mount::name).collect();
        assert_eq!(names, ["wrist_cam", "head_cam", "table_cam_0", "table_cam_1"]);
    }
}
