//! What a client waits for, as the caller is shown it.

use std::{fmt, sync::Arc, time::Duration};

/// What `connect` or `reset` waits for. Its text is for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Waiting<'a> {
    /// `connect` waits until there is a server.
    #[non_exhaustive]
    ForServer {
        /// Its address.
        uri: &'a str,
        /// Why the last attempt failed; `None` at first, since the server may just be starting.
        reason: Option<&'a str>,
    },
    /// `reset` waits until the robot is done.
    #[non_exhaustive]
    ForReset {
        /// For how long so far.
        waited: Duration,
    },
}

impl fmt::Display for Waiting<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Waiting::ForServer { uri, reason: None } => write!(f, "waiting for server at {uri} …"),
            Waiting::ForServer { uri, reason: Some(reason) } => {
                write!(f, "still waiting for {uri}: {reason}")
            }
            Waiting::ForReset { waited } => {
                write!(f, "waiting for the robot to reset, for {} s so far …", waited.as_secs())
            }
        }
    }
}

/// What is called while a client waits.
#[derive(Clone)]
pub(crate) struct OnWaiting(Arc<dyn Fn(&Waiting<'_>) + Send + Sync>);

impl OnWaiting {
    pub(crate) fn new(on_waiting: impl Fn(&Waiting<'_>) + Send + Sync + 'static) -> OnWaiting {
        OnWaiting(Arc::new(on_waiting))
    }

    pub(crate) fn call(&self, waiting: &Waiting<'_>) {
        (self.0)(waiting);
    }
}

impl Default for OnWaiting {
    /// Prints a line on stderr.
    fn default() -> OnWaiting {
        OnWaiting::new(|waiting| eprintln!("chiral: {waiting}"))
    }
}

impl fmt::Debug for OnWaiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnWaiting")
    }
}
