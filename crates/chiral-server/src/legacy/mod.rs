//! The legacy wire: msgpack, without a hello, ids or error replies. [`serve`] serves a client's own
//! connection, [`zenoh::start`] the keys that all legacy clients of a Zenoh network share. Outside this
//! module, the WebSocket handshake knows that a client without a subprotocol speaks it, and pings such a
//! client.

#[cfg(feature = "zenoh")]
mod neighbours;
#[cfg_attr(not(feature = "zenoh"), allow(dead_code, reason = "only on Zenoh do clients share keys"))]
mod requests;
mod session;
#[cfg(feature = "zenoh")]
pub(crate) mod zenoh;

pub(crate) use session::serve;
