//! Frames over a Zenoh network: a session of it, how a robot and its clients meet there, and connections as
//! transports.
//!
//! Zenoh's own types end here. Its sessions are opened and dropped on plain threads, never in async code,
//! where Zenoh panics on a runtime of one thread.

mod config;
mod existing;
mod flow;
mod lane;
mod meeting;
mod network;
mod outbox;
mod search;
mod shared;
mod word;

pub use existing::ExistingTransport;
pub use lane::{LaneKind, ZenohOptions, ZenohTransport};
pub use meeting::Presence;
pub use network::{Network, NetworkError, NetworkOptions};
pub use search::{Search, Sighting};
pub use shared::{SharedMemory, SharedMemoryCounts};
