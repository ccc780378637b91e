//! What an address leads to: a WebSocket server or a robot on a Zenoh network.

use std::{sync::Arc, time::Duration};

use chiral_transport::IdleTimeout;

#[cfg(feature = "websocket")]
use crate::websocket;
#[cfg(feature = "zenoh")]
use crate::zenoh;
use crate::{
    connect::options::{ConnectError, ConnectOptions, LinkOptions},
    error::Error,
    transport::DynTransport,
};

/// How addresses of Zenoh begin, also those that this client does not support.
const ZENOH_PREFIXES: &[&str] = &[
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

/// Where a server is and how it is reached. A clone is the same endpoint.
#[derive(Clone)]
pub(crate) enum Endpoint {
    #[cfg(feature = "websocket")]
    WebSocket(websocket::Endpoint),
    #[cfg(feature = "zenoh")]
    Zenoh(zenoh::Endpoint),
}

impl Endpoint {
    /// The endpoint at the options' address.
    pub(crate) fn parse(options: &ConnectOptions) -> Result<Endpoint, Error> {
        let uri = &options.uri;
        let refuse = |reason: &str| Error::Address { uri: uri.clone(), reason: reason.to_owned() };
        #[cfg(feature = "zenoh")]
        if zenoh::Endpoint::accepts(uri) {
            return zenoh::Endpoint::parse(options).map(Endpoint::Zenoh);
        }
        if ZENOH_PREFIXES.iter().any(|prefix| uri.starts_with(prefix)) {
            return Err(refuse(if cfg!(feature = "zenoh") {
                "of Zenoh's addresses only tcp/, tls/, quic/, unixsock-stream/ and zenoh: are supported"
            } else {
                "it is an address of Zenoh, which this program was built without"
            }));
        }
        if options.robot.is_some() {
            return Err(refuse("a robot's name was given, but this address leads to a single robot"));
        }
        if options.zenoh_config.is_some() {
            return Err(refuse("a Zenoh configuration was given, but this is not an address of Zenoh"));
        }
        #[cfg(feature = "websocket")]
        return websocket::Endpoint::parse(options).map(Endpoint::WebSocket);
        #[cfg(not(feature = "websocket"))]
        Err(refuse("it is not an address of Zenoh, and this program was built without WebSocket"))
    }

    /// The pause between two attempts to connect.
    pub(crate) fn retry_period(&self) -> Duration {
        match self {
            #[cfg(feature = "websocket")]
            Endpoint::WebSocket(_) => Duration::from_millis(100),
            #[cfg(feature = "zenoh")]
            Endpoint::Zenoh(_) => zenoh::RETRY_PERIOD,
        }
    }

    /// One attempt to connect.
    pub(crate) async fn connect(
        &self,
        options: LinkOptions,
    ) -> Result<(Arc<dyn DynTransport>, IdleTimeout), ConnectError> {
        match self {
            #[cfg(feature = "websocket")]
            Endpoint::WebSocket(endpoint) => {
                let transport = websocket::connect(endpoint, options).await?;
                let idle_timeout = transport.idle_timeout();
                Ok((Arc::new(transport), idle_timeout))
            }
            #[cfg(feature = "zenoh")]
            Endpoint::Zenoh(endpoint) => {
                let transport = endpoint.connect(options).await?;
                let idle_timeout = transport.idle_timeout();
                Ok((Arc::new(transport), idle_timeout))
            }
        }
    }
}
