//! The messages of the frames that `golden.py` writes. Keep the two files in step.

use std::sync::Arc;

use bytes::Bytes;
use chiral_proto::{
    ActionChunk, ActionSpec, Camera, CameraSpec, Code, DType, Encoding, Image, Message, Notice, Observation,
    ProprioSpec, Reply, Request, StepResult, Timestamp, Value, ValueMap,
    action::ActionMeaning,
    clock::Rate,
    error::Fault,
    message::{ActionMessage, ActionsDropped, Hello, RobotInfo, Role, Subscribe, Welcome},
    value::map,
};

use super::{Named, camera, notice, proprio, reply, request, strings, tensor};

pub(crate) fn all() -> Vec<Named> {
    [requests(), replies(), notices(), newer()].concat()
}

fn requests() -> Vec<Named> {
    let hello = Hello {
        protocol: 1,
        software: "python".to_owned(),
        role: Role::Observer,
        client_name: "schlängel".to_owned(),
        auth: Bytes::from_static(&[0, 1, 2]),
        attach_token: Bytes::from_static(&[7; 16]),
    };
    let actions = ActionChunk::new(3, vec![1.0, 2.0, 3.0, -1.0, -2.0, -3.0]).unwrap();
    let subscribe =
        Subscribe { rate: Rate::new(12.5).unwrap(), cameras: strings(["a"]), depth: true, window: 3 };
    vec![
        ("hello", request(11, Request::Hello(hello))),
        ("get_metadata", request(12, Request::GetMetadata)),
        (
            "reset",
            request(
                13,
                Request::Reset {
                    seed: Some(u64::MAX),
                    options: map([("why", Value::Str("again".to_owned()))]),
                },
            ),
        ),
        ("reset-plain", request(13, Request::Reset { seed: None, options: ValueMap::new() })),
        ("get_obs", request(14, Request::GetObs)),
        ("step", request(15, Request::Step { session: 5, episode: 6, actions })),
        ("subscribe", request(16, Request::Subscribe(subscribe))),
        ("unsubscribe", request(17, Request::Unsubscribe)),
    ]
}

fn replies() -> Vec<Named> {
    let action_spec = ActionSpec {
        dimension: 2,
        names: strings(["left", "right"]),
        low: vec![-1.0, -2.0],
        high: vec![1.0, 2.0],
        unit: "m/s".to_owned(),
        meaning: ActionMeaning::EndEffectorDelta,
        control_hz: 50.0,
    };
    let welcome = Welcome {
        protocol: 1,
        software: "python".to_owned(),
        session: 5,
        episode: 6,
        robot: RobotInfo {
            name: "snake".to_owned(),
            cameras: vec![CameraSpec {
                name: "a".to_owned(),
                image_shape: [4, 5, 6],
                image_dtype: DType::I16,
                depth_shape: Some([4, 5]),
            }],
            proprios: vec![ProprioSpec::new("coil", 3, "N m")],
            action_spec,
        },
        attach_token: Bytes::from_static(&[9; 16]),
        controller: "day shift".to_owned(),
        max_chunk_rows: 0,
    };
    let values = map([
        ("bool", Value::Bool(false)),
        ("bytes", Value::Bytes(Bytes::from_static(b"\xfe"))),
        ("float", Value::Float(1.5)),
        ("int", Value::Int(i64::MAX)),
        ("list", Value::List(vec![Value::Int(0), Value::Str("x".to_owned())])),
        ("map", Value::Map(map([("null", Value::Null)]))),
        // A kind of value that this version does not know.
        ("newer", Value::Null),
        ("null", Value::Null),
        ("str", Value::Str("λ".to_owned())),
    ]);
    let step = StepResult {
        obs: observation(),
        reward: 0.5,
        terminated: false,
        truncated: true,
        info: map([("rows", Value::Int(2))]),
    };
    vec![
        ("welcome", reply(11, Reply::Welcome(welcome.into()))),
        ("metadata", reply(12, Reply::Metadata(values))),
        ("reset_result", reply(13, Reply::Reset { obs: observation(), info: ValueMap::new() })),
        ("observation", reply(14, Reply::Observation(observation()))),
        ("step_result", reply(15, Reply::Step(step))),
        ("subscribed", reply(16, Reply::Subscribed { hz: 10.0, cameras: strings(["a"]) })),
        ("stream_end", reply(17, Reply::StreamEnd { reason: "asked".to_owned() })),
    ]
}

fn notices() -> Vec<Named> {
    let action = ActionMessage {
        session: 5,
        episode: 6,
        seq: 7,
        actions: ActionChunk::from([[0.25, 0.75]]),
        observation_seq: 8,
        ..ActionMessage::default()
    };
    let refused = Fault {
        code: Code::QueueFull,
        text: "16 rows wait".to_owned(),
        field: "action".to_owned(),
        retryable: true,
        action_seq: 7,
    };
    vec![
        ("action", notice(Notice::Action(action))),
        ("credit", notice(Notice::Credit { received: 9, window: 4 })),
        ("ping", notice(Notice::Ping { t1: Timestamp(-123) })),
        ("pong", notice(Notice::Pong { t1: Timestamp(i64::MIN), t2: Timestamp(0), t3: Timestamp(456) })),
        ("goodbye", notice(Notice::Goodbye { reason: "bye".to_owned() })),
        ("error", notice(Notice::Error(refused))),
        (
            "actions_dropped",
            notice(Notice::ActionsDropped(ActionsDropped { late: 3, superseded: 4, accepted: 5 })),
        ),
    ]
}

/// Frames of a later version, with kinds, fields and enum values that this version does not know.
fn newer() -> Vec<Named> {
    vec![
        ("credit-unknown_fields", notice(Notice::Credit { received: 9, window: 4 })),
        ("error-unknown_code", notice(Notice::Error(Fault::new(Code::Unspecified, "new")))),
        ("observation-unknown_encoding", notice(Notice::Observation(unknown_encoding()))),
        ("unknown_kind", Message::Unknown { id: 77 }),
        ("unknown_kind-notice", Message::Unknown { id: 0 }),
    ]
}

/// One camera, whose image and depth are encoded.
fn unknown_encoding() -> Arc<Observation> {
    let encoded = |dtype, shape: &[usize], data: &'static [u8]| {
        Image::new(Encoding(4242), dtype, shape, Bytes::from_static(data)).unwrap()
    };
    let plain = observation();
    let camera = Camera {
        image: encoded(DType::U8, &[480, 640, 3], b"picture"),
        depth: Some(encoded(DType::F32, &[480, 640], b"")),
        ..Camera::clone(&plain.cameras[0])
    };
    Arc::new(Observation { cameras: vec![Arc::new(camera)], ..Observation::clone(&plain) })
}

fn observation() -> Arc<Observation> {
    let depth = tensor::<f32>(&[1, 2], &[0.5, 4.0]);
    Arc::new(Observation {
        session: 5,
        episode: 6,
        seq: 8,
        timestamp: 99.5,
        cameras: vec![camera(
            "a",
            3,
            -77,
            2.0,
            tensor::<u8>(&[1, 2, 3], &[10, 20, 30, 40, 50, 60]),
            Some(depth),
        )],
        proprios: vec![proprio("coil", 88, &[1.0, 2.0, 4.0])],
        extra: map([("note", Value::Str("hi".to_owned()))]),
    })
}
