//! What client and server both need with a socket, and neither alone: WebSocket frames over any byte stream,
//! connections over a Zenoh network, the runtime that drives a connection, and the host's clock and name.
//!
//! The opening handshake is not here: each end does its own, with a library. Afterwards the bytes are ours:
//! an observation of 17 MB is written from the sensors' memory and read into the memory that the policy will
//! use.

mod clock;
mod host_name;
mod liveness;
mod lock;
mod pacing;
mod runtime;
#[cfg(feature = "websocket")]
pub mod tcp;
#[cfg(feature = "websocket")]
mod websocket;
#[cfg(feature = "zenoh")]
pub mod zenoh;

pub use clock::monotonic;
pub use host_name::host_name;
pub use liveness::IdleTimeout;
pub use lock::lock;
pub use pacing::Pacing;
pub use runtime::Runtime;
#[cfg(feature = "websocket")]
pub use websocket::{Role, WebSocketOptions, WebSocketTransport};

/// The subprotocol that means the protobuf codec.
pub const SUBPROTOCOL: &str = "chiral.v1";
