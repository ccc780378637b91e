//! Failures: malformed messages, robot methods that fail or panic, and sensors that never publish. The peer
//! gets an error that names the cause, and the server keeps serving.

use std::sync::{Arc, atomic::Ordering};

use bytes::Bytes;
use chiral_client::{Code, Error};
use chiral_proto::{ActionChunk, Codec, Message, Notice, Reply, Request, message::ActionMessage};
use chiral_server::{CameraSpec, PolicyServer, Robot as _, Sensors};
use chiral_sim::link::{LinkOptions, link};

use crate::{
    ROW, ms, reset,
    support::harness::{DIMENSION, Harness, Script, ScriptedRobot},
};

#[tokio::test]
async fn malformed_and_unknown_messages_get_an_error_and_the_server_keeps_serving() {
    let harness = Harness::new();
    let mut raw = harness.connect_raw().await;
    let session = raw.welcome.session;
    let action = ActionMessage { session, seq: 1, actions: ROW.into(), ..ActionMessage::default() };
    let action = Codec::Protobuf.encode(&Message::Notice(Notice::Action(action))).unwrap().into_bytes();
    let corrupted = |change: fn(&mut Vec<u8>)| {
        let mut bytes = action.to_vec();
        change(&mut bytes);
        bytes
    };
    let malformed = [
        vec![],
        vec![1, 0],
        vec![255; 64],
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        corrupted(|bytes| bytes[0] = 255),
        corrupted(|bytes| bytes.truncate(70)),
        corrupted(|bytes| bytes[8] ^= 0xff),
    ];
    for bytes in malformed {
        raw.send_frame(Bytes::from(bytes.clone())).await;
        let fault = raw.error_notice().await;
        assert_eq!(fault.code, Code::Malformed, "{bytes:?}: {fault}");
        assert!(fault.text.contains("expected"), "{fault}");
    }

    // A header with id 9 and a field 99 that no version has.
    static UNKNOWN: [u8; 9] = [5, 0, 0, 0, 0x08, 9, 0x9a, 0x06, 0];
    raw.send_frame(Bytes::from_static(&UNKNOWN)).await;
    match raw.reply_to(9).await {
        Reply::Error(fault) => assert_eq!(fault.code, Code::Unsupported),
        other => panic!("{other:?}"),
    }

    assert!(matches!(raw.request(Request::GetObs).await, Reply::Observation(_)));
    assert!(matches!(raw.request(reset(1)).await, Reply::Reset { .. }));
    assert!(harness.script.applied().is_empty());
}

#[tokio::test]
async fn a_reset_that_fails_returns_the_robots_error_and_the_server_keeps_serving() {
    let harness = Harness::new();
    *harness.script.reset_error.lock().unwrap() = Some("the brake of joint 3 does not release".to_owned());
    let env = harness.connect().await;
    match env.reset().await {
        Err(Error::Rejected(fault)) => {
            assert_eq!(fault.code, Code::RobotFailed);
            assert!(fault.text.contains("joint 3"), "{fault}");
        }
        other => panic!("{other:?}"),
    }
    *harness.script.reset_error.lock().unwrap() = None;
    env.reset().await.unwrap();
    assert_eq!(env.step(ROW).await.unwrap().reward, 1.0);
}

#[tokio::test]
async fn a_panic_in_any_robot_method_is_reported_and_the_server_keeps_serving() {
    for method in ["action_spec", "execution", "is_lock_step", "stopper", "metadata"] {
        let script = Arc::new(Script::default());
        *script.panics_in.lock().unwrap() = Some(method);
        let built = PolicyServer::new(ScriptedRobot(script), Sensors::new([], []).unwrap());
        assert!(built.unwrap_err().to_string().contains(&format!("panicked in {method}")));
    }

    for method in ["metadata", "reset", "apply_action", "apply_chunk", "step", "hold", "on_disconnect"] {
        let script = Arc::new(Script::default());
        script.executes_chunks.store(method == "apply_chunk", Ordering::Relaxed);
        let harness = Harness::with(Arc::clone(&script), 8, 8, |builder| builder);
        *script.panics_in.lock().unwrap() = Some(method);
        let env = harness.connect().await;
        let error = match method {
            "metadata" => {
                env.reset().await.unwrap();
                env.get_metadata().await.unwrap_err()
            }
            "reset" => env.reset().await.unwrap_err(),
            "step" => env.step(ROW).await.unwrap_err(),
            "apply_action" | "apply_chunk" => {
                let rows = if method == "apply_action" { 1 } else { 2 };
                env.send_action(ActionChunk::new(DIMENSION, ROW.repeat(rows)).unwrap()).await.unwrap();
                harness.wait_until("the refusal arrives", |_| env.stats().actions_refused == 1).await;
                env.put_action(ROW).await.unwrap_err()
            }
            _ => {
                env.close().await.unwrap();
                harness
                    .wait_until("the robot is out of service", |harness| {
                        harness.handle.stats().out_of_service.is_some()
                    })
                    .await;
                harness.connect().await.reset().await.unwrap_err()
            }
        };
        match &error {
            Error::Rejected(fault) | Error::ActionRefused(fault) => {
                assert_eq!(fault.code, Code::OutOfService, "{method}: {fault}")
            }
            other => panic!("{method}: {other}"),
        }
        assert!(error.to_string().contains(&format!("panicked in {method}")), "{method}: {error}");
        assert!(script.applied().is_empty(), "{method}");
        let observer = harness
            .builder()
            .observer()
            .connect_over(harness.open_link(LinkOptions::default()).0)
            .await
            .unwrap();
        assert!(observer.get_obs().await.is_ok(), "{method}: observations are still served");
        assert!(harness.handle.stats().out_of_service.unwrap().contains(method));
    }
    assert_eq!(ScriptedRobot(Arc::default()).action_spec().dimension, DIMENSION);
}

#[tokio::test]
async fn the_error_names_a_sensor_that_never_publishes() {
    let harness = Harness::configured(|builder| builder.observe_timeout(ms(50)));
    let sensors = Sensors::new([CameraSpec::rgb("left_cam", 2, 2)], []).unwrap();
    let server = PolicyServer::builder(ScriptedRobot(Arc::default()), sensors)
        .observe_timeout(ms(50))
        .build()
        .unwrap();
    let (client_end, server_end, _) = link(LinkOptions::default());
    tokio::spawn(async move { server.serve_connection(server_end).await });
    let env = harness.builder().connect_over(client_end).await.unwrap();
    for outcome in
        [env.get_obs().await.map(drop), env.start_obs_stream(30.0).await, env.reset().await.map(drop)]
    {
        match outcome {
            Err(Error::Rejected(fault)) => {
                assert_eq!((fault.code, &*fault.field), (Code::SensorTimeout, "camera left_cam"))
            }
            other => panic!("{other:?}"),
        }
    }
}
