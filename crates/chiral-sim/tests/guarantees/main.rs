//! What must hold for every session, one test per promise. Rates, deadlines and long waits run on tokio's
//! paused clock over the in-memory link; wall-clock limits only guard against hanging.
//!
//! A paused clock jumps ahead whenever the runtime is idle, even while the robot's own thread has work to do.
//! So tests in which that thread replies run in real time, and pause the clock only for their long waits.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]

mod actions;
mod client;
mod failures;
mod observations;
mod sensors;
mod sessions;
#[path = "../support/mod.rs"]
mod support;
mod timing;

use std::time::Duration;

use chiral_proto::{Request, ValueMap};
use support::harness::DIMENSION;

const ROW: [f32; DIMENSION] = [0.1, 0.2, 0.3];

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn reset(seed: u64) -> Request {
    Request::Reset { seed: Some(seed), options: ValueMap::new() }
}
