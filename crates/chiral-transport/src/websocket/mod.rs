//! A WebSocket after its opening handshake, as a transport.

mod reader;
mod transport;
mod writer;

pub use transport::{Role, WebSocketOptions, WebSocketTransport};
