//! Legacy clients, which speak the msgpack wire: [`serve`] serves a connection of one's own, [`zenoh::start`]
//! the keys that all of a Zenoh network shares. The rest of the crate knows nothing of this wire but that.

#[cfg_attr(
    not(feature = "zenoh"),
    allow(dead_code, reason = "only Zenoh's keys are shared by several clients")
)]
mod requests;
mod session;
#[cfg(feature = "zenoh")]
pub(crate) mod zenoh;

pub(crate) use session::serve;
