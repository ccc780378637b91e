//! Requests of both generations over WebSocket, their order, and the handshake.

use bytes::Bytes;
use chiral_client::Error;
use chiral_proto::{Reply, Request};
use futures_util::SinkExt;
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream,
    tungstenite::{
        self,
        protocol::{
            Role,
            frame::{
                Frame as WebSocketFrame,
                coding::{Data, OpCode},
            },
        },
    },
};

use crate::{
    apply_action, frame_of, has_held, kind, reply_of, reset, step,
    support::{
        TEST_TIMEOUT, client_builder,
        harness::{CAMERA, DIMENSION, Event, Harness},
    },
    websocket::{Peer, serve, shake_hands},
};

#[tokio::test]
async fn both_generations_in_one_session() {
    let harness = Harness::new();
    let mut peer = Peer::connect(serve(&harness).await).await;
    let Reply::Metadata(data) = peer.request(Request::GetMetadata).await else { panic!("expected metadata") };
    assert_eq!(data["kind"].as_str(), Some("scripted"));

    let Reply::Reset { obs, .. } = peer.request(reset()).await else { panic!("expected a reset") };
    assert_eq!(obs.camera(CAMERA).unwrap().image.shape(), [8, 8, 3]);
    peer.send(apply_action([0.25; DIMENSION])).await;
    harness
        .wait_until("the action is applied", |harness| harness.script.applied() == [[0.25; DIMENSION]])
        .await;
    let Reply::Observation(obs) = peer.request(Request::GetObs).await else {
        panic!("expected an observation")
    };
    let camera = obs.camera(CAMERA).unwrap();
    assert!(
        harness.clock.now().since(camera.captured_at) < TEST_TIMEOUT,
        "the capture time is on the robot's clock"
    );
    assert!(camera.image.data().iter().all(|byte| *byte == 1));
    assert_eq!(camera.depth.as_ref().unwrap().shape(), [8, 8]);
    assert_eq!(obs.proprio("joint_pos").unwrap().data.shape(), [DIMENSION]);

    let Reply::Step(result) = peer.request(step(2)).await else { panic!("expected a step") };
    assert_eq!((result.reward, result.terminated, result.truncated), (2.0, false, false));
    assert_eq!(harness.script.applied().len(), 3);

    // Any request may follow any other, and an unknown message is ignored.
    peer.send(Bytes::from_static(b"\x0e\x00\x00\x00\x81\xa4type\xa7unknown")).await;
    let episodes = |harness: &Harness| {
        harness.script.events().iter().filter(|event| **event == Event::ResetFinished).count()
    };
    assert_eq!(kind(&peer.request(reset()).await), "reset_response");
    assert_eq!(episodes(&harness), 2);
    peer.0.close(None).await.unwrap();
    harness.wait_until("the robot holds", has_held).await;
    assert_eq!(harness.handle.stats().actions_refused, 0);
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let harness = Harness::new();
    let mut peer = Peer::connect(serve(&harness).await).await;
    let requests =
        [Request::GetMetadata, reset(), step(1), Request::GetObs, reset(), step(2), Request::GetMetadata];
    for request in requests {
        peer.send(frame_of(request)).await;
    }
    for expected in ["metadata", "reset", "step", "obs", "reset", "step", "metadata"] {
        let reply = peer.reply().await;
        assert_eq!(kind(&reply), format!("{expected}_response"));
    }
    assert_eq!(harness.handle.stats().actions_refused, 0);
}

#[tokio::test]
async fn messages_may_arrive_in_fragments() {
    let harness = Harness::new();
    let mut peer = Peer::connect(serve(&harness).await).await;
    peer.request(reset()).await;
    // 48 KiB of rows. The first cuts are within the length prefix and within the header.
    let message = frame_of(step(4096));
    let cuts = [0, 2, 9, 32 * 1024, 32 * 1024, message.len()];
    for (i, range) in cuts.windows(2).map(|cut| cut[0]..cut[1]).enumerate() {
        let opcode = if i == 0 { Data::Binary } else { Data::Continue };
        let fragment =
            WebSocketFrame::message(message.slice(range), OpCode::Data(opcode), i == cuts.len() - 2);
        peer.0.send(tungstenite::Message::Frame(fragment)).await.unwrap();
        peer.0.send(tungstenite::Message::Ping(Bytes::from_static(b"between"))).await.unwrap();
    }
    let mut pongs = 0;
    let result = loop {
        match peer.receive().await {
            tungstenite::Message::Pong(_) => pongs += 1,
            tungstenite::Message::Binary(frame) => break reply_of(frame),
            other => panic!("expected a reply, found {other:?}"),
        }
    };
    assert!(matches!(result, Reply::Step(result) if result.reward == 4096.0));
    assert!(pongs > 0);
}

#[tokio::test]
async fn compression_is_declined_and_only_an_offered_subprotocol_is_selected() {
    let harness = Harness::new();
    let address = serve(&harness).await;
    let (head, stream) =
        shake_hands(address, "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n")
            .await;
    assert!(head.starts_with("http/1.1 101"), "{head}");
    assert!(!head.contains("sec-websocket-extensions") && !head.contains("sec-websocket-protocol"), "{head}");
    let stream = MaybeTlsStream::Plain(stream);
    let mut peer = Peer(WebSocketStream::from_raw_socket(stream, Role::Client, None).await);
    assert_eq!(kind(&peer.request(Request::GetMetadata).await), "metadata_response");
    // A client that offers only other subprotocols is refused.
    let (head, _) = shake_hands(address, "Sec-WebSocket-Protocol: mqtt\r\n").await;
    assert!(head.starts_with("http/1.1 400"), "{head}");
    let (head, _) = shake_hands(address, "Sec-WebSocket-Protocol: mqtt, chiral.v1\r\n").await;
    assert!(head.starts_with("http/1.1 101") && head.contains("sec-websocket-protocol: chiral.v1"), "{head}");
}

#[tokio::test]
async fn legacy_and_chiral_clients_share_one_controller_role() {
    let harness = Harness::new();
    let address = serve(&harness).await;
    let uri = format!("ws://{address}");
    let mut first = Peer::connect(address).await;
    first.request(reset()).await;
    let (code, reason) = Peer::connect(address).await.close_reason().await;
    assert!(code == 1013 && reason.contains("a legacy client at 127.0.0.1:"), "{code}: {reason}");
    let error = client_builder(&uri).connect().await.unwrap_err();
    assert!(matches!(&error, Error::Busy(fault) if fault.text.contains("a legacy client at")), "{error}");
    let observer = client_builder(&uri).observer().connect().await.unwrap();
    assert_eq!(observer.get_obs().await.unwrap().episode, 1);
    // The first client is still served.
    assert_eq!(kind(&first.request(step(1)).await), "step_response");
    drop(first);
    harness.wait_until("the robot holds", has_held).await;

    let client = client_builder(&uri).name("the night shift").connect().await.unwrap();
    let (code, reason) = Peer::connect(address).await.close_reason().await;
    assert!(code == 1013 && reason.contains("the night shift"), "{code}: {reason}");
    client.reset().await.unwrap();
}
