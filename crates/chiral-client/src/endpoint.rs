//! What an address leads to: WebSocket or Zenoh, one server and one connection whichever it is.

use std::time::Duration;

use chiral_proto::{Codec, Frame, Transport, TransportError, pool::Pool};
use chiral_transport::{IdleTimeout, Pacing};

#[cfg(feature = "websocket")]
use crate::websocket;
#[cfg(feature = "zenoh")]
use crate::zenoh;
use crate::{
    builder::{ConnectError, ConnectOptions},
    connection::Carries,
    error::Error,
};

/// Beginnings of addresses of Zenoh's, those among them that this client was not built for.
const ZENOHS: &[&str] = &[
    "tcp/",
    "tls/",
    "quic/",
    "unixsock-stream/",
    "zenoh:",
    "udp/",
    "ws/",
    "wss/",
    "serial/",
    "vsock/",
    "unixpipe/",
];

/// How to reach a server. A clone is the same server.
#[derive(Clone)]
pub(crate) enum Server {
    #[cfg(feature = "websocket")]
    WebSocket(websocket::Server),
    #[cfg(feature = "zenoh")]
    Zenoh(zenoh::Server),
}

/// A connection to a server.
pub(crate) enum Connection {
    #[cfg(feature = "websocket")]
    WebSocket(Box<websocket::Connection>),
    #[cfg(feature = "zenoh")]
    Zenoh(Box<chiral_transport::zenoh::ZenohTransport>),
    /// With a legacy server, which was asked so often whether it is there.
    #[cfg(feature = "zenoh")]
    Legacy(Box<chiral_transport::zenoh::LegacyTransport>, u64),
}

impl Server {
    /// The server at this address, reached as the builder's options say.
    pub(crate) fn parse(uri: &str, means: &ConnectOptions) -> Result<Server, Error> {
        let refuse = |reason: &str| Error::Address { uri: uri.to_owned(), reason: reason.to_owned() };
        #[cfg(feature = "zenoh")]
        if zenoh::Server::is_meant(uri) {
            return zenoh::Server::parse(uri, means).map(Server::Zenoh);
        }
        if ZENOHS.iter().any(|beginning| uri.starts_with(beginning)) {
            return Err(refuse(if cfg!(feature = "zenoh") {
                "of Zenoh's addresses only tcp/, tls/, quic/, unixsock-stream/ and zenoh: are supported"
            } else {
                "it is an address of Zenoh, which this program was built without"
            }));
        }
        if means.robot.is_some() {
            return Err(refuse("a robot's name is asked for, where there can be only one robot"));
        }
        if means.zenoh_config.is_some() {
            return Err(refuse("a Zenoh configuration is given for an address that is none of Zenoh's"));
        }
        #[cfg(feature = "websocket")]
        return websocket::Server::parse(uri, means).map(Server::WebSocket);
        #[cfg(not(feature = "websocket"))]
        Err(refuse("it is none of Zenoh's, and this program was built without WebSocket"))
    }

    /// Between two attempts to connect.
    pub(crate) fn retry_period(&self) -> Duration {
        match self {
            #[cfg(feature = "websocket")]
            Server::WebSocket(_) => Duration::from_millis(100),
            #[cfg(feature = "zenoh")]
            Server::Zenoh(_) => zenoh::RETRY_PERIOD,
        }
    }

    /// One attempt to connect, for what such a connection carries.
    pub(crate) async fn connect(
        &self,
        carries: Carries,
        max_frame: usize,
        pool: Pool,
        #[cfg_attr(
            not(feature = "websocket"),
            expect(unused_variables, reason = "Zenoh's large messages give way by themselves")
        )]
        pacing: Pacing,
    ) -> Result<Connection, ConnectError> {
        match self {
            #[cfg(feature = "websocket")]
            Server::WebSocket(server) => Ok(Connection::WebSocket(Box::new(
                websocket::connect(server, carries, max_frame, pool, pacing).await?,
            ))),
            #[cfg(feature = "zenoh")]
            Server::Zenoh(server) => server.connect(carries, max_frame, pool).await,
        }
    }
}

impl Connection {
    /// Expires when nothing has arrived for too long.
    pub(crate) fn idle_timeout(&self) -> IdleTimeout {
        match self {
            #[cfg(feature = "websocket")]
            Connection::WebSocket(transport) => transport.idle_timeout(),
            #[cfg(feature = "zenoh")]
            Connection::Zenoh(transport) => transport.idle_timeout(),
            // Nobody else than the server's own session there tells whether it is alive.
            #[cfg(feature = "zenoh")]
            Connection::Legacy(..) => IdleTimeout::never(),
        }
    }

    /// How often a legacy server was asked before it answered, on a network where questions may be lost; 0
    /// elsewhere.
    pub(crate) fn probes(&self) -> u64 {
        match self {
            #[cfg(feature = "websocket")]
            Connection::WebSocket(_) => 0,
            #[cfg(feature = "zenoh")]
            Connection::Zenoh(_) => 0,
            #[cfg(feature = "zenoh")]
            Connection::Legacy(_, probes) => *probes,
        }
    }
}

/// Both are the same, but for the type.
macro_rules! either {
    ($connection:expr, $transport:ident => $call:expr) => {
        match $connection {
            #[cfg(feature = "websocket")]
            Connection::WebSocket($transport) => $call,
            #[cfg(feature = "zenoh")]
            Connection::Zenoh($transport) => $call,
            #[cfg(feature = "zenoh")]
            Connection::Legacy($transport, _) => $call,
        }
    };
}

impl Transport for Connection {
    async fn send(&self, frame: Frame) -> Result<(), TransportError> {
        either!(self, transport => transport.send(frame).await)
    }

    async fn recv(&self) -> Result<Option<Frame>, TransportError> {
        either!(self, transport => transport.recv().await)
    }

    async fn close(&self) {
        either!(self, transport => transport.close().await)
    }

    fn codec(&self) -> Codec {
        either!(self, transport => transport.codec())
    }

    fn peer(&self) -> &str {
        either!(self, transport => transport.peer())
    }
}
