//! What carries frames between two peers.

use std::future::Future;

use crate::{
    codec::Codec,
    error::{Fault, TransportError},
    frame::Frame,
};

/// One connection that carries whole frames to and from one peer.
///
/// At most one `send` and one `recv` are under way at a time, and they run concurrently: a session is two
/// loops, so that a large observation on its way out never delays an action on its way in. Both are
/// cancel-safe at least in this sense: after one was dropped half done, the connection may only be closed or
/// dropped.
///
/// `send` returns once the link is ready for another frame, which need not have arrived.
pub trait Transport: Send + Sync + 'static {
    /// Sends one frame, its segments as they are.
    fn send(&self, frame: Frame) -> impl Future<Output = Result<(), TransportError>> + Send;

    /// The next frame; `None` once the peer closed cleanly.
    fn recv(&self) -> impl Future<Output = Result<Option<Frame>, TransportError>> + Send;

    /// Closes in an orderly way, as far as that takes little time. Dropping closes at once.
    fn close(&self) -> impl Future<Output = ()> + Send;

    /// Closes, and says why, where the transport has words for it: for codecs that have none.
    fn refuse(&self, _fault: &Fault) -> impl Future<Output = ()> + Send {
        self.close()
    }

    /// What was agreed with the peer.
    fn codec(&self) -> Codec;

    /// The peer's name for the log, such as its address.
    fn peer(&self) -> &str;
}
