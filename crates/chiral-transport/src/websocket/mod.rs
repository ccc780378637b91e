//! A WebSocket after its opening handshake, as a transport.

mod frame;
mod reader;
mod transport;
mod writer;

pub use frame::{Role, WebSocketOptions};
pub use transport::WebSocketTransport;
