//! Action dispatch: one queued row is sent at each tick.

pub(crate) mod actions;
mod dropped;
pub(crate) mod put;
mod queue;
pub(crate) mod thread;
pub(crate) mod waker;
