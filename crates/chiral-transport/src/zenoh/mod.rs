//! Frames over a Zenoh network: a session of it, how a robot and its clients meet there, and connections as
//! transports.
//!
//! Zenoh's own types end here. Its sessions are opened and dropped on plain threads, never in async code,
//! where Zenoh panics on a runtime of one thread.

mod config;
mod legacy;
mod listener;
mod packet;
mod reassembly;
mod scout;
mod send_queue;
mod session;
mod shm;
mod transport;

pub use legacy::LegacyTransport;
pub use listener::ZenohListener;
pub use scout::{Scout, ScoutedRobot};
pub use session::{ZenohError, ZenohSession, ZenohSessionOptions};
pub use shm::{SharedMemory, SharedMemoryCounts};
pub use transport::{LaneKind, ZenohOptions, ZenohTransport};
