//! A WebSocket as a transport, after its opening handshake.

mod frame;
mod reader;
mod transport;
mod writer;

pub use frame::{Role, WebSocketOptions};
pub use transport::WebSocketTransport;
