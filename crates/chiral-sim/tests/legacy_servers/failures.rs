//! Failures: replies that are late, missing, slow or malformed, and servers that close.

use std::time::Duration;

use bytes::Bytes;
use chiral_client::{
    Error, Value, ValueMap,
    proto::{
        Frame, Message, Reply,
        codec::msgpack::{self, ID},
        value,
    },
};
use tokio::io::AsyncWriteExt;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, frame::coding::CloseCode};

use crate::{
    ROW,
    fake_server::{connect, step_result},
    support::{TEST_TIMEOUT, in_time},
};

#[tokio::test]
async fn a_late_reply_is_never_taken_for_the_reply_to_another_request() {
    let (env, mut server) = connect(|builder| builder.request_timeout(Duration::from_millis(1000))).await;
    let obs = server.next_observation();
    let replying = async {
        server.reply_to("obs_request", Reply::Observation(obs)).await;
        server.reply_to("metadata", Reply::Metadata(ValueMap::new())).await;
    };
    let (obs, ()) = in_time(async { tokio::join!(env.get_obs(), replying) }).await;
    assert_eq!(obs.unwrap().timestamp, 1.0);

    let (late, _) = in_time(async { tokio::join!(env.get_obs(), server.expect("obs_request")) }).await;
    assert!(matches!(late, Err(Error::Timeout { .. })), "{late:?}");
    // The client recognises a late reply of another kind by its kind.
    let (late, next) = (server.next_observation(), server.next_observation());
    let replying = async {
        server.expect("metadata").await;
        server.send(Reply::Observation(late)).await;
        server.send(Reply::Metadata(value::map([("n", 2.into())]))).await;
    };
    let (metadata, ()) = in_time(async { tokio::join!(env.get_metadata(), replying) }).await;
    assert_eq!(metadata.unwrap()["n"].as_i64(), Some(2));

    // A late reply of the same kind: the client requests again only once it knows that the late reply has
    // arrived or will never arrive.
    for is_lost in [false, true] {
        let (late, _) = in_time(async { tokio::join!(env.get_obs(), server.expect("obs_request")) }).await;
        assert!(matches!(late, Err(Error::Timeout { .. })), "{late:?}");
        let late = server.next_observation();
        let next = next.clone();
        let replying = async {
            server.expect("metadata").await;
            if !is_lost {
                server.send(Reply::Observation(late)).await;
            }
            server.send(Reply::Metadata(ValueMap::new())).await;
            server.reply_to("obs_request", Reply::Observation(next)).await;
        };
        let (obs, ()) = in_time(async { tokio::join!(env.get_obs(), replying) }).await;
        assert_eq!(obs.unwrap().timestamp, 3.0, "lost: {is_lost}");
    }
}

#[tokio::test]
async fn a_stream_ends_with_an_error_if_the_server_does_not_reply() {
    // Not the `request_timeout`: the server may carry out an action first.
    let timeout = Duration::from_millis(1000);
    let (env, mut server) = connect(|builder| builder.step_timeout(timeout)).await;
    let obs = server.next_observation();
    let replying = async {
        server.reply_to("obs_request", Reply::Observation(obs)).await;
        server.reply_to("metadata", Reply::Metadata(ValueMap::new())).await;
    };
    let (started, ()) = in_time(async { tokio::join!(env.start_obs_stream(50.0), replying) }).await;
    started.unwrap();
    let (obs, _) = tokio::join!(env.next_obs(TEST_TIMEOUT), server.expect("obs_request"));
    let error = obs.unwrap_err();
    assert!(matches!(&error, Error::StreamEnded { reason } if reason.contains("within 1 s")), "{error:?}");
}

#[tokio::test]
async fn only_a_pending_reset_or_step_outlasts_the_idle_timeout_even_without_pongs() {
    let (env, mut server) = connect(|builder| builder.idle_timeout(Duration::from_millis(1000))).await;
    for episode in 1..=2 {
        let obs = server.next_observation();
        let replying = async {
            server.expect("reset").await;
            if episode == 1 {
                server.answer_pings(Duration::from_millis(2200)).await;
            } else {
                // Like a server whose only thread homes the robot.
                tokio::time::sleep(Duration::from_millis(2200)).await;
            }
            server.send(Reply::Reset { obs, info: ValueMap::new() }).await;
        };
        let (reset, ()) = in_time(async { tokio::join!(env.reset(), replying) }).await;
        assert_eq!(reset.unwrap().0.episode, episode);
    }
    let obs = server.next_observation();
    let replying = async {
        server.expect("action").await;
        server.expect("metadata").await;
        tokio::time::sleep(Duration::from_millis(2200)).await;
        server.send(Reply::Step(step_result(obs))).await;
        server.send(Reply::Metadata(ValueMap::new())).await;
    };
    let (step, ()) = in_time(async { tokio::join!(env.step(ROW), replying) }).await;
    assert_eq!(step.unwrap().reward, 0.5);
    let error = in_time(env.get_obs()).await.unwrap_err();
    let Error::Disconnected { reason, .. } = &error else { panic!("expected a disconnect, found {error:?}") };
    assert!(reason.contains("nothing received from the server for 1 s"), "{reason}");
    assert!(env.latest_obs().is_err());
}

/// Some servers drop requests that they refuse, and keep answering pings.
#[tokio::test]
async fn a_request_without_a_reply_times_out_and_the_session_continues() {
    let (env, mut server) = connect(|builder| builder.reset_timeout(Duration::from_millis(1000))).await;
    let dropping = async {
        for _ in 0..2 {
            server.expect("reset").await;
            // The metadata reply shows the client that the reset got none.
            server.reply_to("metadata", Reply::Metadata(ValueMap::new())).await;
        }
    };
    let requesting = async {
        for _ in 0..2 {
            let error = env.reset().await.unwrap_err();
            assert_eq!(error.to_string(), "expected a reply to the reset within 1 s, found none");
            assert!(env.get_metadata().await.is_ok());
        }
    };
    in_time(async { tokio::join!(requesting, dropping) }).await;

    // The metadata request sent behind a step shows at once that the step was dropped. The next step is sent
    // all the same.
    let dropping = async {
        server.expect("action").await;
        server.reply_to("metadata", Reply::Metadata(ValueMap::new())).await;
        server.expect("apply_action").await;
        server.expect("obs_request").await;
        server.reply_to("metadata", Reply::Metadata(ValueMap::new())).await;
    };
    let (step, ()) = in_time(async { tokio::join!(env.step(ROW), dropping) }).await;
    let error = step.unwrap_err();
    assert!(matches!(&error, Error::Unsupported { why, .. } if why.contains("ignored")), "{error:?}");
    let obs = server.next_observation();
    let (step, _) = in_time(async {
        tokio::join!(env.step(ROW), server.reply_to("action", Reply::Step(step_result(obs))))
    })
    .await;
    assert_eq!(step.unwrap().reward, 0.5);
}

#[tokio::test]
async fn a_reply_that_arrives_slowly_triggers_no_timeout() {
    let limit = Duration::from_secs(1);
    let (env, mut server) = connect(|builder| builder.idle_timeout(limit).request_timeout(limit)).await;
    let reply = Reply::Metadata(value::map([("filler", Value::Bytes(vec![0; 8000].into()))]));
    let frame = msgpack::encode(&Message::Reply { id: ID, reply }, &ValueMap::new()).unwrap().into_bytes();
    let replying = async {
        server.expect("metadata").await;
        let stream = server.socket.get_mut();
        let len = u16::try_from(frame.len()).unwrap().to_be_bytes();
        stream.write_all(&[0x82, 126, len[0], len[1]]).await.unwrap();
        for piece in frame.chunks(frame.len() / 10) {
            tokio::time::sleep(Duration::from_millis(200)).await;
            stream.write_all(piece).await.unwrap();
        }
    };
    let (metadata, ()) = in_time(async { tokio::join!(env.get_metadata(), replying) }).await;
    assert_eq!(metadata.unwrap().len(), 1);
}

#[tokio::test]
async fn garbage_and_unrequested_replies_end_the_session_but_a_malformed_reply_only_its_request() {
    for (bytes, expected) in [
        (b"garbage".to_vec(), "malformed"),
        (
            include_bytes!("../../../chiral-proto/tests/msgpack/step_response.bin").to_vec(),
            "found a step_response",
        ),
        (include_bytes!("../../../chiral-proto/tests/msgpack/reset.bin").to_vec(), "expected replies"),
    ] {
        let (env, mut server) = connect(|builder| builder).await;
        let replying = async {
            server.expect("metadata").await;
            server.send_bytes(bytes).await;
        };
        let (metadata, ()) = in_time(async { tokio::join!(env.get_metadata(), replying) }).await;
        let error = metadata.unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(env.get_obs().await.unwrap_err().to_string(), error.to_string());
    }
    let (env, mut server) = connect(|builder| builder).await;
    let broken: &[u8] = include_bytes!("../../../../fuzz/seeds/msgpack/hostile-wrong_size.bin");
    let field = msgpack::decode(Frame::from(Bytes::from_static(broken))).unwrap_err().field;
    let requested = if field.starts_with("obs_response") { "obs_request" } else { "reset" };
    let replying = async {
        server.expect(requested).await;
        server.send_bytes(broken.to_vec()).await;
        if requested == "obs_request" {
            server.reply_to("metadata", Reply::Metadata(ValueMap::new())).await;
        }
    };
    let requesting = async {
        if requested == "reset" { env.reset().await.map(drop) } else { env.get_obs().await.map(drop) }
    };
    let (outcome, ()) = in_time(async { tokio::join!(requesting, replying) }).await;
    let error = outcome.unwrap_err();
    assert!(matches!(&error, Error::Malformed(error) if error.field == field), "{error:?}");
    let replying = async { server.reply_to("metadata", Reply::Metadata(ValueMap::new())).await };
    let (metadata, _) = in_time(async { tokio::join!(env.get_metadata(), replying) }).await;
    assert!(metadata.is_ok(), "expected the session to continue, found {metadata:?}");
}

#[tokio::test]
async fn the_servers_close_reason_reaches_the_caller() {
    let busy = "the robot is controlled by \"the night shift\" (session 3)";
    for (code, reason, expected) in [
        (
            1008,
            "actions: expected finite values",
            "the peer closed the connection with 1008: actions: expected finite values",
        ),
        (1011, "no power", "the peer closed the connection with 1011: no power"),
        (1011, "", "the peer closed the connection with 1011"),
        (1013, "full", "the peer closed the connection with 1013: full"),
        (1013, busy, busy),
        (1000, "bye", "the server closed the connection"),
    ] {
        let (env, mut server) = connect(|builder| builder).await;
        let closing = async {
            server.expect("reset").await;
            server
                .socket
                .close(Some(CloseFrame { code: CloseCode::from(code), reason: reason.into() }))
                .await
                .unwrap();
            // Until the client has closed too.
            server.receive().await
        };
        let (reset, _) = in_time(async { tokio::join!(env.reset(), closing) }).await;
        let error = reset.unwrap_err();
        assert!(error.to_string().ends_with(expected), "{error}");
        assert_eq!(matches!(error, Error::Busy(_)), reason == busy, "{error:?}");
    }
}
