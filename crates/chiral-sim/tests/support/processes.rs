//! The company of tests with processes: those they start, and a simulated robot that notes what it is told.

#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    reason = "shared by several test binaries, each of which uses its part"
)]
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]

use std::{
    net::{TcpListener, TcpStream},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, MutexGuard},
    thread,
    time::{Duration, Instant},
};

use chiral_client::{ActionChunk, ActionSpec, Timestamp, ValueMap, action::Action};
use chiral_server::{ActionContext, Robot, RobotError, StepOutcome};
use chiral_sim::robot::SimRobot;
use rustix::process::{Pid, Signal, kill_process};

/// For what must come.
pub const GUARD: Duration = Duration::from_secs(20);

/// A process of a test's own, gone at its end.
pub struct Process(pub Child);

impl Process {
    /// `chiral-sim`, silent.
    pub fn start(arguments: &[&str]) -> Process {
        Process::spawn(Process::command(arguments).stdout(Stdio::null()).stderr(Stdio::null()))
    }

    pub fn command(arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_chiral-sim"));
        command.args(arguments);
        command
    }

    pub fn spawn(command: &mut Command) -> Process {
        Process(command.spawn().unwrap())
    }

    pub fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    /// How it ended, as it must soon.
    pub async fn ended(&mut self) -> ExitStatus {
        let mut status = None;
        until("the process ends", || {
            status = self.0.try_wait().unwrap();
            status.is_some()
        })
        .await;
        status.unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An address on loopback that was free a moment ago.
pub fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// Waits until somebody accepts connections there.
pub fn until_it_listens(address: &str) {
    let began = Instant::now();
    while TcpStream::connect(address).is_err() {
        assert!(began.elapsed() < GUARD, "nobody listens on {address}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Waits for what must come, and never for longer than a test may hang.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < GUARD, "{what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// What a robot was told.
#[derive(Default)]
pub struct Told {
    pub seeds: Vec<u64>,
    /// Rows of actions and steps, and when they arrived.
    pub rows: Vec<(Vec<f32>, Timestamp)>,
    pub ends: Vec<&'static str>,
}

/// The simulated robot, and what it was told.
pub struct Watched {
    pub robot: SimRobot,
    pub told: Arc<Mutex<Told>>,
}

impl Watched {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap()
    }
}

impl Robot for Watched {
    fn action_spec(&self) -> ActionSpec {
        self.robot.action_spec()
    }

    fn reset(&mut self, seed: Option<u64>, options: &ValueMap) -> Result<ValueMap, RobotError> {
        self.told().seeds.extend(seed);
        self.robot.reset(seed, options)
    }

    fn apply_action(&mut self, action: &Action, context: &ActionContext) -> Result<(), RobotError> {
        let now = chiral_server::monotonic().now();
        self.told().rows.push((action.values.clone(), now));
        self.robot.apply_action(action, context)
    }

    fn step(&mut self, chunk: &ActionChunk, context: &ActionContext) -> Result<StepOutcome, RobotError> {
        let now = chiral_server::monotonic().now();
        self.told().rows.extend(chunk.iter().map(|row| (row.to_vec(), now)));
        self.robot.step(chunk, context)
    }

    fn is_lock_step(&self) -> bool {
        self.robot.is_lock_step()
    }

    fn hold(&mut self) {
        self.robot.hold();
        self.told().ends.push("hold");
    }

    fn on_disconnect(&mut self) {
        self.told().ends.push("on_disconnect");
    }
}
