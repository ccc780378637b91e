//! One connection of a session: its sending side, from any thread. Its loops are in `session`.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::{Arc, Weak},
    task::Poll,
    time::Duration,
};

use chiral_proto::{Codec, Frame, Message, Notice, TransportError, message::ActionMessage};
use chiral_transport::{IdleTimeout, Pacing, Runtime};
use tokio::{
    sync::{Notify, watch},
    time::timeout,
};

use crate::{
    core::Core,
    dispatch::thread::ActionSink,
    error::Error,
    transport::{BoxFuture, DynTransport},
};

/// Which of a session's lanes a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Both: it is the session's only connection.
    Both,
    /// Subscriptions, credit and `get_obs`; and everything with an observation in it.
    Observations,
    /// Everything else.
    Control,
}

/// A transport, what drives it and what notices that its peer is idle.
pub(crate) struct Link {
    pub(crate) transport: Arc<dyn DynTransport>,
    pub(crate) runtime: Runtime,
    pub(crate) idle_timeout: IdleTimeout,
}

/// The sending side of a connection.
pub(crate) struct Connection {
    pub(crate) lane: Lane,
    pub(crate) codec: Codec,
    pub(crate) runtime: Runtime,
    pub(crate) idle_timeout: IdleTimeout,
    /// Notified when there is something new for the send loop.
    pub(crate) changed: Notify,
    core: Arc<Core>,
    /// The loops own it, so that it is closed when they end, even if clients are left.
    transport: Weak<dyn DynTransport>,
    /// Turns an error of the transport into the session's end.
    lost: fn(TransportError) -> Error,
    pacing: Pacing,
    closed: watch::Sender<bool>,
}

impl Connection {
    pub(crate) fn new(
        core: Arc<Core>,
        lane: Lane,
        link: &Link,
        pacing: Pacing,
        lost: fn(TransportError) -> Error,
    ) -> Connection {
        Connection {
            lane,
            codec: link.transport.codec(),
            runtime: link.runtime.clone(),
            idle_timeout: link.idle_timeout.clone(),
            changed: Notify::new(),
            core,
            transport: Arc::downgrade(&link.transport),
            lost,
            pacing,
            closed: watch::Sender::new(false),
        }
    }

    /// Encodes and sends a message.
    pub(crate) async fn send_message(&self, message: &Message) -> Result<(), Error> {
        self.send(self.codec.encode(message)?).await
    }

    /// Sends a frame. A connection that fails at it ends the session.
    pub(crate) async fn send(&self, frame: Frame) -> Result<(), Error> {
        if let Err(error) = self.try_send(frame).await {
            self.core.end((self.lost)(error));
        }
        self.core.state().check_alive()
    }

    /// Sends on the calling thread if the link is ready. Otherwise the connection's runtime completes it,
    /// also if the caller stops waiting: half a frame would be the end of the connection.
    pub(crate) async fn try_send(&self, frame: Frame) -> Result<(), TransportError> {
        let ended = || TransportError::lost("the session ended");
        let mut sending = self.transport.upgrade().ok_or_else(ended)?.send(frame);
        if let Poll::Ready(sent) = poll_fn(|context| Poll::Ready(sending.as_mut().poll(context))).await {
            return sent;
        }
        let closed = self.closed();
        let completing = self.runtime.spawn(async move {
            tokio::select! {
                sent = sending => sent,
                () = closed => Err(ended()),
            }
        });
        completing.await.unwrap_or_else(|_| Err(ended()))
    }

    /// Waits for a reply that arrives here; `what` it is. The limit starts anew for as long as a large message
    /// is arriving: on a slow link, that is the reply or what it waits behind.
    pub(crate) async fn within<T>(
        &self,
        limit: Duration,
        what: &'static str,
        reply: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let (mut reply, mut waited) = (pin!(reply), Duration::ZERO);
        loop {
            if let Ok(outcome) = timeout(limit, reply.as_mut()).await {
                return outcome;
            }
            waited = waited.saturating_add(limit);
            if !self.idle_timeout.is_mid_message() {
                return Err(Error::Timeout { what, waited });
            }
        }
    }

    /// The end of the session that an error of the transport means.
    pub(crate) fn lost(&self, error: TransportError) -> Error {
        (self.lost)(error)
    }

    /// Actions are about to be sent: large messages that arrive meanwhile leave the core to them.
    pub(crate) fn note_action(&self) {
        self.pacing.note_action();
    }

    /// Marks the connection as closed. Sends that still wait for the link fail.
    pub(crate) fn close(&self) {
        self.closed.send_replace(true);
    }

    /// Returns when the connection is closed.
    pub(crate) fn closed(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut closed = self.closed.subscribe();
        async move {
            let _ = closed.wait_for(|closed| *closed).await;
        }
    }
}

impl ActionSink for Connection {
    fn send_actions(&self, message: ActionMessage) -> BoxFuture<'_, Result<(), Error>> {
        self.note_action();
        Box::pin(async move { self.send_message(&Message::Notice(Notice::Action(message))).await })
    }
}
