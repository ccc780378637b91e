//! Encodes this crate's types into the schema's. Tensors are added to the payload by reference.

use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;

use super::tables::{CODES, DTYPES};
use crate::{
    action::{ActionChunk, ActionMeaning, ActionSpec},
    codec::wire::{self, header::Kind},
    error::{EncodeError, Fault},
    frame::{Frame, PayloadWriter},
    image::{Encoding, Image},
    message::{ActionsDropped, Hello, Message, Notice, Reply, Request, Role, StepResult, Welcome},
    observation::{Camera, CameraSpec, Observation, Proprio, ProprioSpec},
    pool::ALIGNMENT,
    tensor::{DType, Tensor},
    value::{Value, ValueMap},
};

pub(crate) fn encode(message: &Message) -> Result<Frame, EncodeError> {
    let mut payload = PayloadWriter::new(ALIGNMENT);
    let (id, kind) = match message {
        Message::Request { id, request } => (*id, request_kind(request, &mut payload)?),
        Message::Reply { id, reply } => (*id, reply_kind(reply, &mut payload)?),
        Message::Notice(notice) => (0, notice_kind(notice, &mut payload)?),
        Message::Unknown { .. } => return Err(EncodeError::Unknown),
    };
    let header = wire::Header { id, kind: Some(kind) };
    payload.finish(header.encoded_len(), |head| header.encode(head).expect("a BytesMut grows as needed"))
}

fn request_kind(request: &Request, payload: &mut PayloadWriter) -> Result<Kind, EncodeError> {
    Ok(match request {
        Request::Hello(body) => Kind::Hello(hello(body)),
        Request::GetMetadata => Kind::GetMetadata(wire::GetMetadata {}),
        Request::Reset { seed, options } => {
            Kind::Reset(wire::Reset { seed: *seed, options: Some(value_map(options, "reset.options")?) })
        }
        Request::GetObs => Kind::GetObs(wire::GetObs {}),
        Request::Step { session, episode, actions } => Kind::Step(wire::Step {
            session: *session,
            episode: *episode,
            actions: Some(chunk(actions, payload)),
            rank: rank(actions),
        }),
        Request::Subscribe(body) => Kind::Subscribe(wire::Subscribe {
            hz: body.rate.hz(),
            cameras: body.cameras.clone(),
            depth: body.depth,
            window: body.window,
        }),
        Request::Unsubscribe => Kind::Unsubscribe(wire::Unsubscribe {}),
    })
}

fn reply_kind(reply: &Reply, payload: &mut PayloadWriter) -> Result<Kind, EncodeError> {
    Ok(match reply {
        Reply::Welcome(body) => Kind::Welcome(welcome(body)),
        Reply::Metadata(data) => {
            Kind::Metadata(wire::Metadata { data: Some(value_map(data, "metadata.data")?) })
        }
        Reply::Reset { obs, info } => Kind::ResetResult(wire::ResetResult {
            observation: Some(observation(obs, payload)?),
            info: Some(value_map(info, "reset_result.info")?),
        }),
        Reply::Observation(obs) => Kind::Observation(observation(obs, payload)?),
        Reply::Step(result) => Kind::StepResult(step_result(result, payload)?),
        Reply::Subscribed { hz, cameras } => {
            Kind::Subscribed(wire::Subscribed { hz: *hz, cameras: cameras.clone() })
        }
        Reply::StreamEnd { reason } => Kind::StreamEnd(wire::StreamEnd { reason: reason.clone() }),
        Reply::Error(body) => Kind::Error(fault(body)),
    })
}

fn notice_kind(notice: &Notice, payload: &mut PayloadWriter) -> Result<Kind, EncodeError> {
    Ok(match notice {
        Notice::Observation(obs) => Kind::Observation(observation(obs, payload)?),
        Notice::StreamEnd { reason } => Kind::StreamEnd(wire::StreamEnd { reason: reason.clone() }),
        Notice::Action(body) => Kind::Action(wire::Action {
            session: body.session,
            episode: body.episode,
            seq: body.seq,
            actions: Some(chunk(&body.actions, payload)),
            observation_seq: body.observation_seq,
            sent_at_ns: body.sent_at.map(|sent_at| sent_at.0),
            valid_for_ns: body.valid_for.filter(|valid_for| !valid_for.is_zero()).map_or(0, nanoseconds),
            rank: rank(&body.actions),
            observed_at_ns: body.observed_at.map(|observed_at| observed_at.0),
        }),
        Notice::ActionsDropped(ActionsDropped { late, superseded, accepted }) => {
            Kind::ActionsDropped(wire::ActionsDropped {
                late: *late,
                superseded: *superseded,
                accepted: *accepted,
            })
        }
        Notice::Credit { received, window } => {
            Kind::Credit(wire::Credit { received: *received, window: *window })
        }
        Notice::Ping { t1 } => Kind::Ping(wire::Ping { t1_ns: t1.0 }),
        Notice::Pong { t1, t2, t3 } => Kind::Pong(wire::Pong { t1_ns: t1.0, t2_ns: t2.0, t3_ns: t3.0 }),
        Notice::Goodbye { reason } => Kind::Goodbye(wire::Goodbye { reason: reason.clone() }),
        Notice::Error(body) => Kind::Error(fault(body)),
    })
}

fn hello(hello: &Hello) -> wire::Hello {
    let role = match hello.role {
        Role::Controller => wire::Role::Controller,
        Role::Observer => wire::Role::Observer,
    };
    wire::Hello {
        protocol: hello.protocol,
        software: hello.software.clone(),
        role: role.into(),
        client_name: hello.client_name.clone(),
        auth: hello.auth.clone(),
        attach_token: hello.attach_token.clone(),
    }
}

fn welcome(welcome: &Welcome) -> wire::Welcome {
    wire::Welcome {
        protocol: welcome.protocol,
        software: welcome.software.clone(),
        session: welcome.session,
        robot_name: welcome.robot.name.clone(),
        cameras: welcome.robot.cameras.iter().map(camera_info).collect(),
        proprios: welcome.robot.proprios.iter().map(proprio_info).collect(),
        action_spec: Some(action_spec(&welcome.robot.action_spec)),
        attach_token: welcome.attach_token.clone(),
        episode: welcome.episode,
        controller: welcome.controller.clone(),
        max_chunk_rows: welcome.max_chunk_rows as u64,
    }
}

fn camera_info(spec: &CameraSpec) -> wire::CameraInfo {
    wire::CameraInfo {
        name: spec.name.clone(),
        image_shape: shape(&spec.image_shape),
        image_dtype: dtype(spec.image_dtype),
        has_depth: spec.depth_shape.is_some(),
        // Left out where it is the image's.
        depth_shape: spec
            .depth_shape
            .filter(|_| spec.has_own_depth_size())
            .map_or_else(Vec::new, |size| shape(&size)),
    }
}

fn proprio_info(spec: &ProprioSpec) -> wire::ProprioInfo {
    wire::ProprioInfo { name: spec.name.clone(), size: spec.size as u64, unit: spec.unit.clone() }
}

fn action_spec(spec: &ActionSpec) -> wire::ActionSpec {
    let (meaning, meaning_text) = match &spec.meaning {
        ActionMeaning::JointPosition => (wire::ActionMeaning::JointPosition, String::new()),
        ActionMeaning::JointVelocity => (wire::ActionMeaning::JointVelocity, String::new()),
        ActionMeaning::EndEffectorDelta => (wire::ActionMeaning::EndEffectorDelta, String::new()),
        ActionMeaning::Other(text) => (wire::ActionMeaning::Other, text.clone()),
    };
    wire::ActionSpec {
        dimension: spec.dimension as u64,
        names: spec.names.clone(),
        low: spec.low.clone(),
        high: spec.high.clone(),
        unit: spec.unit.clone(),
        meaning: meaning.into(),
        meaning_text,
        control_hz: spec.control_hz,
    }
}

fn step_result(result: &StepResult, payload: &mut PayloadWriter) -> Result<wire::StepResult, EncodeError> {
    Ok(wire::StepResult {
        observation: Some(observation(&result.obs, payload)?),
        reward: result.reward,
        terminated: result.terminated,
        truncated: result.truncated,
        info: Some(value_map(&result.info, "step_result.info")?),
    })
}

fn observation(obs: &Observation, payload: &mut PayloadWriter) -> Result<wire::Observation, EncodeError> {
    Ok(wire::Observation {
        session: obs.session,
        episode: obs.episode,
        seq: obs.seq,
        timestamp: Some(obs.timestamp),
        cameras: obs.cameras.iter().map(|item| camera(item, payload)).collect(),
        proprios: obs.proprios.iter().map(|item| proprio(item, payload)).collect(),
        extra: Some(value_map(&obs.extra, "observation.extra")?),
    })
}

fn camera(camera: &Camera, payload: &mut PayloadWriter) -> wire::Camera {
    wire::Camera {
        name: camera.name.to_string(),
        seq: camera.seq,
        captured_at_ns: camera.captured_at.0,
        image: Some(image(&camera.image, payload)),
        depth: camera.depth.as_ref().map(|depth| image(depth, payload)),
        // nalgebra stores matrices column-major, the wire row-major.
        intrinsics: camera.intrinsics.transpose().as_slice().to_vec(),
        extrinsics: camera.extrinsics.transpose().as_slice().to_vec(),
        is_stale: camera.is_stale,
        depth_intrinsics: camera
            .depth_intrinsics
            .map_or_else(Vec::new, |intrinsics| intrinsics.transpose().as_slice().to_vec()),
    }
}

fn proprio(proprio: &Proprio, payload: &mut PayloadWriter) -> wire::Proprio {
    wire::Proprio {
        name: proprio.name.to_string(),
        captured_at_ns: proprio.captured_at.0,
        data: Some(tensor(&proprio.data, payload)),
    }
}

fn chunk(chunk: &ActionChunk, payload: &mut PayloadWriter) -> wire::Tensor {
    let rows = Tensor::from_vec([chunk.rows(), chunk.dimension()], chunk.values().to_vec())
        .expect("a chunk holds complete rows");
    tensor(&rows, payload)
}

/// The rank on the wire, where 2 is left out.
fn rank(chunk: &ActionChunk) -> u32 {
    u32::from(chunk.is_single())
}

/// At least 1, since 0 on the wire stands for no limit.
fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX).max(1)
}

fn tensor(tensor: &Tensor, payload: &mut PayloadWriter) -> wire::Tensor {
    descriptor(Encoding::RAW, tensor.dtype(), tensor.shape(), tensor.data(), payload)
}

fn image(image: &Image, payload: &mut PayloadWriter) -> wire::Tensor {
    descriptor(image.encoding(), image.dtype(), image.shape(), image.data(), payload)
}

fn descriptor(
    Encoding(encoding): Encoding,
    elements: DType,
    axes: &[usize],
    data: &Bytes,
    payload: &mut PayloadWriter,
) -> wire::Tensor {
    wire::Tensor {
        dtype: dtype(elements),
        encoding,
        shape: shape(axes),
        offset: payload.push(data) as u64,
        size: data.len() as u64,
    }
}

fn shape(shape: &[usize]) -> Vec<u64> {
    shape.iter().map(|&axis| axis as u64).collect()
}

fn dtype(dtype: DType) -> i32 {
    DTYPES.iter().find(|(known, _)| *known == dtype).expect("the table has every dtype").1.into()
}

fn fault(fault: &Fault) -> wire::Error {
    wire::Error {
        code: CODES
            .iter()
            .find(|(known, _)| *known == fault.code)
            .expect("the table has every code")
            .1
            .into(),
        text: fault.text.clone(),
        field: fault.field.clone(),
        retryable: fault.retryable,
        action_seq: fault.action_seq,
    }
}

fn value_map(map: &ValueMap, field: &'static str) -> Result<wire::ValueMap, EncodeError> {
    entries(map, Value::MAX_DEPTH).ok_or(EncodeError::TooDeep { field, limit: Value::MAX_DEPTH })
}

/// `None` if values are nested deeper than `depth`.
fn entries(map: &ValueMap, depth: usize) -> Option<wire::ValueMap> {
    let entries =
        map.iter().map(|(key, item)| Some((key.clone(), value(item, depth)?))).collect::<Option<_>>()?;
    Some(wire::ValueMap { entries })
}

fn value(item: &Value, depth: usize) -> Option<wire::Value> {
    use wire::value::Kind;
    let depth = depth.checked_sub(1)?;
    let kind = match item {
        Value::Null => Kind::Null(wire::Null {}),
        Value::Bool(item) => Kind::Bool(*item),
        Value::Int(item) => Kind::Int(*item),
        Value::Float(item) => Kind::Float(*item),
        Value::Str(item) => Kind::Str(item.clone()),
        Value::Bytes(item) => Kind::Bytes(item.clone()),
        Value::List(items) => Kind::List(wire::ValueList {
            items: items.iter().map(|item| value(item, depth)).collect::<Option<_>>()?,
        }),
        Value::Map(map) => Kind::Map(entries(map, depth)?),
    };
    Some(wire::Value { kind: Some(kind) })
}
