//! The server as its host sees it: how it is run, embedded, watched and stopped. How it is made is
//! `builder`'s.

#[cfg(feature = "websocket")]
use std::net::SocketAddr;
use std::{fmt, sync::Arc, sync::atomic::Ordering};

#[cfg(feature = "websocket")]
use axum::Router;
use chiral_proto::Transport;
use chiral_transport::IdleTimeout;
#[cfg(feature = "zenoh")]
use chiral_transport::zenoh::{SharedMemory, SharedMemoryCounts};
#[cfg(feature = "websocket")]
use tokio::net::TcpListener;

#[cfg(feature = "websocket")]
use crate::websocket;
#[cfg(feature = "zenoh")]
use crate::zenoh::ZenohServer;
use crate::{accept::Acceptor, control::ControlCounts, core::ServerCore};
#[cfg(any(feature = "websocket", feature = "zenoh"))]
use crate::{core::STOP_TIMEOUT, error::Error};

/// Serves a robot to policies: observations out, actions in.
///
/// It listens by itself ([`PolicyServer::run`], [`PolicyServer::serve`]) or is embedded in a host
/// ([`PolicyServer::into_router`]).
#[derive(Clone)]
pub struct PolicyServer {
    pub(crate) acceptor: Arc<Acceptor>,
}

impl PolicyServer {
    /// Tells how the server is doing and stops it, from anywhere.
    pub fn handle(&self) -> ServerHandle {
        ServerHandle { core: Arc::clone(&self.acceptor.core) }
    }

    /// Serves one peer over a connection of the host's, until it ends. Needs a tokio runtime.
    pub async fn serve_connection(&self, transport: impl Transport) {
        let idle_timeout = IdleTimeout::new(self.acceptor.core.options.idle_timeout);
        self.acceptor.serve(transport, idle_timeout).await;
    }
}

#[cfg(any(feature = "websocket", feature = "zenoh"))]
impl PolicyServer {
    /// Serves until it is shut down, on a runtime of its own; blocks. Not to be called within a tokio
    /// runtime: there, use [`PolicyServer::serve`].
    ///
    /// # Errors
    /// As [`PolicyServer::serve`]; also [`Error::Start`] if there can be no runtime.
    pub fn run(self) -> Result<(), Error> {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("chiral-server").build();
        let runtime = runtime.map_err(|source| Error::Start { what: "a tokio runtime", source })?;
        let served = runtime.block_on(self.serve());
        runtime.shutdown_timeout(STOP_TIMEOUT);
        served
    }

    /// Serves until it is shut down, on the caller's runtime: over WebSocket at the address that the server
    /// was built with, on a Zenoh network if it was built to, or both.
    ///
    /// # Errors
    /// [`Error::Bind`] if the address cannot be listened on; on a Zenoh network `Error::NameTaken` and
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

    /// The same, with a listener of the host's for WebSocket: at `/`, and `/healthz`.
    ///
    /// # Errors
    /// [`Error::Listener`] if the listener fails; on a Zenoh network `Error::NameTaken` and `Error::Zenoh`.
    #[cfg(feature = "websocket")]
    pub async fn serve_on(self, listener: TcpListener) -> Result<(), Error> {
        #[cfg(feature = "zenoh")]
        if self.acceptor.core.options.is_on_zenoh() {
            // Nobody is let in by WebSocket before the robot's name is its own on the network.
            let on_zenoh = ZenohServer::join(&self.acceptor).await?;
            let zenoh = async {
                on_zenoh.serve().await;
                Ok(())
            };
            return tokio::try_join!(zenoh, websocket::serve(self.acceptor, listener)).map(drop);
        }
        websocket::serve(self.acceptor, listener).await
    }

    /// The WebSocket route alone, at `/`, for a host to merge or to nest under any path. The server lives as
    /// long as the router and its sessions.
    #[cfg(feature = "websocket")]
    pub fn into_router(self) -> Router {
        websocket::router(self.acceptor)
    }

    /// `GET /healthz`: 200 while the robot is in service, 503 and the reason when it is not.
    #[cfg(feature = "websocket")]
    pub fn health_router(&self) -> Router {
        websocket::health_router(Arc::clone(&self.acceptor.core))
    }

    /// Serves until it is shut down, on the Zenoh network that the server was built for and nowhere else: for
    /// a host that takes the WebSocket route into an application of its own. Needs a tokio runtime, of any
    /// kind.
    ///
    /// # Errors
    /// [`Error::NameTaken`] if a robot of this name is alive on the network, [`Error::Zenoh`] if it cannot be
    /// joined.
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

/// Tells how a server is doing and stops it. A clone is a handle of the same server.
#[derive(Clone)]
pub struct ServerHandle {
    core: Arc<ServerCore>,
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
        self.core.request_stop();
    }

    /// The same, and waits until no peer is left and the robot has held; at most a few seconds.
    pub async fn shutdown_and_wait(&self) {
        self.shutdown();
        self.core.wait_until_stopped().await;
    }

    /// How the server is doing.
    pub fn stats(&self) -> ServerStats {
        let ControlCounts { applied, refused, failed } = self.core.control.counts();
        ServerStats {
            sessions: self.core.session_count(),
            rows_applied: applied,
            actions_refused: refused,
            actions_failed: failed,
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
