//! The client for policy code without a runtime: every call blocks.

use std::{fmt, future::Future, sync::Arc, time::Duration};

use chiral_proto::{
    ActionChunk, Codec, Observation, StepResult, Timestamp, ValueMap, action::Action, message::RobotInfo,
};
use chiral_transport::Runtime;
use tokio::{runtime::Handle, time::timeout};

#[cfg(any(feature = "websocket", feature = "zenoh"))]
use crate::{builder::CONNECTION_THREAD, connect};
use crate::{
    builder::PolicyClientBuilder,
    client,
    dispatch::put::PutOptions,
    error::Error,
    interrupt::{InterruptCheck, block_on},
    stats::ClientStats,
    stream_options::StreamOptions,
};

/// For closing a client that is dropped without `close`.
const DROP_TIMEOUT: Duration = Duration::from_millis(500);

type Result<T, E = Error> = std::result::Result<T, E>;

/// The policy's end of a connection to a robot; see [`crate::PolicyClient`], call by call. Not to be used
/// within a tokio runtime.
#[derive(Clone)]
pub struct PolicyClient {
    connection: Arc<Connection>,
}

/// A client and the runtime that drives it.
struct Connection {
    client: client::PolicyClient,
    runtime: Runtime,
    interrupt: Option<InterruptCheck>,
}

impl PolicyClientBuilder {
    /// Connects as [`PolicyClientBuilder::connect`], for code without a runtime; blocks.
    ///
    /// # Errors
    /// As there.
    #[cfg(any(feature = "websocket", feature = "zenoh"))]
    pub fn connect_blocking(self) -> Result<PolicyClient> {
        let runtime = connect::thread(CONNECTION_THREAD)?;
        let interrupt = self.interrupt();
        let client = block_on(&runtime, interrupt.as_ref(), self.connect_on(runtime.clone()))?;
        Ok(PolicyClient { connection: Arc::new(Connection { client, runtime, interrupt }) })
    }

    /// Searches for robots as [`PolicyClientBuilder::discover`], for code without a runtime; blocks.
    ///
    /// # Errors
    /// As there.
    #[cfg(feature = "zenoh")]
    pub fn discover_blocking(&self, duration: Duration) -> Result<Vec<crate::DiscoveredRobot>> {
        block_on(&connect::thread(CONNECTION_THREAD)?, self.interrupt().as_ref(), self.discover(duration))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Within a runtime nothing may block. The connections' threads then send the goodbye, if the process
        // lives on.
        if Handle::try_current().is_err() {
            let _ = self.runtime.block_on(async { timeout(DROP_TIMEOUT, self.client.close()).await });
        }
    }
}

impl PolicyClient {
    /// Connects to the robot at `uri`, such as `ws://localhost:8765` or, over Zenoh, `tcp/localhost:7447`,
    /// waiting until there is a server.
    ///
    /// # Errors
    /// See [`PolicyClientBuilder::connect`].
    #[cfg(any(feature = "websocket", feature = "zenoh"))]
    pub fn connect(uri: &str) -> Result<PolicyClient> {
        PolicyClient::builder(uri).connect_blocking()
    }

    /// See [`crate::PolicyClient::discover`].
    ///
    /// # Errors
    /// As there.
    #[cfg(feature = "zenoh")]
    pub fn discover(duration: Duration) -> Result<Vec<crate::DiscoveredRobot>> {
        PolicyClient::builder(client::PolicyClient::DEFAULT_ZENOH_URI).discover_blocking(duration)
    }

    /// A client to be configured, then connected by [`PolicyClientBuilder::connect_blocking`].
    pub fn builder(uri: &str) -> PolicyClientBuilder {
        client::PolicyClient::builder(uri)
    }

    /// See [`crate::PolicyClient::codec`].
    pub fn codec(&self) -> Codec {
        self.connection.client.codec()
    }

    /// See [`crate::PolicyClient::robot`].
    pub fn robot(&self) -> &RobotInfo {
        self.connection.client.robot()
    }

    /// See [`crate::PolicyClient::get_metadata`].
    ///
    /// # Errors
    /// As there; so with every call.
    pub fn get_metadata(&self) -> Result<ValueMap> {
        self.wait(self.connection.client.get_metadata())
    }

    /// See [`crate::PolicyClient::reset`].
    pub fn reset(&self) -> Result<(Arc<Observation>, ValueMap)> {
        self.wait(self.connection.client.reset())
    }

    /// See [`crate::PolicyClient::reset_with`].
    pub fn reset_with(&self, seed: Option<u64>, options: ValueMap) -> Result<(Arc<Observation>, ValueMap)> {
        self.wait(self.connection.client.reset_with(seed, options))
    }

    /// See [`crate::PolicyClient::get_obs`].
    pub fn get_obs(&self) -> Result<Arc<Observation>> {
        self.wait(self.connection.client.get_obs())
    }

    /// See [`crate::PolicyClient::step`].
    pub fn step(&self, chunk: impl Into<ActionChunk>) -> Result<StepResult> {
        self.wait(self.connection.client.step(chunk))
    }

    /// See [`crate::PolicyClient::start_obs_stream`].
    pub fn start_obs_stream(&self, options: impl Into<StreamOptions>) -> Result<()> {
        self.wait(self.connection.client.start_obs_stream(options))
    }

    /// See [`crate::PolicyClient::stop_obs_stream`].
    pub fn stop_obs_stream(&self) -> Result<()> {
        self.wait(self.connection.client.stop_obs_stream())
    }

    /// See [`crate::PolicyClient::latest_obs`].
    pub fn latest_obs(&self) -> Result<Option<Arc<Observation>>> {
        self.connection.client.latest_obs()
    }

    /// See [`crate::PolicyClient::next_obs`].
    pub fn next_obs(&self, limit: Duration) -> Result<Arc<Observation>> {
        self.wait(self.connection.client.next_obs(limit))
    }

    /// See [`crate::PolicyClient::start_action_dispatch`].
    pub fn start_action_dispatch(&self, hz: f64) -> Result<()> {
        self.connection.client.start_action_dispatch(hz)
    }

    /// See [`crate::PolicyClient::stop_action_dispatch`].
    pub fn stop_action_dispatch(&self) {
        self.connection.client.stop_action_dispatch();
    }

    /// See [`crate::PolicyClient::put_action`].
    pub fn put_action(&self, action: impl Into<Action>) -> Result<()> {
        self.wait(self.connection.client.put_action(action))
    }

    /// See [`crate::PolicyClient::put_chunk`].
    pub fn put_chunk(&self, chunk: impl Into<ActionChunk>, options: impl Into<PutOptions>) -> Result<()> {
        self.wait(self.connection.client.put_chunk(chunk, options))
    }

    /// See [`crate::PolicyClient::try_put_action`].
    pub fn try_put_action(&self, action: impl Into<Action>) -> Result<()> {
        self.connection.client.try_put_action(action)
    }

    /// See [`crate::PolicyClient::try_put_chunk`].
    pub fn try_put_chunk(&self, chunk: impl Into<ActionChunk>, options: impl Into<PutOptions>) -> Result<()> {
        self.connection.client.try_put_chunk(chunk, options)
    }

    /// See [`crate::PolicyClient::clear_actions`].
    pub fn clear_actions(&self) {
        self.connection.client.clear_actions();
    }

    /// See [`crate::PolicyClient::send_action`].
    pub fn send_action(&self, actions: impl Into<ActionChunk>) -> Result<()> {
        self.wait(self.connection.client.send_action(actions))
    }

    /// See [`crate::PolicyClient::age`].
    pub fn age(&self, captured_at: Timestamp) -> Option<Duration> {
        self.connection.client.age(captured_at)
    }

    /// See [`crate::PolicyClient::stats`].
    pub fn stats(&self) -> ClientStats {
        self.connection.client.stats()
    }

    /// See [`crate::PolicyClient::close`].
    pub fn close(&self) -> Result<()> {
        self.connection.runtime.block_on(self.connection.client.close())
    }

    fn wait<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        let Connection { runtime, interrupt, .. } = &*self.connection;
        block_on(runtime, interrupt.as_ref(), call)
    }
}

impl fmt::Debug for PolicyClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.connection.client.fmt(f)
    }
}
