//! Legacy servers, which speak the msgpack wire.

pub(crate) mod pending;
pub(crate) mod session;
