//! Building a server from a robot, its sensors and options. `server` runs it.

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
    control::{ControlledRobot, Limits, OnTimeout, Traits},
    core::{Options, ServerCore},
    error::{Error, panic_text},
    robot::Robot,
    sampler::{Sampler, SamplerOptions, Source},
    sensors::Sensors,
    server::PolicyServer,
    source::{Declaration, ObservationSource},
    staleness::{MaxAge, OnStale},
};

/// Builds a [`PolicyServer`].
pub struct PolicyServerBuilder {
    robot: Box<dyn Robot>,
    sensors: Sensors,
    source: Option<Arc<dyn ObservationSource>>,
    name: String,
    sampling: SamplerOptions,
    max_age: MaxAge,
    clock: Clock,
    limits: Limits,
    options: Options,
}

impl PolicyServer {
    /// Builds a server for this robot and its sensors, with every option at its default.
    ///
    /// # Errors
    /// As [`PolicyServerBuilder::build`].
    pub fn new(robot: impl Robot, sensors: Sensors) -> Result<PolicyServer, Error> {
        PolicyServer::builder(robot, sensors).build()
    }

    /// Returns a builder for a server with other options.
    pub fn builder(robot: impl Robot, sensors: Sensors) -> PolicyServerBuilder {
        PolicyServerBuilder {
            robot: Box::new(robot),
            sensors,
            source: None,
            name: keys::robot_of_host(&host_name()),
            sampling: SamplerOptions { timeout: Duration::from_secs(1), on_stale: OnStale::Mark },
            max_age: MaxAge::Measured,
            clock: monotonic(),
            limits: Limits::default(),
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
    /// The robot's name, as peers see it. By default the name of this host, reduced to the characters that a
    /// name on a Zenoh network may have.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// The address on which `run` and `serve` accept WebSocket connections. By default `127.0.0.1:8765`, or
    /// none if the robot is on a Zenoh network. There is no authentication yet, so the server logs a warning
    /// for an address that is not loopback.
    #[must_use]
    pub fn bind(mut self, address: impl Into<SocketAddr>) -> Self {
        self.options.bind = Some(address.into());
        self
    }

    /// Puts the robot on a Zenoh network, and accepts others into it at this locator, such as
    /// `tcp/127.0.0.1:7447`, or one with `tls/`, `quic/` or `unixsock-stream/`. May be called more than once.
    /// The robot's name must then be valid for Zenoh keys: see [`chiral_proto::keys::check_robot`].
    #[cfg(feature = "zenoh")]
    #[must_use]
    pub fn listen_zenoh(mut self, locator: impl Into<String>) -> Self {
        self.options.network.listen.push(locator.into());
        self
    }

    /// Puts the robot on the Zenoh network of the router or other robot's server that listens at this
    /// locator, such as `tcp/router:7447`. May be called more than once, and together with
    /// [`PolicyServerBuilder::listen_zenoh`].
    #[cfg(feature = "zenoh")]
    #[must_use]
    pub fn join_zenoh(mut self, locator: impl Into<String>) -> Self {
        self.options.network.connect.push(locator.into());
        self
    }

    /// Whether Zenoh peers on this host receive observations in shared memory instead of over the network;
    /// true by default. It takes locked memory for eight observations. Where the system does not provide
    /// that, the server logs it and sends observations over the network.
    #[cfg(feature = "zenoh")]
    #[must_use]
    pub fn shared_memory(mut self, enabled: bool) -> Self {
        self.options.network.shared_memory = enabled;
        self
    }

    /// Puts the robot on the Zenoh network that this Zenoh configuration file describes (JSON5, JSON or
    /// YAML), with its TLS, users, access control and other settings. The locators of
    /// [`PolicyServerBuilder::listen_zenoh`] and [`PolicyServerBuilder::join_zenoh`] are added to the file's
    /// own. The file is read when serving begins.
    #[cfg(feature = "zenoh")]
    #[must_use]
    pub fn zenoh_config(mut self, file: impl Into<PathBuf>) -> Self {
        self.options.network.config = Some(file.into());
        self
    }

    /// Whether clients can find the robot by multicast, without its address; true by default. It needs a
    /// Zenoh locator to listen on. A multicast setting in the configuration file takes precedence.
    #[cfg(feature = "zenoh")]
    #[must_use]
    pub fn discovery(mut self, enabled: bool) -> Self {
        self.options.network.discovery = enabled;
        self
    }

    /// Whether legacy clients are served on Zenoh: those that are given the locator of
    /// [`PolicyServerBuilder::listen_zenoh`]; false by default. Their messages name no robot, so nothing but
    /// its address may lead to such a server: it is not found by multicast, and while it is connected to a
    /// router or another robot, legacy clients get no reply, and the log gives the reason.
    #[cfg(feature = "zenoh")]
    #[must_use]
    pub fn legacy_zenoh(mut self, enabled: bool) -> Self {
        self.options.network.legacy = enabled;
        self
    }

    /// The source of observations, in place of the sensors' snapshot. The sensors still declare the cameras
    /// and proprioception.
    #[must_use]
    pub fn observations(mut self, source: impl ObservationSource) -> Self {
        self.source = Some(Arc::new(source));
        self
    }

    /// How long an observation waits for a sensor that has not published at all, or not since a reset or
    /// step; 1 s by default.
    #[must_use]
    pub fn observe_timeout(mut self, timeout: Duration) -> Self {
        self.sampling.timeout = timeout;
        self
    }

    /// How old a camera's latest image may be before the camera counts as stale; [`MaxAge::Measured`] by
    /// default. [`CameraSensor::set_max_age`](crate::CameraSensor::set_max_age) sets it for one camera.
    /// Sensors that two servers share have the limit of the server that was built last.
    #[must_use]
    pub fn max_age(mut self, max_age: MaxAge) -> Self {
        self.max_age = max_age;
        self
    }

    /// What becomes of observations with a stale camera; [`OnStale::Mark`] by default.
    #[must_use]
    pub fn on_stale(mut self, on_stale: OnStale) -> Self {
        self.sampling.on_stale = on_stale;
        self
    }

    /// How long nothing may arrive from a peer before it counts as lost; 10 s by default. Clients ping every
    /// second; legacy clients over WebSocket are pinged.
    #[must_use]
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.options.idle_timeout = timeout;
        self
    }

    /// How late an action may be: how much longer than usual it may have been on its way, and how long after it
    /// was due a row may still be applied. Later ones are dropped and counted. 250 ms by default; `None` for
    /// any. Actions of legacy clients do not say when they were sent: of them, those that arrive in a burst
    /// after a gap of this length are dropped but for the newest.
    #[must_use]
    pub fn max_action_lateness(mut self, limit: impl Into<Option<Duration>>) -> Self {
        self.limits.max_action_lateness = limit.into();
        self
    }

    /// How long after the last applied row, and its own period, the robot holds unless another one is applied;
    /// 500 ms by default. `None` for never, if the robot does that by itself.
    #[must_use]
    pub fn command_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.limits.command_timeout = timeout.into();
        self
    }

    /// What follows after a hold for lack of actions; by default the next action goes on.
    #[must_use]
    pub fn on_timeout(mut self, on_timeout: OnTimeout) -> Self {
        self.limits.on_timeout = on_timeout;
        self
    }

    /// How old the observation may be from which an action was chosen, where the client states it; `None`, the
    /// default, for any. Actions chosen from older ones are refused.
    #[must_use]
    pub fn max_observation_age(mut self, limit: impl Into<Option<Duration>>) -> Self {
        self.limits.max_observation_age = limit.into();
        self
    }

    /// The largest frame accepted from a peer, in bytes; 16 MiB by default.
    #[must_use]
    pub fn max_frame(mut self, bytes: usize) -> Self {
        self.options.max_frame = bytes;
        self
    }

    /// The clock of observations and actions; CLOCK_MONOTONIC by default. Use the clock of the sensors.
    #[must_use]
    pub fn clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// Builds the server. This starts the control thread and nothing else.
    ///
    /// # Errors
    /// [`Error::Declaration`] if the robot's action spec is invalid, or its name not valid on a Zenoh
    /// network; [`Error::Start`] if the thread cannot be started.
    #[cfg_attr(
        not(feature = "zenoh"),
        expect(unused_mut, reason = "only the shared memory option is changed")
    )]
    pub fn build(mut self) -> Result<PolicyServer, Error> {
        #[cfg(feature = "zenoh")]
        if self.options.is_on_zenoh() {
            keys::check_robot(&self.name).map_err(|error| Error::Declaration(error.to_string()))?;
        }
        let robot = self.robot;
        let spec = ask(&*robot, "action_spec", Robot::action_spec)?;
        check_spec(&spec)?;
        let execution = ask(&*robot, "execution", Robot::execution)?;
        let is_lock_step = ask(&*robot, "is_lock_step", Robot::is_lock_step)?;
        let traits = Traits { spec: spec.clone(), execution, is_lock_step };
        let stopper = ask(&*robot, "stopper", Robot::stopper)?;
        let metadata = ask(&*robot, "metadata", Robot::metadata)?;
        let robot = ControlledRobot { robot, traits, stopper, metadata };
        #[cfg(feature = "zenoh")]
        let shared_memory = match self.options.is_on_zenoh() && self.options.network.shared_memory {
            true => self.sensors.use_shared_memory(),
            false => None,
        };
        #[cfg(feature = "zenoh")]
        {
            // Where the sensors have no shared memory, the network does not try to use any.
            self.options.network.shared_memory = shared_memory.is_some();
        }
        let info = RobotInfo {
            name: self.name,
            cameras: self.sensors.camera_specs().cloned().collect(),
            proprios: self.sensors.proprio_specs().cloned().collect(),
            action_spec: spec,
        };
        self.sensors.set_max_age(match self.max_age {
            MaxAge::Measured if is_lock_step => MaxAge::Unlimited,
            max_age => max_age,
        });
        let source = match self.source {
            None => Source::Sensors(self.sensors),
            Some(source) => Source::Custom(source),
        };
        let declaration = Declaration { cameras: info.cameras.clone(), proprios: info.proprios.clone() };
        let sampler = Arc::new(Sampler::new(source, declaration, self.sampling, self.clock.clone()));
        let core = ServerCore::start(
            robot,
            self.limits,
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

/// Calls a method of the robot's that is asked once.
fn ask<T>(robot: &dyn Robot, method: &str, call: fn(&dyn Robot) -> T) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(|| call(robot))).map_err(|panic| {
        Error::Declaration(format!("the robot panicked in {method}: {}", panic_text(&*panic)))
    })
}

/// The control rates that a robot may declare, Hz.
const MIN_CONTROL_HZ: f64 = 1e-3;
const MAX_CONTROL_HZ: f64 = 1e5;

/// Fails if the action spec is invalid.
fn check_spec(spec: &ActionSpec) -> Result<(), Error> {
    let rates = MIN_CONTROL_HZ..=MAX_CONTROL_HZ;
    if spec.control_hz != 0.0 && !rates.contains(&spec.control_hz) {
        return Err(Error::Declaration(format!(
            "expected a control_hz of {MIN_CONTROL_HZ} to {MAX_CONTROL_HZ}, or 0 for none, in the action spec; \
             found {}",
            spec.control_hz
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
    if spec.low.iter().chain(&spec.high).any(|limit| limit.is_nan()) {
        let found = (&spec.low, &spec.high);
        return Err(Error::Declaration(format!(
            "expected limits that are numbers in the action spec, found {found:?}"
        )));
    }
    if let Some((low, high)) = spec.low.iter().zip(&spec.high).find(|(low, high)| low > high) {
        return Err(Error::Declaration(format!(
            "expected limits with low at most high in the action spec, found {low} and {high}"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_no_action_can_keep_are_refused() {
        let spec = |low: &[f32], high: &[f32]| ActionSpec {
            low: low.to_vec(),
            high: high.to_vec(),
            ..ActionSpec::joint_positions(2, 20.0)
        };
        for (low, high) in [(&[][..], &[][..]), (&[-1.0, 2.0], &[1.0, 2.0]), (&[], &[1.0, f32::INFINITY])] {
            assert!(check_spec(&spec(low, high)).is_ok(), "{low:?} {high:?}");
        }
        for (low, high) in [
            (&[0.0, 3.0][..], &[1.0, 2.0][..]),
            (&[f32::NAN, 0.0], &[]),
            (&[0.0, 0.0], &[1.0, f32::NAN]),
            (&[0.0], &[1.0]),
        ] {
            assert!(check_spec(&spec(low, high)).is_err(), "{low:?} {high:?}");
        }
        for control_hz in [-1.0, f64::NAN, f64::INFINITY] {
            assert!(check_spec(&ActionSpec::joint_positions(2, control_hz)).is_err(), "{control_hz} Hz");
        }
        assert!(check_spec(&ActionSpec::undeclared()).is_ok());
    }
}
