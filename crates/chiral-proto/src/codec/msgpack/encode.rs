//! Encodes messages into the maps of the legacy wire, with fields in the order of the wire's description.
//! Tensors are added to the payload by reference.

use std::fmt::Debug;

use rmp::encode;

use super::{
    constants::{ALIGNMENT, NAME},
    seconds::seconds,
};
use crate::{
    action::ActionChunk,
    error::EncodeError,
    frame::{Frame, PayloadWriter},
    image::Image,
    message::{Message, Notice, Reply, Request},
    observation::{Camera, Observation, Proprio},
    tensor::{DType, Tensor},
    value::{Value, ValueMap},
};

type Result<T, E = EncodeError> = std::result::Result<T, E>;

/// Encodes a message. The frame shares the memory of its tensors.
///
/// `capture_times` are those of the observation from which actions were chosen, as in
/// [`TimedMessage`](super::TimedMessage). Messages without actions ignore them.
///
/// # Errors
/// [`EncodeError`] if this wire cannot carry the message.
pub fn encode(message: &Message, capture_times: &ValueMap) -> Result<Frame> {
    let mut writer = Writer { header: Vec::new(), payload: PayloadWriter::new(ALIGNMENT) };
    match message {
        Message::Request { request, .. } => writer.request(request, capture_times)?,
        Message::Reply { reply, .. } => writer.reply(reply)?,
        Message::Notice(notice) => writer.notice(notice, capture_times)?,
        Message::Unknown { .. } => return Err(EncodeError::Unknown),
    }
    let Writer { header, payload } = writer;
    payload.finish(header.len(), |head| head.extend_from_slice(&header))
}

/// The header and the payload of the frame that is being written.
struct Writer {
    header: Vec<u8>,
    payload: PayloadWriter,
}

impl Writer {
    fn request(&mut self, request: &Request, capture_times: &ValueMap) -> Result<()> {
        let kind = match request {
            Request::GetMetadata => "metadata",
            Request::Reset { seed: None, options } if options.is_empty() => "reset",
            Request::GetObs => "obs_request",
            Request::Step { actions, .. } => return self.action("action", actions, capture_times),
            Request::Reset { .. } => return unsupported("a reset with a seed or options"),
            Request::Hello(_) => return unsupported("a hello"),
            Request::Subscribe(_) | Request::Unsubscribe => {
                return unsupported("an observation stream");
            }
        };
        self.start(kind, 0);
        Ok(())
    }

    fn reply(&mut self, reply: &Reply) -> Result<()> {
        match reply {
            Reply::Metadata(data) => {
                self.start("metadata_response", 1);
                self.map_field("data", data)
            }
            Reply::Reset { obs, info } => {
                self.start("reset_response", OBSERVATION_FIELDS + 1);
                self.observation(obs)?;
                self.map_field("info", info)
            }
            Reply::Observation(obs) => {
                self.start("obs_response", OBSERVATION_FIELDS);
                self.observation(obs)
            }
            Reply::Step(result) => {
                self.start("step_response", OBSERVATION_FIELDS + 4);
                self.observation(&result.obs)?;
                self.text("reward").float(result.reward);
                self.text("terminated").boolean(result.terminated);
                self.text("truncated").boolean(result.truncated);
                self.map_field("info", &result.info)
            }
            Reply::Welcome(_) => unsupported("a welcome"),
            Reply::Subscribed { .. } => unsupported("an observation stream"),
            Reply::StreamEnd { .. } => unsupported("the end of an observation stream"),
            Reply::Error(_) => unsupported("an error"),
        }
    }

    fn notice(&mut self, notice: &Notice, capture_times: &ValueMap) -> Result<()> {
        match notice {
            Notice::Action(action) => self.action("apply_action", &action.actions, capture_times),
            Notice::Observation(_) => unsupported("an observation that is not a reply"),
            Notice::StreamEnd { .. } => unsupported("the end of an observation stream"),
            Notice::Credit { .. } => unsupported("credit"),
            Notice::Ping { .. } | Notice::Pong { .. } => unsupported("a ping or pong"),
            Notice::Goodbye { .. } => unsupported("a goodbye"),
            Notice::Error(_) | Notice::ActionsDropped(_) => unsupported("an error"),
        }
    }

    fn action(&mut self, kind: &str, actions: &ActionChunk, capture_times: &ValueMap) -> Result<()> {
        self.start(kind, 3);
        let (rows, dimension) = (actions.rows(), actions.dimension());
        let shape = if kind == "apply_action" && rows == 1 { &[dimension][..] } else { &[rows, dimension] };
        let values = Tensor::from_vec(shape, actions.values().to_vec()).expect("a chunk holds complete rows");
        self.text("shape").sizes(shape);
        self.text("dtype").text(DType::F32.numpy_name());
        self.map_field("obs_timestamps", capture_times)?;
        self.payload.push(values.data());
        Ok(())
    }

    /// Writes [`OBSERVATION_FIELDS`] fields.
    fn observation(&mut self, obs: &Observation) -> Result<()> {
        self.text("timestamp").float(obs.timestamp);
        self.map_field("extra", &obs.extra)?;
        self.text("cameras").list(obs.cameras.len());
        obs.cameras.iter().try_for_each(|camera| self.camera(camera))?;
        self.text("proprios").list(obs.proprios.len());
        obs.proprios.iter().for_each(|proprio| self.proprio(proprio));
        Ok(())
    }

    fn camera(&mut self, camera: &Camera) -> Result<()> {
        let (image, depth) = (pixels(&camera.image)?, depth(camera)?);
        self.map(if depth.is_some() { 12 } else { 8 });
        self.text("name").text(&camera.name);
        self.text("timestamp").float(seconds(camera.captured_at));
        // nalgebra stores matrices column-major, the wire row-major.
        self.text("intrinsics").numbers(camera.intrinsics.transpose().as_slice());
        self.text("extrinsics").numbers(camera.extrinsics.transpose().as_slice());
        self.array(["image_shape", "image_dtype", "image_offset", "image_size"], image);
        if let Some(depth) = depth {
            self.array(["depth_shape", "depth_dtype", "depth_offset", "depth_size"], depth);
        }
        Ok(())
    }

    fn array(&mut self, [shape_key, dtype_key, offset_key, size_key]: [&str; 4], tensor: &Tensor) {
        self.text(shape_key).sizes(tensor.shape());
        self.text(dtype_key).text(tensor.dtype().numpy_name());
        let offset = self.payload.push(tensor.data());
        self.text(offset_key).size(offset);
        self.text(size_key).size(tensor.data().len());
    }

    fn proprio(&mut self, proprio: &Proprio) {
        self.map(4);
        self.text("name").text(&proprio.name);
        self.text("dtype").text(proprio.data.dtype().numpy_name());
        let offset = self.payload.push(proprio.data.data());
        self.text("offset").size(offset);
        self.text("size").size(proprio.data.data().len());
    }

    /// Starts a header that has its type and `fields` more fields.
    fn start(&mut self, kind: &str, fields: usize) {
        self.map(1 + fields).text("type").text(kind);
    }

    fn map_field(&mut self, field: &'static str, map: &ValueMap) -> Result<()> {
        let too_deep = || EncodeError::TooDeep { field, limit: Value::MAX_DEPTH };
        self.text(field).entries(map, Value::MAX_DEPTH).ok_or_else(too_deep)
    }

    /// `None` if values are nested deeper than `depth`.
    fn entries(&mut self, map: &ValueMap, depth: usize) -> Option<()> {
        self.map(map.len());
        map.iter().try_for_each(|(key, item)| self.text(key).value(item, depth))
    }

    fn value(&mut self, item: &Value, depth: usize) -> Option<()> {
        let depth = depth.checked_sub(1)?;
        match item {
            Value::Null => infallible(encode::write_nil(&mut self.header)),
            Value::Bool(item) => self.boolean(*item),
            Value::Int(item) => infallible(encode::write_sint(&mut self.header, *item)),
            Value::Float(item) => self.float(*item),
            Value::Str(item) => drop(self.text(item)),
            Value::Bytes(item) => infallible(encode::write_bin(&mut self.header, item)),
            Value::List(items) => return self.list(items.len()).each_value(items, depth),
            Value::Map(map) => return self.entries(map, depth),
        }
        Some(())
    }

    fn each_value(&mut self, items: &[Value], depth: usize) -> Option<()> {
        items.iter().try_for_each(|item| self.value(item, depth))
    }

    fn sizes(&mut self, sizes: &[usize]) {
        self.list(sizes.len());
        sizes.iter().for_each(|&size| self.size(size));
    }

    fn numbers(&mut self, numbers: &[f64]) {
        self.list(numbers.len());
        numbers.iter().for_each(|&number| self.float(number));
    }

    // Casting lengths to u32 is fine: a longer item makes the header exceed 4 GiB, which `finish` refuses.

    fn map(&mut self, len: usize) -> &mut Writer {
        infallible(encode::write_map_len(&mut self.header, len as u32));
        self
    }

    fn list(&mut self, len: usize) -> &mut Writer {
        infallible(encode::write_array_len(&mut self.header, len as u32));
        self
    }

    fn text(&mut self, text: &str) -> &mut Writer {
        infallible(encode::write_str(&mut self.header, text));
        self
    }

    fn size(&mut self, size: usize) {
        infallible(encode::write_uint(&mut self.header, size as u64));
    }

    fn float(&mut self, number: f64) {
        infallible(encode::write_f64(&mut self.header, number));
    }

    fn boolean(&mut self, value: bool) {
        infallible(encode::write_bool(&mut self.header, value));
    }
}

/// The number of fields that an observation adds to a header.
const OBSERVATION_FIELDS: usize = 4;

fn pixels(image: &Image) -> Result<&Tensor> {
    image.pixels().map_err(|_| EncodeError::Unsupported { wire: NAME, what: "an encoded image" })
}

/// The camera's depth, unless it has a K of its own: a peer would take the image's for it.
fn depth(camera: &Camera) -> Result<Option<&Tensor>> {
    let has_same_k = camera.depth_intrinsics.is_none_or(|intrinsics| intrinsics == camera.intrinsics);
    let is_same_size = |depth: &&Image| camera.image.shape().starts_with(depth.shape());
    camera.depth.as_ref().filter(|depth| has_same_k && is_same_size(depth)).map(pixels).transpose()
}

fn unsupported(what: &'static str) -> Result<()> {
    Err(EncodeError::Unsupported { wire: NAME, what })
}

fn infallible<T, E: Debug>(result: Result<T, E>) {
    drop(result.expect("writing to a Vec does not fail"));
}
