//! What can go wrong on the server's side, and the error that a robot's own code returns.

use std::{any::Any, error::Error as StdError, fmt, io, net::SocketAddr, time::Duration};

use chiral_proto::{
    Code, Fault, TensorError,
    error::{UnknownName, chain},
};

/// Why a server could not start or go on serving.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The listener failed.
    #[error("the listener failed")]
    Listener(#[source] io::Error),
    /// A thread or runtime could not be started.
    #[error("cannot start {what}")]
    Start {
        /// What was to be started.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A robot of this name is on the Zenoh network already.
    #[cfg(feature = "zenoh")]
    #[error(
        "a robot named {name:?} is alive on this network (server {holder}): expected a name of its own for every robot"
    )]
    NameTaken {
        /// The robot's name.
        name: String,
        /// The server that has it: its Zenoh id, and its host.
        holder: String,
    },
    /// The Zenoh network cannot be joined.
    #[cfg(feature = "zenoh")]
    #[error("cannot join the Zenoh network")]
    Zenoh(#[source] Box<dyn StdError + Send + Sync>),
    /// What the robot or its sensors declare cannot be.
    #[error("{0}")]
    Declaration(String),
}

/// Why a sensor's data was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SensorError {
    /// No such sensor was declared.
    #[error(transparent)]
    Unknown(#[from] UnknownName),
    /// The data is not of the declared shape.
    #[error("{sensor}: {source}")]
    Shape {
        /// The sensor, and which part of it.
        sensor: String,
        /// What was expected and what was found.
        source: TensorError,
    },
    /// Depth was given for a camera declared without, or not given for one declared with it.
    #[error("camera {camera}: declared {} depth, published {} depth", with(*declared), with(!*declared))]
    Depth {
        /// The camera.
        camera: String,
        /// Whether it was declared with depth.
        declared: bool,
    },
}

fn with(depth: bool) -> &'static str {
    if depth { "with" } else { "without" }
}

/// Why there is no observation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ObserveError {
    /// A sensor published nothing in time.
    #[error("{sensor} published nothing new within {} s", waited.as_secs_f64())]
    Late {
        /// The first sensor that is late, such as `camera wrist_cam`.
        sensor: String,
        /// How long was waited.
        waited: Duration,
    },
    /// The host's own source failed.
    #[error("{0}")]
    Failed(RobotError),
}

impl From<ObserveError> for Fault {
    fn from(error: ObserveError) -> Fault {
        let text = error.to_string();
        match error {
            ObserveError::Late { sensor, .. } => {
                Fault::new(Code::SensorTimeout, text).field(sensor).retryable()
            }
            ObserveError::Failed(_) => Fault::new(Code::RobotFailed, text),
        }
    }
}

/// What a robot's own code returns when it fails; the peer is told its text and that of its causes.
///
/// Any error becomes one by `?`, and so do a `String` and a `&str`.
pub struct RobotError(Box<dyn StdError + Send + Sync>);

impl<E: Into<Box<dyn StdError + Send + Sync>>> From<E> for RobotError {
    fn from(error: E) -> RobotError {
        RobotError(error.into())
    }
}

impl fmt::Display for RobotError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&chain(&*self.0))
    }
}

impl fmt::Debug for RobotError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl From<RobotError> for Fault {
    fn from(error: RobotError) -> Fault {
        Fault::new(Code::RobotFailed, error.to_string())
    }
}

/// The message of a panic, where it has one.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
