//! The wire's types to ours. Everything that a peer can get wrong is found here, once; tensors are slices of
//! what arrived.

use std::{fmt, sync::Arc};

use nalgebra::{Matrix3, Matrix4};
use prost::Message as _;

use super::{CODES, DTYPES, wire, wire::header::Kind};
use crate::{
    action::{ActionChunk, ActionMeaning, ActionSpec},
    clock::{InvalidRate, Rate, Timestamp},
    error::{Code, DecodeError, Fault},
    frame::{self, Frame, Payload},
    message::{
        ActionMessage, Hello, Message, Notice, Reply, Request, RobotInfo, Role, StepResult, Subscribe,
        Welcome,
    },
    observation::{Camera, CameraSpec, Observation, Proprio, ProprioSpec},
    pool::ALIGNMENT,
    tensor::{DType, Tensor, byte_len},
    value::{Value, ValueMap},
};

type Result<T, E = DecodeError> = std::result::Result<T, E>;

pub(crate) fn decode(frame: Frame) -> Result<Message> {
    let (header, payload) = frame::open(frame, ALIGNMENT)?;
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
        Kind::Hello(said) => request(Request::Hello(hello(said)?)),
        Kind::GetMetadata(wire::GetMetadata {}) => request(Request::GetMetadata),
        Kind::Reset(said) => request(Request::Reset { seed: said.seed, options: value_map(said.options)? }),
        Kind::GetObs(wire::GetObs {}) => request(Request::GetObs),
        Kind::Step(said) => request(Request::Step {
            session: said.session,
            episode: said.episode,
            actions: chunk(said.actions, payload).map_err(|error| error.within("step"))?,
        }),
        Kind::Subscribe(said) => request(Request::Subscribe(subscribe(said)?)),
        Kind::Unsubscribe(wire::Unsubscribe {}) => request(Request::Unsubscribe),
        Kind::Welcome(said) => reply(Reply::Welcome(Box::new(welcome(said)?))),
        Kind::Metadata(said) => reply(Reply::Metadata(value_map(said.data)?)),
        Kind::ResetResult(said) => reply(Reply::Reset {
            obs: observation(said.observation, payload).map_err(|error| error.within("reset_result"))?,
            info: value_map(said.info)?,
        }),
        Kind::Observation(said) => match id {
            0 => notice(Notice::Observation(observation(Some(said), payload)?)),
            _ => reply(Reply::Observation(observation(Some(said), payload)?)),
        },
        Kind::StepResult(said) => reply(Reply::Step(StepResult {
            obs: observation(said.observation, payload).map_err(|error| error.within("step_result"))?,
            reward: said.reward,
            terminated: said.terminated,
            truncated: said.truncated,
            info: value_map(said.info)?,
        })),
        Kind::Subscribed(said) => reply(Reply::Subscribed { hz: said.hz, cameras: said.cameras }),
        Kind::StreamEnd(said) => match id {
            0 => notice(Notice::StreamEnd { reason: said.reason }),
            _ => reply(Reply::StreamEnd { reason: said.reason }),
        },
        Kind::Action(said) => notice(Notice::Action(ActionMessage {
            session: said.session,
            episode: said.episode,
            seq: said.seq,
            actions: chunk(said.actions, payload)
                .map_err(|error| DecodeError { action_seq: said.seq, ..error.within("action") })?,
            observation_seq: said.observation_seq,
        })),
        Kind::Credit(said) => notice(Notice::Credit { received: said.received, window: said.window }),
        Kind::Ping(said) => notice(Notice::Ping { t1: Timestamp(said.t1_ns) }),
        Kind::Pong(said) => notice(Notice::Pong {
            t1: Timestamp(said.t1_ns),
            t2: Timestamp(said.t2_ns),
            t3: Timestamp(said.t3_ns),
        }),
        Kind::Goodbye(said) => notice(Notice::Goodbye { reason: said.reason }),
        Kind::Error(said) => match id {
            0 => notice(Notice::Error(fault(said))),
            _ => reply(Reply::Error(fault(said))),
        },
    }
}

fn hello(said: wire::Hello) -> Result<Hello> {
    let role = match wire::Role::try_from(said.role) {
        Ok(wire::Role::Controller) => Role::Controller,
        Ok(wire::Role::Observer) => Role::Observer,
        Ok(wire::Role::Unspecified) | Err(_) => {
            return Err(DecodeError::new("hello.role", "controller or observer", said.role));
        }
    };
    Ok(Hello {
        protocol: said.protocol,
        software: said.software,
        role,
        client_name: said.client_name,
        auth: said.auth,
        attach_token: said.attach_token,
    })
}

fn welcome(said: wire::Welcome) -> Result<Welcome> {
    let action_spec = said.action_spec.ok_or_else(|| missing("welcome.action_spec"))?;
    Ok(Welcome {
        protocol: said.protocol,
        software: said.software,
        session: said.session,
        episode: said.episode,
        robot: RobotInfo {
            name: said.robot_name,
            cameras: each("welcome.cameras", said.cameras, camera_spec)?,
            proprios: each("welcome.proprios", said.proprios, |info| {
                Ok(ProprioSpec { name: info.name, size: size("size", info.size)?, unit: info.unit })
            })?,
            action_spec: spec(action_spec).map_err(|error| error.within("welcome.action_spec"))?,
        },
        attach_token: said.attach_token,
        controller: said.controller,
    })
}

fn camera_spec(info: wire::CameraInfo) -> Result<CameraSpec> {
    Ok(CameraSpec {
        name: info.name,
        image_shape: exactly("image_shape", &shape("image_shape", &info.image_shape)?)?,
        image_dtype: dtype("image_dtype", info.image_dtype)?,
        has_depth: info.has_depth,
    })
}

fn spec(said: wire::ActionSpec) -> Result<ActionSpec> {
    let dimension = size("dimension", said.dimension)?;
    for (field, len) in [("names", said.names.len()), ("low", said.low.len()), ("high", said.high.len())] {
        if len != 0 && len != dimension {
            return Err(DecodeError::new(field, format_args!("none or {dimension}"), len));
        }
    }
    Ok(ActionSpec {
        dimension,
        names: said.names,
        low: said.low,
        high: said.high,
        unit: said.unit,
        meaning: match wire::ActionMeaning::try_from(said.meaning) {
            Ok(wire::ActionMeaning::JointPosition) => ActionMeaning::JointPosition,
            Ok(wire::ActionMeaning::JointVelocity) => ActionMeaning::JointVelocity,
            Ok(wire::ActionMeaning::EndEffectorDelta) => ActionMeaning::EndEffectorDelta,
            Ok(wire::ActionMeaning::Other) | Err(_) => ActionMeaning::Other(said.meaning_text),
        },
        control_hz: said.control_hz,
    })
}

fn subscribe(said: wire::Subscribe) -> Result<Subscribe> {
    let rate = Rate::new(said.hz).map_err(|InvalidRate { found }| {
        DecodeError::new(
            "subscribe.hz",
            format_args!("a rate above 0 and at most {} Hz", Rate::MAX_HZ),
            found,
        )
    })?;
    Ok(Subscribe { rate, cameras: said.cameras, depth: said.depth, window: said.window })
}

fn observation(said: Option<wire::Observation>, payload: &Payload) -> Result<Arc<Observation>> {
    let said = said.ok_or_else(|| missing("observation"))?;
    let within = |error: DecodeError| error.within("observation");
    Ok(Arc::new(Observation {
        session: said.session,
        episode: said.episode,
        seq: said.seq,
        timestamp: said.timestamp.unwrap_or_default(),
        cameras: each("cameras", said.cameras, |item| camera(item, payload)).map_err(within)?,
        proprios: each("proprios", said.proprios, |item| proprio(item, payload)).map_err(within)?,
        extra: value_map(said.extra)?,
    }))
}

fn camera(said: wire::Camera, payload: &Payload) -> Result<Arc<Camera>> {
    let image = tensor("image", said.image, payload)?;
    let [height, width, _] = exactly("image.shape", image.shape())?;
    let depth = match said.depth {
        None => None,
        Some(depth) => Some(floats("depth", Some(depth), payload)?),
    };
    if let Some(depth) = &depth
        && depth.shape() != [height, width]
    {
        return Err(DecodeError::new("depth.shape", debug(&[height, width]), debug(&depth.shape())));
    }
    Ok(Arc::new(Camera {
        name: said.name.into(),
        seq: said.seq,
        captured_at: Timestamp(said.captured_at_ns),
        image,
        depth,
        intrinsics: Matrix3::from_row_slice(&exactly::<f64, 9>("intrinsics", &said.intrinsics)?),
        extrinsics: Matrix4::from_row_slice(&exactly::<f64, 16>("extrinsics", &said.extrinsics)?),
    }))
}

fn proprio(said: wire::Proprio, payload: &Payload) -> Result<Arc<Proprio>> {
    let data = floats("data", said.data, payload)?;
    let [_] = exactly("data.shape", data.shape())?;
    Ok(Arc::new(Proprio { name: said.name.into(), captured_at: Timestamp(said.captured_at_ns), data }))
}

fn chunk(said: Option<wire::Tensor>, payload: &Payload) -> Result<ActionChunk> {
    let rows = floats("actions", said, payload)?;
    let [_, dimension] = exactly("actions.shape", rows.shape())?;
    let values = rows.values().expect("floats checked the dtype").into_owned();
    ActionChunk::new(dimension, values)
        .map_err(|error| DecodeError::new("actions.shape", "whole rows", error))
}

fn floats(field: &str, said: Option<wire::Tensor>, payload: &Payload) -> Result<Tensor> {
    let tensor = tensor(field, said, payload)?;
    match tensor.dtype() {
        DType::F32 => Ok(tensor),
        other => Err(DecodeError::new(format!("{field}.dtype"), DType::F32, other)),
    }
}

fn tensor(field: &str, said: Option<wire::Tensor>, payload: &Payload) -> Result<Tensor> {
    let read = |said: wire::Tensor| {
        let dtype = dtype("dtype", said.dtype)?;
        if said.encoding != i32::from(wire::Encoding::Raw) {
            return Err(DecodeError::new("encoding", "raw", said.encoding));
        }
        let shape = shape("shape", &said.shape)?;
        let len = byte_len(dtype, &shape)
            .ok_or_else(|| DecodeError::new("shape", "an array that memory can hold", debug(&shape)))?;
        if said.size != len as u64 {
            return Err(DecodeError::new(
                "size",
                format_args!("{len} bytes for {dtype} of shape {shape:?}"),
                said.size,
            ));
        }
        let data = payload.take(size("offset", said.offset)?, len)?;
        Ok(Tensor::new(dtype, shape, data).expect("the length was checked against the shape"))
    };
    read(said.ok_or_else(|| missing(field))?).map_err(|error| error.within(field))
}

fn dtype(field: &str, said: i32) -> Result<DType> {
    let known = DTYPES.iter().find(|(_, wire)| i32::from(*wire) == said);
    known.map(|(ours, _)| *ours).ok_or_else(|| DecodeError::new(field, "a known element type", said))
}

fn shape(field: &str, said: &[u64]) -> Result<Vec<usize>> {
    said.iter().map(|&axis| size(field, axis)).collect()
}

fn size(field: &str, said: u64) -> Result<usize> {
    usize::try_from(said).map_err(|_| DecodeError::new(field, "a size that memory can hold", said))
}

fn fault(said: wire::Error) -> Fault {
    let known = CODES.iter().find(|(_, wire)| i32::from(*wire) == said.code);
    Fault {
        code: known.map_or(Code::Unspecified, |(ours, _)| *ours),
        text: said.text,
        field: said.field,
        retryable: said.retryable,
        action_seq: said.action_seq,
    }
}

fn value_map(said: Option<wire::ValueMap>) -> Result<ValueMap> {
    entries(said.unwrap_or_default(), Value::MAX_DEPTH).ok_or_else(|| {
        DecodeError::new("values", format_args!("at most {} within each other", Value::MAX_DEPTH), "more")
    })
}

/// `None` if anything lies deeper than `depth` values.
fn entries(said: wire::ValueMap, depth: usize) -> Option<ValueMap> {
    said.entries.into_iter().map(|(key, item)| Some((key, value(item, depth)?))).collect()
}

fn value(said: wire::Value, depth: usize) -> Option<Value> {
    use wire::value::Kind;
    let depth = depth.checked_sub(1)?;
    Some(match said.kind {
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

/// Converts each item; an error says which.
fn each<T, U>(field: &str, items: Vec<T>, convert: impl Fn(T) -> Result<U>) -> Result<Vec<U>> {
    let convert =
        |(i, item)| convert(item).map_err(|error: DecodeError| error.within(format_args!("{field}[{i}]")));
    items.into_iter().enumerate().map(convert).collect()
}

fn exactly<T: Copy, const N: usize>(field: &str, items: &[T]) -> Result<[T; N]> {
    <[T; N]>::try_from(items).map_err(|_| DecodeError::new(field, format_args!("{N} values"), items.len()))
}

fn missing(field: &str) -> DecodeError {
    DecodeError::new(field, "a value", "none")
}

fn debug(value: &dyn fmt::Debug) -> String {
    format!("{value:?}")
}
