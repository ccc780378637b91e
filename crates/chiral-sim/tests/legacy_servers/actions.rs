//! Actions: the capture times they carry, their order relative to requests, and what a reset discards.

use std::time::Duration;

use bytes::Bytes;
use chiral_client::{
    Code, Error, PutMode, Value, ValueMap,
    proto::{Frame, Message, Notice, Reply, codec::msgpack, value},
};
use futures_util::FutureExt;

use crate::{
    ROW,
    fake_server::{FakeServer, connect, rows},
    support::{TEST_TIMEOUT, client_builder, in_time},
};

/// The capture times that a server puts into an observation come back with the actions that were chosen from
/// it, and with no others.
#[tokio::test]
async fn actions_carry_the_capture_times_of_their_observation_bit_for_bit() {
    let frames: [&[u8]; 3] = [
        include_bytes!("../../../chiral-proto/tests/msgpack/varied-nanos.bin"),
        include_bytes!("../../../chiral-proto/tests/msgpack/varied-unix.bin"),
        include_bytes!("../../../chiral-proto/tests/msgpack/obs_response.bin"),
    ];
    let (env, mut server) = connect(|builder| builder).await;
    let reset = tokio::spawn({
        let env = env.clone();
        async move { env.reset().await.map(drop) }
    });
    let obs = server.next_observation();
    server.reply_to("reset", Reply::Reset { obs, info: ValueMap::new() }).await;
    reset.await.unwrap().unwrap();
    let reset_times =
        value::map([("wrist_cam", Value::Float(1.000_000_001)), ("head_cam", Value::Float(1.000_000_001))]);
    for (n, frame) in frames.into_iter().enumerate() {
        let expected = msgpack::decode(Frame::from(Bytes::from_static(frame))).unwrap().capture_times;
        assert!(!expected.is_empty());
        let replying = async {
            server.expect("obs_request").await;
            server.send_bytes(frame.to_vec()).await;
            if n == 0 {
                server.reply_to("metadata", Reply::Metadata(ValueMap::new())).await;
            }
        };
        // Queued before the observation arrives, sent after it.
        env.clear_actions();
        env.put_action(ROW).await.unwrap();
        let (obs, ()) = in_time(async { tokio::join!(env.get_obs(), replying) }).await;
        env.put_chunk([ROW, ROW], PutMode::Append).await.unwrap();
        drop(obs.unwrap());
        env.send_action(ROW).await.unwrap();
        let received = server.expect("apply_action").await;
        assert_eq!(bits(&received.capture_times), bits(&expected), "sent immediately");
        env.start_action_dispatch(100.0).unwrap();
        let before = server.expect("apply_action").await.capture_times;
        assert!(
            bits(&before) != bits(&expected),
            "expected the times of the previous observation, found {before:?}"
        );
        assert!(n > 0 || before == reset_times, "{before:?}");
        for _ in 0..2 {
            let received = server.expect("apply_action").await;
            assert_eq!(
                (bits(&received.capture_times), rows(&received)),
                (bits(&expected), Some(1)),
                "from the queue"
            );
        }
        env.stop_action_dispatch();
    }
}

fn bits(times: &ValueMap) -> Vec<(String, String, u64)> {
    let bits = |time: &Value| match time {
        Value::Int(time) => ("int".to_owned(), *time as u64),
        Value::Float(time) => ("float".to_owned(), time.to_bits()),
        other => panic!("expected a time, found {other:?}"),
    };
    times.iter().map(|(camera, time)| (camera.clone(), bits(time).0, bits(time).1)).collect()
}

#[tokio::test]
async fn requests_never_overlap_and_actions_do_not_wait_for_them() {
    let server = FakeServer { reply_delay: Duration::from_millis(5), ..FakeServer::streaming() };
    let (uri, _serving) = server.serve().await;
    let env = client_builder(&uri).connect().await.unwrap();
    env.reset().await.unwrap();
    env.start_obs_stream(1000.0).await.unwrap();
    env.start_action_dispatch(500.0).unwrap();
    for _ in 0..10 {
        env.next_obs(TEST_TIMEOUT).await.unwrap();
        env.put_action(ROW).await.unwrap();
        env.get_metadata().await.unwrap();
        env.get_obs().await.unwrap();
    }
    server.wait_until("all actions have arrived", |server| server.count("apply_action") == 10).await;
    assert!(server.capture_times().iter().all(|times| times.len() == 2), "{:?}", server.capture_times());
    assert_eq!(
        *server.overlapping.lock().unwrap(),
        ["metadata"],
        "only the request that detects the generation overlaps"
    );
}

#[tokio::test]
async fn actions_put_while_a_reset_is_pending_are_not_sent() {
    let (env, mut server) = connect(|builder| builder).await;
    let obs = server.next_observation();
    let replying = async {
        server.reply_to("obs_request", Reply::Observation(obs)).await;
        server.reply_to("metadata", Reply::Metadata(ValueMap::new())).await;
    };
    let (obs, ()) = tokio::join!(env.get_obs(), replying);
    obs.unwrap();
    env.start_action_dispatch(1000.0).unwrap();
    // The caller drops the call, but the server executes the reset.
    let resetting = env.reset().now_or_never();
    assert!(resetting.is_none());
    server.expect("reset").await;
    env.put_action(ROW).await.unwrap();
    let error = env.send_action(ROW).await.unwrap_err();
    assert!(matches!(&error, Error::ActionRefused(fault) if fault.code == Code::Stale), "{error:?}");
    let obs = server.next_observation();
    server.send(Reply::Reset { obs, info: ValueMap::new() }).await;
    let obs = server.next_observation();
    let replying = async { server.reply_to("obs_request", Reply::Observation(obs)).await };
    let (obs, _) = in_time(async { tokio::join!(env.get_obs(), replying) }).await;
    assert_eq!(obs.unwrap().episode, 1);
    env.put_action([9.0; 3]).await.unwrap();
    let received = server.expect("apply_action").await;
    let Message::Notice(Notice::Action(action)) = &received.message else { panic!("{received:?}") };
    assert_eq!(action.actions.values(), [9.0; 3]);
    assert_eq!(env.stats().actions_discarded, 1);
}
