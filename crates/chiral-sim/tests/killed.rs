//! What happens when the process on the other side is killed, or stops without a word, with real processes
//! and real sockets.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]

mod support;

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use chiral_client::{Error, PolicyClient};
use chiral_server::{PolicyServer, PolicyServerBuilder};
use chiral_sim::robot::{SimConfig, start};
use rustix::process::Signal;
use support::processes::{GUARD, Process, Told, Watched, free_address, until};

/// After so long without a word the other side is lost: Zenoh's lease, and what sessions over WebSocket are
/// told here.
const SILENCE: Duration = Duration::from_secs(2);

/// What sessions at this address are told: over Zenoh nothing, which has to notice by itself.
fn idle_timeout(uri: &str) -> Duration {
    if uri.starts_with("ws:") { SILENCE } else { GUARD }
}

/// What becomes of the process on the other side.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Killed,
    /// By SIGSTOP: its connections stay, and nothing comes any more.
    Stopped,
}

impl Fate {
    fn befall(self, process: &mut Process) {
        match self {
            Fate::Killed => process.kill(),
            Fate::Stopped => process.signal(Signal::STOP),
        }
    }

    /// Within this it is noticed.
    fn noticed(self) -> Duration {
        match self {
            Fate::Killed => Duration::from_secs(2),
            Fate::Stopped => SILENCE + Duration::from_millis(1_500),
        }
    }
}

#[tokio::test]
async fn the_server_is_killed_the_next_call_fails_and_nothing_hangs() {
    check_server_of_each_transport(Fate::Killed).await;
}

#[tokio::test]
async fn the_server_is_stopped_the_next_call_fails_and_nothing_hangs() {
    check_server_of_each_transport(Fate::Stopped).await;
}

async fn check_server_of_each_transport(fate: Fate) {
    let address = free_address();
    check_server(fate, &["--bind", &address], &format!("ws://{address}")).await;
    let locator = format!("tcp/{}", free_address());
    check_server(fate, &["--zenoh", &locator, "--no-discovery"], &locator).await;
}

async fn check_server(fate: Fate, listen: &[&str], uri: &str) {
    let arguments = [&["serve"], listen, &["--width", "64", "--height", "48", "--quiet"]].concat();
    let mut server = Process::start(&arguments);
    let builder = || PolicyClient::builder(uri).quiet().deadline(GUARD).idle_timeout(idle_timeout(uri));
    let env = builder().connect().await.unwrap();
    let (obs, _) = env.reset().await.unwrap();
    env.start_obs_stream(100.0).await.unwrap();
    env.start_action_dispatch(100.0).unwrap();
    env.next_obs(GUARD).await.unwrap();
    let acting = env.clone();
    let home = obs.proprio("joint_pos").unwrap().values().into_owned();
    let acting = tokio::spawn(async move { while acting.put_action(&home).await.is_ok() {} });

    fate.befall(&mut server);
    let began = Instant::now();
    let ended = async {
        acting.await.unwrap();
        assert!(began.elapsed() < fate.noticed(), "{uri}, {fate:?}: noticed after {:?}", began.elapsed());
        assert!(matches!(env.reset().await, Err(Error::Disconnected { .. })));
        assert!(matches!(env.latest_obs(), Err(Error::Disconnected { .. })));
        assert!(matches!(env.next_obs(GUARD).await, Err(Error::Disconnected { .. })));
        assert!(matches!(env.put_action([0.0; 7]).await, Err(Error::Disconnected { .. })));
        env.close().await.unwrap();
    };
    tokio::time::timeout(GUARD, ended).await.expect("nothing hangs");
    // Another one takes its place at once; or the same, once it goes on.
    let _server = match fate {
        Fate::Killed => Process::start(&arguments),
        Fate::Stopped => {
            tokio::time::sleep(Duration::from_secs(4).saturating_sub(began.elapsed())).await;
            server.signal(Signal::CONT);
            server
        }
    };
    let env = builder().connect().await.unwrap();
    let episode = if fate == Fate::Killed { 1 } else { 2 };
    assert_eq!(env.reset().await.unwrap().0.episode, episode);
}

#[tokio::test]
async fn the_client_is_killed_the_robot_holds_and_the_next_client_drives() {
    check_client_of_each_transport(Fate::Killed).await;
}

#[tokio::test]
async fn the_client_is_stopped_the_robot_holds_and_the_next_client_drives() {
    check_client_of_each_transport(Fate::Stopped).await;
}

async fn check_client_of_each_transport(fate: Fate) {
    let address = free_address();
    let bind: std::net::SocketAddr = address.parse().unwrap();
    check_client(fate, |builder| builder.bind(bind), &format!("ws://{address}")).await;
    let locator = format!("tcp/{}", free_address());
    check_client(fate, |builder| builder.listen_zenoh(&locator).discovery(false), &locator).await;
}

async fn check_client(
    fate: Fate,
    listen: impl FnOnce(PolicyServerBuilder) -> PolicyServerBuilder,
    uri: &str,
) {
    let (robot, sensors) = start(SimConfig { width: 64, height: 48, ..SimConfig::default() }).unwrap();
    let told = Arc::<Mutex<Told>>::default();
    let builder = PolicyServer::builder(Watched { robot, told: Arc::clone(&told) }, sensors);
    let builder = builder.idle_timeout(idle_timeout(uri));
    let server = listen(builder).build().unwrap();
    let handle = server.handle();
    tokio::spawn(server.serve());
    let has_held = || told.lock().unwrap().ends == ["hold", "on_disconnect"];

    let mut policy = Process::start(&["policy", uri, "--episodes", "1000", "--quiet"]);
    until("the policy drives", || handle.stats().rows_applied > 5).await;
    fate.befall(&mut policy);
    let began = Instant::now();
    until("the robot holds", has_held).await;
    assert!(began.elapsed() < fate.noticed(), "{uri}, {fate:?}: noticed after {:?}", began.elapsed());

    let env = PolicyClient::builder(uri).quiet().deadline(GUARD).connect().await.unwrap();
    let (obs, _) = env.reset().await.unwrap();
    let home = obs.proprio("joint_pos").unwrap().values().into_owned();
    if fate == Fate::Stopped {
        // It goes on, too late: it is told, and moves nothing.
        policy.signal(Signal::CONT);
        assert!(!policy.ended().await.success());
    }
    assert!(env.step(&home).await.unwrap().obs.seq > obs.seq);
    assert!(has_held(), "once, and no more");
}
