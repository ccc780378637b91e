//! The cameras as sensors: each draws one instant into its sensor's buffers and publishes it with the
//! matrices of that instant, or replays instants that were drawn beforehand.
//!
//! When a camera captures is decided in `robot`, what it sees in `world`.

use std::sync::{Arc, Mutex};
use std::thread;

use chiral_proto::{CameraSpec, lock};
use chiral_server::{CameraFrame, CameraSensor, SensorError};

use crate::arm::{Links, READY, clamp_to_limits};
use crate::camera::Mount;
use crate::render::Instant;
use crate::scene::Scene;
use crate::world::View;

/// Changes the frame that a camera, given by its name, is about to publish. Tests use it to inject faults.
pub type Tamper = Arc<dyn Fn(&str, CameraFrame) -> CameraFrame + Send + Sync>;

/// One camera.
pub(crate) struct Camera {
    mount: Mount,
    sensor: CameraSensor,
    /// The frames to replay in a loop. If there are none, the camera draws the world.
    replay: Vec<CameraFrame>,
    /// The index of the next frame to replay. Locked from viewing the world until the image is published, so
    /// that no older instant follows a newer one.
    next: Mutex<usize>,
    tamper: Option<Tamper>,
}

impl Camera {
    pub(crate) fn new(mount: Mount, sensor: CameraSensor, tamper: Option<Tamper>) -> Camera {
        Camera { mount, sensor, replay: Vec::new(), next: Mutex::default(), tamper }
    }

    /// Publishes the view that `view` returns, if any.
    pub(crate) fn publish(&self, view: impl FnOnce() -> Option<View>) -> Result<(), SensorError> {
        let mut next = lock(&self.next);
        let Some(View { links, bodies, captured_at }) = view() else { return Ok(()) };
        let frame = match self.replay.get(*next) {
            Some(frame) => self.copy(frame),
            None => self.draw(&Instant::new(bodies), &links),
        };
        *next = (*next + 1) % self.replay.len().max(1);
        let frame = CameraFrame { captured_at: Some(captured_at), ..frame };
        let frame = match &self.tamper {
            Some(tamper) => tamper(&self.sensor.spec().name, frame),
            None => frame,
        };
        self.sensor.publish(frame)
    }

    /// Copies the frame into the sensor's buffers, where a camera driver would write it.
    fn copy(&self, frame: &CameraFrame) -> CameraFrame {
        let mut image = self.sensor.buffer();
        image.copy_from_slice(&frame.image);
        let depth = frame.depth.as_ref().map(|pixels| {
            let mut depth = self.sensor.depth_buffer();
            depth.copy_from_slice(pixels);
            depth.freeze()
        });
        CameraFrame { image: image.freeze(), depth, ..frame.clone() }
    }

    fn draw(&self, instant: &Instant, links: &Links) -> CameraFrame {
        let [height, width] = self.sensor.spec().image_size();
        let (mut image, mut depth) = (self.sensor.buffer(), self.sensor.depth_buffer());
        let camera = self.mount.camera(links, width, height);
        instant.render(&camera, &mut image, depth.values_mut());
        CameraFrame {
            image: image.freeze(),
            depth: Some(depth.freeze()),
            intrinsics: camera.intrinsics,
            extrinsics: camera.extrinsics,
            ..CameraFrame::default()
        }
    }
}

/// The specifications of the first `count` cameras of a robot.
pub(crate) fn specs(count: usize, width: usize, height: usize) -> impl Iterator<Item = CameraSpec> {
    Mount::first(count).map(move |mount| CameraSpec::rgbd(mount.name(), height, width))
}

/// Draws `count` instants of a cyclic motion for every camera.
pub(crate) fn prerender(cameras: &mut [Camera], scene: &Scene, count: usize) {
    let instants: Vec<(Instant, Links)> = (0..count)
        .map(|k| {
            let phase = std::f64::consts::TAU * k as f64 / count as f64;
            let swing = [0.6, 0.25, 0.2, 0.3, 0.2, 0.3, 0.5];
            let posture =
                std::array::from_fn(|i| READY[i] + swing[i] * (phase * (1 + i % 2) as f64 + i as f64).sin());
            let links = Links::at(&clamp_to_limits(&posture));
            (Instant::new(scene.bodies(&links)), links)
        })
        .collect();
    thread::scope(|scope| {
        for camera in cameras {
            let instants = &instants;
            scope.spawn(|| {
                camera.replay = instants.iter().map(|(instant, links)| camera.draw(instant, links)).collect()
            });
        }
    });
}
