//! What client and server both need with a socket, and neither alone: WebSocket frames over any byte stream,
//! threads for connections, and the host's clock and name.
//!
//! The opening handshake is not here: each end does its own, by a library. Afterwards the bytes are ours: an
//! observation of 17 MB is written from the sensors' memory and read into the memory that the policy will
//! look at.

mod clock;
mod courtesy;
mod host;
mod name;
#[cfg(feature = "websocket")]
mod read;
mod silence;
#[cfg(feature = "websocket")]
mod socket;
#[cfg(feature = "websocket")]
mod tune;
#[cfg(feature = "websocket")]
mod write;
#[cfg(feature = "zenoh")]
pub mod zenoh;

pub use clock::monotonic;
pub use courtesy::Courtesy;
pub use host::Host;
pub use name::host_name;
pub use silence::{Patience, Silence};
#[cfg(feature = "websocket")]
pub use socket::{Role, WebSocketOptions, WebSocketTransport};
#[cfg(feature = "websocket")]
pub use tune::{lose_after, tune};

/// The subprotocol that means the protobuf codec.
pub const SUBPROTOCOL: &str = "chiral.v1";
