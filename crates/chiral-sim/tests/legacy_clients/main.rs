//! Legacy clients of both generations at our server, over WebSocket and over Zenoh, and what keeps the robot
//! safe from them.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]

mod liveness;
mod refusals;
mod requests;
#[path = "../support/mod.rs"]
mod support;
mod websocket;
mod zenoh_network;

use bytes::Bytes;
use chiral_proto::{
    ActionChunk, Frame, Message, Notice, Reply, Request, ValueMap, codec::msgpack, message::ActionMessage,
};
use support::harness::{DIMENSION, Event, Harness};

fn reset() -> Request {
    Request::Reset { seed: None, options: ValueMap::new() }
}

fn step(rows: usize) -> Request {
    let actions = ActionChunk::new(DIMENSION, vec![0.5; rows * DIMENSION]).unwrap();
    Request::Step { session: 0, episode: 0, actions }
}

fn frame_of(request: Request) -> Bytes {
    msgpack::encode(&Message::Request { id: msgpack::ID, request }, &ValueMap::new()).unwrap().into_bytes()
}

fn apply_action(actions: impl Into<ActionChunk>) -> Bytes {
    let action = ActionMessage { actions: actions.into(), ..ActionMessage::default() };
    msgpack::encode(&Message::Notice(Notice::Action(action)), &ValueMap::new()).unwrap().into_bytes()
}

/// An `apply_action` whose payload is too short for its shape.
fn truncated_apply_action() -> Bytes {
    let frame = apply_action([0.5; DIMENSION]);
    frame.slice(..frame.len() - 4)
}

fn reply_of(frame: Bytes) -> Reply {
    match msgpack::decode(Frame::from(frame)).unwrap().message {
        Message::Reply { reply, .. } => reply,
        other => panic!("expected a reply, found {other:?}"),
    }
}

/// The kind of a reply, as the legacy wire names it.
fn kind(reply: &Reply) -> &'static str {
    match reply {
        Reply::Metadata(_) => "metadata_response",
        Reply::Reset { .. } => "reset_response",
        Reply::Observation(_) => "obs_response",
        Reply::Step(_) => "step_response",
        other => panic!("expected a reply of this wire, found {other:?}"),
    }
}

fn has_held(harness: &Harness) -> bool {
    harness.script.events().ends_with(&[Event::Held, Event::Disconnected])
}

fn reset_count(harness: &Harness) -> usize {
    harness.script.events().iter().filter(|event| **event == Event::ResetStarted).count()
}
