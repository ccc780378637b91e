//! The simulated robot: a [`Robot`] and its [`Sensors`], with the threads that advance and publish them.
//!
//! What a tick does is in `world`, how an image is made in `cameras`.
//!
//! There are two paces. In *real time*, one thread advances the arm at 500 Hz and each camera has a thread
//! that captures at its rate. In *lock-step*, the world moves only within `step`, by exactly `1 / control_hz`
//! per row, and `step` publishes every sensor. An episode's time begins with its first action: `apply_action`
//! begins or resumes real time, `step` begins lock-step.
//!
//! Lock order: a camera's lock before the world's. Joints are published under the world's lock and images
//! under their camera's. Both locks are held from reading the world until the publication is done, so that
//! **nothing older is ever published after something newer**.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::{BuildHasher, Hasher};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use chiral_proto::action::Action;
use chiral_proto::{ActionChunk, ActionSpec, ProprioSpec, Value, ValueMap, lock, value};
use chiral_server::{
    ActionContext, Error, ResetOutcome, ResetRequest, Robot, RobotError, SensorError, Sensors, StepOutcome,
    monotonic,
};
use nalgebra::Point3;

use crate::arm::{LOWER, UPPER};
use crate::camera::Mount;
pub use crate::cameras::Tamper;
use crate::cameras::{self, Camera};
use crate::scene::Scene;
use crate::world::{Pace, World};

/// The rate at which joints are published in real time, and about the rate of the ticks in lock-step, Hz.
pub const PHYSICS_HZ: f64 = 500.0;

/// The robot to simulate.
#[derive(Clone)]
pub struct SimConfig {
    /// Columns of every camera's image.
    pub width: usize,
    /// Rows of every camera's image.
    pub height: usize,
    /// Images per second of every camera, in real time.
    pub fps: f64,
    /// The number of cameras: `wrist_cam`, `head_cam`, then fixed ones around the table.
    pub cameras: usize,
    /// Rows of a chunk per second.
    pub control_hz: f64,
    /// The simulated time after which an episode is truncated, s.
    pub time_limit: f64,
    /// How long a reset takes, as a real arm needs time to move home, s.
    pub homing: f64,
    /// Draw this many instants once and replay them, whatever the arm does. For load tests, which measure the
    /// transport.
    pub prerender: Option<usize>,
    /// For tests: a fault between drawing and publishing.
    pub tamper: Option<Tamper>,
}

impl Default for SimConfig {
    /// Two cameras of 320 x 240 at 30 Hz, actions at 20 Hz, episodes of at most 6 s.
    fn default() -> SimConfig {
        SimConfig {
            width: 320,
            height: 240,
            fps: 30.0,
            cameras: 2,
            control_hz: 20.0,
            time_limit: 6.0,
            homing: 0.0,
            prerender: None,
            tamper: None,
        }
    }
}

impl SimConfig {
    /// Ticks of the world per row.
    fn ticks_per_row(&self) -> u32 {
        (PHYSICS_HZ / self.control_hz).round().max(1.0) as u32
    }

    fn new_world(&self, scene: Scene) -> World {
        World::new(scene, self.time_limit, 1.0 / (self.control_hz * f64::from(self.ticks_per_row())))
    }
}

impl fmt::Debug for SimConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SimConfig { width, height, fps, cameras, control_hz, .. } = self;
        write!(
            f,
            "SimConfig({cameras} cameras of {width} x {height} at {fps} Hz, actions at {control_hz} Hz)"
        )
    }
}

/// Starts the robot's threads, which end when the robot is dropped. Every sensor has published once before
/// this returns.
///
/// # Errors
/// [`Error::Declaration`] for an invalid size or rate, [`Error::Start`] if a thread cannot be started.
pub fn start(config: SimConfig) -> Result<(SimRobot, Sensors), Error> {
    for (name, value) in
        [("fps", config.fps), ("control_hz", config.control_hz), ("time_limit", config.time_limit)]
    {
        if !(value > 0.0 && value.is_finite()) {
            return Err(Error::Declaration(format!("expected a positive {name}, found {value}")));
        }
    }
    let SimConfig { width, height, cameras: count, .. } = config;
    if width == 0 || height == 0 {
        return Err(Error::Declaration(format!(
            "expected images of at least one pixel, found {width} x {height}"
        )));
    }
    let proprios = [ProprioSpec::new("joint_pos", 7, "rad"), ProprioSpec::new("joint_vel", 7, "rad/s")];
    let sensors = Sensors::new(cameras::specs(count, width, height), proprios)?;
    let scene = Scene::sample(0);
    let mut cameras: Vec<Camera> = Mount::first(count)
        .map(|mount| {
            Camera::new(
                mount,
                sensors.camera(&mount.name()).expect("declared just now"),
                config.tamper.clone(),
            )
        })
        .collect();
    if let Some(instants) = config.prerender {
        cameras::prerender(&mut cameras, &scene, instants);
    }
    let world = Mutex::new(config.new_world(scene));
    let shared = Arc::new(Shared { world, cameras, sensors: sensors.clone(), config, stop: Stop::default() });
    shared.publish_joints(&lock(&shared.world));
    shared.publish_cameras().map_err(|error| Error::Declaration(error.to_string()))?;
    let mut robot = SimRobot { shared, threads: Vec::new() };
    robot.spawn("sim-physics".to_owned(), Shared::run_physics)?;
    for i in 0..count {
        robot.spawn(format!("sim-camera-{i}"), move |shared| shared.run_camera(&shared.cameras[i]))?;
    }
    Ok((robot, sensors))
}

/// A Panda arm in front of a table, to be served by a [`PolicyServer`](chiral_server::PolicyServer).
///
/// `reset` takes the option `target`, a list of x, y, z in metres, in place of the seed's own target; it
/// ignores other options.
#[derive(Debug)]
pub struct SimRobot {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl SimRobot {
    fn spawn(&mut self, name: String, run: impl FnOnce(&Shared) + Send + 'static) -> Result<(), Error> {
        let shared = Arc::clone(&self.shared);
        let spawned = thread::Builder::new().name(name).spawn(move || run(&shared));
        self.threads
            .push(spawned.map_err(|source| Error::Start { what: "a thread of the simulation", source })?);
        Ok(())
    }
}

impl Robot for SimRobot {
    fn action_spec(&self) -> ActionSpec {
        ActionSpec {
            names: (1..=7).map(|i| format!("panda_joint{i}")).collect(),
            low: LOWER.map(|low| low as f32).to_vec(),
            high: UPPER.map(|high| high as f32).to_vec(),
            ..ActionSpec::joint_positions(7, self.shared.config.control_hz)
        }
    }

    fn reset(&mut self, request: &ResetRequest) -> Result<ResetOutcome, RobotError> {
        let scene = Scene::sample(request.seed.unwrap_or_else(fresh_seed));
        let scene = match request.options.get("target") {
            Some(target) => scene.with_target(point(target)?),
            None => scene,
        };
        thread::sleep(Duration::from_secs_f64(self.shared.config.homing));
        let mut world = lock(&self.shared.world);
        *world = self.shared.config.new_world(scene);
        self.shared.publish_joints(&world);
        drop(world);
        self.shared.publish_cameras()?;
        Ok(value::map([("instruction", "reach the red ball".into())]).into())
    }

    fn apply_action(&mut self, action: &Action, _context: &ActionContext) -> Result<(), RobotError> {
        let mut world = lock(&self.shared.world);
        world.pace = Pace::RealTime;
        world.command(action);
        Ok(())
    }

    fn step(
        &mut self,
        chunk: &ActionChunk,
        context: &ActionContext,
    ) -> Result<Option<StepOutcome>, RobotError> {
        let mut world = lock(&self.shared.world);
        world.pace = Pace::LockStep;
        let mut reward = 0.0;
        for row in chunk.iter() {
            world.command(row);
            for _ in 0..self.shared.config.ticks_per_row() {
                reward += world.advance().reward;
            }
            let outcome = world.outcome();
            if outcome.terminated || outcome.truncated || context.is_over() {
                break;
            }
        }
        self.shared.publish_joints(&world);
        let outcome = world.outcome();
        drop(world);
        self.shared.publish_cameras()?;
        let info = value::map([("success", outcome.success.into())]);
        Ok(Some(StepOutcome::new(reward).with_end(outcome.terminated, outcome.truncated).with_info(info)))
    }

    fn metadata(&self) -> ValueMap {
        let names: Value = Mount::first(self.shared.cameras.len()).map(Mount::name).collect();
        value::map([
            ("robot", "Franka Panda, simulated".into()),
            ("cameras", names),
            ("action_shape", vec![1, 7].into()),
            ("action_N", 1.into()),
            ("action_D", 7.into()),
            ("control_hz", self.shared.config.control_hz.into()),
        ])
    }

    fn is_lock_step(&self) -> bool {
        true
    }

    /// Stops the arm where it is. Real time continues, so that observers still receive images.
    fn hold(&mut self) {
        let mut world = lock(&self.shared.world);
        world.stop();
        if world.pace == Pace::LockStep {
            world.pace = Pace::RealTime;
        }
    }
}

impl Drop for SimRobot {
    fn drop(&mut self) {
        self.shared.stop.set();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// What the robot's methods and its threads share.
struct Shared {
    world: Mutex<World>,
    cameras: Vec<Camera>,
    sensors: Sensors,
    config: SimConfig,
    stop: Stop,
}

impl Shared {
    /// Publishes everything but the images. The lock guarantees that nothing newer has been published.
    fn publish_joints(&self, world: &MutexGuard<'_, World>) {
        let [position, velocity] = world.joints();
        let now = monotonic().now();
        for (name, values) in [("joint_pos", position), ("joint_vel", velocity)] {
            self.sensors.publish_proprio(name, &values, now).expect("declared with seven values");
        }
        self.sensors.set_timestamp(world.seconds());
        self.sensors.set_extra(world.extra());
    }

    /// Publishes an image of every camera. All of them show the same instant if no time passes meanwhile.
    fn publish_cameras(&self) -> Result<(), SensorError> {
        let now = monotonic().now();
        self.cameras.iter().try_for_each(|camera| camera.publish(|| Some(lock(&self.world).view(now))))
    }

    fn run_physics(&self) {
        // After a delay of more ticks than this the world skips the rest instead of catching up.
        const MAX_TICKS_AT_ONCE: u32 = 50;
        let tick = Duration::from_secs_f64(1.0 / PHYSICS_HZ);
        let mut due = Instant::now() + tick;
        while self.stop.wait_until(due) {
            let ticks = 1 + (Instant::now().duration_since(due).as_secs_f64() / tick.as_secs_f64()) as u32;
            due += tick * ticks;
            let mut world = lock(&self.world);
            if world.pace == Pace::RealTime {
                for _ in 0..ticks.min(MAX_TICKS_AT_ONCE) {
                    world.advance();
                }
            }
            if world.pace != Pace::LockStep {
                self.publish_joints(&world);
            }
        }
    }

    fn run_camera(&self, camera: &Camera) {
        let period = Duration::from_secs_f64(1.0 / self.config.fps);
        let mut due = Instant::now() + period;
        while self.stop.wait_until(due) {
            let late = Instant::now().duration_since(due).as_secs_f64();
            due += period * (1 + (late / period.as_secs_f64()) as u32);
            let view = || {
                let world = lock(&self.world);
                (world.pace != Pace::LockStep).then(|| world.view(monotonic().now()))
            };
            if let Err(error) = camera.publish(view) {
                tracing::error!("camera stopped, cannot publish: {error}");
                return;
            }
        }
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.config.fmt(f)
    }
}

/// Ends threads, including those that wait for their next deadline.
#[derive(Default)]
struct Stop {
    is_set: Mutex<bool>,
    changed: Condvar,
}

impl Stop {
    fn set(&self) {
        *lock(&self.is_set) = true;
        self.changed.notify_all();
    }

    /// Waits until `deadline`; returns whether the thread should continue.
    fn wait_until(&self, deadline: Instant) -> bool {
        let mut is_set = lock(&self.is_set);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if *is_set || left.is_zero() {
                return !*is_set;
            }
            is_set = self.changed.wait_timeout(is_set, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Returns a different number every time.
fn fresh_seed() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// Parses the position of a target requested by a peer, m.
fn point(value: &Value) -> Result<Point3<f64>, RobotError> {
    let numbers: Option<Vec<f64>> = value.as_list().and_then(|list| list.iter().map(Value::as_f64).collect());
    match numbers.as_deref() {
        Some(&[x, y, z]) if [x, y, z].iter().all(|number| number.is_finite()) => Ok(Point3::new(x, y, z)),
        _ => Err(format!("option target: expected a list of three finite numbers, found {value:?}").into()),
    }
}
