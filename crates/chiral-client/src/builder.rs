//! How a client is configured, and how it finds its server.

use std::{
    future::Future,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use chiral_proto::{
    ActionMeaning, ActionSpec, Clock, Codec, PROTOCOL_VERSION, Timestamp, Transport,
    message::{RobotInfo, Role, Welcome},
    pool::Pool,
};
use chiral_transport::{IdleTimeout, Pacing, Runtime, monotonic};
use tokio::{
    sync::{Notify, watch},
    time::{sleep, timeout},
};

#[cfg(feature = "zenoh")]
use crate::discover::{DiscoveredRobot, discover};
#[cfg(any(feature = "websocket", feature = "zenoh"))]
use crate::endpoint::{Connection, Server};
use crate::{
    client::PolicyClient,
    connection::{Carries, Lane},
    dispatch::thread::{self as dispatch_thread, DispatchThread, Pace},
    error::Error,
    legacy::session::{LegacySession, LegacyState},
    session::{self, Identity, Shared},
    state::State,
};

/// For the second connection, its hello included.
#[cfg(any(feature = "websocket", feature = "zenoh"))]
const ATTACH_LIMIT: Duration = Duration::from_secs(5);
/// Large frames that nobody looks at any more, kept for the next ones: the latest, one that arrives, and one
/// that a policy has just let go.
const IDLE_BUFFERS: usize = 3;

/// Makes a [`PolicyClient`].
#[derive(Clone, Debug)]
pub struct PolicyClientBuilder {
    uri: String,
    identity: Identity,
    quiet: bool,
    deadline: Option<Duration>,
    request_timeout: Duration,
    idle_timeout: Duration,
    reply_timeout: Duration,
    queue_capacity: usize,
    clock: Option<Clock>,
    dispatch_spin: Duration,
    one_connection: bool,
    max_frame: usize,
    means: ConnectOptions,
    pool: Pool,
    pacing: Pacing,
}

/// By what a server is reached, beside its address.
#[derive(Clone, Debug, Default)]
#[cfg_attr(
    not(all(feature = "websocket", feature = "zenoh")),
    allow(dead_code, reason = "certificates are of WebSocket, the rest of Zenoh")
)]
pub(crate) struct ConnectOptions {
    /// Trusted for `wss://`, in place of the system's.
    pub(crate) root_certificates: Option<Vec<u8>>,
    /// Which robot, on a Zenoh network.
    pub(crate) robot: Option<String>,
    /// A configuration file of Zenoh's.
    pub(crate) zenoh_config: Option<PathBuf>,
    /// Whether memory is shared with a server on this host.
    pub(crate) shared_memory: bool,
    /// The one wire that will do.
    pub(crate) codec: Option<Codec>,
    /// After how long without an arrival a connection is lost.
    pub(crate) idle_timeout: Duration,
}

/// What became of one attempt to connect.
#[cfg_attr(
    not(any(feature = "websocket", feature = "zenoh")),
    expect(dead_code, reason = "transports make them")
)]
pub(crate) enum ConnectError {
    /// Nobody is there yet; it is worth trying again.
    Absent(String),
    /// Trying again would not help.
    Failed(Error),
}

impl PolicyClientBuilder {
    pub(crate) fn new(uri: &str) -> PolicyClientBuilder {
        PolicyClientBuilder {
            uri: uri.to_owned(),
            identity: Identity { name: default_name(), ..Identity::default() },
            quiet: false,
            deadline: None,
            request_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(10),
            reply_timeout: Duration::from_secs(60),
            queue_capacity: 256,
            clock: None,
            dispatch_spin: Duration::from_micros(300),
            one_connection: false,
            max_frame: 256 << 20,
            means: ConnectOptions { shared_memory: true, ..ConnectOptions::default() },
            pool: Pool::new(IDLE_BUFFERS),
            pacing: Pacing::default(),
        }
    }

    /// Connects to watch and not to move: any number of observers may. By default the client is the robot's
    /// one controller.
    #[must_use]
    pub fn observer(mut self) -> Self {
        self.identity.role = Role::Observer;
        self
    }

    /// Who this is, for people: told to others who find the robot taken. By default the program's name and
    /// process id.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.identity.name = name.into();
        self
    }

    /// Which robot, where an address leads to a Zenoh network of several. Other addresses lead to one robot:
    /// asking for one there is an error.
    #[must_use]
    pub fn robot(mut self, name: impl Into<String>) -> Self {
        self.means.robot = Some(name.into());
        self
    }

    /// Reaches the robot as this configuration file of Zenoh's says (JSON5, JSON or YAML): TLS, user and
    /// password, whatever else it says stands. The client's address is added to those that the file connects
    /// to; with the address `zenoh:<robot>` they are all there are. Other addresses than Zenoh's have no use
    /// for it, and are refused.
    #[cfg(feature = "zenoh")]
    #[must_use]
    pub fn zenoh_config(mut self, file: impl Into<PathBuf>) -> Self {
        self.means.zenoh_config = Some(file.into());
        self
    }

    /// Whether observations are read from memory that the server shares, where that is on the same host and
    /// the address is Zenoh's; they are by default.
    #[cfg(feature = "zenoh")]
    #[must_use]
    pub fn shared_memory(mut self, is_wanted: bool) -> Self {
        self.means.shared_memory = is_wanted;
        self
    }

    /// Whatever the server's operator asks for. No server looks at it yet.
    #[must_use]
    pub fn auth(mut self, auth: impl Into<Bytes>) -> Self {
        self.identity.auth = auth.into();
        self
    }

    /// Says nothing on stderr while waiting for the server.
    #[must_use]
    pub fn quiet(mut self) -> Self {
        self.quiet = true;
        self
    }

    /// How long to wait for a server; for ever by default.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Speaks by this codec only: [`Codec::Protobuf`] with servers of ours, [`Codec::Msgpack`] as legacy
    /// clients do, to whatever server takes them. By default it is the former, or else, where a WebSocket
    /// server chooses no subprotocol, the latter.
    #[must_use]
    pub fn codec(mut self, codec: Codec) -> Self {
        self.means.codec = Some(codec);
        self
    }

    /// How long a legacy server may take for a `reset`, a `step` or a gym-like one's action, and for how
    /// long it may answer no pings meanwhile; 60 s by default. One that drops a request says nothing of it,
    /// so that there must be some limit.
    #[must_use]
    pub fn reply_timeout(mut self, limit: Duration) -> Self {
        self.reply_timeout = limit;
        self
    }

    /// How long `get_metadata`, `get_obs` and the stream's start and stop may take; 5 s by default. `reset`
    /// and `step` have no limit.
    #[must_use]
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        self.request_timeout = timeout;
        self
    }

    /// After how long without a word the server counts as lost; 10 s by default. An observation that is still
    /// arriving is no word yet: raise this for a link on which one takes longer. Of a legacy server every
    /// byte is one, pongs among them: raise this for one that answers no pings while it resets.
    #[must_use]
    pub fn idle_timeout(mut self, limit: Duration) -> Self {
        self.idle_timeout = limit;
        self
    }

    /// How many rows the action queue holds; 256 by default.
    #[must_use]
    pub fn queue_capacity(mut self, rows: usize) -> Self {
        self.queue_capacity = rows;
        self
    }

    /// The largest frame that is taken from the server, in bytes; 256 MiB by default.
    #[must_use]
    pub fn max_frame(mut self, bytes: usize) -> Self {
        self.max_frame = bytes;
        self
    }

    /// Trusts these certificates (PEM) for `wss://`, in place of the system's.
    #[must_use]
    pub fn root_certificates(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.means.root_certificates = Some(pem.into());
        self
    }

    /// Over how much of the time before each tick dispatch's thread spins, in place of sleeping on: 300 µs by
    /// default, which costs so much of a core's time a tick. A sleeping thread is woken 50 µs to 1 ms late;
    /// with 0, so late are the actions.
    #[must_use]
    pub fn dispatch_spin(mut self, spin: Duration) -> Self {
        self.dispatch_spin = spin;
        self
    }

    /// Makes do with one connection, so that an action may have to wait for an observation. By default
    /// observations have a second one.
    #[must_use]
    pub fn one_connection(mut self) -> Self {
        self.one_connection = true;
        self
    }

    /// The clock that actions are timed by and ages measured with; CLOCK_MONOTONIC by default. Ticks of
    /// another are waited for by the runtime's timers.
    #[must_use]
    pub fn clock(mut self, clock: Clock) -> Self {
        self.clock = Some(clock);
        self
    }

    /// Connects, waiting until there is a server: while nobody listens, the name does not resolve or the
    /// handshake times out, it tries again every 100 ms (on Zenoh every 500 ms, also while no robot is alive)
    /// and says so on stderr, after 5 s also why. The session's two connections live on threads of their own;
    /// if only the second cannot be had, the first carries everything.
    ///
    /// # Errors
    /// At once: [`Error::Address`], [`Error::Busy`] naming the holder, [`Error::VersionMismatch`],
    /// [`Error::NotProtobuf`], [`Error::Http`], [`Error::Tls`], [`Error::Handshake`], [`Error::Thread`]; on
    /// Zenoh [`Error::SeveralRobots`], [`Error::ZenohConfig`] and [`Error::Zenoh`]. [`Error::NoServer`] after
    /// the deadline, if one was set.
    #[cfg(any(feature = "websocket", feature = "zenoh"))]
    pub async fn connect(self) -> Result<PolicyClient, Error> {
        let control = thread("chiral-client")?;
        self.connect_by(control).await
    }

    /// The same, for code without a runtime; blocks.
    ///
    /// # Errors
    /// As [`PolicyClientBuilder::connect`].
    #[cfg(any(feature = "websocket", feature = "zenoh"))]
    pub fn connect_blocking(self) -> Result<crate::blocking::PolicyClient, Error> {
        let control = thread("chiral-client")?;
        let client = control.block_on(self.connect_by(control.clone()))?;
        Ok(crate::blocking::PolicyClient::new(client, control))
    }

    /// As [`PolicyClient::discover`], and wherever the configuration file connects to. Of the options only
    /// that file counts, and not the address.
    ///
    /// # Errors
    /// [`Error::ZenohConfig`], [`Error::Zenoh`] if multicast cannot be used, [`Error::Thread`].
    #[cfg(feature = "zenoh")]
    pub async fn discover(&self, duration: Duration) -> Result<Vec<DiscoveredRobot>, Error> {
        let config = self.means.zenoh_config.clone();
        discover(&chiral_transport::zenoh::ZenohSessionOptions { config, ..Default::default() }, duration)
            .await
    }

    /// The same, for code without a runtime; blocks.
    ///
    /// # Errors
    /// As [`PolicyClientBuilder::discover`].
    #[cfg(feature = "zenoh")]
    pub fn discover_blocking(&self, duration: Duration) -> Result<Vec<DiscoveredRobot>, Error> {
        thread("chiral-client")?.block_on(self.discover(duration))
    }

    /// Connects over a transport of the caller's.
    ///
    /// # Errors
    /// [`Error::Busy`], [`Error::VersionMismatch`], [`Error::Rejected`], or how the connection broke.
    pub async fn connect_over(self, transport: impl Transport) -> Result<PolicyClient, Error> {
        if transport.codec() == Codec::Msgpack {
            return self.begin_legacy((transport, Runtime::current(), IdleTimeout::never()), 0).await;
        }
        let began = self.now();
        let welcome = session::greet(&transport, &self.identity, Bytes::new()).await?;
        let idle_timeout = IdleTimeout::new(self.idle_timeout);
        self.begin(began, welcome, (transport, Runtime::current(), idle_timeout), None, None)
    }

    /// Connects over two, so that observations and actions do not wait for each other.
    ///
    /// # Errors
    /// As [`PolicyClientBuilder::connect_over`]; also if the server joins no second connection to a session.
    pub async fn connect_over_two<T: Transport>(
        self,
        control: T,
        observations: T,
    ) -> Result<PolicyClient, Error> {
        let began = self.now();
        let welcome = session::greet(&control, &self.identity, Bytes::new()).await?;
        if welcome.attach_token.is_empty() {
            return Err(Error::Protocol { expected: "a token for a second connection" });
        }
        session::greet(&observations, &self.identity, welcome.attach_token.clone()).await?;
        let here = || (Runtime::current(), IdleTimeout::new(self.idle_timeout));
        let [control_runtime, observations_runtime] = [here(), here()];
        let control = (control, control_runtime.0, control_runtime.1);
        let observations = (observations, observations_runtime.0, observations_runtime.1);
        self.begin(began, welcome, control, Some(observations), None)
    }

    #[cfg(any(feature = "websocket", feature = "zenoh"))]
    async fn connect_by(mut self, host: Runtime) -> Result<PolicyClient, Error> {
        // Clones of a builder make clients that have nothing in common.
        (self.pool, self.pacing) = (Pool::new(IDLE_BUFFERS), Pacing::default());
        self.means.idle_timeout = self.idle_timeout;
        let server = Server::parse(&self.uri, &self.means)?;
        let control =
            self.wait_for(server.retry_period(), || self.attempt(&server, Carries::Control, &host)).await?;
        if control.codec() == Codec::Msgpack {
            let (probes, idle_timeout) = (control.probes(), control.idle_timeout());
            return self.begin_legacy((control, host, idle_timeout), probes).await;
        }
        let began = self.now();
        let welcome = session::greet(&control, &self.identity, Bytes::new()).await?;
        let observations = match self.one_connection || welcome.attach_token.is_empty() {
            true => None,
            // As long as that takes, nobody looks after the first.
            false => match timeout(ATTACH_LIMIT, self.attach(&server, &welcome)).await {
                Ok(Ok(attached)) => Some(attached),
                Ok(Err(error)) => self.alone(&error),
                Err(_) => self.alone(&format_args!("not within {} s", ATTACH_LIMIT.as_secs())),
            },
        };
        let idle_timeout = control.idle_timeout();
        let observations = observations.map(|(transport, host)| {
            let idle_timeout = transport.idle_timeout();
            (transport, host, idle_timeout)
        });
        self.begin(began, welcome, (control, host, idle_timeout), observations, None)
    }

    #[cfg(any(feature = "websocket", feature = "zenoh"))]
    fn alone<T>(&self, why: &dyn std::fmt::Display) -> Option<T> {
        tracing::warn!(
            "no second connection to {}, so that actions may have to wait for observations: {why}",
            self.uri
        );
        None
    }

    /// The session's second connection.
    #[cfg(any(feature = "websocket", feature = "zenoh"))]
    async fn attach(&self, server: &Server, welcome: &Welcome) -> Result<(Connection, Runtime), Error> {
        let host = thread("chiral-client-o")?;
        let observations =
            self.attempt(server, Carries::Observations, &host).await.map_err(|attempt| match attempt {
                ConnectError::Failed(error) => error,
                ConnectError::Absent(reason) => Error::Disconnected { reason, cause: None },
            })?;
        session::greet(&observations, &self.identity, welcome.attach_token.clone()).await?;
        Ok((observations, host))
    }

    /// One attempt to connect, on the runtime that the connection will live on.
    #[cfg(any(feature = "websocket", feature = "zenoh"))]
    async fn attempt(
        &self,
        server: &Server,
        carries: Carries,
        host: &Runtime,
    ) -> Result<Connection, ConnectError> {
        let (server, limit, pool, pacing) =
            (server.clone(), self.max_frame, self.pool.clone(), self.pacing.clone());
        let connecting = host.spawn(async move { server.connect(carries, limit, pool, pacing).await });
        connecting.await.unwrap_or_else(|ended| Err(ConnectError::Absent(ended.to_string())))
    }

    /// Begins a session with a legacy server, where nobody says hello, after so many probes on a network
    /// where they may be lost; without any, a first question shows that it is one.
    async fn begin_legacy<T: Transport>(
        self,
        control: (T, Runtime, IdleTimeout),
        probes: u64,
    ) -> Result<PolicyClient, Error> {
        let action_spec = ActionSpec {
            meaning: ActionMeaning::Other("not declared".to_owned()),
            unit: String::new(),
            ..ActionSpec::joint_positions(0, 0.0)
        };
        let welcome = Welcome {
            protocol: PROTOCOL_VERSION,
            software: String::new(),
            session: 1,
            episode: 0,
            robot: RobotInfo {
                name: self.uri.clone(),
                cameras: Vec::new(),
                proprios: Vec::new(),
                action_spec,
            },
            attach_token: Bytes::new(),
            controller: String::new(),
        };
        let legacy = LegacySession {
            request_timeout: self.request_timeout,
            reply_timeout: self.reply_timeout,
            idle_timeout: control.2.clone(),
            // Whoever waits for the answer is told first that there was none.
            busy_idle_timeout: self.idle_timeout.saturating_add(self.reply_timeout),
            is_lossy: probes > 0,
            is_observer: self.identity.role == Role::Observer,
            turn: Default::default(),
            order: Default::default(),
        };
        let now = self.now();
        let client =
            self.begin(now, welcome, control, None, Some((legacy, LegacyState::after_probes(probes))))?;
        if probes == 0 {
            client.get_metadata().await?;
        }
        Ok(client)
    }

    /// The hello was said and answered: has the session run.
    fn begin<T: Transport>(
        self,
        began: Timestamp,
        welcome: Welcome,
        (control, host, idle_timeout): (T, Runtime, IdleTimeout),
        observations: Option<(T, Runtime, IdleTimeout)>,
        legacy: Option<(LegacySession, LegacyState)>,
    ) -> Result<PolicyClient, Error> {
        let first_round_trip = self.now().since(began);
        let pace = if self.clock.is_some() { Pace::Timers } else { Pace::Spin(self.dispatch_spin) };
        let carries = if observations.is_some() { Carries::Control } else { Carries::Everything };
        let control = Arc::new(control);
        let lane = Arc::new(Lane::new(carries, &control, host, idle_timeout));
        let second = observations.map(|(transport, host, idle_timeout)| {
            let transport = Arc::new(transport);
            (Arc::new(Lane::new(Carries::Observations, &transport, host, idle_timeout)), transport)
        });
        let mut state = State::new(welcome.session, welcome.episode, self.queue_capacity, first_round_trip);
        let legacy = legacy.map(|(legacy, known)| {
            state.legacy = known;
            legacy
        });
        let shared = Arc::new(Shared {
            state: state.into(),
            legacy,
            latest: watch::Sender::new(None),
            room: Notify::new(),
            clock: self.clock.unwrap_or_else(monotonic),
            idle_timeout: self.idle_timeout,
            dispatcher: DispatchThread::new(pace),
            observations: Arc::clone(second.as_ref().map_or(&lane, |(lane, _)| lane)),
            control: lane,
            pool: self.pool,
            pacing: self.pacing,
            ended: watch::Sender::new(false),
        });
        session::run(&shared, &shared.control, control);
        if let Some((lane, transport)) = second {
            session::run(&shared, &lane, transport);
        }
        dispatch_thread::start(&shared).inspect_err(|error| shared.end(error.clone()))?;
        Ok(PolicyClient::new(shared, welcome, self.request_timeout))
    }

    fn now(&self) -> Timestamp {
        self.clock.as_ref().map_or_else(|| monotonic().now(), Clock::now)
    }

    /// Attempts to connect until somebody is there.
    #[cfg_attr(
        not(any(feature = "websocket", feature = "zenoh")),
        expect(dead_code, reason = "transports use it")
    )]
    async fn wait_for<T, F: Future<Output = Result<T, ConnectError>>>(
        &self,
        period: Duration,
        attempt: impl Fn() -> F,
    ) -> Result<T, Error> {
        let mut last = "the first attempt is not over".to_owned();
        let attempts = async {
            let mut waiting = Waiting::default();
            loop {
                match attempt().await {
                    Ok(connected) => return Ok(connected),
                    Err(ConnectError::Failed(error)) => return Err(error),
                    Err(ConnectError::Absent(reason)) => last = reason,
                }
                if !self.quiet
                    && let Some(line) = waiting.line(&self.uri, &last, Instant::now())
                {
                    eprintln!("{line}");
                }
                sleep(period).await;
            }
        };
        let Some(deadline) = self.deadline else { return attempts.await };
        let outcome = timeout(deadline, attempts).await;
        outcome.unwrap_or_else(|_| Err(Error::NoServer { uri: self.uri.clone(), deadline, last }))
    }
}

/// What is said of waiting: at once that it is so, and why after a while, since that may last for ever; then
/// whenever the reason is another.
#[derive(Default)]
struct Waiting {
    told: Option<(Instant, String)>,
}

impl Waiting {
    /// So long a server that is just starting may take; and so seldom a reason that changes all the time is
    /// told.
    const PERIOD: Duration = Duration::from_secs(5);

    /// What to say now, if anything.
    fn line(&mut self, uri: &str, reason: &str, now: Instant) -> Option<String> {
        let Some((told_at, told)) = &mut self.told else {
            self.told = Some((now, String::new()));
            return Some(format!("chiral: waiting for server at {uri} …"));
        };
        if told == reason || now - *told_at < Self::PERIOD {
            return None;
        }
        (*told_at, *told) = (now, reason.to_owned());
        Some(format!("chiral: still waiting for {uri}: {reason}"))
    }
}

#[cfg(any(feature = "websocket", feature = "zenoh"))]
fn thread(name: &str) -> Result<Runtime, Error> {
    Runtime::thread(name).map_err(|error| Error::Thread(Arc::new(error)))
}

fn default_name() -> String {
    let program = std::env::args_os().next().map(std::path::PathBuf::from);
    let program = program
        .as_ref()
        .and_then(|path| path.file_name())
        .map_or("policy".into(), |name| name.to_string_lossy());
    format!("{program} ({})", std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_is_said_at_once_and_its_reason_after_a_while() {
        let (mut waiting, began) = (Waiting::default(), Instant::now());
        let mut line =
            |ms, reason| waiting.line("ws://robot:8765", reason, began + Duration::from_millis(ms));
        assert_eq!(line(0, "refused").as_deref(), Some("chiral: waiting for server at ws://robot:8765 …"));
        assert_eq!(line(4999, "refused"), None, "it may just be starting");
        assert_eq!(
            line(5000, "refused").as_deref(),
            Some("chiral: still waiting for ws://robot:8765: refused")
        );
        assert_eq!(line(20_000, "refused"), None, "it is known");
        assert_eq!(
            line(20_100, "no answer").as_deref(),
            Some("chiral: still waiting for ws://robot:8765: no answer")
        );
        assert_eq!(line(20_200, "refused"), None, "a reason that changes all the time");
    }
}
