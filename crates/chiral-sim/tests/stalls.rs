//! What reaches the robot when a link is cut for seconds while a policy drives, over both transports and both
//! wires, between two hosts (network namespaces). `cargo xtask soak` runs it and shows the table that it
//! prints; the rules themselves are tested on virtual time, in `chiral-server/src/control/core/tests.rs`.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]

mod support;

use std::{
    env, thread,
    time::{Duration, Instant},
};

use chiral_client::{PutMode, Timestamp, ValueMap};
use chiral_proto::{Message, Notice, Request, codec::msgpack, message::ActionMessage};
use chiral_server::monotonic;
use chiral_sim::robot::SimConfig;
use support::{
    client_builder,
    hosts::{Host, INSIDE, decode_time, encode_time, in_namespace},
    processes::{Process, RecordingRobot},
    wait_until,
};
use tokio_tungstenite::tungstenite;
use zenoh::Wait;

const ADDRESS: &str = "10.0.1.1:8765";
const LOCATOR: &str = "tcp/10.0.1.1:7447";
/// How long the policy drives before the cut, and after the link is back: TCP may try again only after as long
/// as the cut lasted.
const BEFORE: Duration = Duration::from_secs(1);
/// An action that is carried out later than this is old: `max_action_lateness`, and what a busy machine adds.
const OLD_MS: f64 = 300.0;

/// How a policy sends its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    SendAction,
    Dispatch,
    Legacy,
}

#[test]
#[ignore = "minutes long: run by cargo xtask soak"]
fn a_cut_of_a_link_delivers_nothing_old_and_nothing_in_a_burst() {
    in_namespace("a_cut_of_a_link_delivers_nothing_old_and_nothing_in_a_burst", check_all());
}

async fn check_all() {
    println!(
        "| transport | way | rate | cut | rows applied | oldest row | older than {OLD_MS} ms | closer than half a period | the policy |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for (hz, cut_s) in [(50.0, 3), (20.0, 4), (50.0, 8)] {
        for way in [Way::SendAction, Way::Dispatch, Way::Legacy] {
            for uri in [format!("ws://{ADDRESS}"), LOCATOR.to_owned()] {
                check(way, &uri, hz, Duration::from_secs(cut_s)).await;
            }
        }
    }
}

async fn check(way: Way, uri: &str, hz: f64, cut: Duration) {
    let (robot, policy) = (Host(None), Host::new());
    robot.connect(("robot", "10.0.1.1"), &policy, ("policy", "10.0.1.2"));
    let config = SimConfig { width: 64, height: 48, control_hz: hz, ..SimConfig::default() };
    let (server, log) = RecordingRobot::start(config);
    let server = match uri.starts_with("ws") {
        true => server.bind(ADDRESS.parse::<std::net::SocketAddr>().unwrap()),
        false => server.listen_zenoh(LOCATOR).discovery(false).legacy_zenoh(way == Way::Legacy),
    };
    let server = server.build().unwrap();
    let handle = server.handle();
    let serving = tokio::spawn(server.serve());

    let this_test = env::current_exe().unwrap();
    let mut command = policy.command(this_test.to_str().unwrap());
    command.args(["--exact", "policy", "--ignored", "--nocapture"]).env(INSIDE, uri);
    let drives = BEFORE + 3 * cut;
    command
        .env("WAY", format!("{way:?}"))
        .env("HZ", hz.to_string())
        .env("SECONDS", drives.as_secs().to_string());
    let mut driving = Process::spawn(command.stdout(std::process::Stdio::null()));
    wait_until("the policy drives", || handle.stats().rows_applied > 5).await;
    tokio::time::sleep(BEFORE).await;
    policy.ip("link set policy down");
    tokio::time::sleep(cut).await;
    policy.ip("link set policy up");
    let ended_well = driving.wait().await.success();
    handle.shutdown();
    serving.await.unwrap().unwrap();
    // A process that is ending may keep the policy's namespace alive, and with it the link.
    robot.ip("link del robot");

    let rows = std::mem::take(&mut log.lock().unwrap().rows);
    let ages_ms: Vec<f64> = rows.iter().map(|(row, at)| ms_between(decode_time(row), *at)).collect();
    let oldest_ms = ages_ms.iter().copied().fold(0.0, f64::max);
    let old = ages_ms.iter().filter(|age| **age > OLD_MS).count();
    // Robots are called by a thread that may be woken late.
    let burst = rows.windows(2).filter(|rows| ms_between(rows[0].1, rows[1].1) < 450.0 / hz).count();
    let transport = if uri.starts_with("ws") { "WebSocket" } else { "Zenoh" };
    println!(
        "| {transport} | {way:?} | {hz} Hz | {} s | {} | {oldest_ms:.0} ms | {old} | {burst} | {} |",
        cut.as_secs(),
        rows.len(),
        if ended_well { "goes on" } else { "ends" }
    );
    // Where sending times are unknown, the first row after a stall cannot be told from a fresh one.
    let allowed = usize::from(way == Way::Legacy);
    assert!(old <= allowed, "{way:?} over {transport}: {old} rows were older than {OLD_MS} ms");
    assert_eq!(burst, 0, "{way:?} over {transport}");
    assert!(ended_well || cut > Duration::from_secs(4), "{way:?} over {transport}: the policy ended");
}

fn ms_between(earlier: Timestamp, later: Timestamp) -> f64 {
    (later.0 - earlier.0) as f64 * 1e-6
}

/// The policy, on its host: sends the time at a rate, for so many seconds. One host's clock counts for all
/// namespaces.
#[test]
#[ignore = "started by another test, in a namespace"]
fn policy() {
    let Ok(uri) = env::var(INSIDE) else { return };
    let hz: f64 = env::var("HZ").unwrap().parse().unwrap();
    let length = Duration::from_secs(env::var("SECONDS").unwrap().parse().unwrap());
    match (env::var("WAY").unwrap().as_str(), uri.starts_with("ws")) {
        ("Legacy", true) => drive_legacy_websocket(&uri, hz, length),
        ("Legacy", false) => drive_legacy_zenoh(&uri, hz, length),
        (way, _) => drive(&uri, hz, length, way == "Dispatch"),
    }
}

fn drive(uri: &str, hz: f64, length: Duration, dispatches: bool) {
    let env = client_builder(uri).connect_blocking().unwrap();
    env.reset().unwrap();
    if dispatches {
        env.start_action_dispatch(hz).unwrap();
    }
    at_rate(hz, length, |row| match dispatches {
        // The newest row replaces what waits: the policy itself is never late.
        true => env.put_chunk(row, PutMode::Replace).unwrap(),
        false => env.send_action(row).unwrap(),
    });
    env.close().unwrap();
}

fn drive_legacy_websocket(uri: &str, hz: f64, length: Duration) {
    let mut client = tungstenite::connect(uri).unwrap().0;
    client.send(reset().into()).unwrap();
    while !client.read().unwrap().is_binary() {}
    at_rate(hz, length, |row| client.send(apply(row).into()).unwrap());
}

fn drive_legacy_zenoh(uri: &str, hz: f64, length: Duration) {
    let mut config = zenoh::Config::default();
    for (key, value) in [
        ("mode", "\"peer\"".to_owned()),
        ("scouting/multicast/enabled", "false".to_owned()),
        ("connect/endpoints", format!("[{uri:?}]")),
    ] {
        config.insert_json5(key, &value).unwrap();
    }
    let session = zenoh::open(config).wait().unwrap();
    let (sender, replies) = std::sync::mpsc::channel();
    let subscriber = session
        .declare_subscriber("chiral/s2c")
        .callback(move |_| {
            // Fails once the policy drives and waits for no reply.
            let _ = sender.send(());
        })
        .wait()
        .unwrap();
    let probe = msgpack::encode(
        &Message::Request { id: msgpack::ID, request: Request::GetMetadata },
        &ValueMap::new(),
    );
    let put = |frame: bytes::Bytes| session.put("chiral/c2s", frame.to_vec()).wait().unwrap();
    let probe = probe.unwrap().into_bytes();
    put(probe.clone());
    while replies.recv_timeout(Duration::from_millis(500)).is_err() {
        put(probe.clone());
    }
    put(reset());
    replies.recv().unwrap();
    at_rate(hz, length, |row| put(apply(row)));
    drop(subscriber);
    session.close().wait().unwrap();
}

/// Calls `send` with the time, at a rate. A tick that is missed is skipped.
fn at_rate(hz: f64, length: Duration, mut send: impl FnMut([f32; 7])) {
    let started = Instant::now();
    let mut tick = 0;
    while started.elapsed() < length {
        send(encode_time(monotonic().now()));
        tick = (tick + 1).max((started.elapsed().as_secs_f64() * hz) as u32);
        let due = started + Duration::from_secs_f64(f64::from(tick) / hz);
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}

fn reset() -> bytes::Bytes {
    let request = Request::Reset { seed: None, options: ValueMap::new() };
    msgpack::encode(&Message::Request { id: msgpack::ID, request }, &ValueMap::new()).unwrap().into_bytes()
}

fn apply(row: [f32; 7]) -> bytes::Bytes {
    let action = ActionMessage { actions: row.into(), ..ActionMessage::default() };
    msgpack::encode(&Message::Notice(Notice::Action(action)), &ValueMap::new()).unwrap().into_bytes()
}
