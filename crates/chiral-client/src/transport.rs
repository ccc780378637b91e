//! A transport behind a pointer, so that a session is one type whatever it connects by.

use std::{future::Future, pin::Pin, sync::Arc};

use chiral_proto::{Codec, Frame, Transport, TransportError};

/// A future behind a pointer.
pub(crate) type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// [`Transport`], for trait objects.
pub(crate) trait DynTransport: Send + Sync {
    /// See [`Transport::send`]. The future owns the transport, so that another task can complete it.
    fn send(self: Arc<Self>, frame: Frame) -> BoxFuture<'static, Result<(), TransportError>>;

    /// See [`Transport::recv`].
    fn recv(&self) -> BoxFuture<'_, Result<Option<Frame>, TransportError>>;

    /// See [`Transport::close`].
    fn close(&self) -> BoxFuture<'_, ()>;

    /// See [`Transport::codec`].
    fn codec(&self) -> Codec;
}

impl<T: Transport> DynTransport for T {
    fn send(self: Arc<Self>, frame: Frame) -> BoxFuture<'static, Result<(), TransportError>> {
        Box::pin(async move { Transport::send(&*self, frame).await })
    }

    fn recv(&self) -> BoxFuture<'_, Result<Option<Frame>, TransportError>> {
        Box::pin(Transport::recv(self))
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(Transport::close(self))
    }

    fn codec(&self) -> Codec {
        Transport::codec(self)
    }
}
