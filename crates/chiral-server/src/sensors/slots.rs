//! The slots themselves: what each camera and proprio has published last, and its times. What all slots of
//! some sensors share is in `shared`.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use chiral_proto::{Camera, CameraSpec, DType, Image, Proprio, ProprioSpec, Tensor, Timestamp, lock};
use nalgebra::{Matrix3, Matrix4};

use super::times::{Implausible, NotNew, SensorTimes};
use crate::{
    error::{ObserveError, SensorError},
    staleness::MaxAge,
};

/// The slot of one camera.
#[derive(Debug)]
pub(super) struct CameraSlot {
    pub(super) spec: CameraSpec,
    pub(super) name: Arc<str>,
    pub(super) state: Mutex<CameraState>,
}

/// What a camera has published. The matrices are those of the next assembly.
#[derive(Debug)]
pub(super) struct CameraState {
    pub(super) image: Part,
    pub(super) depth: Part,
    pub(super) intrinsics: Matrix3<f64>,
    pub(super) depth_intrinsics: Option<Matrix3<f64>>,
    pub(super) extrinsics: Matrix4<f64>,
    /// `None` for the server's limit.
    pub(super) max_age: Option<MaxAge>,
    seq: u64,
    latest: Option<Arc<Camera>>,
}

/// The image or the depth of a camera. Each has its own times, since each may be updated at its own rate.
#[derive(Debug, Default)]
pub(super) struct Part {
    latest: Option<Image>,
    times: SensorTimes,
}

impl Part {
    /// Replaces the image. Returns what is wrong with its capture time, to be logged.
    pub(super) fn publish(
        &mut self,
        image: Image,
        captured_at: Option<Timestamp>,
        now: Timestamp,
    ) -> Option<Implausible> {
        self.latest = Some(image);
        self.times.publish(captured_at, now)
    }
}

impl CameraSlot {
    pub(super) fn new(spec: CameraSpec) -> CameraSlot {
        let state = CameraState {
            image: Part::default(),
            depth: Part::default(),
            intrinsics: Matrix3::identity(),
            depth_intrinsics: spec.has_own_depth_size().then(Matrix3::identity),
            extrinsics: Matrix4::identity(),
            max_age: None,
            seq: 0,
            latest: None,
        };
        CameraSlot { name: spec.name.as_str().into(), spec, state: Mutex::new(state) }
    }

    /// The size of an image in bytes.
    pub(super) fn image_len(&self) -> usize {
        self.spec.image_shape.iter().product::<usize>() * self.spec.image_dtype.size()
    }

    /// The size of a depth image in bytes; 0 without depth.
    pub(super) fn depth_len(&self) -> usize {
        self.spec.depth_shape.map_or(0, |[height, width]| height * width * size_of::<f32>())
    }

    pub(super) fn image(&self, data: Bytes) -> Result<Image, SensorError> {
        self.part("image", self.spec.image_dtype, &self.spec.image_shape, data)
    }

    pub(super) fn depth(&self, data: Option<Bytes>) -> Result<Option<Image>, SensorError> {
        match (data, &self.spec.depth_shape) {
            (None, None) => Ok(None),
            (Some(data), Some(shape)) => self.part("depth", DType::F32, shape, data).map(Some),
            (_, declared) => {
                Err(SensorError::Depth { camera: self.spec.name.clone(), declared: declared.is_some() })
            }
        }
    }

    fn part(&self, part: &str, dtype: DType, shape: &[usize], data: Bytes) -> Result<Image, SensorError> {
        let tensor = Tensor::new(dtype, shape, data).map_err(|source| SensorError::Shape {
            sensor: format!("camera {}, {part}", self.name),
            source,
        })?;
        Ok(tensor.into())
    }

    pub(super) fn check_depth_intrinsics(&self, found: Option<&Matrix3<f64>>) -> Result<(), SensorError> {
        match self.spec.has_own_depth_size() && found.is_none() {
            true => Err(SensorError::DepthIntrinsics { camera: self.spec.name.clone() }),
            false => Ok(()),
        }
    }

    /// Whether all declared parts have been published.
    pub(super) fn has_published(&self) -> bool {
        lock(&self.state).latest.is_some()
    }

    /// Returns what was published last, marked as stale if it is. With `after`, fails unless every part of it
    /// is newer.
    pub(super) fn observe(
        &self,
        after: Option<Timestamp>,
        default_max_age: MaxAge,
        now: Timestamp,
    ) -> Result<Arc<Camera>, ObserveError> {
        let mut state = lock(&self.state);
        let CameraState { image, depth, max_age, latest, .. } = &mut *state;
        let rule = max_age.unwrap_or(default_max_age);
        let parts = [Some(&image.times), self.spec.depth_shape.map(|_| &depth.times)];
        let mut is_stale = false;
        for times in parts.into_iter().flatten() {
            times.check_new(after, now).map_err(|reason| late(format!("camera {}", self.name), reason))?;
            is_stale |= times.is_stale(rule, now);
        }
        let camera = latest.as_mut().expect("it is assembled once all of its parts are published");
        if camera.is_stale != is_stale {
            // Observations that were taken before keep theirs.
            Arc::make_mut(camera).is_stale = is_stale;
        }
        Ok(Arc::clone(camera))
    }
}

impl CameraState {
    /// Assembles the parts into one camera, once all declared parts are present.
    pub(super) fn assemble(&mut self, slot: &CameraSlot) {
        let Some(image) = self.image.latest.clone() else { return };
        let depth = self.depth.latest.clone();
        if slot.spec.depth_shape.is_some() && depth.is_none() {
            return;
        }
        let image_at = self.image.times.captured_at();
        self.seq += 1;
        self.latest = Some(Arc::new(Camera {
            name: Arc::clone(&slot.name),
            seq: self.seq,
            captured_at: depth.as_ref().map_or(image_at, |_| image_at.min(self.depth.times.captured_at())),
            image,
            depth,
            intrinsics: self.intrinsics,
            depth_intrinsics: self.depth_intrinsics,
            extrinsics: self.extrinsics,
            is_stale: false,
        }));
    }
}

/// The slot of one stream of proprioception.
#[derive(Debug)]
pub(super) struct ProprioSlot {
    pub(super) spec: ProprioSpec,
    pub(super) name: Arc<str>,
    state: Mutex<ProprioState>,
}

#[derive(Debug, Default)]
struct ProprioState {
    latest: Option<Arc<Proprio>>,
    times: SensorTimes,
}

impl ProprioSlot {
    pub(super) fn new(spec: ProprioSpec) -> ProprioSlot {
        ProprioSlot { name: spec.name.as_str().into(), spec, state: Mutex::default() }
    }

    /// Replaces the values. Returns what is wrong with their capture time, to be logged.
    pub(super) fn publish(
        &self,
        values: &[f32],
        captured_at: Option<Timestamp>,
        now: Timestamp,
    ) -> Result<Option<Implausible>, SensorError> {
        let data = Tensor::from_vec([self.spec.size], values.to_vec())
            .map_err(|source| SensorError::Shape { sensor: format!("proprio {}", self.name), source })?;
        let mut state = lock(&self.state);
        let implausible = state.times.publish(captured_at, now);
        let captured_at = state.times.captured_at();
        state.latest = Some(Arc::new(Proprio { name: Arc::clone(&self.name), captured_at, data }));
        Ok(implausible)
    }

    /// Whether it has been published.
    pub(super) fn has_published(&self) -> bool {
        lock(&self.state).latest.is_some()
    }

    /// Returns what was published last. With `after`, fails unless it is newer.
    pub(super) fn observe(
        &self,
        after: Option<Timestamp>,
        now: Timestamp,
    ) -> Result<Arc<Proprio>, ObserveError> {
        let state = lock(&self.state);
        let late = |reason| late(format!("proprio {}", self.name), reason);
        state.times.check_new(after, now).map_err(late)?;
        state.latest.clone().ok_or_else(|| late(NotNew::Unpublished))
    }
}

/// The error for a sensor that has nothing new. The caller fills in `waited`.
fn late(sensor: String, reason: NotNew) -> ObserveError {
    match reason {
        NotNew::Unpublished => ObserveError::Late { sensor, waited: Duration::ZERO },
        NotNew::CapturedBefore { age, published } => ObserveError::Old { sensor, published, age },
    }
}
