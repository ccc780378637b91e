//! Sending queued actions at their times.

pub(crate) mod queue;
pub(crate) mod thread;
