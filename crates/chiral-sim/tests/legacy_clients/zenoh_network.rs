//! Legacy clients on a Zenoh network, where all of them share two keys.

use std::{sync::Arc, thread, time::Duration};

use bytes::Bytes;
use chiral_client::Error;
use chiral_proto::{
    Reply, Request,
    keys::{self, End},
};
use chiral_server::PolicyServerBuilder;
use futures_util::SinkExt;
use tokio::{net::TcpStream, sync::mpsc, time::timeout};
use tokio_tungstenite::tungstenite;
use zenoh::Wait;

use crate::{
    apply_action, frame_of, has_held, kind, reply_of, reset, reset_count, step,
    support::{
        TEST_TIMEOUT, client_builder, free_locator,
        harness::{CAMERA, DIMENSION, Harness, wait_until_alive, zenoh_session},
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
        matches!(&error, Error::Busy(fault) if fault.text.contains("a legacy client at chiral/c2s")),
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
        builder.name("arm").listen_zenoh(&uri).discovery(false)
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
async fn over_zenoh_requests_of_a_second_client_get_no_reply() {
    let (harness, uri) = serve_zenoh(|builder| builder);
    let mut peer = ZenohPeer::join(&uri).await;
    peer.probe().await;
    // Requests that arrive while another is pending.
    harness.script.reset_gate.close();
    peer.send_request(reset());
    harness.wait_until("the reset runs", |harness| harness.script.reset_gate.is_blocking()).await;
    for request in [reset(), Request::GetObs, step(1), Request::GetMetadata, Request::GetMetadata] {
        peer.send_request(request);
    }
    // The action arrives after these requests and is counted, since a reset runs.
    peer.send(apply_action([0.5; DIMENSION]));
    harness
        .wait_until("all requests have arrived", |harness| harness.handle.stats().actions_refused == 1)
        .await;
    harness.script.reset_gate.open();
    assert_eq!(peer.kind().await, "reset_response");
    peer.send_request(step(1));
    assert_eq!(peer.kind().await, "step_response", "nothing else gets a reply");
    assert_eq!((reset_count(&harness), harness.script.applied().len()), (1, 1));

    // A probe during a session. The next request shows that the controller did not send it.
    peer.send_request(Request::GetMetadata);
    peer.send_request(step(1));
    assert_eq!(peer.kind().await, "step_response");
    // The controller's own metadata request, not sent soon after a probe, gets a reply.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    peer.send_request(Request::GetMetadata);
    assert_eq!(peer.kind().await, "metadata_response");
    peer.send_request(step(1));
    assert_eq!(peer.kind().await, "step_response");
}

#[tokio::test]
async fn a_request_sent_right_after_a_reply_gets_its_reply() {
    let uri = free_locator();
    let harness = Harness::with(Arc::default(), 128, 96, |builder| {
        builder.name("arm").listen_zenoh(&uri).discovery(false)
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
async fn a_client_that_goes_silent_on_zenoh_releases_the_robot() {
    let (harness, uri) = serve_zenoh(|builder| builder.idle_timeout(Duration::from_millis(2500)));
    let mut peer = ZenohPeer::join(&uri).await;
    peer.probe().await;
    peer.send_request(reset());
    assert_eq!(peer.kind().await, "reset_response");
    harness.wait_until("the robot holds", has_held).await;
    let client = client_builder(&uri).name("the night shift").connect().await.unwrap();
    assert_eq!(client.reset().await.unwrap().0.episode, 2);

    // While another client controls the robot, the legacy client gets no reply and moves nothing. The pings
    // of our client keep its session alive beyond the idle timeout.
    peer.send(apply_action([0.5; DIMENSION]));
    peer.send_request(step(1));
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
        Harness::configured(|builder| configure(builder.name("arm").listen_zenoh(&uri).discovery(false)));
    tokio::spawn(harness.server.clone().serve());
    (harness, uri)
}

/// A peer on the shared keys: one client, or two that do not know of each other.
struct ZenohPeer {
    session: Option<zenoh::Session>,
    received: mpsc::UnboundedReceiver<Bytes>,
}

impl ZenohPeer {
    /// Joins the network at `uri` once a server listens there.
    async fn join(uri: &str) -> ZenohPeer {
        wait_until_open(uri).await;
        let session = zenoh_session("peer", uri);
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
        let session = self.session.take();
        thread::spawn(move || drop(session)).join().unwrap();
    }
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
