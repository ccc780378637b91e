//! Messages to frames and back. Each codec's own words stay in its own file.

pub mod msgpack;
mod protobuf;
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, reason = "generated")]
#[rustfmt::skip]
mod wire;

use crate::{
    error::{DecodeError, EncodeError},
    frame::Frame,
    message::Message,
    value::ValueMap,
};

/// How messages are put into frames; agreed once for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Codec {
    /// The protocol of `proto/chiral/v1/chiral.proto`.
    Protobuf,
    /// The wire of peers that were there before us: [`msgpack`] says what it can carry.
    Msgpack,
}

impl Codec {
    /// The frame of `message`, which shares the memory of its tensors.
    ///
    /// # Errors
    /// [`EncodeError`] if the codec has no words for it.
    pub fn encode(self, message: &Message) -> Result<Frame, EncodeError> {
        match self {
            Codec::Protobuf => protobuf::encode(message),
            Codec::Msgpack => msgpack::encode(message, &ValueMap::new()),
        }
    }

    /// The message in `frame`, whose tensors share the frame's memory. Everything that a peer can get wrong
    /// is found here.
    ///
    /// # Errors
    /// [`DecodeError`], which names the field, what was expected and what was found.
    pub fn decode(self, frame: Frame) -> Result<Message, DecodeError> {
        match self {
            Codec::Protobuf => protobuf::decode(frame),
            Codec::Msgpack => msgpack::decode(frame).map(|decoded| decoded.message),
        }
    }
}
