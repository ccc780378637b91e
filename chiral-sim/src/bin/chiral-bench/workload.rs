//! What is observed: prebuilt pictures, published again and again, and a robot that only notes when an action reached it.

use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use bytes::Bytes;
use chiral_proto::action::Action;
use chiral_proto::{ActionSpec, CameraSpec, ProprioSpec, ValueMap};
use chiral_server::{ActionContext, CameraFrame, CameraSensor, Robot, RobotError, Sensors, monotonic};

/// An observation's size.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Workload {
    /// 8 cameras of 640 x 480 with depth, 17.2 MB.
    L,
    /// 3 cameras of 224 x 224, 0.45 MB.
    M,
    /// 2 proprios of 7 values and no camera.
    S,
    /// One camera of so many bytes.
    Bytes(usize),
}

impl FromStr for Workload {
    type Err = String;

    fn from_str(text: &str) -> Result<Workload, String> {
        match text {
            "L" => Ok(Workload::L),
            "M" => Ok(Workload::M),
            "S" => Ok(Workload::S),
            bytes => {
                bytes.parse().map(Workload::Bytes).map_err(|_| format!("expected L, M, S or a number of bytes, found {bytes:?}"))
            }
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
            Workload::Bytes(bytes) => vec![CameraSpec { image_shape: [1, bytes, 1], ..CameraSpec::rgb("cam_0", 1, bytes) }],
        }
    }

    fn proprios(self) -> Vec<ProprioSpec> {
        match self {
            Workload::Bytes(_) => Vec::new(),
            _ => [("joint_pos", "rad"), ("joint_vel", "rad/s")].map(|(name, unit)| ProprioSpec::new(name, 7, unit)).into(),
        }
    }
}

/// Sensors that publish what was prepared.
pub(crate) struct Prepared {
    pub(crate) sensors: Sensors,
    cameras: Vec<(CameraSensor, [CameraFrame; 2])>,
    turn: usize,
}

impl Prepared {
    /// Everything has published once.
    pub(crate) fn new(workload: Workload) -> Result<Prepared> {
        let sensors = Sensors::new(workload.cameras(), workload.proprios())?;
        let mut cameras = Vec::new();
        for spec in workload.cameras() {
            let len = spec.image_shape.iter().product::<usize>();
            let pixels = |level: u8| Bytes::from(vec![level; len]);
            let depth = |level: u8| spec.has_depth.then(|| Bytes::from(vec![level; len / 3 * 4]));
            let frame = |level| CameraFrame { image: pixels(level), depth: depth(level), ..CameraFrame::default() };
            cameras.push((sensors.camera(&spec.name)?, [frame(63), frame(64)]));
        }
        let mut prepared = Prepared { sensors, cameras, turn: 0 };
        prepared.publish()?;
        Ok(prepared)
    }

    /// The next picture of every camera, captured now. Nothing is copied.
    pub(crate) fn publish(&mut self) -> Result<()> {
        self.turn += 1;
        for (camera, frames) in &self.cameras {
            camera.publish(frames[self.turn % 2].clone())?;
        }
        let proprios: Vec<_> = self.sensors.proprio_specs().map(|spec| spec.name.clone()).collect();
        proprios.iter().try_for_each(|name| self.sensors.update_proprio(name, &[0.5; 7]))?;
        Ok(())
    }

    /// Bytes of all tensors of an observation.
    pub(crate) fn observed_bytes(&self) -> Result<usize> {
        let obs = self.sensors.snapshot().context("everything has published")?;
        let cameras = obs.cameras.iter().flat_map(|camera| std::iter::once(&camera.image).chain(&camera.depth));
        Ok(cameras.chain(obs.proprios.iter().map(|proprio| &proprio.data)).map(|tensor| tensor.data().len()).sum())
    }
}

/// When which action arrived: its first value, and nanoseconds of CLOCK_MONOTONIC.
pub(crate) type Arrivals = Arc<Mutex<Vec<(u32, i64)>>>;

/// Notes arrivals and moves nothing.
pub(crate) struct Noting(pub(crate) Arrivals);

impl Robot for Noting {
    fn action_spec(&self) -> ActionSpec {
        ActionSpec::joint_positions(7, 500.0)
    }

    fn reset(&mut self, _seed: Option<u64>, _options: &ValueMap) -> Result<ValueMap, RobotError> {
        Ok(ValueMap::new())
    }

    fn apply_action(&mut self, action: &Action, _context: &ActionContext) -> Result<(), RobotError> {
        let at = monotonic().now().0;
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((action.values[0] as u32, at));
        Ok(())
    }
}
