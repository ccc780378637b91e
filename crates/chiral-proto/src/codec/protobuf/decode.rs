//! Decodes the schema's types into this crate's, and validates everything that a peer sent. Tensors are
//! slices of the received frame.

use std::{fmt, sync::Arc, time::Duration};

use nalgebra::{Matrix3, Matrix4};
use prost::Message as _;

use super::tables::{CODES, DTYPES};
use crate::{
    action::{ActionChunk, ActionMeaning, ActionSpec},
    clock::{InvalidRate, Rate, Timestamp},
    codec::wire::{self, header::Kind},
    error::{Code, DecodeError, Fault},
    frame::{self, Frame, Payload},
    image::{Encoding, Image},
    message::{
        ActionMessage, ActionsDropped, Hello, Message, Notice, Reply, Request, RobotInfo, Role, StepResult,
        Subscribe, Welcome,
    },
    observation::{Camera, CameraSpec, Observation, Proprio, ProprioSpec},
    pool::ALIGNMENT,
    tensor::{DType, Tensor, byte_len},
    value::{Value, ValueMap},
};

type Result<T, E = DecodeError> = std::result::Result<T, E>;

pub(crate) fn decode(frame: Frame) -> Result<Message> {
    let (header, payload) = frame::split(frame, ALIGNMENT)?;
    let header = wire::Header::decode(header)
        .map_err(|error| DecodeError::new("header", "a protobuf Header", error))?;
    let id = header.id;
    match header.kind {
        None => Ok(Message::Unknown { id }),
        Some(kind) => message(id, kind, &payload).map_err(|error| DecodeError { id, ..error }),
    }
}

fn message(id: u64, kind: Kind, payload: &Payload) -> Result<Message> {
    let request = |request| match id {
        0 => Err(DecodeError::new("header.id", "a number other than 0 in a request", 0)),
        _ => Ok(Message::Request { id, request }),
    };
    let reply = |reply| match id {
        0 => Err(DecodeError::new("header.id", "the request's id in a reply", 0)),
        _ => Ok(Message::Reply { id, reply }),
    };
    let notice = |notice| Ok(Message::Notice(notice));
    match kind {
        Kind::Hello(body) => request(Request::Hello(hello(body)?)),
        Kind::GetMetadata(wire::GetMetadata {}) => request(Request::GetMetadata),
        Kind::Reset(body) => request(Request::Reset { seed: body.seed, options: value_map(body.options)? }),
        Kind::GetObs(wire::GetObs {}) => request(Request::GetObs),
        Kind::Step(body) => request(Request::Step {
            session: body.session,
            episode: body.episode,
            actions: chunk(body.actions, body.rank, payload).map_err(|error| error.in_field("step"))?,
        }),
        Kind::Subscribe(body) => request(Request::Subscribe(subscribe(body)?)),
        Kind::Unsubscribe(wire::Unsubscribe {}) => request(Request::Unsubscribe),
        Kind::Welcome(body) => reply(Reply::Welcome(Box::new(welcome(body)?))),
        Kind::Metadata(body) => reply(Reply::Metadata(value_map(body.data)?)),
        Kind::ResetResult(body) => reply(Reply::Reset {
            obs: observation(body.observation, payload).map_err(|error| error.in_field("reset_result"))?,
            info: value_map(body.info)?,
        }),
        Kind::Observation(body) => match id {
            0 => notice(Notice::Observation(observation(Some(body), payload)?)),
            _ => reply(Reply::Observation(observation(Some(body), payload)?)),
        },
        Kind::StepResult(body) => reply(Reply::Step(StepResult {
            obs: observation(body.observation, payload).map_err(|error| error.in_field("step_result"))?,
            reward: body.reward,
            terminated: body.terminated,
            truncated: body.truncated,
            info: value_map(body.info)?,
        })),
        Kind::Subscribed(body) => reply(Reply::Subscribed { hz: body.hz, cameras: body.cameras }),
        Kind::StreamEnd(body) => match id {
            0 => notice(Notice::StreamEnd { reason: body.reason }),
            _ => reply(Reply::StreamEnd { reason: body.reason }),
        },
        Kind::Action(body) => notice(Notice::Action(ActionMessage {
            session: body.session,
            episode: body.episode,
            seq: body.seq,
            actions: chunk(body.actions, body.rank, payload)
                .map_err(|error| DecodeError { action_seq: body.seq, ..error.in_field("action") })?,
            observation_seq: body.observation_seq,
            sent_at: body.sent_at_ns.map(Timestamp),
            valid_for: (body.valid_for_ns != 0).then(|| Duration::from_nanos(body.valid_for_ns)),
            observed_at: body.observed_at_ns.map(Timestamp),
        })),
        Kind::ActionsDropped(wire::ActionsDropped { late, superseded, accepted }) => {
            notice(Notice::ActionsDropped(ActionsDropped { late, superseded, accepted }))
        }
        Kind::Credit(body) => notice(Notice::Credit { received: body.received, window: body.window }),
        Kind::Ping(body) => notice(Notice::Ping { t1: Timestamp(body.t1_ns) }),
        Kind::Pong(body) => notice(Notice::Pong {
            t1: Timestamp(body.t1_ns),
            t2: Timestamp(body.t2_ns),
            t3: Timestamp(body.t3_ns),
        }),
        Kind::Goodbye(body) => notice(Notice::Goodbye { reason: body.reason }),
        Kind::Error(body) => match id {
            0 => notice(Notice::Error(fault(body))),
            _ => reply(Reply::Error(fault(body))),
        },
    }
}

fn hello(hello: wire::Hello) -> Result<Hello> {
    let role = match wire::Role::try_from(hello.role) {
        Ok(wire::Role::Controller) => Role::Controller,
        Ok(wire::Role::Observer) => Role::Observer,
        Ok(wire::Role::Unspecified) | Err(_) => {
            return Err(DecodeError::new("hello.role", "controller or observer", hello.role));
        }
    };
    Ok(Hello {
        protocol: hello.protocol,
        software: hello.software,
        role,
        client_name: hello.client_name,
        auth: hello.auth,
        attach_token: hello.attach_token,
    })
}

fn welcome(welcome: wire::Welcome) -> Result<Welcome> {
    let action_spec = welcome.action_spec.ok_or_else(|| missing_field("welcome.action_spec"))?;
    Ok(Welcome {
        protocol: welcome.protocol,
        software: welcome.software,
        session: welcome.session,
        episode: welcome.episode,
        robot: RobotInfo {
            name: welcome.robot_name,
            cameras: convert_each("welcome.cameras", welcome.cameras, camera_spec)?,
            proprios: convert_each("welcome.proprios", welcome.proprios, |info| {
                Ok(ProprioSpec { name: info.name, size: size("size", info.size)?, unit: info.unit })
            })?,
            action_spec: convert_action_spec(action_spec)
                .map_err(|error| error.in_field("welcome.action_spec"))?,
        },
        attach_token: welcome.attach_token,
        controller: welcome.controller,
        max_chunk_rows: size("welcome.max_chunk_rows", welcome.max_chunk_rows)?,
    })
}

fn camera_spec(info: wire::CameraInfo) -> Result<CameraSpec> {
    let image_shape = fixed_array("image_shape", &shape("image_shape", &info.image_shape)?)?;
    let [height, width, _] = image_shape;
    let depth_shape = match (info.has_depth, &info.depth_shape[..]) {
        (false, _) => None,
        (true, []) => Some([height, width]),
        (true, axes) => Some(fixed_array("depth_shape", &shape("depth_shape", axes)?)?),
    };
    let image_dtype = dtype("image_dtype", info.image_dtype)?;
    Ok(CameraSpec { name: info.name, image_shape, image_dtype, depth_shape })
}

fn convert_action_spec(spec: wire::ActionSpec) -> Result<ActionSpec> {
    let dimension = size("dimension", spec.dimension)?;
    for (field, len) in [("names", spec.names.len()), ("low", spec.low.len()), ("high", spec.high.len())] {
        if len != 0 && len != dimension {
            return Err(DecodeError::new(field, format_args!("none or {dimension}"), len));
        }
    }
    Ok(ActionSpec {
        dimension,
        names: spec.names,
        low: spec.low,
        high: spec.high,
        unit: spec.unit,
        meaning: match wire::ActionMeaning::try_from(spec.meaning) {
            Ok(wire::ActionMeaning::JointPosition) => ActionMeaning::JointPosition,
            Ok(wire::ActionMeaning::JointVelocity) => ActionMeaning::JointVelocity,
            Ok(wire::ActionMeaning::EndEffectorDelta) => ActionMeaning::EndEffectorDelta,
            Ok(wire::ActionMeaning::Other) | Err(_) => ActionMeaning::Other(spec.meaning_text),
        },
        control_hz: spec.control_hz,
    })
}

fn subscribe(subscribe: wire::Subscribe) -> Result<Subscribe> {
    let rate = Rate::new(subscribe.hz).map_err(|InvalidRate { found }| {
        DecodeError::new(
            "subscribe.hz",
            format_args!("a rate above 0 and at most {} Hz", Rate::MAX_HZ),
            found,
        )
    })?;
    Ok(Subscribe { rate, cameras: subscribe.cameras, depth: subscribe.depth, window: subscribe.window })
}

fn observation(observation: Option<wire::Observation>, payload: &Payload) -> Result<Arc<Observation>> {
    let observation = observation.ok_or_else(|| missing_field("observation"))?;
    let in_observation = |error: DecodeError| error.in_field("observation");
    Ok(Arc::new(Observation {
        session: observation.session,
        episode: observation.episode,
        seq: observation.seq,
        timestamp: observation.timestamp.unwrap_or_default(),
        cameras: convert_each("cameras", observation.cameras, |item| camera(item, payload))
            .map_err(in_observation)?,
        proprios: convert_each("proprios", observation.proprios, |item| proprio(item, payload))
            .map_err(in_observation)?,
        extra: value_map(observation.extra)?,
    }))
}

fn camera(camera: wire::Camera, payload: &Payload) -> Result<Arc<Camera>> {
    let image = image("image", camera.image, payload)?;
    let [height, width, _] = fixed_array("image.shape", image.shape())?;
    let depth = camera.depth.map(|depth| depth_image(depth, payload)).transpose()?;
    let depth_intrinsics = match &camera.depth_intrinsics[..] {
        [] => None,
        values => Some(Matrix3::from_row_slice(&fixed_array::<f64, 9>("depth_intrinsics", values)?)),
    };
    if let Some(depth) = &depth
        && depth.shape() != [height, width]
        && depth_intrinsics.is_none()
    {
        let expected = format_args!(
            "9 values, since depth of {:?} is not of the image's size {:?}",
            depth.shape(),
            [height, width]
        )
        .to_string();
        return Err(DecodeError::new("depth_intrinsics", expected, "none"));
    }
    Ok(Arc::new(Camera {
        name: camera.name.into(),
        seq: camera.seq,
        captured_at: Timestamp(camera.captured_at_ns),
        image,
        depth,
        intrinsics: Matrix3::from_row_slice(&fixed_array::<f64, 9>("intrinsics", &camera.intrinsics)?),
        depth_intrinsics,
        extrinsics: Matrix4::from_row_slice(&fixed_array::<f64, 16>("extrinsics", &camera.extrinsics)?),
        is_stale: camera.is_stale,
    }))
}

fn proprio(proprio: wire::Proprio, payload: &Payload) -> Result<Arc<Proprio>> {
    let data = f32_tensor("data", proprio.data, payload)?;
    let [_] = fixed_array("data.shape", data.shape())?;
    Ok(Arc::new(Proprio { name: proprio.name.into(), captured_at: Timestamp(proprio.captured_at_ns), data }))
}

fn chunk(tensor: Option<wire::Tensor>, rank: u32, payload: &Payload) -> Result<ActionChunk> {
    let rows = f32_tensor("actions", tensor, payload)?;
    let [count, dimension] = fixed_array("actions.shape", rows.shape())?;
    let values = rows.values().expect("f32_tensor checked the dtype").into_owned();
    let chunk = ActionChunk::new(dimension, values)
        .map_err(|error| DecodeError::new("actions.shape", "complete rows", error))?;
    match (rank, count) {
        (0 | 2, _) => Ok(chunk),
        (1, 0 | 1) => Ok(chunk.into_single()),
        (1, _) => {
            Err(DecodeError::new("actions.shape", "one row, since rank is 1", format_args!("{count} rows")))
        }
        _ => Err(DecodeError::new("rank", "0, 1 or 2", rank)),
    }
}

fn depth_image(descriptor: wire::Tensor, payload: &Payload) -> Result<Image> {
    let depth = image("depth", Some(descriptor), payload)?;
    let [_, _] = fixed_array("depth.shape", depth.shape())?;
    match depth.dtype() {
        DType::F32 => Ok(depth),
        other => Err(DecodeError::new("depth.dtype", DType::F32, other)),
    }
}

fn f32_tensor(field: &str, descriptor: Option<wire::Tensor>, payload: &Payload) -> Result<Tensor> {
    let image = image(field, descriptor, payload)?;
    let encoding = image.encoding();
    let tensor =
        image.into_pixels().map_err(|_| DecodeError::new(format!("{field}.encoding"), "raw", encoding))?;
    match tensor.dtype() {
        DType::F32 => Ok(tensor),
        other => Err(DecodeError::new(format!("{field}.dtype"), DType::F32, other)),
    }
}

/// Decodes a tensor, which for an image may have an encoding that only newer peers know: reading its pixels
/// is then an error, and everything else in the observation is usable.
fn image(field: &str, descriptor: Option<wire::Tensor>, payload: &Payload) -> Result<Image> {
    let read = |descriptor: wire::Tensor| {
        let encoding = Encoding(descriptor.encoding);
        let dtype = dtype("dtype", descriptor.dtype)?;
        let shape = shape("shape", &descriptor.shape)?;
        let len = byte_len(dtype, &shape)
            .ok_or_else(|| DecodeError::new("shape", "an array that fits in memory", debug(&shape)))?;
        if encoding == Encoding::RAW && descriptor.size != len as u64 {
            return Err(DecodeError::new(
                "size",
                format_args!("{len} bytes for {dtype} of shape {shape:?}"),
                descriptor.size,
            ));
        }
        let data = payload.take(size("offset", descriptor.offset)?, size("size", descriptor.size)?)?;
        Ok(Image::new(encoding, dtype, shape, data).expect("the length was checked against the shape"))
    };
    read(descriptor.ok_or_else(|| missing_field(field))?).map_err(|error| error.in_field(field))
}

fn dtype(field: &str, number: i32) -> Result<DType> {
    let known = DTYPES.iter().find(|(_, wire)| i32::from(*wire) == number);
    known.map(|(dtype, _)| *dtype).ok_or_else(|| DecodeError::new(field, "a known element type", number))
}

fn shape(field: &str, axes: &[u64]) -> Result<Vec<usize>> {
    axes.iter().map(|&axis| size(field, axis)).collect()
}

fn size(field: &str, size: u64) -> Result<usize> {
    usize::try_from(size).map_err(|_| DecodeError::new(field, "a size that fits in memory", size))
}

fn fault(error: wire::Error) -> Fault {
    let known = CODES.iter().find(|(_, wire)| i32::from(*wire) == error.code);
    Fault {
        code: known.map_or(Code::Unspecified, |(code, _)| *code),
        text: error.text,
        field: error.field,
        retryable: error.retryable,
        action_seq: error.action_seq,
    }
}

fn value_map(map: Option<wire::ValueMap>) -> Result<ValueMap> {
    entries(map.unwrap_or_default(), Value::MAX_DEPTH).ok_or_else(|| {
        DecodeError::new(
            "values",
            format_args!("values nested at most {} deep", Value::MAX_DEPTH),
            "deeper nesting",
        )
    })
}

/// `None` if values are nested deeper than `depth`.
fn entries(map: wire::ValueMap, depth: usize) -> Option<ValueMap> {
    map.entries.into_iter().map(|(key, item)| Some((key, value(item, depth)?))).collect()
}

fn value(encoded: wire::Value, depth: usize) -> Option<Value> {
    use wire::value::Kind;
    let depth = depth.checked_sub(1)?;
    Some(match encoded.kind {
        None | Some(Kind::Null(wire::Null {})) => Value::Null,
        Some(Kind::Bool(item)) => Value::Bool(item),
        Some(Kind::Int(item)) => Value::Int(item),
        Some(Kind::Float(item)) => Value::Float(item),
        Some(Kind::Str(item)) => Value::Str(item),
        Some(Kind::Bytes(item)) => Value::Bytes(item),
        Some(Kind::List(list)) => {
            Value::List(list.items.into_iter().map(|item| value(item, depth)).collect::<Option<_>>()?)
        }
        Some(Kind::Map(map)) => Value::Map(entries(map, depth)?),
    })
}

/// Converts each item. An error names the index of the item.
fn convert_each<T, U>(field: &str, items: Vec<T>, convert: impl Fn(T) -> Result<U>) -> Result<Vec<U>> {
    let convert =
        |(i, item)| convert(item).map_err(|error: DecodeError| error.in_field(format_args!("{field}[{i}]")));
    items.into_iter().enumerate().map(convert).collect()
}

fn fixed_array<T: Copy, const N: usize>(field: &str, items: &[T]) -> Result<[T; N]> {
    <[T; N]>::try_from(items).map_err(|_| DecodeError::new(field, format_args!("{N} values"), items.len()))
}

fn missing_field(field: &str) -> DecodeError {
    DecodeError::new(field, "a value", "none")
}

fn debug(value: &dyn fmt::Debug) -> String {
    format!("{value:?}")
}
