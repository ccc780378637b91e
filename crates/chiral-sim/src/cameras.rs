//! The cameras as sensors: each draws one instant and publishes it with the matrices of that instant.
//!
//! Lives here: drawing into the sensors' buffers, and replaying instants that were drawn beforehand. Does not
//! live here: when a camera looks (`robot`), and what it sees (`world`).

use std::sync::Mutex;
use std::thread;

use chiral_proto::CameraSpec;
use chiral_server::{CameraFrame, CameraSensor, SensorError};

use crate::arm::{Links, READY, clamp_to_limits};
use crate::camera::Mount;
use crate::lock;
use crate::render::Instant;
use crate::robot::Tamper;
use crate::scene::Scene;
use crate::world::View;

/// One camera.
pub(crate) struct Camera {
    mount: Mount,
    sensor: CameraSensor,
    /// Frames to be replayed, over and over; none to draw what is there.
    replay: Vec<CameraFrame>,
    /// Number of the frame that is replayed next. Its lock is held from looking at the world until the
    /// picture is published, so that no older instant follows a newer one.
    turn: Mutex<usize>,
    tamper: Option<Tamper>,
}

impl Camera {
    pub(crate) fn new(mount: Mount, sensor: CameraSensor, tamper: Option<Tamper>) -> Camera {
        Camera { mount, sensor, replay: Vec::new(), turn: Mutex::default(), tamper }
    }

    /// Publishes what `look` finds; nothing where it finds that it is not this camera's turn.
    pub(crate) fn publish(&self, look: impl FnOnce() -> Option<View>) -> Result<(), SensorError> {
        let mut turn = lock(&self.turn);
        let Some(View { links, bodies, captured_at }) = look() else { return Ok(()) };
        let frame = match self.replay.get(*turn) {
            Some(frame) => self.copy(frame),
            None => self.draw(&Instant::new(bodies), &links),
        };
        *turn = (*turn + 1) % self.replay.len().max(1);
        let frame = CameraFrame { captured_at: Some(captured_at), ..frame };
        let frame = match &self.tamper {
            Some(tamper) => tamper(&self.sensor.spec().name, frame),
            None => frame,
        };
        self.sensor.publish(frame)
    }

    /// The frame in the sensor's buffers, where a camera's driver would have put it.
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
        let [height, width] = self.sensor.spec().depth_shape();
        let (mut image, mut depth) = (self.sensor.buffer(), self.sensor.depth_buffer());
        let camera = self.mount.camera(links, width, height);
        instant.render(&camera, &mut image, depth.values_mut());
        CameraFrame {
            image: image.freeze(),
            depth: Some(depth.freeze()),
            intrinsics: camera.intrinsics,
            extrinsics: camera.extrinsics,
            captured_at: None,
        }
    }
}

/// What the first `count` cameras of a robot look like.
pub(crate) fn specs(count: usize, width: usize, height: usize) -> impl Iterator<Item = CameraSpec> {
    Mount::first(count).map(move |mount| CameraSpec::rgbd(mount.name(), height, width))
}

/// Draws `count` instants for every camera, along a motion made up so that its end leads into its beginning.
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
