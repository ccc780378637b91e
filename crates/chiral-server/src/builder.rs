//! The options of a server, and how it is made from them.

#[cfg(feature = "zenoh")]
use std::path::PathBuf;
use std::{
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use chiral_proto::{ActionSpec, Clock, keys, message::RobotInfo};
use chiral_transport::{host_name, monotonic};

use crate::{
    accept::Acceptor,
    core::{Options, ServerCore},
    error::{Error, panic_text},
    robot::Robot,
    sampler::{Sampler, Source},
    sensors::{ObservationSource, Sensors},
    server::PolicyServer,
};

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
        check_spec(&spec)?;
        #[cfg(feature = "zenoh")]
        let shared_memory = match self.options.is_on_zenoh() && self.options.network.shared_memory {
            true => self.sensors.use_shared_memory(),
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
            action_spec: spec,
        };
        let source = self.source.map_or(Source::Sensors(self.sensors), Source::Custom);
        let sampler = Arc::new(Sampler::new(source, self.observe_timeout));
        let core = ServerCore::start(
            robot,
            info,
            sampler,
            self.clock,
            self.options,
            #[cfg(feature = "zenoh")]
            shared_memory,
        )?;
        Ok(PolicyServer { acceptor: Arc::new(Acceptor::new(core)) })
    }
}

/// Fails if the spec contradicts itself.
fn check_spec(spec: &ActionSpec) -> Result<(), Error> {
    if spec.dimension == 0 || !(spec.control_hz > 0.0 && spec.control_hz.is_finite()) {
        let found = format!("dimension {} at {} Hz", spec.dimension, spec.control_hz);
        return Err(Error::Declaration(format!(
            "expected an action spec of at least one dimension and a positive control_hz, found {found}"
        )));
    }
    for (field, len) in [("names", spec.names.len()), ("low", spec.low.len()), ("high", spec.high.len())] {
        if len != 0 && len != spec.dimension {
            return Err(Error::Declaration(format!(
                "expected none or {} of the action spec's {field}, found {len}",
                spec.dimension
            )));
        }
    }
    Ok(())
}
