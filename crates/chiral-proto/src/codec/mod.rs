//! Encodes messages into frames and decodes them. Each codec is a module of its own; [`Codec`] chooses
//! between them.

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

/// The encoding of messages, negotiated once per connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Codec {
    /// The protocol of `proto/chiral/v1/chiral.proto`.
    Protobuf,
    /// The legacy wire. [`msgpack`] describes what it can carry.
    Msgpack,
}

impl Codec {
    /// Encodes a message. The frame shares the memory of its tensors.
    ///
    /// # Errors
    /// [`EncodeError`] if the codec cannot encode the message.
    pub fn encode(self, message: &Message) -> Result<Frame, EncodeError> {
        match self {
            Codec::Protobuf => protobuf::encode(message),
            Codec::Msgpack => msgpack::encode(message, &ValueMap::new()),
        }
    }

    /// Decodes a message and validates it. Its tensors share the memory of `frame`.
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
