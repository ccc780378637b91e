//! Our types to the wire's maps, their fields in the order in which the wire is described. Tensors go to the
//! payload by reference.

use std::fmt::Debug;

use rmp::encode;

use super::{ALIGNMENT, seconds::seconds};
use crate::{
    action::ActionChunk,
    error::EncodeError,
    frame::{Frame, PayloadWriter},
    message::{Message, Notice, Reply, Request},
    observation::{Camera, Observation, Proprio},
    tensor::{DType, Tensor},
    value::{Value, ValueMap},
};

type Result<T, E = EncodeError> = std::result::Result<T, E>;

/// The frame of `message`, which shares the memory of its tensors. `capture_times` are those of the
/// observation that actions came from, as [`Decoded`](super::Decoded) has them; other messages do not use
/// them.
///
/// # Errors
/// [`EncodeError`] if this wire has no words for it.
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

/// A header under way, and the payload that it describes.
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
            Request::Reset { .. } => return no_words("a reset with a seed or options"),
            Request::Hello(_) => return no_words("a hello"),
            Request::Subscribe(_) | Request::Unsubscribe => return no_words("the subscription of a stream"),
        };
        self.begin(kind, 0);
        Ok(())
    }

    fn reply(&mut self, reply: &Reply) -> Result<()> {
        match reply {
            Reply::Metadata(data) => {
                self.begin("metadata_response", 1);
                self.map_field("data", data)
            }
            Reply::Reset { obs, info } => {
                self.begin("reset_response", OBSERVATION + 1);
                self.observation(obs)?;
                self.map_field("info", info)
            }
            Reply::Observation(obs) => {
                self.begin("obs_response", OBSERVATION);
                self.observation(obs)
            }
            Reply::Step(result) => {
                self.begin("step_response", OBSERVATION + 4);
                self.observation(&result.obs)?;
                self.text("reward").float(result.reward);
                self.text("terminated").boolean(result.terminated);
                self.text("truncated").boolean(result.truncated);
                self.map_field("info", &result.info)
            }
            Reply::Welcome(_) => no_words("a welcome"),
            Reply::Subscribed { .. } => no_words("the subscription of a stream"),
            Reply::StreamEnd { .. } => no_words("the end of a stream"),
            Reply::Error(_) => no_words("an error"),
        }
    }

    fn notice(&mut self, notice: &Notice, capture_times: &ValueMap) -> Result<()> {
        match notice {
            Notice::Action(said) => self.action("apply_action", &said.actions, capture_times),
            Notice::Observation(_) => no_words("an observation that answers no request"),
            Notice::StreamEnd { .. } => no_words("the end of a stream"),
            Notice::Credit { .. } => no_words("credit"),
            Notice::Ping { .. } | Notice::Pong { .. } => no_words("a ping or pong"),
            Notice::Goodbye { .. } => no_words("a goodbye"),
            Notice::Error(_) => no_words("an error"),
        }
    }

    fn action(&mut self, kind: &str, actions: &ActionChunk, capture_times: &ValueMap) -> Result<()> {
        self.begin(kind, 3);
        let (rows, dimension) = (actions.rows(), actions.dimension());
        let shape = if kind == "apply_action" && rows == 1 { &[dimension][..] } else { &[rows, dimension] };
        let values = Tensor::from_vec(shape, actions.values().to_vec()).expect("a chunk holds whole rows");
        self.text("shape").sizes(shape);
        self.text("dtype").text(DType::F32.numpy_name());
        self.map_field("obs_timestamps", capture_times)?;
        self.payload.push(values.data());
        Ok(())
    }

    /// As many fields as [`OBSERVATION`] says.
    fn observation(&mut self, obs: &Observation) -> Result<()> {
        self.text("timestamp").float(obs.timestamp);
        self.map_field("extra", &obs.extra)?;
        self.text("cameras").list(obs.cameras.len());
        obs.cameras.iter().for_each(|camera| self.camera(camera));
        self.text("proprios").list(obs.proprios.len());
        obs.proprios.iter().for_each(|proprio| self.proprio(proprio));
        Ok(())
    }

    fn camera(&mut self, camera: &Camera) {
        self.map(if camera.depth.is_some() { 12 } else { 8 });
        self.text("name").text(&camera.name);
        self.text("timestamp").float(seconds(camera.captured_at));
        // nalgebra stores columns, the wire rows.
        self.text("intrinsics").numbers(camera.intrinsics.transpose().as_slice());
        self.text("extrinsics").numbers(camera.extrinsics.transpose().as_slice());
        self.array(["image_shape", "image_dtype", "image_offset", "image_size"], &camera.image);
        if let Some(depth) = &camera.depth {
            self.array(["depth_shape", "depth_dtype", "depth_offset", "depth_size"], depth);
        }
    }

    fn array(&mut self, [shape, dtype, offset, size]: [&str; 4], tensor: &Tensor) {
        self.text(shape).sizes(tensor.shape());
        self.text(dtype).text(tensor.dtype().numpy_name());
        let begin = self.payload.push(tensor.data());
        self.text(offset).size(begin);
        self.text(size).size(tensor.data().len());
    }

    fn proprio(&mut self, proprio: &Proprio) {
        self.map(4);
        self.text("name").text(&proprio.name);
        self.text("dtype").text(proprio.data.dtype().numpy_name());
        let begin = self.payload.push(proprio.data.data());
        self.text("offset").size(begin);
        self.text("size").size(proprio.data.data().len());
    }

    /// Begins a header with its type and so many more fields.
    fn begin(&mut self, kind: &str, fields: usize) {
        self.map(1 + fields).text("type").text(kind);
    }

    fn map_field(&mut self, field: &'static str, map: &ValueMap) -> Result<()> {
        let too_deep = || EncodeError::TooDeep { field, limit: Value::MAX_DEPTH };
        self.text(field).entries(map, Value::MAX_DEPTH).ok_or_else(too_deep)
    }

    /// `None` if anything lies deeper than `depth` values.
    fn entries(&mut self, map: &ValueMap, depth: usize) -> Option<()> {
        self.map(map.len());
        map.iter().try_for_each(|(key, item)| self.text(key).value(item, depth))
    }

    fn value(&mut self, item: &Value, depth: usize) -> Option<()> {
        let depth = depth.checked_sub(1)?;
        match item {
            Value::Null => written(encode::write_nil(&mut self.header)),
            Value::Bool(item) => self.boolean(*item),
            Value::Int(item) => written(encode::write_sint(&mut self.header, *item)),
            Value::Float(item) => self.float(*item),
            Value::Str(item) => drop(self.text(item)),
            Value::Bytes(item) => written(encode::write_bin(&mut self.header, item)),
            Value::List(items) => return self.list(items.len()).each(items, depth),
            Value::Map(map) => return self.entries(map, depth),
        }
        Some(())
    }

    fn each(&mut self, items: &[Value], depth: usize) -> Option<()> {
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

    // Lengths are cast: what is longer than a length may say makes a header of more than 4 GiB, which is
    // refused.

    fn map(&mut self, len: usize) -> &mut Writer {
        written(encode::write_map_len(&mut self.header, len as u32));
        self
    }

    fn list(&mut self, len: usize) -> &mut Writer {
        written(encode::write_array_len(&mut self.header, len as u32));
        self
    }

    fn text(&mut self, text: &str) -> &mut Writer {
        written(encode::write_str(&mut self.header, text));
        self
    }

    fn size(&mut self, size: usize) {
        written(encode::write_uint(&mut self.header, size as u64));
    }

    fn float(&mut self, number: f64) {
        written(encode::write_f64(&mut self.header, number));
    }

    fn boolean(&mut self, value: bool) {
        written(encode::write_bool(&mut self.header, value));
    }
}

/// Fields that an observation adds to a header.
const OBSERVATION: usize = 4;

fn no_words(what: &'static str) -> Result<()> {
    Err(EncodeError::NoWords { what })
}

fn written<T, E: Debug>(result: Result<T, E>) {
    drop(result.expect("memory takes what is written to it"));
}
