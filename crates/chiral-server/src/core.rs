//! What all sessions of a server share: the control thread, the sampler, the options and the shutdown. It
//! knows neither sessions nor connections.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use chiral_proto::{
    ActionChunk, Clock, Code, Fault, PROTOCOL_VERSION, lock,
    message::{RobotInfo, Welcome},
};
#[cfg(any(feature = "websocket", feature = "zenoh"))]
use chiral_transport::Runtime;
#[cfg(feature = "zenoh")]
use chiral_transport::zenoh::SharedMemory;
use chiral_transport::{IdleTimeout, Pacing};
use tokio::sync::watch;

use crate::{
    control::{Control, ControlledRobot, Limits},
    error::Error,
    sampler::Sampler,
};

/// How long a stopping server waits for its sessions to end, and then for its robot.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// When it is noticed that nothing arrives from the controller.
pub(crate) const SILENCE_LIMIT: Duration = Duration::from_secs(2);

/// Where a server can be reached.
#[derive(Debug, Default)]
pub(crate) struct Listening {
    pub(crate) websocket: Option<SocketAddr>,
    pub(crate) zenoh: Vec<String>,
}

/// Ends a session with a text.
type EndSession = Arc<dyn Fn(&str) + Send + Sync>;

/// What all sessions of a server share.
pub(crate) struct ServerCore {
    pub(crate) robot: RobotInfo,
    pub(crate) sampler: Arc<Sampler>,
    pub(crate) control: Control,
    pub(crate) clock: Clock,
    pub(crate) options: Options,
    /// Notified of the actions that arrive, for the connections that send large messages.
    pub(crate) pacing: Pacing,
    /// For observations to peers on this host, where the system provides it.
    #[cfg(feature = "zenoh")]
    pub(crate) shared_memory: Option<SharedMemory>,
    /// Makes the server log only once that connections run on the host's runtime.
    #[cfg(feature = "websocket")]
    pub(crate) host_runtime_logged: std::sync::Once,
    last_session: AtomicU64,
    pub(crate) observations_skipped: AtomicU64,
    /// Where the server listens.
    pub(crate) listening: Mutex<Listening>,
    sessions: watch::Sender<usize>,
    /// How a session is ended from outside, by its id.
    end_session: Mutex<BTreeMap<u64, EndSession>>,
    /// The controller's session, and since when nothing has arrived from it.
    controller_idle: Mutex<Option<(u64, IdleTimeout)>>,
    stopping: watch::Sender<bool>,
    control_ended: watch::Receiver<bool>,
}

/// The options of a server.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// Absent unless the user gave an address.
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
        robot: ControlledRobot,
        limits: Limits,
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
        let control = Control::start(robot, limits, Arc::clone(&sampler), clock.clone(), on_end)?;
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
            listening: Mutex::default(),
            sessions: watch::Sender::new(0),
            end_session: Mutex::default(),
            controller_idle: Mutex::default(),
            stopping: watch::Sender::new(false),
            control_ended,
        })
    }

    /// The description of the robot that a session gets, or with session 0 a peer that has none.
    pub(crate) fn welcome(&self, session: u64, attach_token: Bytes) -> Welcome {
        Welcome {
            protocol: PROTOCOL_VERSION,
            software: concat!("chiral-server ", env!("CARGO_PKG_VERSION")).to_owned(),
            session,
            episode: self.sampler.episode(),
            robot: self.robot.clone(),
            attach_token,
            controller: self.control.controller().unwrap_or_default(),
            max_chunk_rows: ActionChunk::MAX_ROWS,
        }
    }

    /// Counts a new session and returns its id.
    pub(crate) fn register_session(&self) -> Result<u64, Fault> {
        if *self.stopping.borrow() {
            return Err(Fault::new(Code::ShuttingDown, "the server is shutting down"));
        }
        self.sessions.send_modify(|count| *count += 1);
        Ok(self.last_session.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// The number of sessions.
    pub(crate) fn session_count(&self) -> usize {
        *self.sessions.borrow()
    }

    /// Sets how a session is ended from outside.
    pub(crate) fn set_end_session(&self, session: u64, end: impl Fn(&str) + Send + Sync + 'static) {
        lock(&self.end_session).insert(session, Arc::new(end));
    }

    /// Ends a session with a text for its client. Returns whether there is such a session.
    pub(crate) fn end_session(&self, session: u64, text: &str) -> bool {
        let end = lock(&self.end_session).get(&session).cloned();
        end.inspect(|end| end(text)).is_some()
    }

    /// Sets what notices when nothing arrives from the controller's session.
    pub(crate) fn set_controller_idle(&self, session: u64, idle_timeout: IdleTimeout) {
        *lock(&self.controller_idle) = Some((session, idle_timeout));
    }

    /// For how long nothing has arrived from the controller, if that is too long.
    pub(crate) fn silent_for(&self) -> Option<Duration> {
        let idle_time = lock(&self.controller_idle).as_ref().and_then(|(_, timeout)| timeout.idle_time());
        idle_time.filter(|idle_time| *idle_time >= SILENCE_LIMIT)
    }

    pub(crate) fn unregister_session(&self, session: u64) {
        lock(&self.end_session).remove(&session);
        lock(&self.controller_idle).take_if(|(controller, _)| *controller == session);
        self.sessions.send_modify(|count| *count -= 1);
    }

    /// Makes the server stop. Returns at once.
    pub(crate) fn request_stop(&self) {
        self.stopping.send_replace(true);
    }

    /// Waits until the server is to stop.
    pub(crate) async fn stop_requested(&self) {
        let mut stopping = self.stopping.subscribe();
        stopping.wait_for(|stopping| *stopping).await.map(drop).unwrap_or_default();
    }

    /// Waits for all sessions to end, then for the robot to hold.
    pub(crate) async fn wait_until_stopped(&self) {
        let mut sessions = self.sessions.subscribe();
        let _ = tokio::time::timeout(STOP_TIMEOUT, sessions.wait_for(|count| *count == 0)).await;
        self.control.stop();
        let mut ended = self.control_ended.clone();
        if tokio::time::timeout(STOP_TIMEOUT, ended.wait_for(|ended| *ended)).await.is_err() {
            tracing::warn!("the robot is still busy after {} s: not waiting for it", STOP_TIMEOUT.as_secs());
        }
    }
}

/// A thread for one connection or, if none can be started, the caller's runtime.
#[cfg(any(feature = "websocket", feature = "zenoh"))]
pub(crate) fn connection_runtime() -> Runtime {
    Runtime::thread("chiral-connection").unwrap_or_else(|error| {
        tracing::warn!("cannot start a thread for a connection, so it runs on the current runtime: {error}");
        Runtime::current()
    })
}
