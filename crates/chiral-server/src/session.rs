//! The life of one session, which has one or two connections and ends once. How a session is found for a new
//! connection is `accept`'s; what a connection does, `connection`'s.

use std::{
    convert::Infallible,
    future::{Future, pending},
    sync::{Arc, OnceLock},
    time::Duration,
};

use chiral_proto::{Fault, TransportError, ValueMap, error::chain, message::Role};
use chiral_transport::IdleTimeout;
use tokio::{sync::watch, time::sleep};

use crate::{
    core::{SILENCE_LIMIT, ServerCore},
    robot::ResetRequest,
    send_queue::SendQueue,
};

/// How long the last message and the close handshake may take.
pub(crate) const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
const SILENCE_CHECK_PERIOD: Duration = Duration::from_millis(100);

/// Why a session ended.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum End {
    #[error("the peer sent a goodbye ({0})")]
    Goodbye(String),
    #[error("the peer closed the connection")]
    Closed,
    #[error("{}", chain(.0))]
    Lost(TransportError),
    #[error("nothing received for {} s", .0.as_secs_f64())]
    Idle(Duration),
    #[error("refused: {0}")]
    Refused(Fault),
    #[error("the server is shutting down")]
    ShuttingDown,
    #[error("ended by the robot's host: {0}")]
    Host(String),
}

/// A session of a peer, on one connection or two.
pub(crate) struct Session {
    pub(crate) id: u64,
    pub(crate) core: Arc<ServerCore>,
    /// Where everything that carries observations is sent, once that is decided.
    observations_queue: OnceLock<SendQueue>,
    ended: watch::Sender<Option<End>>,
    pub(crate) span: tracing::Span,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.core.unregister_session(self.id);
    }
}

impl Session {
    /// Opens a session, which controls the robot if `role` is `Controller`.
    pub(crate) fn open(
        core: &Arc<ServerCore>,
        role: Role,
        name: &str,
        software: &str,
        peer: &str,
    ) -> Result<Arc<Session>, Fault> {
        let id = core.register_session()?;
        let session = Arc::new(Session {
            id,
            core: Arc::clone(core),
            observations_queue: OnceLock::new(),
            ended: watch::Sender::new(None),
            span: tracing::info_span!("session", id, peer, client = name),
        });
        let ended = Arc::downgrade(&session);
        core.set_end_session(id, move |text| {
            if let Some(session) = ended.upgrade() {
                session.end(End::Host(text.to_owned()));
            }
        });
        if role == Role::Controller {
            // An event names the session from now on, and a host may end it.
            core.control.claim(id, name)?;
        }
        tracing::info!(parent: &session.span, ?role, software, "connected");
        Ok(session)
    }

    /// Whether a second connection may join: the session has not ended, and no stream has started on the
    /// first connection, where it would stay.
    pub(crate) fn accepts_second_connection(&self) -> bool {
        self.ended.borrow().is_none() && self.observations_queue().is_none()
    }

    /// Makes this the queue of everything that carries observations. The first call decides.
    pub(crate) fn set_observations_queue(&self, queue: SendQueue) {
        let _ = self.observations_queue.set(queue);
    }

    /// The send queue of the connection that carries observations, once that is decided.
    pub(crate) fn observations_queue(&self) -> Option<&SendQueue> {
        self.observations_queue.get()
    }

    /// Ends the session, unless it has ended already. From then on another session may control the robot.
    pub(crate) fn end(&self, end: End) {
        let is_first = self.ended.send_if_modified(|ended| {
            let is_first = ended.is_none();
            ended.get_or_insert_with(|| end.clone());
            is_first
        });
        if is_first {
            self.core.control.release(self.id, &end.to_string());
            tracing::info!(parent: &self.span, "disconnected: {end}");
        }
    }

    /// A request of this session's to start an episode.
    pub(crate) fn reset_request(&self, seed: Option<u64>, options: ValueMap) -> ResetRequest {
        let mut request = ResetRequest::new(self.id);
        (request.seed, request.options) = (seed, options);
        request
    }

    /// Makes the robot hold when nothing has arrived from its controller for a while, long before the session
    /// ends. Bytes of an incomplete message count as arrivals.
    pub(crate) async fn notice_silence(&self, idle_timeout: &IdleTimeout) -> Infallible {
        self.core.set_controller_idle(self.id, idle_timeout.clone());
        loop {
            idle_timeout.until_idle_for(SILENCE_LIMIT).await;
            self.core.control.note_silence(self.id);
            tracing::warn!(
                parent: &self.span,
                "nothing has arrived from the controller for {} s",
                SILENCE_LIMIT.as_secs()
            );
            while idle_timeout.idle_time().is_some_and(|idle| idle >= SILENCE_LIMIT) {
                sleep(SILENCE_CHECK_PERIOD).await;
            }
            tracing::info!(parent: &self.span, "something arrives from the controller again");
        }
    }

    /// Runs the two loops of a connection until the session has ended and no message is partly sent. Returns
    /// why it ended.
    pub(crate) async fn run(
        &self,
        receive: impl Future<Output = End>,
        send: impl Future<Output = End>,
    ) -> End {
        // Ends the session even if this future is dropped.
        let _end_on_drop = EndOnDrop(self);
        let receive = async {
            self.end(receive.await);
            pending().await
        };
        let stopping = async {
            self.core.stop_requested().await;
            self.end(End::ShuttingDown);
            pending().await
        };
        let timed_out = async {
            self.ended().await;
            sleep(CLOSE_TIMEOUT).await;
        };
        tokio::select! {
            biased;
            () = receive => {}
            () = stopping => {}
            // Returns after the session has ended, but never in the middle of a message.
            () = async { self.end(send.await) } => {}
            () = timed_out => {}
        }
        self.ended().await
    }

    /// Waits until the session has ended, and returns why.
    pub(crate) async fn ended(&self) -> End {
        let mut ended = self.ended.subscribe();
        let end = ended.wait_for(Option::is_some).await;
        end.ok().and_then(|end| end.clone()).unwrap_or(End::ShuttingDown)
    }
}

/// Ends the session when dropped.
struct EndOnDrop<'a>(&'a Session);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.end(End::ShuttingDown);
    }
}
