//! Types, codecs and framing of the Chiral protocol: everything that both ends need and that is pure.
//!
//! There is no socket, runtime, thread, clock or log in this crate: bytes and times are passed in. A
//! `PolicyServer` runs on the robot, a `PolicyClient` beside the policy; both speak [`Message`]s, which a
//! [`Codec`] turns into [`Frame`]s, which a [`Transport`] carries.
//!
//! ```
//! use chiral_proto::{ActionChunk, Codec, Message, Notice};
//! use chiral_proto::message::ActionMessage;
//!
//! let actions = ActionChunk::from([0.1, -0.2, 0.3]);
//! let message = Message::Notice(Notice::Action(ActionMessage { session: 7, episode: 1, seq: 1, actions, observation_seq: 42 }));
//! let frame = Codec::Protobuf.encode(&message)?;
//! assert_eq!(Codec::Protobuf.decode(frame)?, message);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

#[cfg(target_endian = "big")]
compile_error!(
    "tensors are little-endian in memory as on the wire; a big-endian host would need byte swaps that nobody has tested"
);

pub mod action;
pub mod clock;
pub mod codec;
pub mod error;
pub mod frame;
pub mod keys;
pub mod message;
pub mod observation;
pub mod pool;
pub mod tensor;
pub mod transport;
pub mod value;

// Their types are part of this crate's interface.
pub use {bytes, nalgebra, ndarray};

pub use action::{ActionChunk, ActionSpec};
pub use clock::{Clock, Timestamp};
pub use codec::Codec;
pub use error::{Code, Fault, TransportError};
pub use frame::Frame;
pub use message::{Message, Notice, Reply, Request, StepResult};
pub use observation::{Camera, CameraSpec, Observation, Proprio, ProprioSpec};
pub use tensor::{DType, Tensor};
pub use transport::Transport;
pub use value::{Value, ValueMap};

/// The protocol's version, as `Hello` and `Welcome` carry it.
pub const PROTOCOL_VERSION: u32 = 1;
