//! The server as its host sees it: running, embedding, monitoring and stopping it. `builder`
//! builds it.

use std::{
    fmt,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
#[cfg(any(feature = "websocket", feature = "zenoh"))]
use std::{future::Future, io, sync::mpsc, thread};

#[cfg(feature = "websocket")]
use axum::Router;
#[cfg(any(feature = "websocket", feature = "zenoh"))]
use chiral_proto::error::chain;
use chiral_proto::{Codec, Transport, lock};
#[cfg(feature = "zenoh")]
use chiral_transport::zenoh::SharedMemory;
use chiral_transport::{IdleTimeout, SharedMemoryCounts};
#[cfg(feature = "websocket")]
use tokio::net::TcpListener;
#[cfg(any(feature = "websocket", feature = "zenoh"))]
use tokio::runtime::Runtime;

#[cfg(feature = "websocket")]
use crate::websocket;
#[cfg(feature = "zenoh")]
use crate::zenoh::ZenohServer;
use crate::{accept::Acceptor, control::ControlEvents, core::ServerCore};
#[cfg(any(feature = "websocket", feature = "zenoh"))]
use crate::{
    core::{Listening, STOP_TIMEOUT},
    error::Error,
};

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
        run_on(runtime()?, self.serve())
    }

    /// Serves on a thread and a runtime of its own, and returns as soon as clients can connect. The handle
    /// says where, and stops it; dropping the handle does not. Blocks until then, also within a tokio runtime.
    ///
    /// # Errors
    /// As [`PolicyServer::run`], if the server cannot begin. If it fails later, that is logged.
    pub fn start(self) -> Result<ServerHandle, Error> {
        let handle = self.handle();
        let runtime = runtime()?;
        let failed = |source| Error::Start { what: "the server's thread", source };
        let (sender, begun) = mpsc::channel();
        let serving = async move {
            let listeners = match self.listen().await {
                Ok(listeners) => listeners,
                // Fails only if the caller has panicked.
                Err(error) => return drop(sender.send(Err(error))),
            };
            let _ = sender.send(Ok(()));
            if let Err(error) = listeners.serve(self.acceptor).await {
                tracing::error!("the server has failed: {}", chain(&error));
            }
        };
        let spawned =
            thread::Builder::new().name("chiral-server".to_owned()).spawn(move || run_on(runtime, serving));
        spawned.map_err(failed)?;
        begun.recv().unwrap_or_else(|_| Err(failed(io::Error::other("it has panicked"))))?;
        Ok(handle)
    }

    /// Serves until it is shut down, on the caller's runtime: over WebSocket, on a Zenoh network, or both, as
    /// the server was built.
    ///
    /// # Errors
    /// [`Error::Bind`] if the server cannot listen on the address; on a Zenoh network `Error::NameTaken` and
    /// `Error::Zenoh`.
    pub async fn serve(self) -> Result<(), Error> {
        self.listen().await?.serve(self.acceptor).await
    }

    /// The same as [`PolicyServer::serve`], with the host's listener for WebSocket: at `/`, and `/healthz`.
    ///
    /// # Errors
    /// [`Error::Listener`] if the listener fails; on a Zenoh network `Error::NameTaken` and `Error::Zenoh`.
    #[cfg(feature = "websocket")]
    pub async fn serve_on(self, listener: TcpListener) -> Result<(), Error> {
        self.listen_with(Some(listener)).await?.serve(self.acceptor).await
    }

    /// Begins to listen, as the server was built. Accepts no WebSocket before the robot's name is known to be
    /// unique on its Zenoh network.
    async fn listen(&self) -> Result<Listeners, Error> {
        #[cfg(feature = "websocket")]
        let websocket = {
            let options = &self.acceptor.core.options;
            let default = (!options.is_on_zenoh()).then(|| SocketAddr::from(([127, 0, 0, 1], 8765)));
            match options.bind.or(default) {
                None => None,
                Some(address) => {
                    let bound = TcpListener::bind(address).await;
                    Some(bound.map_err(|source| Error::Bind { address, source })?)
                }
            }
        };
        self.listen_with(
            #[cfg(feature = "websocket")]
            websocket,
        )
        .await
    }

    /// Joins the Zenoh network, if the server was built for one, and notes where the server listens.
    async fn listen_with(
        &self,
        #[cfg(feature = "websocket")] websocket: Option<TcpListener>,
    ) -> Result<Listeners, Error> {
        let core = &self.acceptor.core;
        #[cfg(feature = "zenoh")]
        let zenoh = match core.options.is_on_zenoh() {
            true => Some(ZenohServer::join(&self.acceptor).await?),
            false => None,
        };
        let listening = Listening {
            #[cfg(feature = "websocket")]
            websocket: websocket.as_ref().and_then(|listener| listener.local_addr().ok()),
            #[cfg(not(feature = "websocket"))]
            websocket: None,
            #[cfg(feature = "zenoh")]
            zenoh: match &zenoh {
                Some(zenoh) => zenoh.locators().await,
                None => Vec::new(),
            },
            #[cfg(not(feature = "zenoh"))]
            zenoh: Vec::new(),
        };
        *lock(&core.listening) = listening;
        Ok(Listeners {
            #[cfg(feature = "websocket")]
            websocket,
            #[cfg(feature = "zenoh")]
            zenoh,
        })
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
        let zenoh = ZenohServer::join(&self.acceptor).await?;
        let locators = zenoh.locators().await;
        lock(&self.acceptor.core.listening).zenoh = locators;
        zenoh.serve().await;
        Ok(())
    }
}

/// Where a server listens, before it accepts anybody.
#[cfg(any(feature = "websocket", feature = "zenoh"))]
struct Listeners {
    #[cfg(feature = "websocket")]
    websocket: Option<TcpListener>,
    #[cfg(feature = "zenoh")]
    zenoh: Option<ZenohServer>,
}

#[cfg(any(feature = "websocket", feature = "zenoh"))]
impl Listeners {
    /// Serves until the server is shut down, or one of the listeners fails.
    async fn serve(self, acceptor: Arc<Acceptor>) -> Result<(), Error> {
        let websocket = async {
            #[cfg(feature = "websocket")]
            if let Some(listener) = self.websocket {
                websocket::serve(acceptor, listener).await?;
            }
            #[cfg(not(feature = "websocket"))]
            drop(acceptor);
            Ok(())
        };
        let zenoh = async {
            #[cfg(feature = "zenoh")]
            if let Some(zenoh) = self.zenoh {
                zenoh.serve().await;
            }
            Ok(())
        };
        tokio::try_join!(websocket, zenoh).map(drop)
    }
}

#[cfg(any(feature = "websocket", feature = "zenoh"))]
fn runtime() -> Result<Runtime, Error> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("chiral-server").build();
    runtime.map_err(|source| Error::Start { what: "a tokio runtime", source })
}

/// Runs to the end, then leaves what is left of the runtime little time.
#[cfg(any(feature = "websocket", feature = "zenoh"))]
fn run_on<T>(runtime: Runtime, serving: impl Future<Output = T>) -> T {
    let served = runtime.block_on(serving);
    runtime.shutdown_timeout(STOP_TIMEOUT);
    served
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
#[non_exhaustive]
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
    /// For how long nothing has arrived from the controller, once that is 2 s; `None` while all is well.
    pub silent_for: Option<Duration>,
    /// Observations that streams skipped: their ticks passed while the link, the client or a sensor was not
    /// ready.
    pub observations_skipped: u64,
    /// Why the robot is out of service, if it is.
    pub out_of_service: Option<String>,
    /// How observations were sent to Zenoh peers: in shared memory or over the network.
    pub shared_memory: SharedMemoryCounts,
}

impl ServerHandle {
    /// The address on which the server accepts WebSocket connections, with the port that the system chose for
    /// port 0. `None` until it listens, and if it does not.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        lock(&self.core.listening).websocket
    }

    /// The locators at which the server can be reached on its Zenoh network; empty until it has joined one.
    pub fn zenoh_locators(&self) -> Vec<String> {
        lock(&self.core.listening).zenoh.clone()
    }

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

    /// The same as [`ServerHandle::shutdown_and_wait`], for code without a runtime; blocks.
    ///
    /// # Errors
    /// [`Error::Start`] if a thread to wait on cannot be started. The server shuts down all the same.
    #[cfg(any(feature = "websocket", feature = "zenoh"))]
    pub fn shutdown_blocking(&self) -> Result<(), Error> {
        self.shutdown();
        let (runtime, core) = (runtime()?, Arc::clone(&self.core));
        let wait = move || run_on(runtime, async move { core.wait_until_stopped().await });
        let waiting = thread::Builder::new().name("chiral-shutdown".to_owned()).spawn(wait);
        let waiting = waiting.map_err(|source| Error::Start { what: "a thread to wait on", source })?;
        waiting.join().map_err(|_| Error::Start {
            what: "a thread to wait on",
            source: io::Error::other("it has panicked"),
        })
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
            #[cfg(not(feature = "zenoh"))]
            shared_memory: SharedMemoryCounts::default(),
        }
    }
}

impl fmt::Debug for ServerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServerHandle({:?})", self.stats())
    }
}
