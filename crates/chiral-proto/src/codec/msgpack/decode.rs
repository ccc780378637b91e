//! Decodes the maps of the legacy wire into messages, and validates everything that a peer sent. Tensors are
//! slices of the received frame.

use std::sync::Arc;

use nalgebra::{Matrix3, Matrix4};

use super::{
    constants::{ALIGNMENT, ID},
    read::{self, describe},
    seconds::timestamp,
};
use crate::{
    action::ActionChunk,
    clock::Timestamp,
    error::DecodeError,
    frame::{self, Frame, Payload},
    image::Image,
    message::{ActionMessage, Message, Notice, Reply, Request, StepResult},
    observation::{Camera, Observation, Proprio},
    tensor::{DType, Tensor, byte_len},
    value::{Value, ValueMap},
};

type Result<T, E = DecodeError> = std::result::Result<T, E>;

/// A decoded message, and the capture times that the legacy wire carries with it.
#[derive(Clone, Debug, PartialEq)]
pub struct TimedMessage {
    /// The message.
    pub message: Message,
    /// The capture time of each camera, by the camera's name and exactly as the peer sent it: of the
    /// observation in the message, or of the one from which its actions were chosen. A time that an
    /// observation lacks is 0.0.
    pub capture_times: ValueMap,
}

/// Decodes a message and validates it. Its tensors share the memory of `frame`.
///
/// # Errors
/// [`DecodeError`], which names the field, what was expected and what was found.
pub fn decode(frame: Frame) -> Result<TimedMessage> {
    let (header, payload) = frame::split(frame, ALIGNMENT)?;
    let mut fields = Fields(read::header(header)?);
    let kind = fields.text("type")?;
    let id = if kind == "apply_action" { 0 } else { ID };
    message(&kind, &mut fields, &payload).map_err(|error| DecodeError { id, ..error.in_field(&kind) })
}

fn message(kind: &str, fields: &mut Fields, payload: &Payload) -> Result<TimedMessage> {
    let mut capture_times = ValueMap::new();
    let request = |request| Message::Request { id: ID, request };
    let reply = |reply| Message::Reply { id: ID, reply };
    let message = match kind {
        "metadata" => request(Request::GetMetadata),
        "reset" => request(Request::Reset { seed: None, options: ValueMap::new() }),
        "obs_request" => request(Request::GetObs),
        "action" => {
            capture_times = fields.times("obs_timestamps")?;
            request(Request::Step { session: 0, episode: 0, actions: chunk(fields, payload)? })
        }
        "apply_action" => {
            capture_times = fields.times("obs_timestamps")?;
            let actions = chunk(fields, payload)?;
            Message::Notice(Notice::Action(ActionMessage { actions, ..ActionMessage::default() }))
        }
        "metadata_response" => reply(Reply::Metadata(fields.get("data", "a map", as_map)?)),
        "reset_response" => {
            let obs = observation(fields, payload, &mut capture_times)?;
            reply(Reply::Reset { obs, info: fields.map("info")? })
        }
        "obs_response" => reply(Reply::Observation(observation(fields, payload, &mut capture_times)?)),
        "step_response" => reply(Reply::Step(StepResult {
            obs: observation(fields, payload, &mut capture_times)?,
            reward: fields.number("reward")?,
            terminated: fields.get("terminated", "a boolean", |value| value.as_bool().ok_or(value))?,
            truncated: fields.get("truncated", "a boolean", |value| value.as_bool().ok_or(value))?,
            info: fields.map("info")?,
        })),
        _ => Message::Unknown { id: 0 },
    };
    Ok(TimedMessage { message, capture_times })
}

fn observation(fields: &mut Fields, payload: &Payload, times: &mut ValueMap) -> Result<Arc<Observation>> {
    Ok(Arc::new(Observation {
        timestamp: fields.number("timestamp")?,
        extra: fields.map("extra")?,
        // Decode in this order, the order of the payload.
        cameras: convert_each("cameras", fields.list("cameras")?, |fields| camera(fields, payload, times))?,
        proprios: match fields.has("proprios") {
            true => convert_each("proprios", fields.list("proprios")?, |fields| proprio(fields, payload))?,
            false => Vec::new(),
        },
        ..Observation::default()
    }))
}

fn camera(fields: &mut Fields, payload: &Payload, times: &mut ValueMap) -> Result<Arc<Camera>> {
    let name = fields.text("name")?;
    let time = match fields.take("timestamp") {
        Value::Null => Value::Float(0.0),
        value => value,
    };
    let captured_at = timestamp(&time).ok_or_else(|| {
        DecodeError::new("timestamp", "a number of seconds or nanoseconds", describe(&time))
    })?;
    let image = array(fields, "image_", payload)?;
    let [height, width, _] = fixed_array("image_shape", image.shape())?;
    let depth = match ["depth_shape", "depth_dtype", "depth_offset", "depth_size"]
        .into_iter()
        .any(|field| fields.has(field))
    {
        true => Some(array(fields, "depth_", payload)?),
        false => None,
    };
    if let Some(depth) = &depth {
        if depth.dtype() != DType::F32 {
            return Err(DecodeError::new("depth_dtype", DType::F32, depth.dtype()));
        }
        if depth.shape() != [height, width] {
            return Err(DecodeError::new(
                "depth_shape",
                format_args!("[{height}, {width}]"),
                format_args!("{:?}", depth.shape()),
            ));
        }
    }
    let camera = Camera {
        captured_at,
        depth: depth.map(Image::from),
        intrinsics: Matrix3::from_row_slice(&fields.numbers::<9>("intrinsics")?),
        extrinsics: Matrix4::from_row_slice(&fields.numbers::<16>("extrinsics")?),
        ..Camera::new(name.as_str(), image)
    };
    times.insert(name, time);
    Ok(Arc::new(camera))
}

fn proprio(fields: &mut Fields, payload: &Payload) -> Result<Arc<Proprio>> {
    let name = fields.text("name")?.into();
    check_f32(fields)?;
    let (offset, size) = (fields.size("offset")?, fields.size("size")?);
    if !size.is_multiple_of(DType::F32.size()) {
        return Err(DecodeError::new("size", "a multiple of 4 bytes", size));
    }
    let data = Tensor::new(DType::F32, [size / DType::F32.size()], payload.take(offset, size)?);
    Ok(Arc::new(Proprio {
        name,
        captured_at: Timestamp(0),
        data: data.expect("the shape was computed from the size"),
    }))
}

/// Decodes the array of a camera whose fields begin with `prefix`.
fn array(fields: &mut Fields, prefix: &str, payload: &Payload) -> Result<Tensor> {
    let field = |name: &str| format!("{prefix}{name}");
    let dtype = dtype(fields, &field("dtype"))?;
    let (shape, len) = shape(fields, &field("shape"), dtype)?;
    let (offset, size) = (fields.size(&field("offset"))?, fields.size(&field("size"))?);
    if size != len {
        return Err(DecodeError::new(
            field("size"),
            format_args!("{len} bytes for {dtype} of shape {shape:?}"),
            size,
        ));
    }
    let data =
        payload.take(offset, len).map_err(|error| DecodeError { field: field(&error.field), ..error })?;
    Ok(Tensor::new(dtype, shape, data).expect("the length was checked against the shape"))
}

/// Decodes the rows of actions, which are the whole payload.
fn chunk(fields: &mut Fields, payload: &Payload) -> Result<ActionChunk> {
    check_f32(fields)?;
    let (shape, len) = shape(fields, "shape", DType::F32)?;
    let (dimension, is_single) = match shape[..] {
        [dimension] => (dimension, true),
        [_, dimension] => (dimension, false),
        _ => return Err(DecodeError::new("shape", "[D] or [N, D]", format_args!("{shape:?}"))),
    };
    if payload.len() != len {
        let expected = format_args!("{len} bytes for {} of shape {shape:?}", DType::F32).to_string();
        return Err(DecodeError::new("payload", expected, payload.len()));
    }
    let rows = Tensor::new(DType::F32, shape, payload.take(0, len)?)
        .expect("the length was checked against the shape");
    let values = rows.values().expect("created as float32").into_owned();
    let chunk = ActionChunk::new(dimension, values)
        .map_err(|error| DecodeError::new("shape", "complete rows", error))?;
    Ok(if is_single { chunk.into_single() } else { chunk })
}

/// Decodes a shape. Returns it with the size in bytes of such an array.
fn shape(fields: &mut Fields, field: &str, dtype: DType) -> Result<(Vec<usize>, usize)> {
    let axis = |value: &Value| value.as_i64().and_then(|axis| usize::try_from(axis).ok());
    let shape: Vec<usize> = fields.get(field, "a list of sizes", |value| {
        value.as_list().and_then(|axes| axes.iter().map(axis).collect()).ok_or(value)
    })?;
    let len = byte_len(dtype, &shape)
        .ok_or_else(|| DecodeError::new(field, "an array that fits in memory", format_args!("{shape:?}")))?;
    Ok((shape, len))
}

fn dtype(fields: &mut Fields, field: &str) -> Result<DType> {
    let known =
        |value: &Value| DType::ALL.into_iter().find(|dtype| value.as_str() == Some(dtype.numpy_name()));
    fields.get(field, "the name of an element type", |value| known(&value).ok_or(value))
}

/// Checks the element type of a field that is always float32 on this wire.
fn check_f32(fields: &mut Fields) -> Result<()> {
    match dtype(fields, "dtype")? {
        DType::F32 => Ok(()),
        other => Err(DecodeError::new("dtype", DType::F32, other)),
    }
}

/// Converts each map of a list. An error names the index of the map.
fn convert_each<T>(
    field: &str,
    items: Vec<Value>,
    mut convert: impl FnMut(&mut Fields) -> Result<T>,
) -> Result<Vec<T>> {
    let convert = |(i, item)| {
        let in_item = |error: DecodeError| error.in_field(format_args!("{field}[{i}]"));
        let map = as_map(item)
            .map_err(|item| DecodeError::new(format!("{field}[{i}]"), "a map", describe(&item)))?;
        convert(&mut Fields(map)).map_err(in_item)
    };
    items.into_iter().enumerate().map(convert).collect()
}

fn fixed_array<T: Copy, const N: usize>(field: &str, items: &[T]) -> Result<[T; N]> {
    <[T; N]>::try_from(items).map_err(|_| DecodeError::new(field, format_args!("{N} values"), items.len()))
}

fn as_map(value: Value) -> Result<ValueMap, Value> {
    if let Value::Map(map) = value { Ok(map) } else { Err(value) }
}

/// The fields of a map that have not been read yet.
struct Fields(ValueMap);

impl Fields {
    fn has(&self, field: &str) -> bool {
        self.0.get(field).is_some_and(|value| *value != Value::Null)
    }

    fn take(&mut self, field: &str) -> Value {
        self.0.remove(field).unwrap_or_default()
    }

    /// Converts a field's value. `convert` returns the value as an error if it is not `expected`.
    fn get<T>(
        &mut self,
        field: &str,
        expected: &str,
        convert: impl FnOnce(Value) -> Result<T, Value>,
    ) -> Result<T> {
        convert(self.take(field)).map_err(|found| DecodeError::new(field, expected, describe(&found)))
    }

    fn text(&mut self, field: &str) -> Result<String> {
        self.get(field, "text", |value| if let Value::Str(text) = value { Ok(text) } else { Err(value) })
    }

    fn number(&mut self, field: &str) -> Result<f64> {
        self.get(field, "a number", |value| value.as_f64().ok_or(value))
    }

    fn numbers<const N: usize>(&mut self, field: &str) -> Result<[f64; N]> {
        let numbers =
            |value: &Value| value.as_list().and_then(|items| items.iter().map(Value::as_f64).collect());
        let items: Vec<f64> = self.get(field, "a list of numbers", |value| numbers(&value).ok_or(value))?;
        fixed_array(field, &items)
    }

    fn size(&mut self, field: &str) -> Result<usize> {
        let size = |value: &Value| value.as_i64().and_then(|size| usize::try_from(size).ok());
        self.get(field, "a number of bytes", |value| size(&value).ok_or(value))
    }

    fn list(&mut self, field: &str) -> Result<Vec<Value>> {
        self.get(field, "a list", |value| if let Value::List(items) = value { Ok(items) } else { Err(value) })
    }

    /// A map; empty if the field is absent.
    fn map(&mut self, field: &str) -> Result<ValueMap> {
        if self.has(field) { self.get(field, "a map", as_map) } else { Ok(ValueMap::new()) }
    }

    /// Capture times by camera; empty if the field is absent.
    fn times(&mut self, field: &str) -> Result<ValueMap> {
        let times = self.map(field)?;
        match times.iter().find(|(_, time)| time.as_f64().is_none()) {
            None => Ok(times),
            Some((camera, time)) => {
                Err(DecodeError::new(format!("{field}[{camera:?}]"), "a number", describe(time)))
            }
        }
    }
}
