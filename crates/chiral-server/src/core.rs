//! What all sessions of a server share: the robot's control thread, the observations, the options, and the
//! shutdown. It knows no session and no connection.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use chiral_proto::{
    Clock, Code, Fault, PROTOCOL_VERSION,
    message::{RobotInfo, Welcome},
};
use chiral_transport::Pacing;
#[cfg(any(feature = "websocket", feature = "zenoh"))]
use chiral_transport::Runtime;
#[cfg(feature = "zenoh")]
use chiral_transport::zenoh::SharedMemory;
use tokio::sync::watch;

use crate::{control::Control, error::Error, robot::Robot, sampler::Sampler};

/// How long a stopping server waits for its peers, and then for its robot.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// What all sessions of a server share.
pub(crate) struct ServerCore {
    pub(crate) robot: RobotInfo,
    pub(crate) sampler: Arc<Sampler>,
    pub(crate) control: Control,
    pub(crate) clock: Clock,
    pub(crate) options: Options,
    /// Asked for by the actions that arrive.
    pub(crate) pacing: Pacing,
    /// For observations to peers on this host, if it can be had.
    #[cfg(feature = "zenoh")]
    pub(crate) shared_memory: Option<SharedMemory>,
    /// For what is worth a line in the log, and not one for every connection.
    #[cfg(feature = "websocket")]
    pub(crate) host_runtime_logged: std::sync::Once,
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

impl ServerCore {
    /// Starts the control thread of this robot, and nothing else.
    pub(crate) fn start(
        robot: Box<dyn Robot>,
        info: RobotInfo,
        sampler: Arc<Sampler>,
        clock: Clock,
        options: Options,
        #[cfg(feature = "zenoh")] shared_memory: Option<SharedMemory>,
    ) -> Result<ServerCore, Error> {
        let (ended, control_ended) = watch::channel(false);
        let on_end = move || {
            ended.send_replace(true);
        };
        let spec = info.action_spec.clone();
        let control = Control::start(robot, spec, Arc::clone(&sampler), clock.clone(), on_end)?;
        Ok(ServerCore {
            robot: info,
            sampler,
            control,
            clock,
            options,
            pacing: Pacing::default(),
            #[cfg(feature = "zenoh")]
            shared_memory,
            #[cfg(feature = "websocket")]
            host_runtime_logged: std::sync::Once::new(),
            last_session: AtomicU64::new(0),
            observations_skipped: AtomicU64::new(0),
            sessions: watch::Sender::new(0),
            stopping: watch::Sender::new(false),
            control_ended,
        })
    }

    /// What this server says of its robot, to a session or, with 0, to none.
    pub(crate) fn welcome(&self, session: u64, attach_token: Bytes) -> Welcome {
        Welcome {
            protocol: PROTOCOL_VERSION,
            software: concat!("chiral-server ", env!("CARGO_PKG_VERSION")).to_owned(),
            session,
            episode: self.sampler.episode(),
            robot: self.robot.clone(),
            attach_token,
            controller: self.control.controller().unwrap_or_default(),
        }
    }

    /// A new session's number.
    pub(crate) fn register_session(&self) -> Result<u64, Fault> {
        if *self.stopping.borrow() {
            return Err(Fault::new(Code::ShuttingDown, "the server is shutting down"));
        }
        self.sessions.send_modify(|count| *count += 1);
        Ok(self.last_session.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// How many sessions there are.
    pub(crate) fn session_count(&self) -> usize {
        *self.sessions.borrow()
    }

    pub(crate) fn unregister_session(&self) {
        self.sessions.send_modify(|count| *count -= 1);
    }

    /// Tells the server to stop. Returns at once.
    pub(crate) fn request_stop(&self) {
        self.stopping.send_replace(true);
    }

    /// Returns when the server has been told to stop.
    pub(crate) async fn stop_requested(&self) {
        let mut stopping = self.stopping.subscribe();
        stopping.wait_for(|stopping| *stopping).await.map(drop).unwrap_or_default();
    }

    /// Waits for the peers to leave, then for the robot to hold.
    pub(crate) async fn wait_until_stopped(&self) {
        let mut sessions = self.sessions.subscribe();
        let _ = tokio::time::timeout(STOP_TIMEOUT, sessions.wait_for(|count| *count == 0)).await;
        self.control.stop();
        let mut ended = self.control_ended.clone();
        if tokio::time::timeout(STOP_TIMEOUT, ended.wait_for(|ended| *ended)).await.is_err() {
            tracing::warn!("the robot is still busy after {} s; not waiting for it", STOP_TIMEOUT.as_secs());
        }
    }
}

/// A thread for a connection; or, if there is none, the runtime that this is called in.
#[cfg(any(feature = "websocket", feature = "zenoh"))]
pub(crate) fn connection_runtime() -> Runtime {
    Runtime::thread("chiral-connection").unwrap_or_else(|error| {
        tracing::warn!("no thread for a connection: {error}");
        Runtime::current()
    })
}
