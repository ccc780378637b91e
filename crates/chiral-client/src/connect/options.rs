//! What a client is connected with, and what an attempt to connect can fail at.

use std::{path::PathBuf, time::Duration};

use bytes::Bytes;
use chiral_proto::{
    Clock, Codec,
    message::{Role, Welcome},
    pool::Pool,
};
use chiral_transport::{Pacing, monotonic};

use crate::{
    connection::Lane,
    dispatch::{actions::Actions, thread::Wait},
    error::Error,
    interrupt::InterruptCheck,
    state::State,
    waiting::OnWaiting,
};

/// For a legacy server's reply to a reset, unless the builder sets it.
const LEGACY_RESET_TIMEOUT: Duration = Duration::from_secs(60);

/// What the builder sets. Options of one transport are ignored or refused by the other, as the builder
/// documents.
#[derive(Clone, Debug)]
#[cfg_attr(
    not(all(feature = "websocket", feature = "zenoh")),
    allow(dead_code, reason = "some options are of one transport only")
)]
pub(crate) struct ConnectOptions {
    pub(crate) uri: String,
    pub(crate) identity: Identity,
    /// Called while `connect` and `reset` wait.
    pub(crate) on_waiting: OnWaiting,
    /// Asked while a call of the blocking client waits.
    pub(crate) interrupt: Option<InterruptCheck>,
    /// For a server to appear; none means without limit.
    pub(crate) deadline: Option<Duration>,
    pub(crate) request_timeout: Duration,
    pub(crate) step_timeout: Duration,
    /// None stands for the default of the wire.
    pub(crate) reset_timeout: Option<Duration>,
    pub(crate) idle_timeout: Duration,
    /// Rows that the action queue holds.
    pub(crate) queue_capacity: usize,
    /// For how long the server may accept no action before that is an error.
    pub(crate) late_limit: Duration,
    /// Of the caller's own.
    pub(crate) clock: Option<Clock>,
    pub(crate) dispatch_spin: Duration,
    pub(crate) one_connection: bool,
    /// In bytes.
    pub(crate) max_frame: usize,
    /// The only wire to speak.
    pub(crate) codec: Option<Codec>,
    /// PEM; trusted for `wss://` in place of the system's.
    pub(crate) root_certificates: Option<Vec<u8>>,
    /// The robot's name on a Zenoh network.
    pub(crate) robot: Option<String>,
    /// A configuration file of Zenoh's.
    pub(crate) zenoh_config: Option<PathBuf>,
    /// Whether observations are read from shared memory where the server is on the same host.
    pub(crate) shared_memory: bool,
}

/// Who a client is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Identity {
    pub(crate) role: Role,
    pub(crate) name: String,
    pub(crate) auth: Bytes,
}

impl ConnectOptions {
    pub(crate) fn new(uri: &str) -> ConnectOptions {
        ConnectOptions {
            uri: uri.to_owned(),
            identity: Identity { name: default_name(), ..Identity::default() },
            on_waiting: OnWaiting::default(),
            interrupt: None,
            deadline: None,
            request_timeout: Duration::from_secs(5),
            step_timeout: Duration::from_secs(60),
            reset_timeout: None,
            idle_timeout: Duration::from_secs(10),
            queue_capacity: 256,
            late_limit: Duration::from_secs(5),
            clock: None,
            dispatch_spin: Duration::from_micros(300),
            one_connection: false,
            max_frame: 256 << 20,
            codec: None,
            root_certificates: None,
            robot: None,
            zenoh_config: None,
            shared_memory: true,
        }
    }

    /// The state of a session that begins now.
    pub(crate) fn state(&self, welcome: &Welcome, first_round_trip: Duration) -> State {
        let actions = Actions::new(welcome.session, welcome.episode, self.queue_capacity, self.late_limit);
        State::new(welcome.episode, actions, first_round_trip)
    }

    /// How long a reset may take. A legacy server that drops one does not report it, so that there is always
    /// a limit.
    pub(crate) fn reset_timeout(&self, codec: Codec) -> Option<Duration> {
        self.reset_timeout.or((codec == Codec::Msgpack).then_some(LEGACY_RESET_TIMEOUT))
    }

    pub(crate) fn clock(&self) -> Clock {
        self.clock.clone().unwrap_or_else(monotonic)
    }

    /// How dispatch waits for its ticks.
    pub(crate) fn wait(&self) -> Wait {
        if self.clock.is_some() { Wait::Timers } else { Wait::Spin(self.dispatch_spin) }
    }
}

/// The program's name and process id.
fn default_name() -> String {
    let program = std::env::args_os().next().map(PathBuf::from);
    let program = program
        .as_ref()
        .and_then(|path| path.file_name())
        .map_or("policy".into(), |name| name.to_string_lossy());
    format!("{program} ({})", std::process::id())
}

/// What a session's connections share.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    /// Where received observations lie.
    pub(crate) pool: Pool,
    pub(crate) pacing: Pacing,
}

impl Shared {
    /// Large buffers that nobody uses, kept for the next observations: the latest one, one that arrives, and
    /// one that a policy has just dropped.
    const IDLE_BUFFERS: usize = 3;

    pub(crate) fn new() -> Shared {
        Shared { pool: Pool::new(Self::IDLE_BUFFERS), pacing: Pacing::default() }
    }
}

/// How one connection is made.
#[cfg_attr(
    not(any(feature = "websocket", feature = "zenoh")),
    expect(dead_code, reason = "transports use it")
)]
#[derive(Clone, Debug)]
pub(crate) struct LinkOptions {
    pub(crate) lane: Lane,
    /// The largest frame to receive, in bytes.
    pub(crate) max_frame: usize,
    pub(crate) shared: Shared,
}

/// What one attempt to connect failed at.
#[cfg_attr(
    not(any(feature = "websocket", feature = "zenoh")),
    expect(dead_code, reason = "transports make them")
)]
pub(crate) enum ConnectError {
    /// There is no server yet; another attempt may succeed.
    Unavailable(String),
    /// Another attempt would fail, too.
    Failed(Error),
}
