//! Our client and our own server over the msgpack wire.

use chiral_client::{Codec, Error, PolicyClient};

use crate::support::{
    TEST_TIMEOUT, client_builder, free_locator,
    harness::{CAMERA, DIMENSION, Event, Harness},
};

#[tokio::test]
async fn our_server_serves_our_client_as_a_legacy_client_if_it_is_set_to_msgpack() {
    let harness = Harness::new();
    let uri = format!("ws://{}", harness.serve_websocket().await.0);
    let env = client_builder(&uri).codec(Codec::Msgpack).connect().await.unwrap();
    check_all_calls(&harness, &env).await;
    for builder in [client_builder(&uri), client_builder(&uri).codec(Codec::Msgpack)] {
        let error = builder.connect().await.unwrap_err();
        assert!(
            matches!(&error, Error::Busy(fault) if fault.text.contains("a legacy client at")),
            "{error:?}"
        );
    }
    let observer = client_builder(&uri).observer().connect().await.unwrap();
    assert_eq!(observer.codec(), Codec::Protobuf);
    env.close().await.unwrap();
    harness
        .wait_until("the robot is free", |harness| {
            harness.script.events().ends_with(&[Event::Held, Event::Disconnected])
        })
        .await;

    let env = client_builder(&uri).codec(Codec::Msgpack).connect().await.unwrap();
    *harness.script.reset_error.lock().unwrap() = Some("no power".to_owned());
    let error = env.reset().await.unwrap_err();
    assert!(error.to_string().ends_with("closed the connection with 1011: no power"), "{error}");
    harness.handle.shutdown();
}

#[tokio::test]
async fn our_server_serves_our_client_over_zenoh_if_it_is_set_to_msgpack() {
    let uri = free_locator();
    let harness = Harness::configured(|builder| builder.name("arm").listen_zenoh(&uri).legacy_zenoh(true));
    let _serving = tokio::spawn(harness.server.clone().serve());
    let env = client_builder(&uri).codec(Codec::Msgpack).connect().await.unwrap();
    check_all_calls(&harness, &env).await;
    env.close().await.unwrap();
}

/// Runs every call over msgpack, those of both generations.
async fn check_all_calls(harness: &Harness, env: &PolicyClient) {
    assert_eq!(env.codec(), Codec::Msgpack);
    assert_eq!(env.get_metadata().await.unwrap()["kind"].as_str(), Some("scripted"));
    let (first, _) = env.reset().await.unwrap();
    assert_eq!((first.episode, first[CAMERA].image.shape()), (1, &[8, 8, 3][..]));
    assert_eq!(env.step([[0.5; DIMENSION]; 2]).await.unwrap().reward, 2.0);
    assert!(env.get_obs().await.unwrap()[CAMERA].captured_at > first[CAMERA].captured_at);
    env.start_obs_stream(50.0).await.unwrap();
    env.start_action_dispatch(100.0).unwrap();
    for _ in 0..5 {
        env.next_obs(TEST_TIMEOUT).await.unwrap();
        env.put_action([0.25; DIMENSION]).await.unwrap();
    }
    env.send_action([[0.125; DIMENSION]; 2]).await.unwrap();
    harness.wait_until("all actions are applied", |harness| harness.script.applied().len() == 9).await;
    env.stop_obs_stream().await.unwrap();
}
