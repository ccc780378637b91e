//! Liveness over WebSocket: pings, shutdown, and connections that break or go silent.

use std::time::Duration;

use bytes::Bytes;
use chiral_proto::Request;
use futures_util::{SinkExt, StreamExt};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite;

use crate::{
    frame_of, has_held, kind, reset,
    support::{TEST_TIMEOUT, harness::Harness},
    websocket::{Peer, serve, shake_hands},
};

#[tokio::test]
async fn pings_are_answered_while_the_robot_is_busy() {
    let harness = Harness::new();
    let mut peer = Peer::connect(serve(&harness).await).await;
    harness.script.reset_gate.close();
    for request in [reset(), Request::GetObs] {
        peer.send(frame_of(request)).await;
    }
    harness.wait_until("the reset runs", |harness| harness.script.reset_gate.is_blocking()).await;
    for payload in [&b"one"[..], b"two"] {
        peer.0.send(tungstenite::Message::Ping(Bytes::from_static(payload))).await.unwrap();
        assert_eq!(peer.receive().await, tungstenite::Message::Pong(Bytes::from_static(payload)));
    }
    harness.script.reset_gate.open();
    assert_eq!(kind(&peer.reply().await), "reset_response");
    assert_eq!(kind(&peer.reply().await), "obs_response");
}

#[tokio::test]
async fn a_server_that_shuts_down_closes_with_the_reason() {
    let harness = Harness::new();
    let mut peer = Peer::connect(serve(&harness).await).await;
    peer.request(reset()).await;
    harness.handle.shutdown();
    let (code, reason) = peer.close_reason().await;
    assert!(code == 1001 && reason.contains("shutting down"), "{code}: {reason}");
    harness.wait_until("the robot holds", has_held).await;
}

#[tokio::test]
async fn the_robot_holds_when_the_connection_breaks_or_goes_silent() {
    let idle_timeout = Duration::from_millis(250);
    let harness = Harness::configured(|builder| builder.idle_timeout(idle_timeout));
    let address = serve(&harness).await;
    let mut peer = Peer::connect(address).await;
    peer.request(reset()).await;
    // The connection breaks without a close.
    drop(peer);
    harness.wait_until("the robot holds", has_held).await;

    // A client that computes for long but whose library answers pings: wait for several pings of the server.
    let mut slow = Peer::connect(address).await;
    slow.request(reset()).await;
    let mut pings = 0;
    while pings < 6 {
        let message = timeout(TEST_TIMEOUT, slow.0.next())
            .await
            .expect("a ping")
            .expect("the connection is open")
            .unwrap();
        assert!(message.is_ping(), "found {message:?}");
        pings += 1;
    }
    // For a while it is too busy to answer pings.
    tokio::time::sleep(2 * idle_timeout).await;
    assert_eq!(kind(&slow.request(Request::GetObs).await), "obs_response");
    drop(slow);
    harness.wait_until_robot_is_free().await;

    // A client that is gone although its connection is open.
    let (_, unplugged) = shake_hands(address, "").await;
    harness.wait_until("the client is connected", |harness| harness.handle.stats().sessions == 1).await;
    harness.wait_until("the server drops the client", |harness| harness.handle.stats().sessions == 0).await;
    drop(unplugged);
}
