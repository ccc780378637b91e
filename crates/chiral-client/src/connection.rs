//! One connection of a session: its sending side, which calls, loops and the dispatcher share.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    sync::{Arc, Weak},
    task::Poll,
};

use chiral_proto::{Codec, Frame, Transport, TransportError};
use chiral_transport::{IdleTimeout, Runtime};
use tokio::sync::{Notify, watch};

/// What a connection carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carries {
    /// It is the session's only one.
    Everything,
    /// Subscriptions, credit and `get_obs`; and everything with an observation in it.
    Observations,
    /// Everything else.
    Control,
}

/// A connection, to who sends by it; from any thread.
pub(crate) struct Lane {
    pub(crate) carries: Carries,
    pub(crate) codec: Codec,
    /// Something for its send loop has changed.
    pub(crate) changed: Notify,
    pub(crate) host: Runtime,
    pub(crate) idle_timeout: IdleTimeout,
    /// Held by its loops, so that it is closed when they end, whoever still has a client.
    carrier: Weak<dyn Carrier>,
    gone: watch::Sender<bool>,
}

type Sending = Pin<Box<dyn Future<Output = Result<(), TransportError>> + Send>>;

/// A transport behind a pointer, so that a client is one type whatever it connects by.
trait Carrier: Send + Sync {
    fn send(self: Arc<Self>, frame: Frame) -> Sending;
}

impl<T: Transport> Carrier for T {
    fn send(self: Arc<Self>, frame: Frame) -> Sending {
        Box::pin(async move { Transport::send(&*self, frame).await })
    }
}

impl Lane {
    pub(crate) fn new<T: Transport>(
        carries: Carries,
        transport: &Arc<T>,
        host: Runtime,
        idle_timeout: IdleTimeout,
    ) -> Lane {
        let carrier: Weak<T> = Arc::downgrade(transport);
        Lane {
            carries,
            codec: transport.codec(),
            changed: Notify::new(),
            host,
            idle_timeout,
            carrier,
            gone: watch::Sender::new(false),
        }
    }

    /// Sends from the caller's own thread, if the link is ready. Otherwise the connection's host does it in
    /// its turn, also if the caller stops waiting for it: half a frame would be the end of the connection.
    pub(crate) async fn send(&self, frame: Frame) -> Result<(), TransportError> {
        let ended = || TransportError::lost("the session ended");
        let mut sending = self.carrier.upgrade().ok_or_else(ended)?.send(frame);
        if let Poll::Ready(sent) = poll_fn(|context| Poll::Ready(sending.as_mut().poll(context))).await {
            return sent;
        }
        let gone = self.gone();
        let finishing = self.host.spawn(async move {
            tokio::select! {
                sent = sending => sent,
                () = gone => Err(ended()),
            }
        });
        finishing.await.unwrap_or_else(|_| Err(ended()))
    }

    /// The connection is closed; who is still sending is let go.
    pub(crate) fn leave(&self) {
        self.gone.send_replace(true);
    }

    /// Returns when the connection is closed.
    pub(crate) fn gone(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut gone = self.gone.subscribe();
        async move {
            let _ = gone.wait_for(|gone| *gone).await;
        }
    }
}
