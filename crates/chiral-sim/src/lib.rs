//! A simulated robot, a policy that drives it from pixels, and the tests and bench peers that need both a
//! client and a server.
//!
//! The simulated data is consistent: every camera shows one instant of one scene. A wrong matrix, a torn
//! frame or a swapped channel contradicts the geometry, and the policy fails.
//!
//! ```
//! use chiral_server::PolicyServer;
//! use chiral_sim::robot::{self, SimConfig};
//!
//! let (robot, sensors) = robot::start(SimConfig { width: 64, height: 48, ..SimConfig::default() })?;
//! let obs = sensors.snapshot().expect("every sensor has published");
//! assert_eq!(obs["wrist_cam"].image.shape(), [48, 64, 3]);
//! let server = PolicyServer::new(robot, sensors)?; // `server.run()` serves it at ws://127.0.0.1:8765
//! # Ok::<(), chiral_server::Error>(())
//! ```

pub mod any_client;
pub mod arm;
pub mod camera;
mod cameras;
mod canvas;
pub mod episode;
pub mod link;
pub mod policy;
pub mod render;
pub mod robot;
pub mod scene;
mod shade;
pub mod shape;
pub mod sheet;
pub mod task;
mod world;

#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
