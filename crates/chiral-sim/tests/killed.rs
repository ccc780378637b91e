//! What happens when the peer's process is killed or suspended, with real processes and real sockets.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]

mod support;

use std::time::{Duration, Instant};

use chiral_client::Error;
use chiral_server::PolicyServerBuilder;
use chiral_sim::robot::SimConfig;
use rustix::process::Signal;
use support::{
    TEST_TIMEOUT, client_builder, free_address, free_locator, in_time,
    processes::{Process, RecordingRobot},
    wait_until,
};

/// Shorter than Zenoh's lease.
const IDLE_TIMEOUT: Duration = Duration::from_secs(2);

/// What happens to the peer's process.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Loss {
    Killed,
    /// Suspended by SIGSTOP: its connections stay open, and nothing arrives any more.
    Suspended,
}

impl Loss {
    fn apply(self, process: &mut Process) {
        match self {
            Loss::Killed => process.kill(),
            Loss::Suspended => process.signal(Signal::STOP),
        }
    }

    /// How long the other peer may take to detect it.
    fn detection_timeout(self) -> Duration {
        match self {
            Loss::Killed => Duration::from_secs(2),
            Loss::Suspended => IDLE_TIMEOUT + Duration::from_millis(1_500),
        }
    }
}

#[tokio::test]
async fn every_call_fails_and_nothing_hangs_after_the_server_is_killed() {
    check_server_of_each_transport(Loss::Killed).await;
}

#[tokio::test]
async fn every_call_fails_and_nothing_hangs_after_the_server_is_suspended() {
    check_server_of_each_transport(Loss::Suspended).await;
}

async fn check_server_of_each_transport(loss: Loss) {
    let address = free_address();
    check_server(loss, &["--bind", &address], &format!("ws://{address}")).await;
    let locator = free_locator();
    check_server(loss, &["--zenoh", &locator, "--no-discovery"], &locator).await;
}

async fn check_server(loss: Loss, listen: &[&str], uri: &str) {
    let arguments = [&["serve"], listen, &["--width", "64", "--height", "48", "--quiet"]].concat();
    let mut server = Process::start(&arguments);
    let builder = || client_builder(uri).idle_timeout(IDLE_TIMEOUT);
    let env = builder().connect().await.unwrap();
    let (obs, _) = env.reset().await.unwrap();
    env.start_obs_stream(100.0).await.unwrap();
    env.start_action_dispatch(100.0).unwrap();
    env.next_obs(TEST_TIMEOUT).await.unwrap();
    let acting = env.clone();
    let home = obs.proprio("joint_pos").unwrap().values().into_owned();
    let acting = tokio::spawn(async move { while acting.put_action(&home).await.is_ok() {} });

    loss.apply(&mut server);
    let started = Instant::now();
    let ended = async {
        acting.await.unwrap();
        assert!(
            started.elapsed() < loss.detection_timeout(),
            "{uri}, {loss:?}: detected after {:?}",
            started.elapsed()
        );
        assert!(matches!(env.reset().await, Err(Error::Disconnected { .. })));
        assert!(matches!(env.latest_obs(), Err(Error::Disconnected { .. })));
        assert!(matches!(env.next_obs(TEST_TIMEOUT).await, Err(Error::Disconnected { .. })));
        assert!(matches!(env.put_action([0.0; 7]).await, Err(Error::Disconnected { .. })));
        env.close().await.unwrap();
    };
    in_time(ended).await;
    // A new server takes its place at once, or the same one after it is resumed.
    let _server = match loss {
        Loss::Killed => Process::start(&arguments),
        Loss::Suspended => {
            tokio::time::sleep(Duration::from_secs(4).saturating_sub(started.elapsed())).await;
            server.signal(Signal::CONT);
            server
        }
    };
    let env = builder().connect().await.unwrap();
    let episode = if loss == Loss::Killed { 1 } else { 2 };
    assert_eq!(env.reset().await.unwrap().0.episode, episode);
}

#[tokio::test]
async fn the_robot_holds_and_serves_the_next_client_after_a_client_is_killed() {
    check_client_of_each_transport(Loss::Killed).await;
}

#[tokio::test]
async fn the_robot_holds_and_serves_the_next_client_after_a_client_is_suspended() {
    check_client_of_each_transport(Loss::Suspended).await;
}

async fn check_client_of_each_transport(loss: Loss) {
    let address = free_address();
    let bind: std::net::SocketAddr = address.parse().unwrap();
    check_client(loss, |builder| builder.bind(bind), &format!("ws://{address}")).await;
    let locator = free_locator();
    check_client(loss, |builder| builder.listen_zenoh(&locator).discovery(false), &locator).await;
}

async fn check_client(
    loss: Loss,
    listen: impl FnOnce(PolicyServerBuilder) -> PolicyServerBuilder,
    uri: &str,
) {
    let (builder, log) = RecordingRobot::start(SimConfig { width: 64, height: 48, ..SimConfig::default() });
    let server = listen(builder.idle_timeout(IDLE_TIMEOUT)).build().unwrap();
    let handle = server.handle();
    tokio::spawn(server.serve());
    let has_held = || log.lock().unwrap().lost_controllers() == 1;

    let mut policy = Process::start(&["policy", uri, "--episodes", "1000", "--quiet"]);
    wait_until("the policy drives", || handle.stats().rows_applied > 5).await;
    loss.apply(&mut policy);
    let started = Instant::now();
    wait_until("the robot holds", has_held).await;
    assert!(
        started.elapsed() < loss.detection_timeout(),
        "{uri}, {loss:?}: detected after {:?}",
        started.elapsed()
    );

    let env = client_builder(uri).connect().await.unwrap();
    let (obs, _) = env.reset().await.unwrap();
    let home = obs.proprio("joint_pos").unwrap().values().into_owned();
    if loss == Loss::Suspended {
        // It is resumed too late: its session is closed, and it moves nothing.
        policy.signal(Signal::CONT);
        assert!(!policy.wait().await.success());
    }
    assert!(env.step(&home).await.unwrap().obs.seq > obs.seq);
    assert!(has_held(), "the robot has lost its controller only once");
}
