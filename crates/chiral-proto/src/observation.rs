//! What flows from the robot to the policy: [`Observation`] with its cameras and proprioception, and the
//! specs that declare them.

use std::{ops::Index, sync::Arc};

use nalgebra::{Matrix3, Matrix4};

use crate::{
    clock::Timestamp,
    error::UnknownName,
    image::Image,
    tensor::{DType, Tensor},
    value::ValueMap,
};

/// The latest values of all of the robot's sensors.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observation {
    /// The session it was sent in; 0 if it was never sent.
    pub session: u64,
    /// The episode it belongs to. An episode lasts from one reset to the next; counted from 1, 0 before the
    /// first reset.
    pub episode: u64,
    /// Counts the server's observations from 1.
    pub seq: u64,
    /// Seconds, application-defined; by default the server's monotonic clock when the observation was taken.
    /// Preserved bit for bit.
    pub timestamp: f64,
    /// The cameras, in the order in which the server declared them.
    pub cameras: Vec<Arc<Camera>>,
    /// The proprioception, in the order in which the server declared it.
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

/// The camera of this name. Panics if there is none, and lists the existing names. [`Observation::camera`]
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

/// One camera at one instant: image, depth, K, T and capture time belong together.
#[derive(Clone, Debug, PartialEq)]
pub struct Camera {
    /// Its name.
    pub name: Arc<str>,
    /// Counts what this camera has published, from 1: if the number is unchanged, so is the image.
    pub seq: u64,
    /// When it was captured, on the clock of the robot's host. Where the camera's own capture times cannot be
    /// right, the server puts the time of publication here.
    pub captured_at: Timestamp,
    /// (H, W, C), usually `u8` in the order red, green, blue.
    pub image: Image,
    /// (H, W) `f32`: distance along the optical axis (z) in metres, 0 or NaN where unknown. It may have
    /// another size than the image, and then has `depth_intrinsics` of its own.
    pub depth: Option<Image>,
    /// The camera matrix K of this image, in pixels. The centre of the first pixel is at (0, 0), as in
    /// OpenCV.
    pub intrinsics: Matrix3<f64>,
    /// The camera matrix K of the depth image; `None` if it is that of the image.
    /// [`Camera::intrinsics_of_depth`] returns the one that applies.
    pub depth_intrinsics: Option<Matrix3<f64>>,
    /// The pose T for this image, camera to world: p_world = T p_camera, in metres. Camera axes: x right, y
    /// down, z forward.
    pub extrinsics: Matrix4<f64>,
    /// Whether the camera has stopped publishing: it was captured longer ago than the server's limit for this
    /// camera.
    pub is_stale: bool,
}

impl Camera {
    /// Creates a camera with this image, without depth, with time and number 0 and identity matrices. Set
    /// the other fields as needed: `Camera { seq: 1, ..Camera::new("wrist_cam", image) }`.
    pub fn new(name: impl Into<Arc<str>>, image: impl Into<Image>) -> Camera {
        Camera {
            name: name.into(),
            seq: 0,
            captured_at: Timestamp(0),
            image: image.into(),
            depth: None,
            intrinsics: Matrix3::identity(),
            depth_intrinsics: None,
            extrinsics: Matrix4::identity(),
            is_stale: false,
        }
    }

    /// The camera matrix K of the depth image: its own, or that of the image.
    pub fn intrinsics_of_depth(&self) -> &Matrix3<f64> {
        self.depth_intrinsics.as_ref().unwrap_or(&self.intrinsics)
    }

    /// The same camera without its depth image.
    #[must_use]
    pub fn without_depth(&self) -> Camera {
        Camera { depth: None, depth_intrinsics: None, ..self.clone() }
    }
}

/// One stream of proprioception at one instant.
#[derive(Clone, Debug, PartialEq)]
pub struct Proprio {
    /// Its name.
    pub name: Arc<str>,
    /// When it was captured, on the clock of the robot's host; as in [`Camera::captured_at`].
    pub captured_at: Timestamp,
    /// (n) `f32`, in the unit of its [`ProprioSpec`].
    pub data: Tensor,
}

impl Proprio {
    /// The values; empty if `data` is not `f32`, which decoding refuses.
    pub fn values(&self) -> std::borrow::Cow<'_, [f32]> {
        self.data.values().unwrap_or_default()
    }
}

/// The shape and type of a camera's images, declared by the robot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CameraSpec {
    /// Its name.
    pub name: String,
    /// (H, W, C).
    pub image_shape: [usize; 3],
    /// The element type of the image.
    pub image_dtype: DType,
    /// (H, W) of the depth image, which is `f32`; `None` if the camera has no depth.
    pub depth_shape: Option<[usize; 2]>,
}

impl CameraSpec {
    /// Creates the spec of a camera with 8-bit red, green and blue.
    pub fn rgb(name: impl Into<String>, height: usize, width: usize) -> CameraSpec {
        CameraSpec {
            name: name.into(),
            image_shape: [height, width, 3],
            image_dtype: DType::U8,
            depth_shape: None,
        }
    }

    /// Creates the spec of a camera with 8-bit red, green and blue, and depth of the same size.
    pub fn rgbd(name: impl Into<String>, height: usize, width: usize) -> CameraSpec {
        CameraSpec::rgb(name, height, width).with_depth(height, width)
    }

    /// Adds depth, or changes its size. Depth of another size than the image needs a K of its own:
    /// [`Camera::depth_intrinsics`].
    #[must_use]
    pub fn with_depth(mut self, height: usize, width: usize) -> CameraSpec {
        self.depth_shape = Some([height, width]);
        self
    }

    /// Whether there is depth of another size than the image, which then needs a K of its own.
    pub fn has_own_depth_size(&self) -> bool {
        self.depth_shape.is_some_and(|size| size != self.image_size())
    }

    /// (H, W) of the image.
    pub fn image_size(&self) -> [usize; 2] {
        [self.image_shape[0], self.image_shape[1]]
    }
}

/// The size and unit of a stream of proprioception, declared by the robot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProprioSpec {
    /// Its name.
    pub name: String,
    /// The number of `f32` values.
    pub size: usize,
    /// The unit, such as `rad`, `rad/s`, `N m`; may be empty.
    pub unit: String,
}

impl ProprioSpec {
    /// Creates the spec of `size` values in `unit`.
    pub fn new(name: impl Into<String>, size: usize, unit: impl Into<String>) -> ProprioSpec {
        ProprioSpec { name: name.into(), size, unit: unit.into() }
    }
}
