//! The errors of Zenoh networks, and how those of Zenoh itself are quoted.

use std::{error::Error, io, path::PathBuf, time::Duration};

/// Why a Zenoh network or a robot on it cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ZenohError {
    /// Zenoh does not accept the locators.
    #[error("expected Zenoh locators such as tcp/localhost:7447, found {locators:?}")]
    Locator {
        /// All locators, those to listen at and those to connect to.
        locators: Vec<String>,
        /// Zenoh's error.
        #[source]
        source: Cause,
    },
    /// The configuration file cannot be used.
    #[error("Zenoh configuration {}: {problem}", file.display())]
    Config {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// There is no locator by which a network could be reached.
    #[error("expected a Zenoh locator to listen at or to connect to, found none")]
    NoLocator,
    /// Something listens at the locators, but the Zenoh handshake with it failed.
    #[error(
        "not let into the Zenoh network at {locators:?}: the listener does not report why, but Zenoh's log \
         may; check user and password, both ends' certificates, and the kind of connection"
    )]
    HandshakeFailed {
        /// All locators, those to listen at and those to connect to.
        locators: Vec<String>,
    },
    /// The locators to listen at cannot be bound.
    #[error("cannot listen at {locators:?}")]
    Listen {
        /// The locators to listen at.
        locators: Vec<String>,
        /// Zenoh's error.
        #[source]
        source: Cause,
    },
    /// Nothing listens at the locators to connect to; or those to listen at, if there are both, cannot be bound.
    #[error("no Zenoh network at {locators:?}")]
    Open {
        /// All locators, those to listen at and those to connect to.
        locators: Vec<String>,
        /// Zenoh's error.
        #[source]
        source: Cause,
    },
    /// The system cannot start a thread.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// A robot of this name is on the network already.
    #[error(
        "a robot named {robot:?} is alive on this network (server {server}): expected a unique name for each \
         robot"
    )]
    NameTaken {
        /// The name.
        robot: String,
        /// Its server: the Zenoh id, and the host.
        server: String,
    },
    /// The network did not report in time which robots are alive on it.
    #[error(
        "the network did not report which robots are alive within {} s: it is busy or lost, or its access \
         control does not let this host query them",
        waited.as_secs_f64()
    )]
    LivelinessTimeout {
        /// How long the answer was waited for.
        waited: Duration,
    },
    /// The robot's server did not answer.
    #[error("no answer from robot {robot:?} within {} s", waited.as_secs_f64())]
    NoAnswer {
        /// The robot's name.
        robot: String,
        /// How long the answer was waited for.
        waited: Duration,
    },
    /// The robot's server refused the connection.
    #[error("robot {robot:?} refused the connection: {reason}")]
    Refused {
        /// The robot's name.
        robot: String,
        /// The server's reason.
        reason: String,
    },
    /// A call of Zenoh failed.
    #[error("the Zenoh session failed")]
    Failed(#[source] Cause),
}

/// An error of Zenoh.
pub(super) type Cause = Box<dyn Error + Send + Sync>;

/// Wraps an error of Zenoh.
pub(super) fn failed(error: zenoh::Error) -> ZenohError {
    ZenohError::Failed(cause(&error))
}

/// Returns an error of Zenoh without the locations in its sources, which are paths on the machine that built
/// it.
pub(super) fn cause(error: &zenoh::Error) -> Cause {
    let text = error.to_string();
    let mut parts = text.split(" at ");
    let mut plain = parts.next().unwrap_or_default().trim_end().to_owned();
    for part in parts {
        let (location, rest) = part.split_at(part.find(' ').unwrap_or(part.len()));
        if !location.contains(".rs:") {
            plain.push_str(" at ");
            plain.push_str(location);
        }
        plain.push_str(rest);
    }
    plain.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_locations_are_removed() {
        let cases = [
            ("no link", "no link"),
            ("no link!  at /a/b.rs:44.", "no link!"),
            ("no link: [refused at /a/b.rs:1.] at /c.rs:3. at /d.rs:2.", "no link: [refused"),
            ("looked at length at noon", "looked at length at noon"),
        ];
        for (text, expected) in cases {
            assert_eq!(cause(&text.into()).to_string(), expected);
        }
    }
}
