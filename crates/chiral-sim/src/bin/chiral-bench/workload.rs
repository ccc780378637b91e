//! What is observed: prepared pictures that are published again and again, and a robot that only records when
//! actions arrive.

use std::str::FromStr;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use chiral_proto::action::Action;
use chiral_proto::{ActionSpec, CameraSpec, ProprioSpec, lock};
use chiral_server::{
    ActionContext, CameraFrame, CameraSensor, ResetOutcome, ResetRequest, Robot, RobotError, Sensors,
    monotonic,
};

/// The size of an observation.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Workload {
    /// 8 cameras of 640 x 480 with depth, 17.2 MB.
    L,
    /// 3 cameras of 224 x 224, 0.45 MB.
    M,
    /// 2 proprios of 7 values and no camera.
    S,
    /// One camera with pictures of this many bytes.
    Bytes(usize),
}

impl FromStr for Workload {
    type Err = String;

    fn from_str(text: &str) -> Result<Workload, String> {
        match text {
            "L" => Ok(Workload::L),
            "M" => Ok(Workload::M),
            "S" => Ok(Workload::S),
            bytes => bytes
                .parse()
                .map(Workload::Bytes)
                .map_err(|_| format!("expected L, M, S or a number of bytes, found {bytes:?}")),
        }
    }
}

impl std::fmt::Display for Workload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Workload::Bytes(bytes) => write!(f, "{bytes}"),
            letter => write!(f, "{letter:?}"),
        }
    }
}

impl Workload {
    fn cameras(self) -> Vec<CameraSpec> {
        match self {
            Workload::L => (0..8).map(|i| CameraSpec::rgbd(format!("cam_{i}"), 480, 640)).collect(),
            Workload::M => (0..3).map(|i| CameraSpec::rgb(format!("cam_{i}"), 224, 224)).collect(),
            Workload::S => Vec::new(),
            Workload::Bytes(bytes) => {
                vec![CameraSpec { image_shape: [1, bytes, 1], ..CameraSpec::rgb("cam_0", 1, bytes) }]
            }
        }
    }

    fn proprios(self) -> Vec<ProprioSpec> {
        match self {
            Workload::Bytes(_) => Vec::new(),
            _ => [("joint_pos", "rad"), ("joint_vel", "rad/s")]
                .map(|(name, unit)| ProprioSpec::new(name, 7, unit))
                .into(),
        }
    }
}

/// Sensors that publish prepared pictures.
pub(crate) struct Prepared {
    pub(crate) sensors: Sensors,
    cameras: Vec<(CameraSensor, [CameraFrame; LEVELS.len()])>,
    turn: usize,
}

/// The values that pictures are filled with, in turn.
const LEVELS: [u8; 2] = [63, 64];

impl Prepared {
    /// Declares the sensors; draws nothing yet.
    pub(crate) fn new(workload: Workload) -> Result<Prepared> {
        let sensors = Sensors::new(workload.cameras(), workload.proprios())?;
        let cameras =
            sensors.camera_specs().map(|spec| Ok((sensors.camera(&spec.name)?, Default::default())));
        let cameras = cameras.collect::<Result<_>>()?;
        Ok(Prepared { sensors, cameras, turn: 0 })
    }

    /// Draws all pictures into the sensors' buffers. Afterwards every sensor has published.
    pub(crate) fn prepare(&mut self) -> Result<()> {
        LEVELS.iter().try_for_each(|_| self.draw())
    }

    /// Draws the next picture of every camera into a fresh buffer and publishes it.
    pub(crate) fn draw(&mut self) -> Result<()> {
        let next = (self.turn + 1) % LEVELS.len();
        for (camera, frames) in &mut self.cameras {
            frames[next] = drawn(camera, LEVELS[next]);
        }
        self.publish()
    }

    /// Publishes the next prepared picture of every camera as captured now. Copies nothing.
    pub(crate) fn publish(&mut self) -> Result<()> {
        self.turn += 1;
        for (camera, frames) in &self.cameras {
            camera.publish(frames[self.turn % LEVELS.len()].clone())?;
        }
        let proprios: Vec<_> = self.sensors.proprio_specs().map(|spec| spec.name.clone()).collect();
        proprios.iter().try_for_each(|name| self.sensors.update_proprio(name, &[0.5; 7]))?;
        Ok(())
    }

    /// Bytes of all tensors in an observation.
    pub(crate) fn observed_bytes(&self) -> Result<usize> {
        let obs = self.sensors.snapshot().context("a sensor has not published yet")?;
        let images =
            obs.cameras.iter().flat_map(|camera| std::iter::once(&camera.image).chain(&camera.depth));
        let proprios = obs.proprios.iter().map(|proprio| proprio.data.data());
        Ok(images.map(|image| image.data()).chain(proprios).map(|data| data.len()).sum())
    }
}

fn drawn(camera: &CameraSensor, level: u8) -> CameraFrame {
    let mut image = camera.buffer();
    image.fill(level);
    let depth = camera.spec().depth_shape.map(|_| {
        let mut depth = camera.depth_buffer();
        depth.fill(level);
        depth.freeze()
    });
    CameraFrame { image: image.freeze(), depth, ..CameraFrame::default() }
}

/// The actions that arrived: the first value of each, and its time in nanoseconds of CLOCK_MONOTONIC.
pub(crate) type Arrivals = Arc<Mutex<Vec<(u32, i64)>>>;

/// Records the arrival of actions and moves nothing.
pub(crate) struct RecordingRobot(pub(crate) Arrivals);

impl Robot for RecordingRobot {
    fn action_spec(&self) -> ActionSpec {
        // Without a rate nothing is paced: what is measured is the way to the robot.
        ActionSpec::joint_positions(7, 0.0)
    }

    fn reset(&mut self, _request: &ResetRequest) -> Result<ResetOutcome, RobotError> {
        Ok(ResetOutcome::default())
    }

    fn apply_action(&mut self, action: &Action, _context: &ActionContext) -> Result<(), RobotError> {
        let at = monotonic().now().0;
        lock(&self.0).push((action.values[0] as u32, at));
        Ok(())
    }
}
