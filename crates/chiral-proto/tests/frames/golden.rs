//! The messages of the golden frames. Their tensors are tiny, because the frames are also seeds of the
//! fuzzers.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use chiral_proto::{
    ActionChunk, ActionSpec, Camera, CameraSpec, Code, DType, Notice, Observation, ProprioSpec, Reply,
    Request, StepResult, Timestamp, Value, ValueMap,
    action::ActionMeaning,
    clock::Rate,
    error::Fault,
    message::{ActionMessage, ActionsDropped, Hello, RobotInfo, Role, Subscribe, Welcome},
    value::map,
};

use super::{Named, camera, counting, notice, proprio, reply, request, strings, tensor};

pub(crate) fn all() -> Vec<Named> {
    [requests(), replies(), notices()].concat()
}

fn requests() -> Vec<Named> {
    let hello = Hello {
        protocol: 1,
        software: "chiral-client 0.1.0".to_owned(),
        role: Role::Controller,
        client_name: "Ada's laptop".to_owned(),
        auth: Bytes::from_static(b"secret"),
        attach_token: Bytes::new(),
    };
    let attaching = Hello {
        role: Role::Observer,
        client_name: "größer".to_owned(),
        auth: Bytes::new(),
        attach_token: Bytes::from_static(&[0xff; 16]),
        ..hello.clone()
    };
    let subscribe = Subscribe {
        rate: Rate::new(30.0).unwrap(),
        cameras: strings(["wrist_cam", "head_cam"]),
        depth: true,
        window: 2,
    };
    vec![
        ("hello", request(1, Request::Hello(hello))),
        ("hello-attaching", request(2, Request::Hello(attaching))),
        ("get_metadata", request(3, Request::GetMetadata)),
        (
            "reset",
            request(4, Request::Reset { seed: Some(0), options: map([("difficulty", Value::Int(2))]) }),
        ),
        ("reset-plain", request(5, Request::Reset { seed: None, options: ValueMap::new() })),
        ("get_obs", request(6, Request::GetObs)),
        (
            "step",
            request(
                7,
                Request::Step {
                    session: 9,
                    episode: 1,
                    actions: ActionChunk::new(2, vec![0.5, -0.5, 1.0, f32::MIN_POSITIVE]).unwrap(),
                },
            ),
        ),
        ("subscribe", request(8, Request::Subscribe(subscribe))),
        (
            "subscribe-all",
            request(
                9,
                Request::Subscribe(Subscribe {
                    rate: Rate::new(0.5).unwrap(),
                    cameras: Vec::new(),
                    depth: false,
                    window: 1,
                }),
            ),
        ),
        ("unsubscribe", request(u64::MAX, Request::Unsubscribe)),
    ]
}

fn replies() -> Vec<Named> {
    let step = StepResult {
        obs: with_depth(),
        reward: -1.25,
        terminated: true,
        truncated: true,
        info: map([("success", Value::Bool(true))]),
    };
    let busy = Fault::new(Code::Busy, "the robot is held by Ada's laptop").retryable();
    vec![
        (
            "welcome",
            reply(
                1,
                Reply::Welcome(welcome(arm(), Bytes::from_static(b"0123456789abcdef"), "night shift").into()),
            ),
        ),
        ("welcome-small_depth", reply(3, Reply::Welcome(welcome(small_depth(), Bytes::new(), "").into()))),
        ("welcome-bare", reply(2, Reply::Welcome(welcome(bare(), Bytes::new(), "").into()))),
        ("metadata", reply(3, Reply::Metadata(every_value()))),
        ("reset_result", reply(4, Reply::Reset { obs: with_depth(), info: map([("seed", Value::Int(0))]) })),
        ("observation-reply", reply(6, Reply::Observation(of_every_dtype()))),
        ("step_result", reply(7, Reply::Step(step))),
        ("subscribed", reply(8, Reply::Subscribed { hz: 30.0, cameras: strings(["wrist_cam", "head_cam"]) })),
        ("stream_end-reply", reply(u64::MAX, Reply::StreamEnd { reason: "unsubscribed".to_owned() })),
        ("error-reply", reply(1, Reply::Error(busy))),
    ]
}

fn notices() -> Vec<Named> {
    let action = ActionMessage {
        session: 9,
        episode: 1,
        seq: 300,
        actions: ActionChunk::from([[0.1, -0.2, 0.3]]),
        observation_seq: 41,
        ..ActionMessage::default()
    };
    let timed = ActionMessage {
        actions: ActionChunk::from([0.1, -0.2, 0.3]),
        sent_at: Some(Timestamp(-5)),
        valid_for: Some(Duration::from_millis(80)),
        observed_at: Some(Timestamp(i64::MAX)),
        ..action.clone()
    };
    let dropped = ActionsDropped { late: 16, superseded: 81, accepted: u64::MAX };
    let refused = Fault {
        action_seq: 300,
        ..Fault::new(Code::Stale, "expected episode 2, found 1").field("action.episode")
    };
    let [t1, t2, t3] = [-1, 2_000_000_000, i64::MAX].map(Timestamp);
    vec![
        ("observation", notice(Notice::Observation(with_depth()))),
        ("observation-stale", notice(Notice::Observation(stale()))),
        ("stream_end", notice(Notice::StreamEnd { reason: "the robot is out of service".to_owned() })),
        ("action", notice(Notice::Action(action))),
        ("action-timed", notice(Notice::Action(timed))),
        ("actions_dropped", notice(Notice::ActionsDropped(dropped))),
        ("credit", notice(Notice::Credit { received: 1 << 40, window: 8 })),
        ("ping", notice(Notice::Ping { t1 })),
        ("pong", notice(Notice::Pong { t1, t2, t3 })),
        ("goodbye", notice(Notice::Goodbye { reason: "done".to_owned() })),
        ("error", notice(Notice::Error(refused))),
    ]
}

/// Two cameras, one with depth. Their data does not end at multiples of 64, so that padding is needed.
fn with_depth() -> Arc<Observation> {
    let depth = tensor(&[2, 3], &[0.5, 1.0, 1.5, 0.0, f32::NAN, 3.0_f32]);
    Arc::new(Observation {
        session: 9,
        episode: 1,
        seq: 42,
        timestamp: 12.5,
        cameras: vec![
            camera("wrist_cam", 17, 1_000_000_007, 0.5, counting(DType::U8, &[2, 3, 3], 1), Some(depth)),
            camera("head_cam", 18, -5, 0.25, counting(DType::U8, &[5, 5, 3], 100), None),
        ],
        proprios: vec![proprio("joint_pos", 1_000_000_009, &[0.25, -0.5]), proprio("nothing", 0, &[])],
        extra: map([("phase", Value::Str("approach".to_owned()))]),
    })
}

/// Cameras that have stopped. One has depth of another size than its image and with a K of its own, the other
/// depth of the same size with a K of its own.
fn stale() -> Arc<Observation> {
    let of = |name, depth_shape: [usize; 2], scale: f64| {
        let image = counting(DType::U8, &[4, 6, 3], 1);
        let depth = counting(DType::F32, &depth_shape, 7);
        let camera = Camera::clone(&camera(name, 3, 4, 0.5, image, Some(depth)));
        let depth_intrinsics = Some(camera.intrinsics * scale);
        Arc::new(Camera { depth_intrinsics, is_stale: true, ..camera })
    };
    let cameras = vec![of("small_depth", [2, 3], 0.5), of("own_depth", [4, 6], 2.0)];
    Arc::new(Observation { seq: 43, timestamp: 0.0, cameras, ..Observation::default() })
}

/// A camera for every element type, and one without pixels.
fn of_every_dtype() -> Arc<Observation> {
    let cameras =
        DType::ALL.map(|dtype| camera(dtype.numpy_name(), 1, 2, 1.0, counting(dtype, &[1, 2, 1], 0), None));
    let empty =
        camera("empty", 1, 2, 1.0, counting(DType::U8, &[0, 4, 3], 0), Some(tensor::<f32>(&[0, 4], &[])));
    let cameras = cameras.into_iter().chain([empty]).collect();
    Arc::new(Observation { seq: 1, timestamp: -0.125, cameras, ..Observation::default() })
}

fn every_value() -> ValueMap {
    let list = [Value::Null, Value::Bool(false), Value::Int(i64::MIN), Value::List(Vec::new())].to_vec();
    map([
        ("", Value::Str(String::new())),
        ("bool", Value::Bool(true)),
        ("bytes", Value::Bytes(Bytes::from_static(&[0, 255]))),
        ("float", Value::Float(f64::MAX)),
        ("int", Value::Int(-3)),
        ("list", Value::List(list)),
        ("map", Value::Map(map([("inner", Value::Map(ValueMap::new()))]))),
        ("null", Value::Null),
        ("str", Value::Str("größer als λ".to_owned())),
    ])
}

fn welcome(robot: RobotInfo, attach_token: Bytes, controller: &str) -> Welcome {
    let (software, controller) = ("chiral-server 0.1.0".to_owned(), controller.to_owned());
    let max_chunk_rows = if controller.is_empty() { 0 } else { 256 };
    Welcome { protocol: 1, software, session: 9, episode: 3, robot, attach_token, controller, max_chunk_rows }
}

fn arm() -> RobotInfo {
    let grey = CameraSpec {
        name: "grey_cam".to_owned(),
        image_shape: [480, 640, 1],
        image_dtype: DType::U16,
        depth_shape: None,
    };
    let action_spec = ActionSpec {
        names: strings(["shoulder", "elbow"]),
        low: vec![-2.5, -1.5],
        high: vec![2.5, f32::INFINITY],
        ..ActionSpec::joint_positions(2, 20.0)
    };
    RobotInfo {
        name: "arm".to_owned(),
        cameras: vec![CameraSpec::rgbd("wrist_cam", 120, 160), grey],
        proprios: vec![ProprioSpec::new("joint_pos", 2, "rad"), ProprioSpec::new("weight", 1, "")],
        action_spec,
    }
}

fn small_depth() -> RobotInfo {
    let cameras = vec![CameraSpec::rgb("head_cam", 480, 640).with_depth(240, 320)];
    RobotInfo { cameras, ..bare() }
}

fn bare() -> RobotInfo {
    let meaning = ActionMeaning::Other("wheel torque".to_owned());
    let action_spec =
        ActionSpec { unit: "N m".to_owned(), meaning, ..ActionSpec::joint_positions(1, 1000.0) };
    RobotInfo { name: "bare".to_owned(), cameras: Vec::new(), proprios: Vec::new(), action_spec }
}
