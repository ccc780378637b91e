//! Legacy clients, which speak the msgpack wire.

#[cfg_attr(
    not(feature = "zenoh"),
    allow(dead_code, reason = "only Zenoh's keys are shared by several clients")
)]
mod requests;
pub(crate) mod session;
