//! The robot's side of Chiral: a [`PolicyServer`] owns cameras and joints, streams observations to policies
//! and applies their actions.
//!
//! Elsewhere a "policy server" serves the policy; this one serves the *robot*.
//!
//! ```no_run
//! use chiral_server::{
//!     ActionContext, ActionSpec, PolicyServer, ProprioSpec, ResetOutcome, ResetRequest, Robot, RobotError,
//!     Sensors, action::Action,
//! };
//!
//! struct Arm;
//!
//! impl Robot for Arm {
//!     fn action_spec(&self) -> ActionSpec {
//!         ActionSpec::joint_positions(7, 20.0)
//!     }
//!     fn reset(&mut self, _request: &ResetRequest) -> Result<ResetOutcome, RobotError> {
//!         Ok(ResetOutcome::default()) // home the arm; this may block
//!     }
//!     fn apply_action(&mut self, action: &Action, _context: &ActionContext) -> Result<(), RobotError> {
//!         println!("to {:?}", action.values);
//!         Ok(())
//!     }
//! }
//!
//! let sensors = Sensors::new([], [ProprioSpec::new("joint_pos", 7, "rad")])?;
//! let reader = sensors.clone();
//! std::thread::spawn(move || loop {
//!     reader.update_proprio("joint_pos", &[0.0; 7]).expect("it is declared above");
//!     std::thread::sleep(std::time::Duration::from_millis(2));
//! });
//! PolicyServer::new(Arm, sensors)?.run()?; // ws://127.0.0.1:8765
//! # Ok::<(), chiral_server::Error>(())
//! ```

mod accept;
mod attach;
mod builder;
mod connection;
mod control;
mod core;
mod error;
mod legacy;
mod log_throttle;
mod robot;
mod sampler;
mod send_queue;
mod sensors;
mod server;
mod session;
mod source;
mod staleness;
mod stream;
#[cfg(feature = "websocket")]
mod websocket;
#[cfg(feature = "zenoh")]
mod zenoh;

/// The types and the protocol that clients and servers share.
pub use chiral_proto as proto;
pub use chiral_proto::{ActionChunk, ActionSpec, CameraSpec, ProprioSpec, Value, ValueMap, action, value};

pub use builder::PolicyServerBuilder;
pub use chiral_transport::{SharedMemoryCounts, monotonic};
pub use control::{ActionId, ControlEvent, ControlEvents, HoldReason, NextEvent, OnTimeout};
pub use error::{Error, ObserveError, RobotError, SensorError};
pub use robot::{ActionContext, Execution, ResetOutcome, ResetRequest, Robot, StepOutcome, Stopper};
pub use sensors::{CameraFrame, CameraSensor, Sensors};
pub use server::{PolicyServer, ServerHandle, ServerStats};
pub use source::ObservationSource;
pub use staleness::{MaxAge, OnStale};

#[cfg(all(doctest, feature = "websocket", feature = "zenoh"))]
#[doc = include_str!("../../../docs/server-guide.md")]
struct ServerGuide;
