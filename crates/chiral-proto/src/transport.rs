//! [`Transport`]: what carries frames between two peers. The implementations are in `chiral-transport`.

use std::future::Future;

use crate::{
    codec::Codec,
    error::{Fault, TransportError},
    frame::Frame,
};

/// One connection that carries whole frames to and from one peer.
///
/// At most one `send` and one `recv` are in progress at a time. They run concurrently: a session is two
/// loops, so that a large outgoing observation never delays an incoming action. If either future is dropped
/// before it completes, the connection can only be closed or dropped.
///
/// `send` returns once the link is ready for another frame; the peer need not have received this one.
pub trait Transport: Send + Sync + 'static {
    /// Sends one frame, without joining its segments.
    fn send(&self, frame: Frame) -> impl Future<Output = Result<(), TransportError>> + Send;

    /// Receives the next frame; `None` once the peer has closed the connection cleanly.
    fn recv(&self) -> impl Future<Output = Result<Option<Frame>, TransportError>> + Send;

    /// Closes the connection in an orderly way, within a short time. Dropping it closes it at once.
    fn close(&self) -> impl Future<Output = ()> + Send;

    /// Closes the connection and sends the reason, if the transport can: for codecs that cannot encode
    /// errors.
    fn refuse(&self, _fault: &Fault) -> impl Future<Output = ()> + Send {
        self.close()
    }

    /// The codec that was negotiated with the peer.
    fn codec(&self) -> Codec;

    /// The peer's name for logs, such as its address.
    fn peer(&self) -> &str;
}
