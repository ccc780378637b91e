//! The policy's side of Chiral: a [`PolicyClient`] receives observations from a robot and sends it actions.
//!
//! ```no_run
//! use std::time::Duration;
//! use chiral_client::{PutMode, PolicyClient};
//!
//! # async fn run() -> Result<(), chiral_client::Error> {
//! let env = PolicyClient::connect("ws://localhost:8765").await?; // waits until there is a server
//! let (obs, _info) = env.reset().await?;
//! println!("{} cameras, t = {}", obs.cameras.len(), obs.timestamp);
//! env.start_obs_stream(30.0).await?;
//! env.start_action_dispatch(10.0)?;
//! loop {
//!     let obs = env.next_obs(Duration::from_secs(1)).await?;
//!     let k = obs["wrist_cam"].intrinsics; // fresh in every observation
//!     let chunk = [0.0; 7]; // your policy's prediction from obs and k
//!     env.put_chunk(chunk, PutMode::Replace).await?;
//! }
//! # }
//! ```
//!
//! [`blocking::PolicyClient`] is the same without a runtime.

pub mod blocking;
mod builder;
mod client;
mod connect;
mod connection;
mod core;
#[cfg(feature = "zenoh")]
mod discover;
mod dispatch;
#[cfg(any(feature = "websocket", feature = "zenoh"))]
mod endpoint;
mod error;
mod interrupt;
mod legacy;
mod native;
mod session;
mod state;
mod stats;
mod stream_options;
mod transport;
mod waiting;
#[cfg(feature = "websocket")]
mod websocket;
mod wire;
#[cfg(feature = "zenoh")]
mod zenoh;

/// The types and the protocol that both ends share.
pub use chiral_proto as proto;
pub use chiral_proto::{
    ActionChunk, ActionSpec, Camera, CameraSpec, Code, Codec, Fault, Image, Observation, Proprio, StepResult,
    Tensor, Timestamp, Value, ValueMap,
    action::{self, ActionMeaning},
    message::RobotInfo,
    value,
};

pub use builder::PolicyClientBuilder;
pub use client::PolicyClient;
#[cfg(feature = "zenoh")]
pub use discover::DiscoveredRobot;
pub use dispatch::put::{ObservationRef, PutMode, PutOptions};
pub use error::{Error, ErrorKind};
pub use stats::ClientStats;
pub use stream_options::{CameraRequest, StreamOptions};
pub use waiting::Waiting;

#[cfg(all(doctest, feature = "websocket"))]
#[doc = include_str!("../../../docs/client-guide.md")]
struct ClientGuide;
