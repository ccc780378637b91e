//! The errors of this crate, and the error that a robot's own code returns.

use std::{any::Any, error::Error as StdError, fmt, io, net::SocketAddr, time::Duration};

use chiral_proto::{
    Code, Fault,
    error::{UnknownName, chain},
    tensor::TensorError,
};

/// Why a server could not start, or stopped serving.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The server cannot listen on the address.
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
        /// What could not be started.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Another robot on the Zenoh network has this name.
    #[cfg(feature = "zenoh")]
    #[error(
        "a robot named {name:?} is alive on this network (server {holder}): give every robot a unique name"
    )]
    NameTaken {
        /// The robot's name.
        name: String,
        /// The server that has it: its Zenoh id, and its host.
        holder: String,
    },
    /// The server cannot join the Zenoh network.
    #[cfg(feature = "zenoh")]
    #[error("cannot join the Zenoh network")]
    Zenoh(#[source] Box<dyn StdError + Send + Sync>),
    /// The robot, its sensors or its name are declared wrongly.
    #[error("{0}")]
    Declaration(String),
}

/// Why a sensor's data was not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SensorError {
    /// No sensor of this name was declared.
    #[error(transparent)]
    Unknown(#[from] UnknownName),
    /// The data does not have the declared shape.
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
    /// Depth of another size than the image has no K.
    #[error(
        "camera {camera}: expected depth_intrinsics, since its depth is not of the image's size, found none"
    )]
    DepthIntrinsics {
        /// The camera.
        camera: String,
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
        /// How long the observation waited.
        waited: Duration,
    },
    /// A sensor published in time, but by its capture time, what it published is older.
    #[error(
        "{sensor} published {published} times, but its captured_at is {:.3} s old", age.as_secs_f64()
    )]
    Old {
        /// The first sensor of which this is true, such as `camera wrist_cam`.
        sensor: String,
        /// How often it has published, ever.
        published: u64,
        /// How long ago the latest was captured, as far as its driver states.
        age: Duration,
    },
    /// The host's own observation source failed.
    #[error("{0}")]
    Failed(RobotError),
}

impl ObserveError {
    /// States how long the observation waited.
    pub(crate) fn after_waiting(self, waited: Duration) -> ObserveError {
        match self {
            ObserveError::Late { sensor, .. } => ObserveError::Late { sensor, waited },
            other => other,
        }
    }
}

impl From<ObserveError> for Fault {
    fn from(error: ObserveError) -> Fault {
        let text = error.to_string();
        match error {
            ObserveError::Late { sensor, .. } | ObserveError::Old { sensor, .. } => {
                Fault::new(Code::SensorTimeout, text).field(sensor).retryable()
            }
            ObserveError::Failed(_) => Fault::new(Code::RobotFailed, text),
        }
    }
}

/// The error that a robot's own code returns; the peer receives its text and that of its causes.
///
/// `?` converts any error, a `String` or a `&str` into one.
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
