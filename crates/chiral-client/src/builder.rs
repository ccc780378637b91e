//! How a client is configured and connected.

#[cfg(feature = "zenoh")]
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use chiral_proto::{Clock, Codec, Transport, message::Role};
#[cfg(any(feature = "websocket", feature = "zenoh"))]
use chiral_transport::Runtime;

#[cfg(feature = "zenoh")]
use crate::discover::{DiscoveredRobot, discover};
use crate::{
    client::PolicyClient,
    connect::{self, Connected, options::ConnectOptions},
    error::Error,
    interrupt::InterruptCheck,
    waiting::{OnWaiting, Waiting},
};

impl PolicyClient {
    /// The default address of a robot on this host.
    pub const DEFAULT_URI: &str = "ws://localhost:8765";
    /// The default address of a robot on this host over Zenoh.
    pub const DEFAULT_ZENOH_URI: &str = "tcp/localhost:7447";

    /// Connects to the robot at `uri`, waiting until there is a server. Addresses are such as
    /// `ws://localhost:8765`; over Zenoh `tcp/localhost:7447`, or `zenoh:panda` for the robot of this name,
    /// which is searched for by multicast.
    ///
    /// # Errors
    /// See [`PolicyClientBuilder::connect`].
    #[cfg(any(feature = "websocket", feature = "zenoh"))]
    pub async fn connect(uri: &str) -> Result<PolicyClient, Error> {
        PolicyClient::builder(uri).connect().await
    }

    /// Searches for robots on the Zenoh networks around, without an address. The search is sent by multicast,
    /// so to this network segment, and takes exactly `duration`; a second is plenty. Returns the robots that
    /// were reached, also through a router that replied, and one of this host at its default address; not
    /// those that are served over WebSocket only. See also [`PolicyClientBuilder::discover`].
    ///
    /// # Errors
    /// [`Error::Zenoh`] if multicast cannot be used, [`Error::Thread`].
    #[cfg(feature = "zenoh")]
    pub async fn discover(duration: Duration) -> Result<Vec<DiscoveredRobot>, Error> {
        PolicyClient::builder(PolicyClient::DEFAULT_ZENOH_URI).discover(duration).await
    }

    /// Configures a client before it connects.
    pub fn builder(uri: &str) -> PolicyClientBuilder {
        PolicyClientBuilder { options: ConnectOptions::new(uri) }
    }
}

/// Configures and connects a [`PolicyClient`].
#[derive(Clone, Debug)]
pub struct PolicyClientBuilder {
    options: ConnectOptions,
}

impl PolicyClientBuilder {
    /// Connects as an observer, which receives observations and may not move the robot; there may be any
    /// number. By default the client is the robot's one controller.
    #[must_use]
    pub fn observer(mut self) -> Self {
        self.options.identity.role = Role::Observer;
        self
    }

    /// The client's name, for people: others that find the robot taken see it. By default the program's name
    /// and process id.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.options.identity.name = name.into();
        self
    }

    /// The robot to connect to, where an address leads to a Zenoh network of several. Other addresses lead to
    /// one robot, and a name there is an error.
    #[must_use]
    pub fn robot(mut self, name: impl Into<String>) -> Self {
        self.options.robot = Some(name.into());
        self
    }

    /// Opens the Zenoh session with this configuration file of Zenoh's (JSON5, JSON or YAML): TLS, user and
    /// password and everything else in it apply. The client's address is added to those that the file
    /// connects to; with the address `zenoh:<robot>` there are no others. With an address that is not
    /// Zenoh's, connecting fails.
    #[cfg(feature = "zenoh")]
    #[must_use]
    pub fn zenoh_config(mut self, file: impl Into<PathBuf>) -> Self {
        self.options.zenoh_config = Some(file.into());
        self
    }

    /// Whether observations are read from the server's shared memory, where the server is on the same host
    /// and the address is Zenoh's; true by default.
    #[cfg(feature = "zenoh")]
    #[must_use]
    pub fn shared_memory(mut self, is_wanted: bool) -> Self {
        self.options.shared_memory = is_wanted;
        self
    }

    /// Bytes for the server to authenticate the client by. No server reads them yet.
    #[must_use]
    pub fn auth(mut self, auth: impl Into<Bytes>) -> Self {
        self.options.identity.auth = auth.into();
        self
    }

    /// Prints nothing on stderr while `connect` waits for the server and `reset` for the robot.
    #[must_use]
    pub fn quiet(self) -> Self {
        self.on_waiting(|_| ())
    }

    /// Calls this in place of printing a line on stderr: while `connect` waits for the server, at once, then
    /// after 5 s with the reason, and whenever that changes; and every 10 s while `reset` waits for the robot.
    /// It is called where the client is waited for, and must not call the client itself.
    #[must_use]
    pub fn on_waiting(mut self, on_waiting: impl Fn(&Waiting<'_>) + Send + Sync + 'static) -> Self {
        self.options.on_waiting = OnWaiting::new(on_waiting);
        self
    }

    /// Lets a call of the blocking client be given up from outside: while one waits, it asks this function
    /// every 100 ms, on the calling thread, and fails with [`Error::Interrupted`] as soon as it returns true.
    /// `connect_blocking` and `discover_blocking` ask it, too; `close` does not. What was sent already is not
    /// taken back: a robot that resets goes on resetting, and its late reply is ignored. To give up a call of
    /// the async client, drop its future.
    ///
    /// ```no_run
    /// use std::sync::{Arc, atomic::{AtomicBool, Ordering}};
    /// use chiral_client::blocking::PolicyClient;
    ///
    /// let is_cancelled = Arc::new(AtomicBool::new(false)); // set by another thread, or a handler of Ctrl-C
    /// let builder = PolicyClient::builder("ws://localhost:8765");
    /// let builder = builder.interrupt_when(move || is_cancelled.load(Ordering::Relaxed));
    /// ```
    #[must_use]
    pub fn interrupt_when(mut self, is_interrupted: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        self.options.interrupt = Some(InterruptCheck::new(is_interrupted));
        self
    }

    /// How long to wait for a server; without a deadline, without limit.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.options.deadline = Some(deadline);
        self
    }

    /// Uses only this codec: [`Codec::Protobuf`] for our own servers, or [`Codec::Msgpack`] as legacy clients
    /// do, for any server that accepts those. By default protobuf is offered, and msgpack used with a server
    /// that does not know it.
    #[must_use]
    pub fn codec(mut self, codec: Codec) -> Self {
        self.options.codec = Some(codec);
        self
    }

    /// How long a `reset` may take. By default without limit, or 60 s with a legacy server, which does not
    /// report it if it drops a request, and may leave pings unanswered meanwhile.
    #[must_use]
    pub fn reset_timeout(mut self, timeout: Duration) -> Self {
        self.options.reset_timeout = Some(timeout);
        self
    }

    /// How long a `step` may take; 60 s by default. With a legacy server also an action of the gym-like
    /// generation and an observation of the polled stream, which may have to wait for one.
    #[must_use]
    pub fn step_timeout(mut self, timeout: Duration) -> Self {
        self.options.step_timeout = timeout;
        self
    }

    /// How long `get_metadata`, `get_obs` and starting and stopping the stream may take; 5 s by default. It
    /// starts anew for as long as a large message is arriving, so that a slow link is no error; over Zenoh with
    /// a legacy server, where nothing shows that, raise it.
    #[must_use]
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        self.options.request_timeout = timeout;
        self
    }

    /// After how long without a byte from the server the connection counts as lost; 10 s by default. Our own
    /// servers answer a ping every second. Raise this for a legacy server that answers no pings while it is
    /// busy.
    #[must_use]
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.options.idle_timeout = timeout;
        self
    }

    /// How many rows the action queue holds; 256 by default.
    #[must_use]
    pub fn queue_capacity(mut self, rows: usize) -> Self {
        self.options.queue_capacity = rows;
        self
    }

    /// For how long the server may drop every action as too late, and accept none, before the next `put_*` or
    /// `send_action` fails with [`Error::ActionsLate`]; 5 s by default. Single stalls of the network only
    /// count in [`ClientStats`](crate::ClientStats).
    #[must_use]
    pub fn late_limit(mut self, limit: Duration) -> Self {
        self.options.late_limit = limit;
        self
    }

    /// The largest frame that is accepted from the server, in bytes; 256 MiB by default.
    #[must_use]
    pub fn max_frame(mut self, bytes: usize) -> Self {
        self.options.max_frame = bytes;
        self
    }

    /// Trusts these certificates (PEM) for `wss://`, in place of the system's.
    #[must_use]
    pub fn root_certificates(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.options.root_certificates = Some(pem.into());
        self
    }

    /// How long before each tick the dispatch thread stops sleeping and spins; 300 µs by default, which costs
    /// that much of a core's time a tick. A sleeping thread is woken 50 µs to 1 ms late: with 0, actions are
    /// that late.
    #[must_use]
    pub fn dispatch_spin(mut self, spin: Duration) -> Self {
        self.options.dispatch_spin = spin;
        self
    }

    /// Uses one connection for both lanes, so that an action may have to wait for an observation. By default
    /// there are two.
    #[must_use]
    pub fn one_connection(mut self) -> Self {
        self.options.one_connection = true;
        self
    }

    /// The clock that times actions and measures ages; CLOCK_MONOTONIC by default. With another clock,
    /// dispatch waits for its ticks by the runtime's timers.
    #[must_use]
    pub fn clock(mut self, clock: Clock) -> Self {
        self.options.clock = Some(clock);
        self
    }

    /// Connects, waiting until there is a server: while nothing listens, the name does not resolve or the
    /// handshake times out, it tries again every 100 ms (on Zenoh every 500 ms, also while no robot is
    /// alive). It reports this on stderr, after 5 s also why. The session's two connections run on threads of
    /// their own; if the second cannot be made, the first carries both lanes.
    ///
    /// # Errors
    /// At once: [`Error::Address`], [`Error::Busy`] naming the holder, [`Error::VersionMismatch`],
    /// [`Error::NotProtobuf`], [`Error::Http`], [`Error::Tls`], [`Error::Handshake`], [`Error::Thread`]; on
    /// Zenoh [`Error::SeveralRobots`], [`Error::ZenohConfig`] and [`Error::Zenoh`]. If what listens there does not
    /// complete the hello within 5 s, or answers wrongly, [`Error::Timeout`], [`Error::Disconnected`],
    /// [`Error::Rejected`] or [`Error::Protocol`]. [`Error::NoServer`] after the deadline, if one was set.
    #[cfg(any(feature = "websocket", feature = "zenoh"))]
    pub async fn connect(self) -> Result<PolicyClient, Error> {
        self.connect_on(connect::thread(CONNECTION_THREAD)?).await
    }

    /// What gives up the calls of the blocking client.
    #[cfg(any(feature = "websocket", feature = "zenoh"))]
    pub(crate) fn interrupt(&self) -> Option<InterruptCheck> {
        self.options.interrupt.clone()
    }

    /// Connects with the control lane's connection on `runtime`.
    #[cfg(any(feature = "websocket", feature = "zenoh"))]
    pub(crate) async fn connect_on(self, runtime: Runtime) -> Result<PolicyClient, Error> {
        Ok(self.client(connect::connect(&self.options, runtime).await?))
    }

    /// Searches for robots as [`PolicyClient::discover`], and also wherever the Zenoh configuration file
    /// connects to. Of the options only that file counts, and not the address.
    ///
    /// # Errors
    /// [`Error::ZenohConfig`], [`Error::Zenoh`] if multicast cannot be used, [`Error::Thread`].
    #[cfg(feature = "zenoh")]
    pub async fn discover(&self, duration: Duration) -> Result<Vec<DiscoveredRobot>, Error> {
        discover(self.options.zenoh_config.clone(), duration).await
    }

    /// Connects over a transport of the caller's, on the current tokio runtime.
    ///
    /// # Errors
    /// [`Error::Busy`], [`Error::VersionMismatch`], [`Error::Rejected`], or how the connection failed.
    pub async fn connect_over(self, transport: impl Transport) -> Result<PolicyClient, Error> {
        Ok(self.client(connect::connect_over(&self.options, transport).await?))
    }

    /// Connects over two transports of the caller's, so that observations and actions do not wait for each
    /// other.
    ///
    /// # Errors
    /// As [`PolicyClientBuilder::connect_over`]; also if the server accepts no second connection.
    pub async fn connect_over_two<T: Transport>(
        self,
        control: T,
        observations: T,
    ) -> Result<PolicyClient, Error> {
        Ok(self.client(connect::connect_over_two(&self.options, control, observations).await?))
    }

    fn client(&self, (session, welcome): Connected) -> PolicyClient {
        PolicyClient::new(session, welcome, &self.options)
    }
}

/// The name of the thread that drives the control lane's connection.
#[cfg(any(feature = "websocket", feature = "zenoh"))]
pub(crate) const CONNECTION_THREAD: &str = "chiral-client";
