//! For tests with several processes: the child processes they start, and a simulated robot that records the
//! calls it receives.

use std::{
    net::TcpStream,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, MutexGuard},
    thread,
    time::{Duration, Instant},
};

use chiral_client::{ActionChunk, ActionSpec, Timestamp, action::Action};
use chiral_server::{
    ActionContext, PolicyServer, PolicyServerBuilder, ResetOutcome, ResetRequest, Robot, RobotError,
    StepOutcome, monotonic,
};
use chiral_sim::robot::{SimConfig, SimRobot, start};
use rustix::process::{Pid, Signal, kill_process};

use super::{TEST_TIMEOUT, wait_until};

/// A child process. Dropping it kills it.
pub struct Process(pub Child);

impl Process {
    /// Starts `chiral-sim` without output.
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

    /// Waits for the process to exit.
    pub async fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("the process exits", || {
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

/// Waits until `address` accepts connections.
pub fn wait_until_listening(address: &str) {
    let started = Instant::now();
    while TcpStream::connect(address).is_err() {
        assert!(started.elapsed() < TEST_TIMEOUT, "nothing listens on {address}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// The calls that a robot received.
#[derive(Default)]
pub struct RobotLog {
    pub seeds: Vec<u64>,
    /// The rows of actions and steps, each with the time at which it arrived.
    pub rows: Vec<(Vec<f32>, Timestamp)>,
    /// `hold` and `on_disconnect`.
    pub end_calls: Vec<&'static str>,
}

impl RobotLog {
    /// How often the robot was told that its controller is gone, each time right after a hold.
    pub fn lost_controllers(&self) -> usize {
        let lost = self.end_calls.windows(2).filter(|calls| calls[1] == "on_disconnect");
        lost.inspect(|calls| assert_eq!(calls[0], "hold", "{:?}", self.end_calls)).count()
    }
}

/// A [`RobotLog`] that the test reads while the robot writes it.
pub type SharedLog = Arc<Mutex<RobotLog>>;

/// A simulated robot that records the calls it receives.
pub struct RecordingRobot {
    robot: SimRobot,
    log: SharedLog,
    is_paced: bool,
}

impl RecordingRobot {
    /// Starts the robot; returns a builder of its server and its log.
    pub fn start(config: SimConfig) -> (PolicyServerBuilder, SharedLog) {
        RecordingRobot::build(config, true)
    }

    /// Starts a robot that declares no rate, and whose server drops nothing as late: every action that is sent
    /// is recorded when it arrives.
    pub fn start_unpaced(config: SimConfig) -> (PolicyServerBuilder, SharedLog) {
        let (builder, log) = RecordingRobot::build(config, false);
        (builder.max_action_lateness(None), log)
    }

    fn build(config: SimConfig, is_paced: bool) -> (PolicyServerBuilder, SharedLog) {
        let (robot, sensors) = start(config).unwrap();
        let log = SharedLog::default();
        let robot = RecordingRobot { robot, log: Arc::clone(&log), is_paced };
        (PolicyServer::builder(robot, sensors), log)
    }

    fn log(&self) -> MutexGuard<'_, RobotLog> {
        self.log.lock().unwrap()
    }
}

impl Robot for RecordingRobot {
    fn action_spec(&self) -> ActionSpec {
        let spec = self.robot.action_spec();
        if self.is_paced { spec } else { ActionSpec { control_hz: 0.0, ..spec } }
    }

    fn reset(&mut self, request: &ResetRequest) -> Result<ResetOutcome, RobotError> {
        self.log().seeds.extend(request.seed);
        self.robot.reset(request)
    }

    fn apply_action(&mut self, action: &Action, context: &ActionContext) -> Result<(), RobotError> {
        let now = monotonic().now();
        self.log().rows.push((action.values.clone(), now));
        self.robot.apply_action(action, context)
    }

    fn step(
        &mut self,
        chunk: &ActionChunk,
        context: &ActionContext,
    ) -> Result<Option<StepOutcome>, RobotError> {
        let now = monotonic().now();
        self.log().rows.extend(chunk.iter().map(|row| (row.to_vec(), now)));
        self.robot.step(chunk, context)
    }

    fn is_lock_step(&self) -> bool {
        self.robot.is_lock_step()
    }

    fn hold(&mut self) {
        self.robot.hold();
        self.log().end_calls.push("hold");
    }

    fn on_disconnect(&mut self) {
        self.log().end_calls.push("on_disconnect");
    }
}
