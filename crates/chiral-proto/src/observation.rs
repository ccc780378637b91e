//! What flows from the robot to the policy.

use std::{ops::Index, sync::Arc};

use nalgebra::{Matrix3, Matrix4};

use crate::{
    clock::Timestamp,
    error::UnknownName,
    tensor::{DType, Tensor},
    value::ValueMap,
};

/// Everything the robot's sensors said at one time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observation {
    /// The session it was sent in; 0 where it was never sent.
    pub session: u64,
    /// The episode it belongs to: from one reset to the next, counted from 1; 0 before the first reset.
    pub episode: u64,
    /// Counts the server's observations from 1.
    pub seq: u64,
    /// Seconds, application-defined; by default the server's monotonic clock when the observation was taken.
    /// Carried bit for bit.
    pub timestamp: f64,
    /// The cameras, in the order the server declared them.
    pub cameras: Vec<Arc<Camera>>,
    /// The proprioception, in the order the server declared it.
    pub proprios: Vec<Arc<Proprio>>,
    /// The application's own values.
    pub extra: ValueMap,
}

impl Observation {
    /// The camera of this name.
    ///
    /// # Errors
    /// [`UnknownName`], which lists the names there are.
    pub fn camera(&self, name: &str) -> Result<&Camera, UnknownName> {
        find(&self.cameras, name, |camera| &camera.name).ok_or_else(|| self.unknown_camera(name))
    }

    /// The proprioception of this name.
    ///
    /// # Errors
    /// [`UnknownName`], which lists the names there are.
    pub fn proprio(&self, name: &str) -> Result<&Proprio, UnknownName> {
        find(&self.proprios, name, |proprio| &proprio.name).ok_or_else(|| {
            UnknownName::new("proprio", name, self.proprios.iter().map(|proprio| &*proprio.name))
        })
    }

    fn unknown_camera(&self, name: &str) -> UnknownName {
        UnknownName::new("camera", name, self.cameras.iter().map(|camera| &*camera.name))
    }
}

/// The camera of this name. Panics where there is none, naming those there are; [`Observation::camera`]
/// returns an error instead.
impl Index<&str> for Observation {
    type Output = Camera;

    fn index(&self, name: &str) -> &Camera {
        find(&self.cameras, name, |camera| &camera.name)
            .unwrap_or_else(|| panic!("{}", self.unknown_camera(name)))
    }
}

fn find<'a, T>(items: &'a [Arc<T>], name: &str, name_of: impl Fn(&T) -> &str) -> Option<&'a T> {
    items.iter().map(|item| &**item).find(|item| name_of(item) == name)
}

/// One camera at one instant: image, depth, K, T and time belong together.
#[derive(Clone, Debug, PartialEq)]
pub struct Camera {
    /// Its name.
    pub name: Arc<str>,
    /// Counts what this camera published, from 1: an unchanged number means an unchanged picture.
    pub seq: u64,
    /// When it was captured, on the clock of the robot's host.
    pub captured_at: Timestamp,
    /// (H, W, C), usually `u8` in the order red, green, blue.
    pub image: Tensor,
    /// (H, W) of `f32`: distance along the optical axis (z) in metres, 0 or NaN where unknown.
    pub depth: Option<Tensor>,
    /// The camera matrix K, in pixels, the centre of the first one at (0, 0), as OpenCV has it. Fresh in
    /// every observation.
    pub intrinsics: Matrix3<f64>,
    /// The pose T, camera to world: p_world = T p_camera, in metres; camera axes x right, y down, z forward.
    /// Fresh in every observation.
    pub extrinsics: Matrix4<f64>,
}

/// One stream of proprioception at one instant.
#[derive(Clone, Debug, PartialEq)]
pub struct Proprio {
    /// Its name.
    pub name: Arc<str>,
    /// When it was captured, on the clock of the robot's host.
    pub captured_at: Timestamp,
    /// (n) of `f32`, in the unit that its [`ProprioSpec`] says.
    pub data: Tensor,
}

impl Proprio {
    /// The values; empty should a peer have sent anything but `f32`, which decoding refuses.
    pub fn values(&self) -> std::borrow::Cow<'_, [f32]> {
        self.data.values().unwrap_or_default()
    }
}

/// What a camera's observations look like, declared by the robot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CameraSpec {
    /// Its name.
    pub name: String,
    /// (H, W, C).
    pub image_shape: [usize; 3],
    /// Element type of the image.
    pub image_dtype: DType,
    /// Whether there is a depth image (H, W) of `f32`.
    pub has_depth: bool,
}

impl CameraSpec {
    /// A camera of 8-bit red, green and blue.
    pub fn rgb(name: impl Into<String>, height: usize, width: usize) -> CameraSpec {
        CameraSpec {
            name: name.into(),
            image_shape: [height, width, 3],
            image_dtype: DType::U8,
            has_depth: false,
        }
    }

    /// A camera of 8-bit red, green and blue, and depth.
    pub fn rgbd(name: impl Into<String>, height: usize, width: usize) -> CameraSpec {
        CameraSpec { has_depth: true, ..CameraSpec::rgb(name, height, width) }
    }

    /// (H, W).
    pub fn depth_shape(&self) -> [usize; 2] {
        [self.image_shape[0], self.image_shape[1]]
    }
}

/// What a stream of proprioception looks like, declared by the robot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProprioSpec {
    /// Its name.
    pub name: String,
    /// Number of `f32` values.
    pub size: usize,
    /// Such as `rad`, `rad/s`, `N m`; may be empty.
    pub unit: String,
}

impl ProprioSpec {
    /// `size` values in `unit`.
    pub fn new(name: impl Into<String>, size: usize, unit: impl Into<String>) -> ProprioSpec {
        ProprioSpec { name: name.into(), size, unit: unit.into() }
    }
}
