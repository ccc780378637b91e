//! Property tests: every message survives encoding and decoding, however many segments the frame arrives in.
#![allow(clippy::unwrap_used, reason = "test helpers may panic")]

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use chiral_proto::{
    ActionChunk, ActionSpec, Camera, CameraSpec, Code, Codec, DType, Encoding, Frame, Image, Message, Notice,
    Observation, Proprio, ProprioSpec, Reply, Request, StepResult, Tensor, Timestamp, Value, ValueMap,
    action::ActionMeaning,
    clock::Rate,
    error::{EncodeError, Fault},
    message::{ActionMessage, ActionsDropped, Hello, RobotInfo, Role, Subscribe, Welcome},
};
use nalgebra::{Matrix3, Matrix4};
use proptest::{
    collection::vec,
    option,
    prelude::*,
    sample::{Index, select},
};

/// Encodes a message, cuts the frame into pieces, and decodes them.
fn roundtrip(message: &Message, cuts: &[Index]) -> Message {
    let frame = Codec::Protobuf.encode(message).unwrap();
    let mut rest = frame.into_bytes();
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(rest.len() + 1)).collect();
    cuts.sort_unstable();
    let mut pieces: Vec<Bytes> = cuts.into_iter().rev().map(|cut| rest.split_off(cut)).collect();
    pieces.push(rest);
    pieces.reverse();
    Codec::Protobuf.decode(Frame::from(pieces)).unwrap()
}

proptest! {
    // Failing cases are not persisted: add a test for them here.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_message_survives_a_round_trip(message in messages(), cuts in vec(any::<Index>(), 0..5)) {
        let back = roundtrip(&message, &cuts);
        prop_assert_eq!(&back, &message);
        // `==` does not distinguish 0 from -0; the debug output does.
        prop_assert_eq!(format!("{back:?}"), format!("{message:?}"));
    }

    #[test]
    fn a_frame_equals_its_joined_segments(message in messages()) {
        let frame = Codec::Protobuf.encode(&message).unwrap();
        let joined = Frame::from(frame.clone().into_bytes());
        prop_assert!(frame == joined);
        prop_assert_eq!(frame.len(), joined.len());
    }

    #[test]
    fn timestamps_are_preserved_bit_for_bit(bits in any::<u64>()) {
        check_timestamp(bits);
    }

    #[test]
    fn values_are_nested_up_to_the_limit(maps in vec(any::<bool>(), 1..2 * Value::MAX_DEPTH)) {
        // Each `true` wraps the value in a map, each `false` in a list; the innermost value adds one level.
        let value = maps.iter().skip(1).fold(Value::Int(1), |inner, &map| match map {
            true => Value::Map(ValueMap::from([("inner".to_owned(), inner)])),
            false => Value::List(vec![inner]),
        });
        let metadata = ValueMap::from([("outer".to_owned(), value)]);
        let message = Message::Reply { id: 1, reply: Reply::Metadata(metadata) };
        if maps.len() <= Value::MAX_DEPTH {
            prop_assert_eq!(roundtrip(&message, &[]), message);
        } else {
            let too_deep = EncodeError::TooDeep { field: "metadata.data", limit: Value::MAX_DEPTH };
            prop_assert_eq!(Codec::Protobuf.encode(&message), Err(too_deep));
        }
    }
}

#[track_caller]
fn check_timestamp(bits: u64) {
    let obs = Observation { timestamp: f64::from_bits(bits), ..Observation::default() };
    match roundtrip(&Message::Notice(Notice::Observation(Arc::new(obs))), &[]) {
        Message::Notice(Notice::Observation(back)) => assert_eq!(back.timestamp.to_bits(), bits),
        other => panic!("expected an observation, found {other:?}"),
    }
}

/// proto3 omits zeros, and with them the sign of -0, unless the field is optional.
#[test]
fn zero_timestamps_keep_their_sign() {
    check_timestamp((0.0_f64).to_bits());
    check_timestamp((-0.0_f64).to_bits());
}

#[test]
fn unknown_messages_are_not_encoded() {
    assert_eq!(Codec::Protobuf.encode(&Message::Unknown { id: 3 }), Err(EncodeError::Unknown));
}

// ---- Strategies, from messages to their parts -------------------------------------------------------------

fn messages() -> impl Strategy<Value = Message> {
    prop_oneof![
        (1..=u64::MAX, requests()).prop_map(|(id, request)| Message::Request { id, request }),
        (1..=u64::MAX, replies()).prop_map(|(id, reply)| Message::Reply { id, reply }),
        notices().prop_map(Message::Notice),
    ]
}

fn requests() -> impl Strategy<Value = Request> {
    prop_oneof![
        hellos().prop_map(Request::Hello),
        Just(Request::GetMetadata),
        (any::<Option<u64>>(), maps()).prop_map(|(seed, options)| Request::Reset { seed, options }),
        Just(Request::GetObs),
        (any::<u64>(), any::<u64>(), chunks()).prop_map(|(session, episode, actions)| Request::Step {
            session,
            episode,
            actions
        }),
        (1e-3..=Rate::MAX_HZ, vec(text(), 0..3), any::<bool>(), any::<u32>()).prop_map(
            |(hz, cameras, depth, window)| Request::Subscribe(Subscribe {
                rate: Rate::new(hz).unwrap(),
                cameras,
                depth,
                window
            })
        ),
        Just(Request::Unsubscribe),
    ]
}

fn replies() -> impl Strategy<Value = Reply> {
    prop_oneof![
        welcomes().prop_map(|welcome| Reply::Welcome(Box::new(welcome))),
        maps().prop_map(Reply::Metadata),
        (observations(), maps()).prop_map(|(obs, info)| Reply::Reset { obs, info }),
        observations().prop_map(Reply::Observation),
        (observations(), numbers(), any::<bool>(), any::<bool>(), maps()).prop_map(
            |(obs, reward, terminated, truncated, info)| Reply::Step(StepResult {
                obs,
                reward,
                terminated,
                truncated,
                info
            })
        ),
        (numbers(), vec(text(), 0..3)).prop_map(|(hz, cameras)| Reply::Subscribed { hz, cameras }),
        text().prop_map(|reason| Reply::StreamEnd { reason }),
        faults().prop_map(Reply::Error),
    ]
}

fn notices() -> impl Strategy<Value = Notice> {
    let actions =
        (any::<[u64; 4]>(), chunks(), [option::of(times()), option::of(times())], option::of(1..=u64::MAX))
            .prop_map(
                |([session, episode, seq, observation_seq], actions, [sent_at, observed_at], valid_ns)| {
                    let valid_for = valid_ns.map(Duration::from_nanos);
                    Notice::Action(ActionMessage {
                        session,
                        episode,
                        seq,
                        actions,
                        observation_seq,
                        sent_at,
                        valid_for,
                        observed_at,
                    })
                },
            );
    prop_oneof![
        observations().prop_map(Notice::Observation),
        text().prop_map(|reason| Notice::StreamEnd { reason }),
        actions,
        (any::<u64>(), any::<u32>()).prop_map(|(received, window)| Notice::Credit { received, window }),
        times().prop_map(|t1| Notice::Ping { t1 }),
        (times(), times(), times()).prop_map(|(t1, t2, t3)| Notice::Pong { t1, t2, t3 }),
        text().prop_map(|reason| Notice::Goodbye { reason }),
        faults().prop_map(Notice::Error),
        any::<[u64; 3]>().prop_map(|[late, superseded, accepted]| {
            Notice::ActionsDropped(ActionsDropped { late, superseded, accepted })
        }),
    ]
}

fn hellos() -> impl Strategy<Value = Hello> {
    let roles = select(vec![Role::Controller, Role::Observer]);
    (any::<u32>(), roles, [text(), text()], [bytes(), bytes()]).prop_map(
        |(protocol, role, [software, client_name], [auth, attach_token])| Hello {
            protocol,
            software,
            role,
            client_name,
            auth,
            attach_token,
        },
    )
}

fn welcomes() -> impl Strategy<Value = Welcome> {
    (any::<u32>(), text(), any::<[u64; 2]>(), robots(), bytes(), text(), any::<usize>()).prop_map(
        |(protocol, software, [session, episode], robot, attach_token, controller, max_chunk_rows)| Welcome {
            protocol,
            software,
            session,
            episode,
            robot,
            attach_token,
            controller,
            max_chunk_rows,
        },
    )
}

fn robots() -> impl Strategy<Value = RobotInfo> {
    let depth_sizes =
        prop_oneof![Just(None), Just(Some(None)), any::<[usize; 2]>().prop_map(|size| Some(Some(size)))];
    let cameras = (text(), any::<[usize; 3]>(), dtypes(), depth_sizes).prop_map(
        |(name, image_shape, image_dtype, depth)| {
            let spec = CameraSpec { name, image_shape, image_dtype, depth_shape: None };
            let depth_shape = depth.map(|size| size.unwrap_or(spec.image_size()));
            CameraSpec { depth_shape, ..spec }
        },
    );
    let proprios =
        (text(), any::<usize>(), text()).prop_map(|(name, size, unit)| ProprioSpec { name, size, unit });
    (text(), vec(cameras, 0..3), vec(proprios, 0..3), action_specs())
        .prop_map(|(name, cameras, proprios, action_spec)| RobotInfo { name, cameras, proprios, action_spec })
}

fn action_specs() -> impl Strategy<Value = ActionSpec> {
    let meanings = prop_oneof![
        Just(ActionMeaning::JointPosition),
        Just(ActionMeaning::JointVelocity),
        Just(ActionMeaning::EndEffectorDelta),
        text().prop_map(ActionMeaning::Other),
    ];
    // One of each per value of an action, or none.
    let lists = (1_usize..4).prop_flat_map(|dimension| {
        let limits = || prop_oneof![Just(Vec::new()), vec(any::<f32>(), dimension)];
        (Just(dimension), prop_oneof![Just(Vec::new()), vec(text(), dimension)], limits(), limits())
    });
    (lists, text(), meanings, numbers()).prop_map(
        |((dimension, names, low, high), unit, meaning, control_hz)| ActionSpec {
            dimension,
            names,
            low,
            high,
            unit,
            meaning,
            control_hz,
        },
    )
}

fn observations() -> impl Strategy<Value = Arc<Observation>> {
    (any::<[u64; 3]>(), any::<f64>(), vec(cameras(), 0..3), vec(proprios(), 0..3), maps()).prop_map(
        |([session, episode, seq], timestamp, cameras, proprios, extra)| {
            Arc::new(Observation { session, episode, seq, timestamp, cameras, proprios, extra })
        },
    )
}

fn cameras() -> impl Strategy<Value = Arc<Camera>> {
    let sizes = || [0_usize..5, 0..5];
    let pictures =
        (sizes(), 0_usize..4, dtypes()).prop_flat_map(move |([height, width], channels, dtype)| {
            let image = images(dtype, vec![height, width, channels]);
            let matrices = || any::<[f64; 9]>().prop_map(|values| Matrix3::from_row_slice(&values));
            let same = (images(DType::F32, vec![height, width]), option::of(matrices()));
            let other = sizes()
                .prop_flat_map(move |size| (images(DType::F32, size.to_vec()), matrices().prop_map(Some)));
            let depth = prop_oneof![same, other].prop_map(|(depth, intrinsics)| (Some(depth), intrinsics));
            (image, prop_oneof![Just((None, None)), depth])
        });
    (text(), any::<u64>(), times(), pictures, any::<[f64; 9]>(), any::<[f64; 16]>(), any::<bool>()).prop_map(
        |(name, seq, captured_at, (image, (depth, depth_intrinsics)), intrinsics, extrinsics, is_stale)| {
            Arc::new(Camera {
                name: name.into(),
                seq,
                captured_at,
                image,
                depth,
                intrinsics: Matrix3::from_row_slice(&intrinsics),
                depth_intrinsics,
                extrinsics: Matrix4::from_row_slice(&extrinsics),
                is_stale,
            })
        },
    )
}

/// Raw images, and some whose encoding nobody knows and whose size is free.
fn images(dtype: DType, shape: Vec<usize>) -> impl Strategy<Value = Image> {
    let encoded = (1..=i32::MAX, bytes(), Just(shape.clone()))
        .prop_map(move |(encoding, data, shape)| Image::new(Encoding(encoding), dtype, shape, data).unwrap());
    prop_oneof![4 => tensors(dtype, shape).prop_map(Image::from), 1 => encoded]
}

fn proprios() -> impl Strategy<Value = Arc<Proprio>> {
    let data = (0_usize..40).prop_flat_map(|size| tensors(DType::F32, vec![size]));
    (text(), times(), data)
        .prop_map(|(name, captured_at, data)| Arc::new(Proprio { name: name.into(), captured_at, data }))
}

fn chunks() -> impl Strategy<Value = ActionChunk> {
    (0_usize..20, 0_usize..9, any::<bool>())
        .prop_flat_map(|(rows, dimension, single)| {
            (Just((dimension, single)), vec(any::<f32>(), rows * dimension))
        })
        .prop_map(|((dimension, single), values)| {
            let chunk = ActionChunk::new(dimension, values).unwrap();
            if single { chunk.into_single() } else { chunk }
        })
}

fn tensors(dtype: DType, shape: Vec<usize>) -> impl Strategy<Value = Tensor> {
    let len = shape.iter().product::<usize>() * dtype.size();
    vec(any::<u8>(), len).prop_map(move |data| Tensor::new(dtype, shape.clone(), data).unwrap())
}

fn faults() -> impl Strategy<Value = Fault> {
    let codes = select(vec![
        Code::Unspecified,
        Code::Malformed,
        Code::Invalid,
        Code::Unsupported,
        Code::VersionMismatch,
        Code::Unauthenticated,
        Code::Busy,
        Code::NotController,
        Code::Stale,
        Code::Resetting,
        Code::QueueFull,
        Code::RobotFailed,
        Code::OutOfService,
        Code::SensorTimeout,
        Code::ShuttingDown,
        Code::Protocol,
    ]);
    (codes, [text(), text()], any::<bool>(), any::<u64>()).prop_map(
        |(code, [text, field], retryable, action_seq)| Fault { code, text, field, retryable, action_seq },
    )
}

fn maps() -> impl Strategy<Value = ValueMap> {
    prop::collection::btree_map(text(), values(), 0..4)
}

fn values() -> impl Strategy<Value = Value> {
    let leaves = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::Bool),
        any::<i64>().prop_map(Value::Int),
        any::<f64>().prop_map(Value::Float),
        text().prop_map(Value::Str),
        bytes().prop_map(Value::Bytes),
    ];
    leaves.prop_recursive(4, 16, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::List),
            prop::collection::btree_map(text(), inner, 0..4).prop_map(Value::Map),
        ]
    })
}

fn dtypes() -> impl Strategy<Value = DType> {
    select(DType::ALL.to_vec())
}

/// Without -0, which proto3 may omit like 0.
fn numbers() -> impl Strategy<Value = f64> {
    any::<f64>().prop_map(|number| number + 0.0)
}

fn times() -> impl Strategy<Value = Timestamp> {
    any::<i64>().prop_map(Timestamp)
}

fn text() -> impl Strategy<Value = String> {
    "\\PC{0,8}"
}

fn bytes() -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..20).prop_map(Bytes::from)
}
