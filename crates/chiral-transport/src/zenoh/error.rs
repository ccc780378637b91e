//! Why nobody can be met on a Zenoh network.

use std::{error::Error, io, path::PathBuf, time::Duration};

/// Why nobody can be met on a network.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ZenohError {
    /// The locators are none.
    #[error("expected Zenoh locators such as tcp/localhost:7447, found {locators:?}")]
    Locator {
        /// All of them.
        locators: Vec<String>,
        /// What Zenoh says of them.
        #[source]
        source: Cause,
    },
    /// The configuration file cannot be used.
    #[error("the Zenoh configuration {}: {problem}", file.display())]
    Config {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// There is nothing by which a network could be reached.
    #[error("expected a Zenoh locator to listen at or to connect to, found none")]
    NoLocator,
    /// Somebody listens, but there is no Zenoh session with him.
    #[error(
        "not let into the Zenoh network at {locators:?}: expected who listens there to take our user and password, our certificate and our kind of \
         connection, and us to trust his; he does not say what it fails at, but a log of Zenoh's may"
    )]
    HandshakeFailed {
        /// All of them.
        locators: Vec<String>,
    },
    /// Nobody is there to connect to, or the address to listen on cannot be had.
    #[error("no Zenoh network at {locators:?}")]
    Open {
        /// All of them.
        locators: Vec<String>,
        /// What Zenoh says of it.
        #[source]
        source: Cause,
    },
    /// There is no thread to be had.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// A robot of this name is on the network.
    #[error(
        "a robot named {robot:?} is alive on this network (server {server}): expected a name of its own for every robot"
    )]
    NameTaken {
        /// The name.
        robot: String,
        /// Its server: the Zenoh id, and the host.
        server: String,
    },
    /// The network did not say in time who is alive on it.
    #[error("no word on who is alive on the network within {} s: it is busy, or lost, or does not let us ask", waited.as_secs_f64())]
    LivelinessTimeout {
        /// How long was waited.
        waited: Duration,
    },
    /// The robot's server did not answer.
    #[error("no answer from robot {robot:?} within {} s", waited.as_secs_f64())]
    NoAnswer {
        /// The robot's name.
        robot: String,
        /// How long was waited.
        waited: Duration,
    },
    /// The robot's server takes no connection.
    #[error("robot {robot:?} takes no connection: {reason}")]
    Refused {
        /// The robot's name.
        robot: String,
        /// What it says.
        reason: String,
    },
    /// Zenoh does not do what it should.
    #[error("the Zenoh session failed")]
    Failed(#[source] Cause),
}

/// Whatever Zenoh says.
pub(super) type Cause = Box<dyn Error + Send + Sync>;

pub(super) fn failed(error: zenoh::Error) -> ZenohError {
    ZenohError::Failed(cause(&error))
}

/// What Zenoh says, without the places in its sources, which are paths of the machine that it was built on.
pub(super) fn cause(error: &zenoh::Error) -> Cause {
    let text = error.to_string();
    let mut parts = text.split(" at ");
    let mut plain = parts.next().unwrap_or_default().trim_end().to_owned();
    for part in parts {
        let (place, rest) = part.split_at(part.find(' ').unwrap_or(part.len()));
        if !place.contains(".rs:") {
            plain.push_str(" at ");
            plain.push_str(place);
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
