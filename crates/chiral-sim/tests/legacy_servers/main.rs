//! Our client against legacy servers: fake ones that know nothing but the msgpack wire, and our own server,
//! which supports it too.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]
#![allow(clippy::result_large_err, reason = "tungstenite's callback has such an error")]

mod actions;
mod both_ends;
mod failures;
mod fake_server;
mod generations;
#[path = "../support/mod.rs"]
mod support;
mod zenoh_network;

const ROW: [f32; 3] = [0.25, -0.5, 1.0];
