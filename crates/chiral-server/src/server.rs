//! The server as its host sees it: running, embedding, monitoring and stopping it. `builder`
//! builds it.

#[cfg(feature = "websocket")]
use std::net::SocketAddr;
use std::{
    fmt,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

#[cfg(feature = "websocket")]
use axum::Router;
use chiral_proto::{Codec, Transport};
use chiral_transport::IdleTimeout;
#[cfg(feature = "zenoh")]
use chiral_transport::zenoh::{SharedMemory, SharedMemoryCounts};
#[cfg(feature = "websocket")]
use tokio::net::TcpListener;

#[cfg(feature = "websocket")]
use crate::websocket;
#[cfg(feature = "zenoh")]
use crate::zenoh::ZenohServer;
use crate::{accept::Acceptor, control::ControlEvents, core::ServerCore};
#[cfg(any(feature = "websocket", feature = "zenoh"))]
use crate::{core::STOP_TIMEOUT, error::Error};

/// Serves a robot to policies: observations out, actions in.
///
/// It runs on its own ([`PolicyServer::run`], [`PolicyServer::serve`]) or is embedded in a host
/// ([`PolicyServer::into_router`]).
#[derive(Clone)]
pub struct PolicyServer {
    pub(crate) acceptor: Arc<Acceptor>,
}

impl PolicyServer {
    /// Returns a handle that monitors and stops the server from anywhere.
    pub fn handle(&self) -> ServerHandle {
        ServerHandle { core: Arc::clone(&self.acceptor.core) }
    }

    /// Serves one peer over a connection that the host provides, until it ends. Needs a tokio runtime.
    pub async fn serve_connection(&self, transport: impl Transport) {
        let idle_timeout = match transport.codec() {
            Codec::Protobuf => IdleTimeout::new(self.acceptor.core.options.idle_timeout),
            // Nothing pings a peer of another wire here, and it may be idle for as long as it likes.
            _ => IdleTimeout::never(),
        };
        self.acceptor.serve(transport, idle_timeout).await;
    }
}

#[cfg(any(feature = "websocket", feature = "zenoh"))]
impl PolicyServer {
    /// Serves until it is shut down, on a runtime of its own, and blocks the caller. Within a tokio runtime,
    /// use [`PolicyServer::serve`] instead.
    ///
    /// # Errors
    /// As [`PolicyServer::serve`]; also [`Error::Start`] if the runtime cannot be started.
    pub fn run(self) -> Result<(), Error> {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("chiral-server").build();
        let runtime = runtime.map_err(|source| Error::Start { what: "a tokio runtime", source })?;
        let served = runtime.block_on(self.serve());
        runtime.shutdown_timeout(STOP_TIMEOUT);
        served
    }

    /// Serves until it is shut down, on the caller's runtime: over WebSocket, on a Zenoh network, or both, as
    /// the server was built.
    ///
    /// # Errors
    /// [`Error::Bind`] if the server cannot listen on the address; on a Zenoh network `Error::NameTaken` and
    /// `Error::Zenoh`.
    pub async fn serve(self) -> Result<(), Error> {
        #[cfg(feature = "websocket")]
        {
            let options = &self.acceptor.core.options;
            let default = (!options.is_on_zenoh()).then(|| SocketAddr::from(([127, 0, 0, 1], 8765)));
            if let Some(address) = options.bind.or(default) {
                let listener =
                    TcpListener::bind(address).await.map_err(|source| Error::Bind { address, source })?;
                return self.serve_on(listener).await;
            }
        }
        #[cfg(feature = "zenoh")]
        self.serve_zenoh().await?;
        Ok(())
    }

    /// The same as [`PolicyServer::serve`], with the host's listener for WebSocket: at `/`, and `/healthz`.
    ///
    /// # Errors
    /// [`Error::Listener`] if the listener fails; on a Zenoh network `Error::NameTaken` and `Error::Zenoh`.
    #[cfg(feature = "websocket")]
    pub async fn serve_on(self, listener: TcpListener) -> Result<(), Error> {
        #[cfg(feature = "zenoh")]
        if self.acceptor.core.options.is_on_zenoh() {
            // Accept no WebSocket before the robot's name is known to be unique on the network.
            let on_zenoh = ZenohServer::join(&self.acceptor).await?;
            let zenoh = async {
                on_zenoh.serve().await;
                Ok(())
            };
            return tokio::try_join!(zenoh, websocket::serve(self.acceptor, listener)).map(drop);
        }
        websocket::serve(self.acceptor, listener).await
    }

    /// Returns the WebSocket route alone, at `/`, for a host to merge or to nest under any path. The server
    /// lives as long as the router and its sessions.
    #[cfg(feature = "websocket")]
    pub fn into_router(self) -> Router {
        websocket::router(self.acceptor)
    }

    /// Returns the route `GET /healthz`: 200 while the robot is in service, 503 and the reason when it is
    /// not.
    #[cfg(feature = "websocket")]
    pub fn health_router(&self) -> Router {
        websocket::health_router(Arc::clone(&self.acceptor.core))
    }

    /// Serves until it is shut down, on the Zenoh network that the server was built for and nowhere else.
    /// This is for a host that mounts the WebSocket route in its own application. Needs a tokio runtime, of
    /// any kind.
    ///
    /// # Errors
    /// [`Error::NameTaken`] if a robot of this name is alive on the network, [`Error::Zenoh`] if the server
    /// cannot join it.
    #[cfg(feature = "zenoh")]
    pub async fn serve_zenoh(self) -> Result<(), Error> {
        ZenohServer::join(&self.acceptor).await?.serve().await;
        Ok(())
    }
}

impl fmt::Debug for PolicyServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let robot = &self.acceptor.core.robot.name;
        f.debug_struct("PolicyServer").field("robot", robot).finish_non_exhaustive()
    }
}

/// Monitors and stops a server. A clone is a handle of the same server.
#[derive(Clone)]
pub struct ServerHandle {
    core: Arc<ServerCore>,
}

/// The state and the counters of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerStats {
    /// Sessions that are open now.
    pub sessions: usize,
    /// Rows that the robot applied.
    pub rows_applied: u64,
    /// Actions refused on arrival, or dropped or cut short by a reset or the end of the controller's session.
    pub actions_refused: u64,
    /// Actions for which the robot's own code failed.
    pub actions_failed: u64,
    /// Rows that were dropped because they were late.
    pub rows_late: u64,
    /// Rows that were dropped because newer ones overtook them.
    pub rows_superseded: u64,
    /// How often the robot was made to hold.
    pub holds: u64,
    /// The controller's name, if there is one.
    pub controller: Option<String>,
    /// For how long nothing has arrived from the controller, if there is one; it pings every second.
    pub silent_for: Option<Duration>,
    /// Observations that streams skipped: their ticks passed while the link, the client or a sensor was not
    /// ready.
    pub observations_skipped: u64,
    /// Why the robot is out of service, if it is.
    pub out_of_service: Option<String>,
    /// How observations were sent to Zenoh peers: in shared memory or over the network.
    #[cfg(feature = "zenoh")]
    pub shared_memory: SharedMemoryCounts,
}

impl ServerHandle {
    /// Starts the shutdown and returns at once: every session ends with a goodbye, the robot holds, and `run`
    /// and `serve` return.
    pub fn shutdown(&self) {
        self.core.request_stop();
    }

    /// Shuts down, and waits until all sessions have ended and the robot has held; at most a few seconds.
    pub async fn shutdown_and_wait(&self) {
        self.shutdown();
        self.core.wait_until_stopped().await;
    }

    /// Ends a session, for instance the controller's, with a text that its client is shown. Returns whether
    /// there is such a session; [`ControlEvents`] and the log name the ids.
    pub fn end_session(&self, session: u64, text: &str) -> bool {
        self.core.end_session(session, text)
    }

    /// Subscribes to what happens from now on to the robot's controller, its actions and its episode.
    pub fn events(&self) -> ControlEvents {
        self.core.control.events()
    }

    /// Returns the state and the counters of the server.
    pub fn stats(&self) -> ServerStats {
        let counts = self.core.control.counts();
        ServerStats {
            sessions: self.core.session_count(),
            rows_applied: counts.applied,
            actions_refused: counts.refused,
            actions_failed: counts.failed,
            rows_late: counts.late,
            rows_superseded: counts.superseded,
            holds: counts.holds,
            controller: self.core.control.controller(),
            silent_for: self.core.silent_for(),
            observations_skipped: self.core.observations_skipped.load(Ordering::Relaxed),
            out_of_service: self.core.control.out_of_service().map(|fault| fault.text),
            #[cfg(feature = "zenoh")]
            shared_memory: self.core.shared_memory.as_ref().map(SharedMemory::counts).unwrap_or_default(),
        }
    }
}

impl fmt::Debug for ServerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServerHandle({:?})", self.stats())
    }
}
