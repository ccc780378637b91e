//! The server as its host sees it: how it is made, run, embedded and stopped.

#[cfg(feature = "zenoh")]
use std::path::PathBuf;
use std::{
    fmt,
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use chiral_proto::{
    Clock, Code, Fault, PROTOCOL_VERSION, Transport, keys,
    message::{RobotInfo, Welcome},
};
#[cfg(feature = "zenoh")]
use chiral_transport::zenoh::{SharedMemory, SharedMemoryCounts};
use chiral_transport::{IdleTimeout, Pacing, host_name, monotonic};
use tokio::sync::watch;

use crate::{
    attach::AttachTokens,
    control::{Control, ControlCounts, panic_text},
    error::Error,
    robot::Robot,
    sampler::{Sampler, Source},
    sensors::{ObservationSource, Sensors},
    session::{self, Session},
};

/// How long a stopping server waits for its peers, and then for its robot.
pub(crate) const STOP_LIMIT: Duration = Duration::from_secs(2);

/// Serves a robot to policies: observations out, actions in.
///
/// It listens by itself ([`PolicyServer::run`], [`PolicyServer::serve`]) or is embedded in a host
/// ([`PolicyServer::into_router`]).
#[derive(Clone)]
pub struct PolicyServer {
    pub(crate) inner: Arc<Inner>,
}

/// What all sessions of a server share.
pub(crate) struct Inner {
    pub(crate) robot: RobotInfo,
    pub(crate) observations: Arc<Sampler>,
    pub(crate) control: Control,
    pub(crate) clock: Clock,
    pub(crate) options: Options,
    pub(crate) lobby: Mutex<AttachTokens<Session>>,
    /// Asked for by the actions that arrive.
    pub(crate) pacing: Pacing,
    /// For observations to peers on this host, if it can be had.
    #[cfg(feature = "zenoh")]
    pub(crate) shared_memory: Option<SharedMemory>,
    /// For what is worth a line in the log, and not one for every connection.
    #[cfg(feature = "websocket")]
    pub(crate) says_once: std::sync::Once,
    last_session: AtomicU64,
    pub(crate) observations_skipped: AtomicU64,
    sessions: watch::Sender<usize>,
    stopping: watch::Sender<bool>,
    control_ended: watch::Receiver<bool>,
}

/// What is known before the server is made.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// Absent if nobody has said where.
    pub(crate) bind: Option<SocketAddr>,
    #[cfg(feature = "zenoh")]
    pub(crate) network: chiral_transport::zenoh::ZenohSessionOptions,
    pub(crate) idle_timeout: Duration,
    pub(crate) max_frame: usize,
}

#[cfg(any(feature = "websocket", feature = "zenoh"))]
impl Options {
    pub(crate) fn is_on_zenoh(&self) -> bool {
        #[cfg(feature = "zenoh")]
        return !(self.network.listen.is_empty() && self.network.connect.is_empty())
            || self.network.config.is_some();
        #[cfg(not(feature = "zenoh"))]
        false
    }
}

/// Makes a [`PolicyServer`].
pub struct PolicyServerBuilder {
    robot: Box<dyn Robot>,
    sensors: Sensors,
    source: Option<Arc<dyn ObservationSource>>,
    name: String,
    observe_timeout: Duration,
    clock: Clock,
    options: Options,
}

impl PolicyServer {
    /// A server for this robot and its sensors, with every option at its default.
    ///
    /// # Errors
    /// As [`PolicyServerBuilder::build`].
    pub fn new(robot: impl Robot, sensors: Sensors) -> Result<PolicyServer, Error> {
        PolicyServer::builder(robot, sensors).build()
    }

    /// A server to be configured.
    pub fn builder(robot: impl Robot, sensors: Sensors) -> PolicyServerBuilder {
        PolicyServerBuilder {
            robot: Box::new(robot),
            sensors,
            source: None,
            name: keys::robot_of_host(&host_name()),
            observe_timeout: Duration::from_secs(1),
            clock: monotonic(),
            options: Options {
                bind: None,
                #[cfg(feature = "zenoh")]
                network: chiral_transport::zenoh::ZenohSessionOptions {
                    discovery: true,
                    ..Default::default()
                },
                idle_timeout: Duration::from_secs(10),
                max_frame: 16 << 20,
            },
        }
    }

    /// Tells how the server is doing and stops it, from anywhere.
    pub fn handle(&self) -> ServerHandle {
        ServerHandle { inner: Arc::clone(&self.inner) }
    }

    /// Serves one peer over a connection of the host's, until it ends. Needs a tokio runtime.
    pub async fn serve_connection(&self, transport: impl Transport) {
        session::serve(&self.inner, transport, IdleTimeout::new(self.inner.options.idle_timeout)).await;
    }
}

impl fmt::Debug for PolicyServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PolicyServer").field("robot", &self.inner.robot.name).finish_non_exhaustive()
    }
}

impl PolicyServerBuilder {
    /// The robot's name, as peers see it; by default that of this host, or as much of it as a name on a Zenoh
    /// network can have.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Where `run` and `serve` listen for WebSocket; `127.0.0.1:8765` by default, or nowhere if the robot is
    /// put on a Zenoh network. There is no authentication yet, so another address than a loopback one is
    /// warned of.
    #[must_use]
    pub fn bind(mut self, address: impl Into<SocketAddr>) -> Self {
        self.options.bind = Some(address.into());
        self
    }

    /// Puts the robot on a Zenoh network, and lets others into it at this locator, such as
    /// `tcp/127.0.0.1:7447`; also by `tls/`, `quic/` and `unixsock-stream/`. May be said more than once. Not
    /// every robot's name will do then: see [`chiral_proto::keys::check_robot`].
    #[cfg(feature = "zenoh")]
    #[must_use]
    pub fn listen_zenoh(mut self, locator: impl Into<String>) -> Self {
        self.options.network.listen.push(locator.into());
        self
    }

    /// Puts the robot on the Zenoh network that a router or another robot's server lets others into at this
    /// locator, such as `tcp/router:7447`. May be said more than once, and beside
    /// [`PolicyServerBuilder::listen_zenoh`].
    #[cfg(feature = "zenoh")]
    #[must_use]
    pub fn join_zenoh(mut self, locator: impl Into<String>) -> Self {
        self.options.network.connect.push(locator.into());
        self
    }

    /// Whether peers on this host that come by Zenoh see observations in shared memory, which then never
    /// cross the network; they do by default. It takes eight observations' worth of memory, locked; where
    /// that cannot be had, observations travel by the network, as the log says.
    #[cfg(feature = "zenoh")]
    #[must_use]
    pub fn shared_memory(mut self, is_wanted: bool) -> Self {
        self.options.network.shared_memory = is_wanted;
        self
    }

    /// Puts the robot on the Zenoh network of this configuration file of Zenoh's (JSON5, JSON or YAML): TLS,
    /// users, access control, whatever else it says stands. Locators of [`PolicyServerBuilder::listen_zenoh`]
    /// and [`PolicyServerBuilder::join_zenoh`] are added to its own. It is read when serving begins.
    #[cfg(feature = "zenoh")]
    #[must_use]
    pub fn zenoh_config(mut self, file: impl Into<PathBuf>) -> Self {
        self.options.network.config = Some(file.into());
        self
    }

    /// Whether the robot can be found without its address, by multicast; true by default, for one on a Zenoh
    /// network who lets others in there. A configuration file's own word on multicast goes before it.
    #[cfg(feature = "zenoh")]
    #[must_use]
    pub fn discovery(mut self, is_found: bool) -> Self {
        self.options.network.discovery = is_found;
        self
    }

    /// Where observations come from, in place of the sensors' snapshot. The sensors still say what cameras
    /// and proprioception there are.
    #[must_use]
    pub fn observations(mut self, source: impl ObservationSource) -> Self {
        self.source = Some(Arc::new(source));
        self
    }

    /// How long an observation waits for a sensor that has published nothing, or nothing since a reset or
    /// step; 1 s by default.
    #[must_use]
    pub fn observe_timeout(mut self, timeout: Duration) -> Self {
        self.observe_timeout = timeout;
        self
    }

    /// After how long without a word a peer counts as lost; 10 s by default. Peers ping every second;
    /// legacy clients over WebSocket are pinged.
    #[must_use]
    pub fn idle_timeout(mut self, limit: Duration) -> Self {
        self.options.idle_timeout = limit;
        self
    }

    /// The largest frame that is taken from a peer, in bytes; 16 MiB by default.
    #[must_use]
    pub fn max_frame(mut self, bytes: usize) -> Self {
        self.options.max_frame = bytes;
        self
    }

    /// The clock of observations and actions; CLOCK_MONOTONIC by default. Use the same as the sensors'.
    #[must_use]
    pub fn clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// Makes the server, which starts the control thread and nothing else.
    ///
    /// # Errors
    /// [`Error::Declaration`] if the robot's action spec cannot be, or its name on a Zenoh network;
    /// [`Error::Start`] if there can be no thread.
    #[cfg_attr(not(feature = "zenoh"), expect(unused_mut, reason = "only shared memory is decided here"))]
    pub fn build(mut self) -> Result<PolicyServer, Error> {
        #[cfg(feature = "zenoh")]
        if self.options.is_on_zenoh() {
            keys::check_robot(&self.name).map_err(|error| Error::Declaration(error.to_string()))?;
        }
        let robot = self.robot;
        let spec = catch_unwind(AssertUnwindSafe(|| robot.action_spec())).map_err(|panic| {
            Error::Declaration(format!("the robot panicked in action_spec: {}", panic_text(&*panic)))
        })?;
        if spec.dimension == 0 || !(spec.control_hz > 0.0 && spec.control_hz.is_finite()) {
            let found = format!("dimension {} at {} Hz", spec.dimension, spec.control_hz);
            return Err(Error::Declaration(format!(
                "expected an action spec of at least one dimension and a positive control_hz, found {found}"
            )));
        }
        for (field, len) in [("names", spec.names.len()), ("low", spec.low.len()), ("high", spec.high.len())]
        {
            if len != 0 && len != spec.dimension {
                return Err(Error::Declaration(format!(
                    "expected none or {} of the action spec's {field}, found {len}",
                    spec.dimension
                )));
            }
        }
        #[cfg(feature = "zenoh")]
        let shared_memory = match self.options.is_on_zenoh() && self.options.network.shared_memory {
            true => self.sensors.share_memory(),
            false => None,
        };
        #[cfg(feature = "zenoh")]
        {
            // What its sensors cannot have, its network need not try.
            self.options.network.shared_memory = shared_memory.is_some();
        }
        let info = RobotInfo {
            name: self.name,
            cameras: self.sensors.camera_specs().cloned().collect(),
            proprios: self.sensors.proprio_specs().cloned().collect(),
            action_spec: spec.clone(),
        };
        let source = self.source.map_or(Source::Sensors(self.sensors), Source::Runtime);
        let observations = Arc::new(Sampler::new(source, self.observe_timeout));
        let (ended, control_ended) = watch::channel(false);
        let tell = move || {
            ended.send_replace(true);
        };
        let control = Control::start(robot, spec, Arc::clone(&observations), self.clock.clone(), tell)?;
        let inner = Inner {
            robot: info,
            observations,
            control,
            clock: self.clock,
            options: self.options,
            lobby: Mutex::default(),
            pacing: Pacing::default(),
            #[cfg(feature = "zenoh")]
            shared_memory,
            #[cfg(feature = "websocket")]
            says_once: std::sync::Once::new(),
            last_session: AtomicU64::new(0),
            observations_skipped: AtomicU64::new(0),
            sessions: watch::Sender::new(0),
            stopping: watch::Sender::new(false),
            control_ended,
        };
        Ok(PolicyServer { inner: Arc::new(inner) })
    }
}

/// Tells how a server is doing and stops it. A clone is a handle of the same server.
#[derive(Clone)]
pub struct ServerHandle {
    pub(crate) inner: Arc<Inner>,
}

/// How a server is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerStats {
    /// Peers connected now.
    pub sessions: usize,
    /// Rows that the robot carried out.
    pub rows_applied: u64,
    /// Actions refused on arrival, or dropped or cut short because a reset or the controller's end overtook
    /// them.
    pub actions_refused: u64,
    /// Actions at which the robot's own code failed.
    pub actions_failed: u64,
    /// Observations that streams left out: their ticks passed while the link, the client or a sensor was not
    /// ready for them.
    pub observations_skipped: u64,
    /// Why the robot is out of service, if it is.
    pub out_of_service: Option<String>,
    /// How observations travelled to peers that came by Zenoh.
    #[cfg(feature = "zenoh")]
    pub shared_memory: SharedMemoryCounts,
}

impl ServerHandle {
    /// Says goodbye to every peer, lets the robot hold, and stops. `run` and `serve` then return. Returns at
    /// once.
    pub fn shutdown(&self) {
        self.inner.stopping.send_replace(true);
    }

    /// The same, and waits until no peer is left and the robot has held; at most a few seconds.
    pub async fn shutdown_and_wait(&self) {
        self.shutdown();
        self.inner.wind_down().await;
    }

    /// How the server is doing.
    pub fn stats(&self) -> ServerStats {
        let ControlCounts { applied, refused, failed } = self.inner.control.counts();
        ServerStats {
            sessions: *self.inner.sessions.borrow(),
            rows_applied: applied,
            actions_refused: refused,
            actions_failed: failed,
            observations_skipped: self.inner.observations_skipped.load(Ordering::Relaxed),
            out_of_service: self.inner.control.out_of_service().map(|fault| fault.text),
            #[cfg(feature = "zenoh")]
            shared_memory: self.inner.shared_memory.as_ref().map(SharedMemory::counts).unwrap_or_default(),
        }
    }
}

impl fmt::Debug for ServerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServerHandle({:?})", self.stats())
    }
}

impl Inner {
    /// What this server says of its robot, to a session or, with 0, to none.
    pub(crate) fn welcome(&self, session: u64, attach_token: Bytes) -> Welcome {
        Welcome {
            protocol: PROTOCOL_VERSION,
            software: concat!("chiral-server ", env!("CARGO_PKG_VERSION")).to_owned(),
            session,
            episode: self.observations.episode(),
            robot: self.robot.clone(),
            attach_token,
            controller: self.control.controller().unwrap_or_default(),
        }
    }

    /// A new session's number.
    pub(crate) fn session_began(&self) -> Result<u64, Fault> {
        if *self.stopping.borrow() {
            return Err(Fault::new(Code::ShuttingDown, "the server is shutting down"));
        }
        self.sessions.send_modify(|count| *count += 1);
        Ok(self.last_session.fetch_add(1, Ordering::Relaxed) + 1)
    }

    pub(crate) fn session_ended(&self) {
        self.sessions.send_modify(|count| *count -= 1);
    }

    /// Returns when the server has been told to stop.
    pub(crate) async fn stopping(&self) {
        let mut stopping = self.stopping.subscribe();
        stopping.wait_for(|stopping| *stopping).await.map(drop).unwrap_or_default();
    }

    /// Waits for the peers to leave, then for the robot to hold.
    pub(crate) async fn wind_down(&self) {
        let mut sessions = self.sessions.subscribe();
        let _ = tokio::time::timeout(STOP_LIMIT, sessions.wait_for(|count| *count == 0)).await;
        self.control.stop();
        let mut ended = self.control_ended.clone();
        if tokio::time::timeout(STOP_LIMIT, ended.wait_for(|ended| *ended)).await.is_err() {
            tracing::warn!("the robot is still busy after {} s; not waiting for it", STOP_LIMIT.as_secs());
        }
    }
}
