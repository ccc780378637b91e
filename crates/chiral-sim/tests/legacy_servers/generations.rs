//! Which wire a server uses, which generation of the legacy wire it has, and what each client call does with
//! each generation.

use std::time::Duration;

use chiral_client::{Code, Codec, Error, StreamOptions, ValueMap, blocking, proto::Reply};
use tokio_tungstenite::{
    accept_hdr_async,
    tungstenite::{
        handshake::server::{ErrorResponse, Request as Upgrade, Response},
        http::StatusCode,
    },
};

use crate::{
    ROW,
    fake_server::{FakeServer, ServerConnection, listener, rows},
    support::{TEST_TIMEOUT, client_builder, in_time},
};

#[tokio::test]
async fn a_server_that_selects_no_subprotocol_is_a_legacy_server() {
    let server = FakeServer::streaming();
    let (uri, _serving) = server.serve().await;
    let env = client_builder(&uri).connect().await.unwrap();
    assert_eq!(
        (env.codec(), env.robot().name.as_str(), env.robot().action_spec.dimension),
        (Codec::Msgpack, uri.as_str(), 0)
    );
    assert_eq!(env.get_metadata().await.unwrap()["kind"].as_str(), Some("legacy"));
    env.close().await.unwrap();

    let error = client_builder(&uri).codec(Codec::Protobuf).connect().await.unwrap_err();
    assert!(matches!(error, Error::NotProtobuf), "{error:?}");
    assert!(error.to_string().contains("without the subprotocol chiral.v1"), "{error}");
}

#[tokio::test]
async fn a_msgpack_client_offers_no_subprotocol_and_a_refused_offer_is_retried_without() {
    let (listener, uri) = listener().await;
    let serving = tokio::spawn(async move {
        let mut offers = Vec::new();
        for _ in 0..3 {
            let (stream, _) = listener.accept().await.unwrap();
            let strict = |upgrade: &Upgrade, response: Response| {
                offers.push(upgrade.headers().contains_key("Sec-WebSocket-Protocol"));
                if offers.last() == Some(&false) {
                    return Ok(response);
                }
                let mut refusal = ErrorResponse::new(Some("no such subprotocol".to_owned()));
                *refusal.status_mut() = StatusCode::BAD_REQUEST;
                Err(refusal)
            };
            let Ok(socket) = accept_hdr_async(stream, strict).await else { continue };
            let mut server = ServerConnection::new(socket);
            server.reply_to("metadata", Reply::Metadata(ValueMap::new())).await;
            assert!(server.receive().await.is_none());
        }
        offers
    });
    for builder in [client_builder(&uri).codec(Codec::Msgpack), client_builder(&uri)] {
        let env = builder.connect().await.unwrap();
        assert_eq!(env.codec(), Codec::Msgpack);
        env.close().await.unwrap();
    }
    assert_eq!(in_time(serving).await.unwrap(), [false, true, false]);
}

#[tokio::test]
async fn connect_fails_if_the_server_does_not_answer_the_metadata_request() {
    let (listener, uri) = listener().await;
    let connecting = tokio::spawn(client_builder(&uri).request_timeout(Duration::from_millis(200)).connect());
    let mut server = ServerConnection::accept(&listener).await;
    server.expect("metadata").await;
    let error = in_time(connecting).await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
}

#[tokio::test]
async fn a_streaming_server_is_detected_by_its_observation_and_polled() {
    let server = FakeServer::streaming();
    let (uri, _serving) = server.serve().await;
    let env = client_builder(&uri).connect().await.unwrap();
    let (first, info) = env.reset().await.unwrap();
    assert_eq!((first.episode, first.seq, info["begun"].as_bool()), (1, 1, Some(true)));
    let obs = env.get_obs().await.unwrap();
    assert_eq!((obs.episode, obs.seq, obs.timestamp), (1, 2, 2.0));
    assert_eq!(server.kinds(), ["metadata", "reset", "obs_request", "metadata"]);
    assert_eq!(env.get_obs().await.unwrap().seq, 3, "the generation is known by now");
    assert_eq!(obs["wrist_cam"].depth.as_ref().unwrap().values::<f32>().unwrap()[..], [2.0; 4]);
    assert_eq!(env.age(obs["wrist_cam"].captured_at), None, "the clocks cannot be compared");

    assert!(matches!(env.next_obs(TEST_TIMEOUT).await, Err(Error::NotStreaming)));
    env.start_obs_stream(200.0).await.unwrap();
    let mut last = 3;
    for _ in 0..5 {
        let obs = env.next_obs(TEST_TIMEOUT).await.unwrap();
        assert!(obs.seq > last && obs.episode == 1);
        last = obs.seq;
    }
    let (first, _) = env.reset().await.unwrap();
    assert_eq!(first.episode, 2);
    assert_eq!(env.next_obs(TEST_TIMEOUT).await.unwrap().episode, 2, "no older observation is returned");
    env.stop_obs_stream().await.unwrap();
    // A request sent before may still be pending.
    env.get_metadata().await.unwrap();
    let requests = server.count("obs_request");
    tokio::time::sleep(Duration::from_millis(50)).await;
    env.get_metadata().await.unwrap();
    assert_eq!(server.count("obs_request"), requests, "polling has stopped");
    assert!(env.latest_obs().unwrap().is_some());

    let options = StreamOptions::hz(100.0).cameras(["wrist_cam"]).without_depth();
    env.start_obs_stream(options).await.unwrap();
    let obs = env.next_obs(TEST_TIMEOUT).await.unwrap();
    assert_eq!((obs.cameras.len(), obs["wrist_cam"].depth.is_none()), (1, true));
    let error = env.start_obs_stream(StreamOptions::hz(100.0).cameras(["foot_cam"])).await.unwrap_err();
    assert!(error.to_string().contains("wrist_cam, head_cam"), "{error}");
}

#[tokio::test]
async fn a_gym_like_server_is_detected_by_its_metadata_and_observes_only_in_reset_and_step() {
    let server = FakeServer::gym();
    let (uri, _serving) = server.serve().await;
    let env = client_builder(&uri).connect().await.unwrap();
    let error = env.get_obs().await.unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error:?}");
    assert_eq!(server.kinds(), ["metadata", "obs_request", "metadata"]);
    let (first, _) = env.reset().await.unwrap();
    assert_eq!(env.get_obs().await.unwrap(), first, "no newer observation exists");
    let result = env.step([ROW, ROW]).await.unwrap();
    assert_eq!((result.reward, result.terminated, result.info["success"].as_bool()), (0.5, true, Some(true)));
    assert_eq!(env.get_obs().await.unwrap().seq, result.obs.seq);
    let error = env.start_obs_stream(30.0).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the server cannot stream observations: it observes in reset and step only"
    );
    // Actions are sent as steps, and the observation in the last reply is the newest.
    env.start_action_dispatch(200.0).unwrap();
    env.put_action(ROW).await.unwrap();
    server.wait_until("the action has arrived", |server| server.count("action") == 2).await;
    env.send_action([ROW, ROW]).await.unwrap();
    assert_eq!(env.get_obs().await.unwrap().seq, 4);
    assert_eq!(server.kinds()[3..], ["reset", "action", "action", "action"]);
    let shapes: Vec<usize> = server.received.lock().unwrap().iter().filter_map(rows).collect();
    assert_eq!(shapes, [2, 1, 2]);
}

#[tokio::test]
async fn each_call_uses_its_own_message_if_the_server_supports_both_generations() {
    let server = FakeServer { observes: true, ..FakeServer::gym() };
    let (uri, _serving) = server.serve().await;
    let env = client_builder(&uri).connect().await.unwrap();
    env.reset().await.unwrap();
    assert_eq!(env.step(ROW).await.unwrap().reward, 0.5);
    assert_eq!(env.get_obs().await.unwrap().seq, 3);
    env.send_action(ROW).await.unwrap();
    env.step(ROW).await.unwrap();
    let expected =
        ["metadata", "reset", "action", "metadata", "obs_request", "metadata", "apply_action", "action"];
    assert_eq!(server.kinds(), expected);
}

#[tokio::test]
async fn step_sends_actions_and_polls_if_the_server_cannot_step() {
    let server = FakeServer::streaming();
    let (uri, _serving) = server.serve().await;
    let env = client_builder(&uri).connect().await.unwrap();
    env.reset().await.unwrap();
    for n in 2..4 {
        let result = env.step([ROW, ROW]).await.unwrap();
        assert_eq!(
            (result.obs.seq, result.reward, result.terminated, result.truncated),
            (n, 0.0, false, false)
        );
    }
    // A step that the server ignores moves nothing.
    let first = ["action", "metadata", "apply_action", "obs_request", "metadata"];
    assert_eq!(server.kinds()[2..], [&first[..], &["apply_action", "obs_request"]].concat());
    assert_eq!(env.stats().actions_sent, 2);
}

#[tokio::test]
async fn calls_that_the_legacy_wire_cannot_express_fail_with_the_reason() {
    let server = FakeServer::streaming();
    let (uri, _serving) = server.serve().await;
    let env = client_builder(&uri).observer().connect().await.unwrap();
    for error in [env.reset().await.map(drop), env.step(ROW).await.map(drop), env.send_action(ROW).await] {
        let error = error.unwrap_err();
        assert!(matches!(&error, Error::Rejected(fault) if fault.code == Code::NotController), "{error:?}");
    }
    assert!(env.get_obs().await.is_ok());
    env.close().await.unwrap();

    let env = client_builder(&uri).connect().await.unwrap();
    let error = env.reset_with(Some(3), ValueMap::new()).await.unwrap_err();
    assert!(matches!(error, Error::Encode(_)), "{error:?}");
    assert!(error.to_string().contains("a reset with a seed or options"), "{error}");
    assert!(matches!(env.send_action([f32::NAN]).await, Err(Error::InvalidAction(_))));
    assert_eq!(env.reset().await.unwrap().0.episode, 1, "the failed calls sent nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_blocking_client_behaves_like_the_async_one() {
    let server = FakeServer::streaming();
    let (uri, _serving) = server.serve().await;
    let driving = tokio::task::spawn_blocking(move || {
        let env = blocking::PolicyClient::connect(&uri).unwrap();
        assert_eq!(env.codec(), Codec::Msgpack);
        env.reset().unwrap();
        env.start_obs_stream(100.0).unwrap();
        env.start_action_dispatch(100.0).unwrap();
        for _ in 0..5 {
            env.next_obs(TEST_TIMEOUT).unwrap();
            env.put_action(ROW).unwrap();
        }
        assert!(env.step(ROW).is_ok());
        env.close().unwrap();
        assert!(matches!(env.latest_obs(), Err(Error::Closed)));
    });
    in_time(driving).await.unwrap();
    assert!(server.count("apply_action") >= 2);
}
