//! The publishing end of one camera.

use std::sync::Arc;

use bytes::Bytes;
use chiral_proto::{CameraSpec, Timestamp, lock, pool::Buffer};
use nalgebra::{Matrix3, Matrix4};

use super::{
    shared::{Shared, report},
    slots::{CameraSlot, CameraState},
    times::Implausible,
};
use crate::{error::SensorError, staleness::MaxAge};

/// What one camera captured at one instant, published as a whole so that its parts cannot tear.
#[derive(Clone, Debug)]
pub struct CameraFrame {
    /// (H, W, C) as declared, row-major.
    pub image: Bytes,
    /// (H, W) of little-endian `f32` in metres, where the camera was declared with depth.
    pub depth: Option<Bytes>,
    /// The camera matrix K, in pixels.
    pub intrinsics: Matrix3<f64>,
    /// The camera matrix K of the depth, in its own pixels; `None` if it is that of the image. Required where
    /// the depth was declared with another size than the image.
    pub depth_intrinsics: Option<Matrix3<f64>>,
    /// The pose T, camera to world, in metres.
    pub extrinsics: Matrix4<f64>,
    /// The capture time, on the clock of the sensors; by default the time of publishing, which also stands in
    /// for one that cannot be right: more than 1 ms after the publishing, more than 60 s before it, or earlier
    /// than the previous one.
    pub captured_at: Option<Timestamp>,
}

impl Default for CameraFrame {
    /// No pixels, and identity matrices.
    fn default() -> CameraFrame {
        CameraFrame {
            image: Bytes::new(),
            depth: None,
            intrinsics: Matrix3::identity(),
            depth_intrinsics: None,
            extrinsics: Matrix4::identity(),
            captured_at: None,
        }
    }
}

/// The writing end of one camera. A clone writes to the same camera.
#[derive(Clone, Debug)]
pub struct CameraSensor {
    pub(super) shared: Arc<Shared>,
    pub(super) index: usize,
}

impl CameraSensor {
    /// Returns the declaration of the camera.
    pub fn spec(&self) -> &CameraSpec {
        &self.slot().spec
    }

    /// Returns pooled, aligned memory for one image, with arbitrary content. Never waits.
    pub fn buffer(&self) -> Buffer {
        self.shared.pool.take(self.slot().image_len())
    }

    /// Returns memory for one depth image, as [`CameraSensor::buffer`] does; write it through
    /// `depth_buffer().values_mut::<f32>()`. It is empty if the camera was declared without depth.
    pub fn depth_buffer(&self) -> Buffer {
        self.shared.pool.take(self.slot().depth_len())
    }

    /// Swaps in image, depth, K, T and capture time at once. Nothing is copied: the memory is shared until
    /// the last reader has dropped it.
    ///
    /// # Errors
    /// [`SensorError`] if the image or the depth does not have the declared size, if depth is given but not
    /// declared, or declared but not given, or if its K is missing although it has another size.
    pub fn publish(&self, frame: CameraFrame) -> Result<(), SensorError> {
        let image = self.slot().image(frame.image)?;
        let depth = self.slot().depth(frame.depth)?;
        self.slot().check_depth_intrinsics(frame.depth_intrinsics.as_ref())?;
        self.update(|state, now| {
            if let Some(depth) = depth {
                // What is wrong with its time is what is wrong with the image's.
                state.depth.publish(depth, frame.captured_at, now);
            }
            state.intrinsics = frame.intrinsics;
            state.depth_intrinsics = frame.depth_intrinsics;
            state.extrinsics = frame.extrinsics;
            state.image.publish(image, frame.captured_at, now)
        });
        Ok(())
    }

    /// Sets how old this camera's latest image may be before the camera counts as stale, in place of the
    /// server's limit.
    pub fn set_max_age(&self, max_age: MaxAge) {
        lock(&self.slot().state).max_age = Some(max_age);
    }

    pub(super) fn slot(&self) -> &CameraSlot {
        &self.shared.cameras[self.index]
    }

    pub(super) fn copy(&self, data: &[u8]) -> Bytes {
        let mut buffer = self.shared.pool.take(data.len());
        buffer.copy_from_slice(data);
        buffer.freeze()
    }

    /// Changes the camera's parts and assembles it anew. `change` returns what is wrong with a capture time.
    pub(super) fn update(&self, change: impl FnOnce(&mut CameraState, Timestamp) -> Option<Implausible>) {
        let now = self.shared.clock.now();
        let slot = self.slot();
        let mut state = lock(&slot.state);
        let implausible = change(&mut state, now);
        state.assemble(slot);
        drop(state);
        self.shared.publications.notify();
        if let Some(implausible) = implausible {
            report(&format!("camera {}", slot.name), implausible);
        }
    }
}
