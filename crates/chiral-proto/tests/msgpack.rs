//! The legacy msgpack wire: frames that another implementation wrote (`golden_msgpack.py`, to
//! `tests/msgpack`), invalid frames, and round trips.
#![allow(clippy::unwrap_used, reason = "test helpers may panic")]

#[allow(dead_code, reason = "only its helpers are used here; its messages are those of the protobuf tests")]
mod frames;

use std::{collections::BTreeSet, fs, path::Path, sync::Arc};

use bytes::Bytes;
use chiral_proto::{
    ActionChunk, Camera, Codec, DType, Encoding, Frame, Image, Message, Notice, Observation, Proprio, Reply,
    Request, StepResult, Tensor, Timestamp, Value, ValueMap,
    clock::Rate,
    codec::msgpack::{self, ID, TimedMessage},
    error::{EncodeError, Fault},
    message::{ActionMessage, Subscribe},
    value::map,
};
use frames::{camera, counting, notice, proprio, reply, request, tensor};
use nalgebra::{Matrix3, Matrix4};
use proptest::{collection::vec, prelude::*, sample::Index};

const WRIST_TIME: f64 = 1.000_000_007;
const HEAD_TIME: f64 = 123_456.789_012_345;
const UNIX_NANOS: i64 = 1_700_000_000_123_456_789;

fn directory(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Reads the files of a directory whose names `pass` accepts.
fn read(path: &str, pass: impl Fn(&str) -> bool) -> Vec<(String, Bytes)> {
    let files = fs::read_dir(directory(path)).unwrap().map(|entry| entry.unwrap().path());
    let named = files.map(|path| {
        (path.file_stem().unwrap().to_str().unwrap().to_owned(), fs::read(&path).unwrap().into())
    });
    named.filter(|(name, _)| pass(name)).collect()
}

fn decode(bytes: Bytes) -> Result<TimedMessage, chiral_proto::error::DecodeError> {
    msgpack::decode(Frame::from(bytes))
}

// ---- Frames of another implementation ---------------------------------------------------------------------

fn times() -> ValueMap {
    map([("wrist_cam", WRIST_TIME.into()), ("head_cam", HEAD_TIME.into())])
}

fn wrist(captured_at: i64) -> Arc<Camera> {
    let depth = tensor(&[2, 3], &[0.5, 1.0, 1.5, 0.0, 2.5, 3.0_f32]);
    camera("wrist_cam", 0, captured_at, 0.5, counting(DType::U8, &[2, 3, 3], 1), Some(depth))
}

fn head(captured_at: i64) -> Arc<Camera> {
    camera("head_cam", 0, captured_at, 0.5, counting(DType::U8, &[5, 5, 3], 100), None)
}

fn observed(cameras: Vec<Arc<Camera>>) -> Observation {
    Observation { timestamp: 12.1, cameras, ..Observation::default() }
}

fn observation() -> Arc<Observation> {
    let proprios = vec![proprio("joint_pos", 0, &[0.25, -0.5]), proprio("nothing", 0, &[])];
    let extra = map([("phase", "approach".into())]);
    Arc::new(Observation {
        proprios,
        extra,
        ..observed(vec![wrist(1_000_000_007), head(123_456_789_012_345)])
    })
}

/// A camera with only the required fields.
fn bare(intrinsics: [f64; 9], extrinsics: [f64; 16]) -> Arc<Camera> {
    let bare = camera("a", 0, 0, 0.0, counting(DType::U8, &[2, 3, 3], 1), None);
    let (intrinsics, extrinsics) =
        (Matrix3::from_row_slice(&intrinsics), Matrix4::from_row_slice(&extrinsics));
    Arc::new(Camera { intrinsics, extrinsics, ..(*bare).clone() })
}

fn bare_with_integers() -> Arc<Camera> {
    let mut extrinsics = [0.5; 16];
    extrinsics[15] = 1.0;
    bare([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], extrinsics)
}

fn apply(actions: impl Into<ActionChunk>) -> Message {
    notice(Notice::Action(ActionMessage { actions: actions.into(), ..ActionMessage::default() }))
}

fn step(actions: impl Into<ActionChunk>) -> Message {
    request(ID, Request::Step { session: 0, episode: 0, actions: actions.into() })
}

fn reset() -> Message {
    request(ID, Request::Reset { seed: None, options: ValueMap::new() })
}

fn values() -> ValueMap {
    let ints = [0, 127, 128, 1 << 16, 1 << 32, i64::MAX, -32, -33, -129, -(1 << 15) - 1, i64::MIN];
    map([
        ("", "".into()),
        ("bool", true.into()),
        ("bytes", Bytes::from_static(b"\0\xff").into()),
        ("float", f64::MAX.into()),
        ("int", (-3).into()),
        ("ints", ints.to_vec().into()),
        ("list", Value::List(vec![Value::Null, Value::Bool(false), Value::List(Vec::new())])),
        ("map", map([("inner", ValueMap::new().into())]).into()),
        ("null", Value::Null),
        ("str", "größer als λ".into()),
    ])
}

fn written_by_python() -> Vec<(&'static str, Message, ValueMap)> {
    let none = ValueMap::new;
    let step_result = |obs| StepResult {
        obs,
        reward: -1.25,
        terminated: true,
        truncated: false,
        info: map([("success", true.into())]),
    };
    let singles = StepResult {
        obs: Arc::new(Observation { timestamp: 7.0, ..observed(vec![bare_with_integers()]) }),
        reward: 0.1_f32.into(),
        terminated: false,
        truncated: true,
        info: map([("x", 0.5.into())]),
    };
    let nanos = observed(vec![wrist(UNIX_NANOS), head(1_500_000_000_000_000_000)]);
    let unix = observed(vec![wrist(1_700_000_000_000_000_000)]);
    let odd = map([
        ("big", (u64::MAX as f64).into()),
        ("ext", Bytes::from_static(b"five").into()),
        (
            "keys",
            map([
                ("null", "nil".into()),
                ("7", "int".into()),
                ("0.5", "float".into()),
                ("true", "bool".into()),
            ])
            .into(),
        ),
    ]);
    let of = |obs| reply(ID, Reply::Observation(obs));
    let absent = || map([("a", 0.0.into())]);
    vec![
        ("metadata", request(ID, Request::GetMetadata), none()),
        ("reset", reset(), none()),
        ("obs_request", request(ID, Request::GetObs), none()),
        ("apply_action", apply([0.5, -0.25, 3.0]), times()),
        ("apply_action-rows", apply([[0.5, -0.25], [3.0, 4.0]]), map([("nanos", UNIX_NANOS.into())])),
        ("action", step([[0.5, -0.25]]), times()),
        ("metadata_response", reply(ID, Reply::Metadata(values())), none()),
        (
            "reset_response",
            reply(ID, Reply::Reset { obs: observation(), info: map([("seed", 0.into())]) }),
            times(),
        ),
        ("obs_response", of(observation()), times()),
        ("step_response", reply(ID, Reply::Step(step_result(observation()))), times()),
        ("varied-backwards", of(observation()), times()),
        ("varied-singles", reply(ID, Reply::Step(singles)), absent()),
        ("varied-nil", of(observed(vec![bare_with_integers()]).into()), absent()),
        (
            "varied-nanos",
            of(nanos.into()),
            map([("wrist_cam", UNIX_NANOS.into()), ("head_cam", 1.5e18.into())]),
        ),
        ("varied-unix", of(unix.into()), map([("wrist_cam", 1_700_000_000.into())])),
        ("varied-one_action", step([0.5, -0.25]), none()),
        ("varied-chunk", step([[0.5], [-0.25]]), map([("a", 3.into())])),
        ("varied-values", reply(ID, Reply::Metadata(odd)), none()),
        (
            "varied-raw",
            reply(ID, Reply::Metadata(map([("raw", Bytes::from_static(b"\xff\xfe").into())]))),
            none(),
        ),
        ("varied-twice", request(ID, Request::GetMetadata), none()),
        ("varied-unknown", Message::Unknown { id: 0 }, none()),
    ]
}

#[test]
fn frames_of_another_implementation_are_decoded_and_encoded() {
    let expected = written_by_python();
    let files = read("tests/msgpack", |_| true);
    for (name, message, capture_times) in &expected {
        let bytes = files
            .iter()
            .find(|(file, _)| file == name)
            .unwrap_or_else(|| panic!("no file of the frame {name}"))
            .1
            .clone();
        let decoded = decode(bytes.clone()).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(&decoded.message, message, "{name}");
        assert_eq!(&decoded.capture_times, capture_times, "{name}");
        if !name.starts_with("varied-") {
            let encoded = msgpack::encode(message, capture_times).unwrap().into_bytes();
            assert!(encoded == bytes, "{name}: expected {bytes:?}, found {encoded:?}");
        }
    }
    let known: BTreeSet<&str> = expected.iter().map(|(name, ..)| *name).collect();
    assert_eq!(
        files.iter().map(|(name, _)| &**name).collect::<BTreeSet<_>>(),
        known,
        "expected one file per message"
    );
}

#[test]
fn pixels_are_not_copied() {
    let sent = observation();
    let frame = msgpack::encode(&reply(ID, Reply::Observation(sent.clone())), &ValueMap::new()).unwrap();
    let places: Vec<_> = frame.segments().iter().map(|segment| segment.as_ptr()).collect();
    assert!(
        places.contains(&sent.cameras[0].image.data().as_ptr())
            && places.contains(&sent.cameras[1].image.data().as_ptr())
    );

    let whole = frame.into_bytes();
    let Message::Reply { reply: Reply::Observation(obs), .. } = decode(whole.clone()).unwrap().message else {
        panic!("expected a reply with an observation")
    };
    let mut place = whole.len() - (18 + 24 + 75 + 8);
    for data in [
        obs.cameras[0].image.data(),
        obs.cameras[0].depth.as_ref().unwrap().data(),
        obs.cameras[1].image.data(),
        obs.proprios[0].data.data(),
    ] {
        assert_eq!(data.as_ptr(), whole[place..].as_ptr());
        place += data.len();
    }
}

// ---- Invalid frames ---------------------------------------------------------------------------------------

/// The hostile frames among the fuzzers' seeds, and the error of each.
const HOSTILE: &[(&str, &str)] = &[
    ("billion_cameras", "header: expected a list of at most 50 values, found 1000000000"),
    ("billion_fields", "header: expected 1 more bytes, found 0"),
    ("camera_is_text", "obs_response.cameras[0]: expected a map, found \"wrist_cam\""),
    ("cube_action", "apply_action.shape: expected [D] or [N, D], found [1, 1, 1]"),
    ("deep_keys", "header: expected values nested at most 24 deep, found deeper nesting"),
    ("deep_list", "header: expected values nested at most 24 deep, found deeper nesting"),
    ("deep_map", "header: expected values nested at most 24 deep, found deeper nesting"),
    ("depth_dtype", "obs_response.cameras[0].depth_dtype: expected float32, found int32"),
    ("depth_shape", "obs_response.cameras[0].depth_shape: expected [2, 3], found [3, 2]"),
    ("double_action", "action.dtype: expected float32, found float64"),
    ("double_proprio", "obs_response.proprios[0].dtype: expected float32, found float64"),
    ("eight_numbers", "obs_response.cameras[0].intrinsics: expected 9 values, found 8"),
    ("empty", "frame: expected at least 4 bytes, found 0"),
    (
        "far_end",
        "obs_response.cameras[0].depth_offset: expected a range within the 42 bytes of payload, \
         found 24 bytes at 19",
    ),
    (
        "far_offset",
        "obs_response.cameras[0].image_offset: expected a range within the 42 bytes of payload, \
         found 18 bytes at 1000",
    ),
    ("half_depth", "obs_response.cameras[0].depth_offset: expected a number of bytes, found nothing"),
    ("header_len", "header_len: expected at most the 12 bytes that follow it, found 4294967295"),
    (
        "huge_offset",
        "obs_response.cameras[0].image_offset: expected a number of bytes, found 1.8446744073709552e19",
    ),
    (
        "image_dtype",
        "obs_response.cameras[0].image_dtype: expected the name of an element type, found \"complex64\"",
    ),
    (
        "large_image",
        "obs_response.cameras[0].image_offset: expected a range within the 42 bytes of payload, \
         found 3000000000000 bytes at 0",
    ),
    ("list_key", "header: expected keys that are text or numbers, found a list of 0"),
    ("long_action", "apply_action.payload: expected 8 bytes for float32 of shape [2], found 12"),
    ("long_bytes", "header: expected 2147483648 more bytes, found 5"),
    ("long_text", "header: expected 4294967295 more bytes, found 5"),
    ("negative_offset", "obs_response.cameras[0].image_offset: expected a number of bytes, found -1"),
    ("negative_shape", "obs_response.cameras[0].image_shape: expected a list of sizes, found a list of 3"),
    ("no_cameras", "obs_response.cameras: expected a list, found nothing"),
    ("no_end", "step_response.terminated: expected a boolean, found 1"),
    ("no_header", "header: expected 1 more bytes, found 0"),
    ("no_map", "header: expected a map, found a list of 2"),
    ("no_timestamp", "obs_response.timestamp: expected a number, found nothing"),
    ("no_type", "type: expected text, found nothing"),
    ("number_type", "type: expected text, found 3"),
    ("odd_proprio", "obs_response.proprios[0].size: expected a multiple of 4 bytes, found 7"),
    (
        "overflowing_empty",
        "obs_response.cameras[0].image_shape: expected an array that fits in memory, \
         found [4611686018427387904, 0, 4]",
    ),
    (
        "overflowing_shape",
        "obs_response.cameras[0].image_shape: expected an array that fits in memory, \
         found [4611686018427387904, 4, 4]",
    ),
    (
        "overlap",
        "obs_response.cameras[1].image_offset: expected a multiple of 1 that is at least 42, found 0",
    ),
    ("reserved", "header: expected MessagePack, found the reserved byte 0xc1"),
    ("short", "frame: expected at least 4 bytes, found 2"),
    ("short_action", "action.payload: expected 16 bytes for float32 of shape [2, 2], found 12"),
    ("text_numbers", "obs_response.cameras[0].extrinsics: expected a list of numbers, found a list of 16"),
    (
        "text_time",
        "obs_response.cameras[0].timestamp: expected a number of seconds or nanoseconds, found \"now\"",
    ),
    ("text_times", "apply_action.obs_timestamps[\"a\"]: expected a number, found \"now\""),
    ("too_deep_by_one", "header: expected values nested at most 24 deep, found deeper nesting"),
    ("two_axes", "obs_response.cameras[0].image_shape: expected 3 values, found 2"),
    ("two_maps", "header: expected one map, found 12 bytes after it"),
    (
        "wide_action",
        "action.shape: expected an array that fits in memory, \
         found [2305843009213693952, 2305843009213693952]",
    ),
    (
        "wrapped_offset",
        "obs_response.cameras[0].image_offset: expected a range within the 42 bytes of payload, \
         found 18 bytes at 9223372036854775807",
    ),
    (
        "wrong_size",
        "obs_response.cameras[0].image_size: expected 18 bytes for uint8 of shape [2, 3, 3], found 17",
    ),
];

#[test]
fn the_error_of_a_hostile_frame_names_the_field() {
    let files = read("../../fuzz/seeds/msgpack", |name| name.starts_with("hostile-"));
    let mut found = Vec::new();
    for (name, bytes) in files {
        let error = decode(bytes).map_or_else(
            |error| error.to_string(),
            |decoded| panic!("{name}: expected an error, found {decoded:?}"),
        );
        found.push((name.trim_start_matches("hostile-").to_owned(), error));
    }
    found.sort();
    let expected: Vec<_> =
        HOSTILE.iter().map(|(name, error)| ((*name).to_owned(), (*error).to_owned())).collect();
    assert_eq!(found, expected);
}

#[test]
fn truncated_frames_are_refused() {
    for (name, bytes) in read("tests/msgpack", |name| name != "varied-unix") {
        for len in 0..bytes.len() {
            assert!(
                decode(bytes.slice(..len)).is_err(),
                "{name}: expected an error for the first {len} of {} bytes",
                bytes.len()
            );
        }
    }
}

#[test]
fn a_decode_error_has_an_id_if_the_peer_expects_a_reply() {
    let id = |name: &str| {
        let (_, bytes) = read("../../fuzz/seeds/msgpack", |file| file == name).remove(0);
        decode(bytes).unwrap_err().id
    };
    assert_eq!(id("hostile-short_action"), ID);
    assert_eq!(id("hostile-far_offset"), ID);
    assert_eq!(id("hostile-long_action"), 0);
    assert_eq!(id("hostile-short"), 0);
}

#[test]
fn a_header_with_too_many_values_is_refused() {
    let values = (1 << 20) + 1_usize;
    let mut header = b"\x82\xa4type\xb1metadata_response\xa4data\x81\xa1x\xdd".to_vec();
    header.extend_from_slice(&(values as u32).to_be_bytes());
    header.resize(header.len() + values, 0xc0);
    let frame = [&(header.len() as u32).to_le_bytes()[..], &header].concat();
    assert_eq!(
        decode(frame.into()).unwrap_err().to_string(),
        "header: expected at most 1048576 values, found more"
    );
}

// ---- Messages this wire cannot carry ----------------------------------------------------------------------

#[test]
fn messages_that_the_wire_cannot_carry_are_not_encoded() {
    let fault = || Fault::new(chiral_proto::Code::Busy, "held");
    let encoded = Image::new(Encoding(1), DType::U8, [2, 3, 3], Bytes::from_static(b"png")).unwrap();
    let encoded = Arc::new(Camera::new("a", encoded));
    let subscribe = Subscribe { rate: Rate::new(30.0).unwrap(), cameras: Vec::new(), depth: true, window: 1 };
    for message in [
        request(1, Request::Reset { seed: Some(0), options: ValueMap::new() }),
        request(1, Request::Reset { seed: None, options: map([("easy", true.into())]) }),
        request(1, Request::Subscribe(subscribe)),
        request(1, Request::Unsubscribe),
        reply(1, Reply::Error(fault())),
        notice(Notice::Error(fault())),
        notice(Notice::Observation(Arc::default())),
        notice(Notice::Ping { t1: Timestamp(1) }),
        notice(Notice::Goodbye { reason: "done".to_owned() }),
        reply(1, Reply::Observation(observed(vec![encoded]).into())),
    ] {
        let found = Codec::Msgpack.encode(&message);
        assert!(
            matches!(found, Err(EncodeError::Unsupported { .. })),
            "{message:?}: expected Unsupported, found {found:?}"
        );
    }
    assert_eq!(Codec::Msgpack.encode(&Message::Unknown { id: 0 }), Err(EncodeError::Unknown));
}

/// A legacy peer takes the image's K for that of the depth.
#[test]
fn depth_is_left_out_unless_its_size_and_k_are_those_of_the_image() {
    let k = Matrix3::new(2.0, 0.0, 1.0, 0.0, 2.0, 1.0, 0.0, 0.0, 1.0);
    let check = |shape: [usize; 2], depth_intrinsics, is_sent: bool| {
        let depth = Some(counting(DType::F32, &shape, 0).into());
        let image = counting(DType::U8, &[2, 3, 3], 1);
        let camera = Camera { depth, intrinsics: k, depth_intrinsics, ..Camera::new("a", image) };
        let sent = observed(vec![Arc::new(camera.clone())]);
        let decoded = roundtrip(&reply(ID, Reply::Observation(sent.into())), &ValueMap::new(), &[]);
        let Message::Reply { reply: Reply::Observation(found), .. } = decoded.message else {
            panic!("expected a reply with an observation")
        };
        let depth = camera.depth.filter(|_| is_sent);
        assert_eq!(*found.cameras[0], Camera { depth, depth_intrinsics: None, ..camera });
    };
    check([2, 3], None, true);
    check([2, 3], Some(k), true);
    check([2, 3], Some(2.0 * k), false);
    check([1, 1], Some(k), false);
}

// ---- Round trips ------------------------------------------------------------------------------------------

/// Encodes a message, cuts the frame into pieces, and decodes them.
fn roundtrip(message: &Message, capture_times: &ValueMap, cuts: &[Index]) -> TimedMessage {
    let mut rest = msgpack::encode(message, capture_times).unwrap().into_bytes();
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(rest.len() + 1)).collect();
    cuts.sort_unstable();
    let mut pieces: Vec<Bytes> = cuts.into_iter().rev().map(|cut| rest.split_off(cut)).collect();
    pieces.push(rest);
    pieces.reverse();
    msgpack::decode(Frame::from(pieces)).unwrap()
}

proptest! {
    // Failing cases are not persisted: add a test for them here.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_message_survives_a_round_trip(message in messages(), cuts in vec(any::<Index>(), 0..5)) {
        let back = roundtrip(&message, &ValueMap::new(), &cuts).message;
        prop_assert_eq!(&back, &message);
        // `==` does not distinguish 0 from -0; the debug output does.
        prop_assert_eq!(format!("{back:?}"), format!("{message:?}"));
    }

    #[test]
    fn capture_times_are_preserved_bit_for_bit(bits in any::<u64>(), nanos in any::<i64>()) {
        let times = map([("a", f64::from_bits(bits).into()), ("b", nanos.into())]);
        let back = roundtrip(&apply([1.0]), &times, &[]).capture_times;
        prop_assert_eq!(back["a"].as_f64().map(f64::to_bits), Some(bits));
        prop_assert_eq!(back["b"].as_i64(), Some(nanos));
    }

    #[test]
    fn timestamps_are_preserved_bit_for_bit(bits in any::<u64>()) {
        let obs = Observation { timestamp: f64::from_bits(bits), ..Observation::default() };
        match roundtrip(&reply(ID, Reply::Observation(Arc::new(obs))), &ValueMap::new(), &[]).message {
            Message::Reply { reply: Reply::Observation(back), .. } => {
                prop_assert_eq!(back.timestamp.to_bits(), bits);
            }
            other => panic!("expected an observation, found {other:?}"),
        }
    }

    #[test]
    fn values_are_nested_up_to_the_limit(maps in vec(any::<bool>(), 1..2 * Value::MAX_DEPTH)) {
        // Each `true` wraps the value in a map, each `false` in a list; the innermost value adds one level.
        let value = maps.iter().skip(1).fold(Value::Int(1), |inner, &map| match map {
            true => Value::Map(ValueMap::from([("inner".to_owned(), inner)])),
            false => Value::List(vec![inner]),
        });
        let message = reply(ID, Reply::Metadata(map([("outer", value)])));
        if maps.len() <= Value::MAX_DEPTH {
            prop_assert_eq!(roundtrip(&message, &ValueMap::new(), &[]).message, message);
        } else {
            let too_deep = EncodeError::TooDeep { field: "data", limit: Value::MAX_DEPTH };
            prop_assert_eq!(Codec::Msgpack.encode(&message), Err(too_deep));
        }
    }
}

fn messages() -> impl Strategy<Value = Message> {
    prop_oneof![
        Just(request(ID, Request::GetMetadata)),
        Just(request(ID, Request::GetObs)),
        Just(reset()),
        chunks().prop_map(step),
        chunks().prop_map(|chunk| apply(chunk.into_single())),
        maps().prop_map(|data| reply(ID, Reply::Metadata(data))),
        observations().prop_map(|obs| reply(ID, Reply::Observation(obs))),
        (observations(), maps()).prop_map(|(obs, info)| reply(ID, Reply::Reset { obs, info })),
        (observations(), any::<f64>(), any::<bool>(), any::<bool>(), maps()).prop_map(
            |(obs, reward, terminated, truncated, info)| {
                reply(ID, Reply::Step(StepResult { obs, reward, terminated, truncated, info }))
            }
        ),
    ]
}

fn observations() -> impl Strategy<Value = Arc<Observation>> {
    (any::<f64>(), vec(cameras(), 0..3), vec(proprios(), 0..3), maps()).prop_map(
        |(timestamp, cameras, proprios, extra)| {
            Arc::new(Observation { timestamp, cameras, proprios, extra, ..Observation::default() })
        },
    )
}

fn cameras() -> impl Strategy<Value = Arc<Camera>> {
    let dtypes = prop::sample::select(DType::ALL.to_vec());
    let pictures = ([0_usize..5, 0..5, 0..4], dtypes, any::<bool>()).prop_flat_map(
        |([height, width, channels], dtype, has_depth)| {
            let depth = if has_depth {
                tensors(DType::F32, vec![height, width]).prop_map(Some).boxed()
            } else {
                Just(None).boxed()
            };
            (tensors(dtype, vec![height, width, channels]), depth)
        },
    );
    // Within the uptime for which nanoseconds are exact in f64 seconds.
    let times = (0..1_i64 << 51).prop_map(Timestamp);
    ("\\PC{0,8}", times, pictures, any::<[f64; 9]>(), any::<[f64; 16]>()).prop_map(
        |(name, captured_at, (image, depth), intrinsics, extrinsics)| {
            let (intrinsics, extrinsics) =
                (Matrix3::from_row_slice(&intrinsics), Matrix4::from_row_slice(&extrinsics));
            let depth = depth.map(Image::from);
            Arc::new(Camera { captured_at, depth, intrinsics, extrinsics, ..Camera::new(name, image) })
        },
    )
}

fn proprios() -> impl Strategy<Value = Arc<Proprio>> {
    ("\\PC{0,8}", vec(any::<f32>(), 0..40)).prop_map(|(name, values)| proprio(&name, 0, &values))
}

fn chunks() -> impl Strategy<Value = ActionChunk> {
    (1_usize..20, 1_usize..9)
        .prop_flat_map(|(rows, dimension)| (Just(dimension), vec(any::<f32>(), rows * dimension)))
        .prop_map(|(dimension, values)| ActionChunk::new(dimension, values).unwrap())
}

fn tensors(dtype: DType, shape: Vec<usize>) -> impl Strategy<Value = Tensor> {
    let len = shape.iter().product::<usize>() * dtype.size();
    vec(any::<u8>(), len).prop_map(move |data| Tensor::new(dtype, shape.clone(), data).unwrap())
}

fn maps() -> impl Strategy<Value = ValueMap> {
    let leaves = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::Bool),
        any::<i64>().prop_map(Value::Int),
        any::<f64>().prop_map(Value::Float),
        "\\PC{0,40}".prop_map(Value::Str),
        vec(any::<u8>(), 0..20).prop_map(|bytes| Value::Bytes(bytes.into())),
    ];
    let values = leaves.prop_recursive(4, 16, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..20).prop_map(Value::List),
            prop::collection::btree_map("\\PC{0,8}", inner, 0..4).prop_map(Value::Map),
        ]
    });
    prop::collection::btree_map("\\PC{0,8}", values, 0..4)
}
