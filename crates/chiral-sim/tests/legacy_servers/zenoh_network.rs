//! Legacy servers on a Zenoh network, where they share their keys with every other peer.

use std::{thread, time::Duration};

use bytes::Bytes;
use chiral_client::{
    Codec, Error, ValueMap,
    proto::{
        Message, Reply,
        codec::msgpack::{self, ID},
    },
};
use zenoh::Wait;

use crate::{
    ROW,
    fake_server::{FakeServer, kind, observation, step_result},
    support::{TEST_TIMEOUT, client_builder, free_locator, in_time},
};

#[tokio::test]
async fn over_zenoh_a_server_is_probed_and_late_replies_to_probes_are_ignored() {
    let server = FakeServer::streaming();
    let uri = serve_zenoh(&server);
    let env = client_builder(&uri).reset_timeout(Duration::from_millis(2000)).connect().await.unwrap();
    // On a busy machine the client may send one more probe before the reply arrives.
    assert!(env.codec() == Codec::Msgpack && server.count("metadata") >= 3, "{:?}", server.kinds());
    let error = env.get_obs().await.unwrap_err();
    assert!(matches!(&error, Error::Unsupported { why, .. } if why.contains("reset first")), "{error:?}");
    env.reset().await.unwrap();
    assert_eq!(env.get_obs().await.unwrap().episode, 1);
    env.start_obs_stream(100.0).await.unwrap();
    let seq = env.next_obs(TEST_TIMEOUT).await.unwrap().seq;
    assert!(env.next_obs(TEST_TIMEOUT).await.unwrap().seq > seq);
    env.send_action(ROW).await.unwrap();
    assert_eq!(env.step([ROW, ROW]).await.unwrap().reward, 0.0);
    env.stop_obs_stream().await.unwrap();
    server.wait_until("both actions have arrived", |server| server.count("apply_action") == 2).await;
    assert!(env.get_metadata().await.is_ok());

    let error = in_time(env.reset()).await.unwrap_err();
    assert_eq!(error.to_string(), "expected a reply to the reset within 2 s, found none");
    assert!(env.get_obs().await.is_ok(), "the session continues");
    in_time(env.close()).await.unwrap();
}

#[tokio::test]
async fn over_zenoh_a_gym_like_server_is_detected_and_the_codec_can_be_forced() {
    let server = FakeServer::gym();
    let uri = serve_zenoh(&server);
    let error = client_builder(&uri)
        .codec(Codec::Protobuf)
        .deadline(Duration::from_millis(1500))
        .connect()
        .await
        .unwrap_err();
    assert!(matches!(error, Error::NoServer { .. }), "{error:?}");
    assert_eq!(server.kinds(), [""; 0], "the server received nothing");
    let env = client_builder(&uri).codec(Codec::Msgpack).connect().await.unwrap();
    env.reset().await.unwrap();
    assert_eq!(env.step(ROW).await.unwrap().reward, 0.5);
    assert!(matches!(env.start_obs_stream(30.0).await, Err(Error::Unsupported { .. })));
    let named = client_builder(&uri).codec(Codec::Msgpack).robot("arm").connect().await.unwrap_err();
    assert!(matches!(named, Error::Address { .. }), "{named:?}");
}

/// Serves on a Zenoh network as a listening peer, as legacy servers do, until the process ends. The server
/// replies to the third metadata request, and to the first two only when a reset arrives. It replies only to
/// the first reset. After each observation it sends a metadata reply that nobody requested.
fn serve_zenoh(server: &FakeServer) -> String {
    let uri = free_locator();
    let (server, locator) = (server.clone(), uri.clone());
    thread::spawn(move || {
        let mut config = zenoh::Config::default();
        config.insert_json5("mode", r#""peer""#).unwrap();
        config.insert_json5("listen/endpoints", &format!("[{locator:?}]")).unwrap();
        config.insert_json5("scouting/multicast/enabled", "false").unwrap();
        let session = zenoh::open(config).wait().unwrap();
        let subscriber = session.declare_subscriber("chiral/c2s").wait().unwrap();
        let send = |reply| {
            let frame = msgpack::encode(&Message::Reply { id: ID, reply }, &ValueMap::new()).unwrap();
            session.put("chiral/s2c", frame.into_bytes().to_vec()).wait().unwrap();
        };
        let (mut observations, mut probes) = (0, 0);
        while let Ok(sample) = subscriber.recv() {
            let decoded =
                msgpack::decode(Bytes::from(sample.payload().to_bytes().into_owned()).into()).unwrap();
            let kind = kind(&decoded.message);
            server.received.lock().unwrap().push(decoded);
            observations += 1;
            match kind {
                "metadata" => {
                    probes += 1;
                    if probes > 2 {
                        send(Reply::Metadata(ValueMap::new()));
                    }
                }
                "reset" if server.count("reset") == 1 => {
                    (0..2).for_each(|_| send(Reply::Metadata(ValueMap::new())));
                    send(Reply::Reset { obs: observation(observations), info: ValueMap::new() });
                }
                "obs_request" if server.observes => {
                    send(Reply::Observation(observation(observations)));
                    // As if to a request of another client.
                    send(Reply::Metadata(ValueMap::new()));
                }
                "action" if server.steps => send(Reply::Step(step_result(observation(observations)))),
                _ => {}
            }
        }
    });
    uri
}
