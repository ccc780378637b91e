//! Types, codecs and framing of the Chiral protocol, shared by client and server and free of IO.
//!
//! This crate has no socket, runtime, thread, clock or log: bytes and times are passed in. A `PolicyServer`
//! runs on the robot, a `PolicyClient` beside the policy. They exchange [`Message`]s, which a [`Codec`]
//! encodes into [`Frame`]s, which a [`Transport`] carries.
//!
//! ```
//! use chiral_proto::{ActionChunk, Codec, Message, Notice};
//! use chiral_proto::message::ActionMessage;
//!
//! let actions = ActionChunk::from([0.1, -0.2, 0.3]);
//! let action = ActionMessage { session: 7, episode: 1, seq: 1, actions, ..ActionMessage::default() };
//! let message = Message::Notice(Notice::Action(action));
//! let frame = Codec::Protobuf.encode(&message)?;
//! assert_eq!(Codec::Protobuf.decode(frame)?, message);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

#[cfg(target_endian = "big")]
compile_error!(
    "tensors are little-endian in memory and on the wire; big-endian hosts would need untested byte swaps"
);

pub mod action;
pub mod clock;
pub mod codec;
pub mod error;
pub mod frame;
pub mod image;
pub mod keys;
mod lock;
pub mod message;
pub mod observation;
pub mod pool;
pub mod tensor;
pub mod transport;
pub mod value;

// Types of these crates are part of this crate's interface.
pub use {bytes, nalgebra, ndarray};

pub use action::{ActionChunk, ActionSpec};
pub use clock::{Clock, Timestamp};
pub use codec::Codec;
pub use error::{Code, Fault, TransportError};
pub use frame::Frame;
pub use image::{Encoding, Image, ImageError};
pub use lock::lock;
pub use message::{Message, Notice, Reply, Request, StepResult};
pub use observation::{Camera, CameraSpec, Observation, Proprio, ProprioSpec};
pub use tensor::{DType, Tensor};
pub use transport::Transport;
pub use value::{Value, ValueMap};

/// The protocol version that `Hello` and `Welcome` carry.
pub const PROTOCOL_VERSION: u32 = 1;
