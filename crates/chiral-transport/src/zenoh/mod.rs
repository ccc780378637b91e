//! Frames over a Zenoh network: its sessions, how a robot and its clients find each other, and lanes as
//! transports.
//!
//! Zenoh's own types end here. Its sessions are opened and dropped on plain threads, never in async code,
//! where Zenoh panics on a runtime of one thread.

mod config;
mod error;
mod legacy;
mod listener;
mod on_sample;
mod packet;
mod publisher;
mod reassembly;
mod scout;
mod send_queue;
mod session;
mod shm;
mod surroundings;
mod thread;
mod transport;

pub use config::ZenohSessionOptions;
pub use error::ZenohError;
pub use legacy::{LegacyEvent, LegacySender, LegacyTransport};
pub use listener::ZenohListener;
pub use scout::{Scout, ScoutedRobot};
pub use session::ZenohSession;
pub use shm::SharedMemory;
pub use surroundings::{Neighbour, NeighbourKind, NetworkEvent};
pub use transport::{LaneKind, ZenohOptions, ZenohTransport};
