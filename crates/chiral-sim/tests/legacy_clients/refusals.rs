//! Refusals: an action that is refused is dropped and counted, a request that is refused closes the
//! connection with the reason, since the legacy wire has no error reply.

use bytes::Bytes;
use chiral_proto::{ActionChunk, Message, Reply, Request, ValueMap, codec::msgpack};
use futures_util::SinkExt;
use tokio_tungstenite::tungstenite;

use crate::{
    apply_action, frame_of, has_held, kind, reset, step,
    support::harness::{DIMENSION, Harness, Script},
    truncated_apply_action,
    websocket::{Peer, serve},
};

#[tokio::test]
async fn an_action_that_is_refused_is_dropped_and_counted() {
    let harness = Harness::new();
    let mut peer = Peer::connect(serve(&harness).await).await;
    peer.request(reset()).await;
    for refused in
        [apply_action([0.5; DIMENSION + 1]), apply_action([f32::NAN; DIMENSION]), truncated_apply_action()]
    {
        peer.send(refused).await;
    }
    harness.wait_until("all three are counted", |harness| harness.handle.stats().actions_refused == 3).await;

    // One while a reset is queued behind a step, and one while the reset runs.
    harness.script.apply_gate.close();
    harness.script.reset_gate.close();
    peer.send(frame_of(step(1))).await;
    harness
        .wait_until("the robot executes the step", |harness| harness.script.apply_gate.is_blocking())
        .await;
    peer.send(frame_of(reset())).await;
    peer.send(apply_action([0.25; DIMENSION])).await;
    harness
        .wait_until("the action before the reset is refused", |harness| {
            harness.handle.stats().actions_refused == 4
        })
        .await;
    harness.script.apply_gate.open();
    harness.wait_until("the reset runs", |harness| harness.script.reset_gate.is_blocking()).await;
    peer.send(apply_action([0.25; DIMENSION])).await;
    harness
        .wait_until("the action during the reset is refused", |harness| {
            harness.handle.stats().actions_refused == 5
        })
        .await;
    harness.script.reset_gate.open();
    assert_eq!(kind(&peer.reply().await), "step_response");
    assert_eq!(kind(&peer.reply().await), "reset_response");
    peer.send(apply_action([0.5; DIMENSION])).await;
    harness
        .wait_until("the session continues", |harness| harness.script.applied() == [[0.5; DIMENSION]; 2])
        .await;
}

#[tokio::test]
async fn a_session_continues_after_the_robot_fails_at_an_action() {
    let harness = Harness::new();
    let mut peer = Peer::connect(serve(&harness).await).await;
    peer.request(reset()).await;
    *harness.script.panics_in.lock().unwrap() = Some("apply_action");
    peer.send(apply_action([0.5; DIMENSION])).await;
    harness.wait_until("the failure is counted", |harness| harness.handle.stats().actions_failed == 1).await;
    // Observations are still served; a request that needs the robot gets the reason.
    assert_eq!(kind(&peer.request(Request::GetObs).await), "obs_response");
    peer.send(frame_of(step(1))).await;
    let (code, reason) = peer.close_reason().await;
    assert!(code == 1011 && reason.contains("out of service"), "{code}: {reason}");
}

#[tokio::test]
async fn a_refused_request_closes_with_the_reason() {
    let none = |_: &Script| {};
    let dimension = ActionChunk::from([0.5; DIMENSION + 1]);
    let dimension = frame_of(Request::Step { session: 0, episode: 0, actions: dimension });
    check_closes("another dimension", none, &[dimension], 1008, "expected actions of dimension 3, found 4")
        .await;
    let nan = ActionChunk::from([f32::NAN; DIMENSION]);
    let nan = frame_of(Request::Step { session: 0, episode: 0, actions: nan });
    check_closes("NaN", none, &[nan], 1008, "expected finite values, found NaN").await;
    let reply = Message::Reply { id: 1, reply: Reply::Metadata(ValueMap::new()) };
    let reply = msgpack::encode(&reply, &ValueMap::new()).unwrap().into_bytes();
    check_closes("a server's message", none, &[reply], 1008, "expected a message that a client sends").await;

    let fails = |text: String| move |script: &Script| *script.reset_error.lock().unwrap() = Some(text);
    check_closes(
        "a reset that fails",
        fails("no gripper".to_owned()),
        &[frame_of(reset())],
        1011,
        "no gripper",
    )
    .await;
    // The reason is cut between two characters, not within one.
    check_closes("a long reason", fails("ä".repeat(200)), &[frame_of(reset())], 1011, "ää").await;
    let panics = |script: &Script| *script.panics_in.lock().unwrap() = Some("step");
    let harness = Harness::new();
    let mut peer = Peer::connect(serve(&harness).await).await;
    panics(&harness.script);
    peer.send(frame_of(step(1))).await;
    let (code, reason) = peer.close_reason().await;
    assert!(code == 1011 && reason.contains("the robot panicked in step"), "{code}: {reason}");
}

#[tokio::test]
async fn a_hostile_frame_closes_its_connection_and_harms_no_other() {
    let none = |_: &Script| {};
    let whole = frame_of(step(3));
    let hostile: &[(&str, Bytes, &str)] = &[
        ("an empty frame", Bytes::new(), "expected at least 4 bytes"),
        ("half a length", whole.slice(..3), "expected at least 4 bytes"),
        ("half a header", whole.slice(..20), "header_len"),
        ("half a payload", whole.slice(..whole.len() - 5), "payload"),
        ("a header of 4 GiB", Bytes::from_static(&[0xff, 0xff, 0xff, 0xff, 0x81]), "header_len"),
        ("a header that is no map", Bytes::from_static(&[1, 0, 0, 0, 0xc0]), "found"),
        ("10^9 fields", Bytes::from_static(&[5, 0, 0, 0, 0xdf, 0x3b, 0x9a, 0xca, 0x00]), ""),
        ("a map of maps of maps", [&[0xff, 0xff, 0, 0][..], &[0x81; 0xffff]].concat().into(), ""),
        ("no type", Bytes::from_static(&[1, 0, 0, 0, 0x80]), "type"),
    ];
    for (what, frame, reason) in hostile {
        check_closes(what, none, std::slice::from_ref(frame), 1008, reason).await;
    }
}

/// Checks that the server closes with this code and reason when it receives these frames, after it has
/// replied to the requests before them, and that it then serves the next client.
async fn check_closes(what: &str, script: impl FnOnce(&Script), frames: &[Bytes], code: u16, reason: &str) {
    let harness = Harness::new();
    let address = serve(&harness).await;
    let mut peer = Peer::connect(address).await;
    peer.request(reset()).await;
    script(&harness.script);
    peer.send(frame_of(Request::GetObs)).await;
    for frame in frames {
        peer.send(frame.clone()).await;
    }
    assert_eq!(kind(&peer.reply().await), "obs_response", "{what}: the request before gets its reply");
    let (found, found_reason) = peer.close_reason().await;
    assert!(
        found == code && found_reason.contains(reason),
        "{what}: expected {code} and {reason:?}, found {found} and {found_reason:?}"
    );
    assert!(found_reason.len() <= 123);
    harness.wait_until("the robot holds", has_held).await;
    assert_eq!(
        kind(&Peer::connect(address).await.request(Request::GetMetadata).await),
        "metadata_response",
        "{what}"
    );
}

#[tokio::test]
async fn a_text_or_oversized_message_closes_the_connection() {
    let harness = Harness::configured(|builder| builder.max_frame(64 * 1024));
    let address = serve(&harness).await;
    for message in [tungstenite::Message::text("{}"), tungstenite::Message::Binary(vec![0; 8 << 20].into())] {
        let mut peer = Peer::connect(address).await;
        peer.0.send(message).await.unwrap();
        let (code, reason) = peer.close_reason().await;
        assert!(code == 1008 && reason.contains("expected"), "{code}: {reason}");
        harness.wait_until_robot_is_free().await;
    }
}

#[tokio::test]
async fn too_many_pending_requests_close_the_connection() {
    let harness = Harness::new();
    let mut peer = Peer::connect(serve(&harness).await).await;
    harness.script.reset_gate.close();
    peer.send(frame_of(reset())).await;
    harness.wait_until("the reset runs", |harness| harness.script.reset_gate.is_blocking()).await;
    for _ in 0..=4096 {
        peer.0.feed(tungstenite::Message::Binary(frame_of(Request::GetObs))).await.unwrap();
    }
    peer.0.flush().await.unwrap();
    let (code, reason) = peer.close_reason().await;
    assert!(code == 1013 && reason.contains("4096 pending requests"), "{code}: {reason}");
}
