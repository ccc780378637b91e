//! What happens when the process on the other side is killed, with real processes and real sockets.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use chiral_client::{ActionChunk, ActionSpec, Error, PolicyClient, ValueMap, action::Action};
use chiral_server::{ActionContext, PolicyServer, PolicyServerBuilder, Robot, RobotError, StepOutcome};
use chiral_sim::robot::{SimConfig, SimRobot, start};

/// For what must come.
const GUARD: Duration = Duration::from_secs(20);
/// Within this either side knows that the other was killed.
const NOTICED: Duration = Duration::from_secs(2);

/// A process of this test's own, gone at its end.
struct Process(Child);

impl Process {
    fn start(arguments: &[&str]) -> Process {
        let program = env!("CARGO_BIN_EXE_chiral-sim");
        let child = Command::new(program).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        Process(child)
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn the_server_is_killed_the_next_call_fails_and_nothing_hangs() {
    let address = free_address();
    check_server_killed(["--bind", &address], &format!("ws://{address}")).await;
    let locator = format!("tcp/{}", free_address());
    check_server_killed(["--zenoh", &locator], &locator).await;
}

/// An address on loopback that was free a moment ago.
fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

async fn check_server_killed(listen: [&str; 2], uri: &str) {
    let arguments = [&["serve"], &listen[..], &["--width", "64", "--height", "48", "--quiet"]].concat();
    let mut server = Process::start(&arguments);
    let env = PolicyClient::builder(uri).quiet().deadline(GUARD).connect().await.unwrap();
    let (obs, _) = env.reset().await.unwrap();
    env.start_obs_stream(100.0).await.unwrap();
    env.start_action_dispatch(100.0).unwrap();
    env.next_obs(GUARD).await.unwrap();
    let acting = env.clone();
    let home = obs.proprio("joint_pos").unwrap().values().into_owned();
    let acting = tokio::spawn(async move { while acting.put_action(&home).await.is_ok() {} });

    server.kill();
    let killed = Instant::now();
    let ended = async {
        acting.await.unwrap();
        assert!(killed.elapsed() < NOTICED, "{uri}: noticed after {:?}", killed.elapsed());
        assert!(matches!(env.reset().await, Err(Error::Disconnected { .. })));
        assert!(matches!(env.latest_obs(), Err(Error::Disconnected { .. })));
        assert!(matches!(env.next_obs(GUARD).await, Err(Error::Disconnected { .. })));
        assert!(matches!(env.put_action([0.0; 7]).await, Err(Error::Disconnected { .. })));
        env.close().await.unwrap();
    };
    tokio::time::timeout(GUARD, ended).await.expect("nothing hangs");
    // Another one takes its place at once.
    let _server = Process::start(&arguments);
    let env = PolicyClient::builder(uri).quiet().deadline(GUARD).connect().await.unwrap();
    assert_eq!(env.reset().await.unwrap().0.episode, 1);
}

/// The simulated robot, its end of control noted.
struct Watched {
    robot: SimRobot,
    ends: Arc<Mutex<Vec<&'static str>>>,
}

impl Robot for Watched {
    fn action_spec(&self) -> ActionSpec {
        self.robot.action_spec()
    }

    fn reset(&mut self, seed: Option<u64>, options: &ValueMap) -> Result<ValueMap, RobotError> {
        self.robot.reset(seed, options)
    }

    fn apply_action(&mut self, action: &Action, context: &ActionContext) -> Result<(), RobotError> {
        self.robot.apply_action(action, context)
    }

    fn step(&mut self, chunk: &ActionChunk, context: &ActionContext) -> Result<StepOutcome, RobotError> {
        self.robot.step(chunk, context)
    }

    fn is_lock_step(&self) -> bool {
        self.robot.is_lock_step()
    }

    fn hold(&mut self) {
        self.robot.hold();
        self.ends.lock().unwrap().push("hold");
    }

    fn on_disconnect(&mut self) {
        self.ends.lock().unwrap().push("on_disconnect");
    }
}

#[tokio::test]
async fn the_client_is_killed_the_robot_holds_and_the_next_client_drives() {
    let address = free_address();
    let bind: std::net::SocketAddr = address.parse().unwrap();
    check_client_killed(|builder| builder.bind(bind), &format!("ws://{address}")).await;
    let locator = format!("tcp/{}", free_address());
    check_client_killed(|builder| builder.listen_zenoh(&locator), &locator).await;
}

async fn check_client_killed(listen: impl FnOnce(PolicyServerBuilder) -> PolicyServerBuilder, uri: &str) {
    let (robot, sensors) = start(SimConfig { width: 64, height: 48, ..SimConfig::default() }).unwrap();
    let ends = Arc::default();
    let server = listen(PolicyServer::builder(Watched { robot, ends: Arc::clone(&ends) }, sensors)).build().unwrap();
    let handle = server.handle();
    tokio::spawn(server.serve());

    let mut policy = Process::start(&["policy", uri, "--episodes", "1000", "--quiet"]);
    until("the policy drives", || handle.stats().rows_applied > 5).await;
    policy.kill();
    let killed = Instant::now();
    until("the robot holds", || *ends.lock().unwrap() == ["hold", "on_disconnect"]).await;
    assert!(killed.elapsed() < NOTICED, "{uri}: noticed after {:?}", killed.elapsed());

    let env = PolicyClient::builder(uri).quiet().deadline(GUARD).connect().await.unwrap();
    let (obs, _) = env.reset().await.unwrap();
    let home = obs.proprio("joint_pos").unwrap().values().into_owned();
    assert!(env.step(&home).await.unwrap().obs.seq > obs.seq);
    assert_eq!(*ends.lock().unwrap(), ["hold", "on_disconnect"], "once, and no more");
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < GUARD, "{what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
