//! A peer's session: how it begins, which connections belong to it, and its end, which comes once.

use std::{
    future::{Future, pending},
    sync::{Arc, OnceLock},
    time::Duration,
};

use chiral_proto::{Fault, TransportError, error::chain, message::Role};
use tokio::{sync::watch, time::sleep};

use crate::{core::ServerCore, send_queue::SendQueue};

/// For a last word and an orderly close.
pub(crate) const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Why a session ended.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum End {
    #[error("the peer said goodbye ({0})")]
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
}

/// An admitted peer, on one connection or two.
pub(crate) struct Session {
    pub(crate) id: u64,
    pub(crate) core: Arc<ServerCore>,
    /// What the second connection has to send.
    observations_queue: OnceLock<SendQueue>,
    ended: watch::Sender<Option<End>>,
    pub(crate) span: tracing::Span,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.core.unregister_session();
    }
}

impl Session {
    /// A new session, which controls the robot if it is to.
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
        if role == Role::Controller {
            core.control.claim(id, name)?;
        }
        tracing::info!(parent: &session.span, ?role, software, "connected");
        Ok(session)
    }

    /// Whether a second connection may join it. One that is still saying goodbye is over, and a stream that has
    /// begun stays where it is.
    pub(crate) fn accepts_second_connection(&self) -> bool {
        self.ended.borrow().is_none() && self.observations_queue().is_none()
    }

    /// From now on, and for good, what carries observations is sent by this connection.
    pub(crate) fn set_observations_queue(&self, queue: SendQueue) {
        let _ = self.observations_queue.set(queue);
    }

    pub(crate) fn observations_queue(&self) -> Option<&SendQueue> {
        self.observations_queue.get()
    }

    /// Ends the session, if it has not ended before: at once another may control the robot.
    pub(crate) fn end(&self, end: End) {
        let is_first = self.ended.send_if_modified(|ended| {
            let is_first = ended.is_none();
            ended.get_or_insert_with(|| end.clone());
            is_first
        });
        if is_first {
            self.core.control.release(self.id);
            tracing::info!(parent: &self.span, "disconnected: {end}");
        }
    }

    /// Runs the two loops of a connection, until the session has ended and nothing is half said; and why it
    /// has.
    pub(crate) async fn run(
        &self,
        receive: impl Future<Output = End>,
        send: impl Future<Output = End>,
    ) -> End {
        // Also if this future is dropped.
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
        let close_timed_out = async {
            self.ended().await;
            sleep(CLOSE_TIMEOUT).await;
        };
        tokio::select! {
            biased;
            () = receive => {}
            () = stopping => {}
            // Ends when the session does, but with nothing half said.
            () = async { self.end(send.await) } => {}
            () = close_timed_out => {}
        }
        self.ended().await
    }

    /// Returns when the session has ended, and why.
    pub(crate) async fn ended(&self) -> End {
        let mut ended = self.ended.subscribe();
        let end = ended.wait_for(Option::is_some).await;
        end.ok().and_then(|end| end.clone()).unwrap_or(End::ShuttingDown)
    }
}

struct EndOnDrop<'a>(&'a Session);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.end(End::ShuttingDown);
    }
}
