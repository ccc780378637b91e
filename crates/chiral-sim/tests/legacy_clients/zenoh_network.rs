//! Legacy clients on a Zenoh network, where all of them share two keys.

use std::{
    env,
    process::{Command, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};

use bytes::Bytes;
use chiral_client::Error;
use chiral_proto::{
    Reply, Request,
    keys::{self, End},
};
use chiral_server::PolicyServerBuilder;
use futures_util::SinkExt;
use rustix::process::Signal;
use tokio::{
    net::TcpStream,
    sync::{Barrier, mpsc},
    time::timeout,
};
use tokio_tungstenite::tungstenite;
use zenoh::Wait;

use crate::{
    apply_action, frame_of, has_held, kind, reply_of, reset, reset_count, step,
    support::{
        TEST_TIMEOUT, client_builder, free_locator,
        harness::{CAMERA, DIMENSION, Harness, wait_until_alive, zenoh_session},
        processes::Process,
    },
    truncated_apply_action,
    websocket::{Peer, serve},
};

#[tokio::test]
async fn both_generations_over_zenoh() {
    let (harness, uri) = serve_zenoh(|builder| builder);
    let mut peer = ZenohPeer::join(&uri).await;
    peer.probe().await;
    peer.send_request(reset());
    assert_eq!(peer.kind().await, "reset_response");
    peer.send(apply_action([0.25; DIMENSION]));
    harness
        .wait_until("the action is applied", |harness| harness.script.applied() == [[0.25; DIMENSION]])
        .await;
    peer.send_request(step(2));
    assert!(matches!(peer.reply().await, Reply::Step(result) if result.reward == 2.0));
    let error = client_builder(&uri).connect().await.unwrap_err();
    assert!(
        matches!(&error, Error::Busy(fault) if fault.text.contains("a legacy client at tcp/127.0.0.1:")),
        "{error}"
    );

    // Bad messages are dropped, and the session continues.
    *harness.script.reset_error.lock().unwrap() = Some("no gripper".to_owned());
    for wrong in [truncated_apply_action(), Bytes::from_static(b"garbage"), frame_of(reset())] {
        peer.send(wrong);
    }
    harness.wait_until("the reset has failed", |harness| reset_count(harness) == 2).await;
    assert_eq!(harness.handle.stats().actions_refused, 1);
    // Repeat the request until it gets a reply: the client cannot know when the failed reset is over.
    let obs = loop {
        peer.send_request(Request::GetObs);
        if let Ok(reply) = timeout(Duration::from_millis(100), peer.received.recv()).await {
            break reply_of(reply.unwrap());
        }
    };
    assert_eq!(kind(&obs), "obs_response");
}

#[tokio::test]
async fn an_observation_of_17_mb_arrives_unchanged() {
    let uri = free_locator();
    let harness = Harness::with(Arc::default(), 1228, 2000, |builder| {
        builder.name("arm").listen_zenoh(&uri).legacy_zenoh(true)
    });
    let mut peer = Peer::connect(serve(&harness).await).await;
    for _ in 0..3 {
        peer.send(frame_of(Request::GetObs)).await;
        peer.0.send(tungstenite::Message::Ping(Bytes::from_static(b"meanwhile"))).await.unwrap();
    }
    let (mut pongs, mut observations) = (0, 0);
    while pongs == 0 || observations < 3 {
        match peer.receive().await {
            tungstenite::Message::Pong(_) => pongs += 1,
            tungstenite::Message::Binary(frame) => {
                check_pixels(&reply_of(frame));
                observations += 1;
            }
            other => panic!("expected an observation or a pong, found {other:?}"),
        }
    }
    drop(peer);
    harness.wait_until_robot_is_free().await;
    let mut peer = ZenohPeer::join(&uri).await;
    peer.probe().await;
    for _ in 0..3 {
        peer.send_request(Request::GetObs);
        check_pixels(&peer.reply().await);
    }
}

/// 17 MB of colour and depth, as `harness::publish` fills them.
fn check_pixels(reply: &Reply) {
    let Reply::Observation(obs) = reply else { panic!("expected an observation") };
    let camera = obs.camera(CAMERA).unwrap();
    let depth = camera.depth.as_ref().unwrap();
    assert_eq!(camera.image.data().len() + depth.data().len(), 1228 * 2000 * 7);
    assert!(camera.image.data().iter().all(|byte| *byte == 1));
    assert!(depth.values::<f32>().unwrap().iter().all(|depth| *depth == 1.0));
}

#[tokio::test]
async fn a_second_client_is_refused_until_the_first_has_left() {
    // Much shorter than the first client thinks.
    let (harness, uri) = serve_zenoh(|builder| builder.idle_timeout(Duration::from_millis(500)));
    let mut first = ZenohPeer::join(&uri).await;
    first.probe().await;
    harness.script.reset_gate.close();
    first.send_request(reset());
    harness.wait_until("the reset runs", |harness| harness.script.reset_gate.is_blocking()).await;
    let mut second = ZenohPeer::join(&uri).await;
    let drive = |peer: &ZenohPeer| {
        for request in [Request::GetMetadata, reset(), step(1), Request::GetObs] {
            peer.send_request(request);
        }
        peer.send(apply_action([0.5; DIMENSION]));
    };
    drive(&second);
    harness.script.reset_gate.open();
    assert_eq!(first.kind().await, "reset_response");
    for _ in 0..4 {
        drive(&second);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert_eq!(harness.handle.stats().sessions, 1, "the first client thinks, and is not gone");
    first.send(apply_action([0.25; DIMENSION]));
    harness.wait_until("the action is applied", |harness| !harness.script.applied().is_empty()).await;
    first.send_request(step(1));
    assert_eq!(first.kind().await, "step_response", "there was no reply to the second client");
    assert_eq!(harness.script.applied(), [[0.25; DIMENSION], [0.5; DIMENSION]]);
    assert_eq!(reset_count(&harness), 1);

    // The second client waits, and the first one leaves.
    drop(first);
    harness.wait_until("the robot holds", has_held).await;
    while second.received.try_recv().is_ok() {}
    second.probe().await;
    second.send_request(reset());
    assert_eq!(second.kind().await, "reset_response");
    assert_eq!(reset_count(&harness), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_clients_that_wait_for_the_server_one_drives() {
    let uri = free_locator();
    let connected = Arc::new(Barrier::new(2));
    let peers = [0.25, 0.75].map(|value| {
        let (mut peer, connected) = (ZenohPeer::open(&uri), Arc::clone(&connected));
        tokio::spawn(async move {
            while peer.session.as_ref().unwrap().info().peers_zid().await.count() == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            connected.wait().await;
            loop {
                peer.send_request(Request::GetMetadata);
                if timeout(Duration::from_millis(100), peer.received.recv()).await.is_ok() {
                    break;
                }
            }
            peer.send_request(reset());
            for _ in 0..100 {
                peer.send(apply_action([value; DIMENSION]));
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            peer
        })
    });
    let harness = Harness::configured(|builder| builder.name("arm").listen_zenoh(&uri).legacy_zenoh(true));
    tokio::spawn(harness.server.clone().serve());
    let mut joined = Vec::new();
    for peer in peers {
        joined.push(timeout(TEST_TIMEOUT, peer).await.expect("both have received a reply").unwrap());
    }
    let applied = harness.script.applied();
    assert!(applied.len() > 10 && applied.iter().all(|row| *row == applied[0]), "{applied:?}");
    assert_eq!(reset_count(&harness), 1);
}

/// A robot that appears while a legacy client drives ends its session; the client goes on, and moves nothing
/// until it resets.
#[tokio::test]
async fn a_session_ends_when_a_second_robot_appears_and_the_client_must_reset() {
    let (arm, uri) = serve_zenoh(|builder| builder);
    let mut peer = ZenohPeer::join(&uri).await;
    peer.probe().await;
    peer.send(apply_action([0.25; DIMENSION]));
    arm.wait_until("the action is applied", |arm| arm.script.applied() == [[0.25; DIMENSION]]).await;
    let leg = Harness::configured(|builder| builder.name("leg").join_zenoh(&uri));
    let serving = tokio::spawn(leg.server.clone().serve());
    arm.wait_until("the robot holds", has_held).await;
    let drive = |peer: &ZenohPeer| {
        peer.send(apply_action([0.5; DIMENSION]));
        peer.send_request(step(1));
    };
    drive(&peer);
    peer.send_request(Request::GetMetadata);
    leg.handle.shutdown();
    serving.await.unwrap().unwrap();
    // Without a session, then in one that began without a reset.
    for begins in [false, true] {
        if begins {
            peer.probe().await;
        }
        for _ in 0..10 {
            drive(&peer);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(arm.handle.stats().sessions, usize::from(begins));
    }
    while peer.received.try_recv().is_ok() {}
    peer.send_request(reset());
    assert_eq!(peer.kind().await, "reset_response");
    peer.send(apply_action([0.75; DIMENSION]));
    arm.wait_until("the client drives again", |arm| arm.script.applied().len() == 2).await;
    assert_eq!(arm.script.applied(), [[0.25; DIMENSION], [0.75; DIMENSION]]);
    assert!(leg.script.events().is_empty());
}

#[tokio::test]
async fn a_client_that_was_stopped_moves_nothing_when_it_wakes_up() {
    let (harness, uri) = serve_zenoh(|builder| builder);
    wait_until_open(&uri).await;
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "zenoh_network::client_that_is_stopped", "--ignored"]).env(LOCATOR, &uri);
    let client = Process::spawn(command.stdout(Stdio::null()));
    harness.wait_until("the client drives", |harness| harness.script.applied().len() > 3).await;
    client.signal(Signal::STOP);
    harness.wait_until("the robot holds", has_held).await;
    let applied = harness.script.applied().len();
    client.signal(Signal::CONT);
    // It connects again, and goes on sending actions and requests for metadata, which begin a session.
    harness
        .wait_until("its actions are refused", |harness| harness.handle.stats().actions_refused > 20)
        .await;
    assert_eq!(harness.script.applied().len(), applied);
}

/// The locator of the server of [`client_that_is_stopped`].
const LOCATOR: &str = "CHIRAL_TEST_LOCATOR";

/// A client that drives without end. It is lost after a second without a sign of life.
#[tokio::test]
#[ignore = "started by another test"]
async fn client_that_is_stopped() {
    let Ok(uri) = env::var(LOCATOR) else { return };
    let mut config = zenoh::Config::default();
    for (key, json) in [
        ("mode", "\"peer\"".to_owned()),
        ("scouting/multicast/enabled", "false".to_owned()),
        ("connect/endpoints", format!("[{uri:?}]")),
        ("transport/link/tx/lease", "1000".to_owned()),
    ] {
        config.insert_json5(key, &json).unwrap();
    }
    let mut peer = ZenohPeer::over(thread::spawn(|| zenoh::open(config).wait().unwrap()).join().unwrap());
    peer.probe().await;
    peer.send_request(reset());
    loop {
        peer.send_request(Request::GetMetadata);
        for _ in 0..10 {
            peer.send(apply_action([0.25; DIMENSION]));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test]
async fn without_the_operators_word_or_with_a_router_no_legacy_client_is_served() {
    let (ours, router_uri, arm_uri) = (free_locator(), free_locator(), free_locator());
    let not_told = Harness::configured(|builder| builder.name("ours").listen_zenoh(&ours).discovery(false));
    tokio::spawn(not_told.server.clone().serve());
    let router = zenoh_session("router", &router_uri);
    // One that connects to the router, and one to which the router connects.
    let joined = Harness::configured(|builder| {
        builder.name("joined").listen_zenoh(free_locator()).join_zenoh(&router_uri).legacy_zenoh(true)
    });
    tokio::spawn(joined.server.clone().serve());
    let arm = Harness::configured(|builder| builder.name("arm").listen_zenoh(&arm_uri).legacy_zenoh(true));
    tokio::spawn(arm.server.clone().serve());
    wait_until_alive(&router_uri, &["joined"]).await;
    let mut config = zenoh::Config::default();
    for (key, json) in [
        ("mode", "\"router\"".to_owned()),
        ("scouting/multicast/enabled", "false".to_owned()),
        ("listen/endpoints", "[]".to_owned()),
        ("connect/endpoints", format!("[{arm_uri:?}]")),
    ] {
        config.insert_json5(key, &json).unwrap();
    }
    wait_until_open(&arm_uri).await;
    let second = thread::spawn(|| zenoh::open(config).wait().unwrap()).join().unwrap();
    for uri in [&ours, &router_uri, &arm_uri] {
        let mut peer = ZenohPeer::join(uri).await;
        for _ in 0..10 {
            peer.send_request(Request::GetMetadata);
            peer.send_request(reset());
            peer.send(apply_action([0.5; DIMENSION]));
            assert!(timeout(Duration::from_millis(50), peer.received.recv()).await.is_err(), "{uri}");
        }
    }
    assert!([&not_told, &joined, &arm].iter().all(|harness| harness.script.events().is_empty()));
    // Without the router, the client that addresses the robot is served.
    close(second);
    ZenohPeer::join(&arm_uri).await.probe().await;
    close(router);
}

#[tokio::test]
async fn a_request_sent_right_after_a_reply_gets_its_reply() {
    let uri = free_locator();
    let harness = Harness::with(Arc::default(), 128, 96, |builder| {
        builder.name("arm").listen_zenoh(&uri).legacy_zenoh(true)
    });
    tokio::spawn(harness.server.clone().serve());
    let mut peer = ZenohPeer::join(&uri).await;
    peer.probe().await;
    // On a busy machine a reply often arrives before the server knows that it is sent.
    let busy = Arc::new(());
    for _ in 0..3 {
        let busy = Arc::downgrade(&busy);
        thread::spawn(move || while busy.strong_count() > 0 {});
    }
    for _ in 0..1000 {
        peer.send_request(Request::GetObs);
        assert_eq!(peer.kind().await, "obs_response");
    }
}

#[tokio::test]
async fn a_legacy_client_moves_nothing_while_another_client_controls_the_robot() {
    let (harness, uri) = serve_zenoh(|builder| builder);
    let mut peer = ZenohPeer::join(&uri).await;
    let client = client_builder(&uri).name("the night shift").connect().await.unwrap();
    client.reset().await.unwrap();
    for request in [Request::GetMetadata, reset(), step(1)] {
        peer.send_request(request);
        peer.send(apply_action([0.5; DIMENSION]));
    }
    assert!(timeout(Duration::from_millis(500), peer.received.recv()).await.is_err());
    assert_eq!(client.step([0.25; DIMENSION]).await.unwrap().reward, 1.0);
    assert_eq!(harness.script.applied(), [[0.25; DIMENSION]]);
    client.close().await.unwrap();
    peer.probe().await;
}

#[tokio::test]
async fn a_client_that_leaves_zenoh_releases_the_robot_at_once() {
    let (harness, uri) = serve_zenoh(|builder| builder.idle_timeout(Duration::from_secs(3600)));
    for _ in 0..3 {
        let mut peer = ZenohPeer::join(&uri).await;
        peer.probe().await;
        peer.send_request(reset());
        assert_eq!(peer.kind().await, "reset_response");
        drop(peer);
        harness.wait_until("the robot holds", has_held).await;
    }
}

#[tokio::test]
async fn with_two_robots_on_the_network_neither_serves_a_legacy_client() {
    let (arm, uri) = serve_zenoh(|builder| builder);
    wait_until_open(&uri).await;
    let leg = Harness::configured(|builder| builder.name("leg").join_zenoh(&uri));
    tokio::spawn(leg.server.clone().serve());
    wait_until_alive(&uri, &["arm", "leg"]).await;
    let mut peer = ZenohPeer::join(&uri).await;
    for _ in 0..10 {
        peer.send_request(reset());
        assert!(timeout(Duration::from_millis(100), peer.received.recv()).await.is_err(), "no robot replies");
    }
    assert!([&arm, &leg].iter().all(|harness| harness.script.events().is_empty()));
    // With one robot left, it serves the legacy client.
    leg.handle.shutdown();
    peer.probe().await;
}

/// Serves on a Zenoh network of its own; returns its locator.
fn serve_zenoh(configure: impl FnOnce(PolicyServerBuilder) -> PolicyServerBuilder) -> (Harness, String) {
    let uri = free_locator();
    let harness =
        Harness::configured(|builder| configure(builder.name("arm").listen_zenoh(&uri).legacy_zenoh(true)));
    tokio::spawn(harness.server.clone().serve());
    (harness, uri)
}

/// A client on the shared keys.
struct ZenohPeer {
    session: Option<zenoh::Session>,
    received: mpsc::UnboundedReceiver<Bytes>,
}

impl ZenohPeer {
    /// Joins the network at `uri` once a server listens there.
    async fn join(uri: &str) -> ZenohPeer {
        wait_until_open(uri).await;
        ZenohPeer::open(uri)
    }

    /// Joins the network at `uri` once there is one.
    fn open(uri: &str) -> ZenohPeer {
        ZenohPeer::over(zenoh_session("peer", uri))
    }

    fn over(session: zenoh::Session) -> ZenohPeer {
        let (sender, received) = mpsc::unbounded_channel();
        let receive = move |sample: zenoh::sample::Sample| {
            drop(sender.send(sample.payload().to_bytes().into_owned().into()))
        };
        session.declare_subscriber(keys::legacy(End::Server)).callback(receive).background().wait().unwrap();
        ZenohPeer { session: Some(session), received }
    }

    fn send(&self, frame: Bytes) {
        self.session.as_ref().unwrap().put(keys::legacy(End::Client), frame.to_vec()).wait().unwrap();
    }

    fn send_request(&self, request: Request) {
        self.send(frame_of(request));
    }

    async fn reply(&mut self) -> Reply {
        reply_of(timeout(TEST_TIMEOUT, self.received.recv()).await.expect("a reply").unwrap())
    }

    /// Returns the kind of the next reply.
    async fn kind(&mut self) -> &'static str {
        kind(&self.reply().await)
    }

    /// Sends probes until one gets a reply and drops the replies, as legacy clients do. No late reply
    /// follows: the last request was sent after all others had their replies.
    async fn probe(&mut self) {
        let mut probes = 0;
        loop {
            self.send_request(Request::GetMetadata);
            probes += 1;
            assert!(probes < 100, "no reply to any probe");
            if let Ok(reply) = timeout(Duration::from_millis(500), self.received.recv()).await {
                assert_eq!(kind(&reply_of(reply.unwrap())), "metadata_response");
                break;
            }
        }
        // Drop late replies.
        self.send_request(Request::GetObs);
        while self.kind().await != "obs_response" {}
    }
}

impl Drop for ZenohPeer {
    fn drop(&mut self) {
        self.session.take().into_iter().for_each(close);
    }
}

/// Closes a session, which must not happen within a runtime.
fn close(session: zenoh::Session) {
    thread::spawn(move || session.close().wait().unwrap()).join().unwrap();
}

/// Waits until a server listens at `uri`.
async fn wait_until_open(uri: &str) {
    let address = uri.strip_prefix("tcp/").unwrap();
    let open = async {
        while TcpStream::connect(address).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(TEST_TIMEOUT, open).await.expect("the server listens");
}
