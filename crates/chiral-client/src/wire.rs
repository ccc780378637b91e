//! What a session needs of its wire. `native` implements it for protobuf, `legacy` for the msgpack wire of
//! legacy servers. The session does not know which it has; `connect` chose.

use chiral_proto::{Frame, Reply, Request};

use crate::{connection::Connection, error::Error, transport::BoxFuture};

/// One session's requests and frames, on one kind of wire.
pub(crate) trait Wire: Send + Sync {
    /// Sends a request and returns its reply.
    fn request(&self, request: Request) -> BoxFuture<'_, Result<Reply, Error>>;

    /// Handles a frame that has arrived. An error ends the session.
    fn receive(&self, connection: &Connection, frame: Frame) -> Result<(), Error>;

    /// Sends what nobody called for, such as pings; returns only with an error, which ends the session.
    fn run_sender<'a>(&'a self, connection: &'a Connection) -> BoxFuture<'a, Error>;

    /// Whether a server closes its side when the client has closed.
    fn awaits_close(&self) -> bool;
}
