//! What client and server share that needs a socket: WebSocket frames over any byte stream, lanes over a
//! Zenoh network, the runtime that drives a connection, and the host's clock and name.
//!
//! The opening handshake is not here: each end does its own, with a library. Afterwards this crate reads and
//! writes the bytes: an observation of 17 MB is written from the sensors' memory and read into the memory
//! that the policy uses.

mod clock;
mod counts;
mod host_name;
mod liveness;
mod pacing;
mod runtime;
#[cfg(feature = "websocket")]
pub mod tcp;
#[cfg(feature = "websocket")]
mod websocket;
#[cfg(feature = "zenoh")]
pub mod zenoh;

pub use clock::monotonic;
pub use counts::SharedMemoryCounts;
pub use host_name::host_name;
pub use liveness::IdleTimeout;
pub use pacing::Pacing;
pub use runtime::Runtime;
#[cfg(feature = "websocket")]
pub use websocket::{Role, WebSocketOptions, WebSocketTransport};

/// The WebSocket subprotocol that selects the protobuf codec.
pub const SUBPROTOCOL: &str = "chiral.v1";
