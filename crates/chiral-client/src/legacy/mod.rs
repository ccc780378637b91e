//! Servers of today's Chiral peers, which speak the msgpack wire: their sessions, and probing for them on
//! Zenoh networks. Messages are encoded by `chiral_proto::codec::msgpack`; a WebSocket without a subprotocol
//! is negotiated in `websocket`.

mod pending;
mod session;
mod stream;
#[cfg(feature = "zenoh")]
mod zenoh;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use chiral_proto::{
    ActionSpec, Codec, PROTOCOL_VERSION, Request,
    message::{RobotInfo, Role, Welcome},
};
#[cfg(any(feature = "websocket", feature = "zenoh"))]
use chiral_transport::Runtime;
use tokio::time::timeout;

use self::session::{LegacyOptions, LegacyWire, lost};
#[cfg(any(feature = "websocket", feature = "zenoh"))]
use crate::{connect::options::ConnectError, endpoint::Endpoint};
use crate::{
    connect::options::{ConnectOptions, Shared},
    connection::Link,
    core::Core,
    error::Error,
    session::{Connections, Session},
};

/// Finds legacy servers where a normal attempt to connect found none: on Zenoh networks.
#[cfg(any(feature = "websocket", feature = "zenoh"))]
#[derive(Default)]
pub(crate) struct Prober {
    #[cfg(feature = "zenoh")]
    zenoh: zenoh::Prober,
}

#[cfg(any(feature = "websocket", feature = "zenoh"))]
impl Prober {
    /// Probes once, after an attempt to connect to `endpoint` failed with `error`. Returns the link to a
    /// legacy server and how many probes were sent.
    #[cfg_attr(not(feature = "zenoh"), expect(unused_variables, reason = "only Zenoh networks are probed"))]
    pub(crate) async fn try_connect(
        &self,
        options: &ConnectOptions,
        endpoint: &Endpoint,
        runtime: &Runtime,
        shared: &Shared,
        error: ConnectError,
    ) -> Result<(Link, u64), ConnectError> {
        match (error, endpoint) {
            #[cfg(feature = "zenoh")]
            (ConnectError::Unavailable(reason), Endpoint::Zenoh(endpoint)) => {
                self.zenoh.try_connect(options, endpoint, runtime, shared, reason).await
            }
            (error, _) => Err(error),
        }
    }
}

/// Starts a session with a legacy server, which has no hello. `probes` is how many requests for metadata were
/// sent to it on Zenoh keys that it shares with others, where requests may be lost; 0 on a connection of its
/// own. There, a first request for metadata shows that it is one.
pub(crate) async fn start(
    options: &ConnectOptions,
    link: Link,
    probes: u64,
    shared: Shared,
) -> Result<(Session, Welcome), Error> {
    let welcome = undeclared(&options.uri);
    let core = Arc::new(Core::new(options.state(&welcome, Duration::ZERO), options.clock()));
    let expires = link.idle_timeout.limit() <= options.idle_timeout;
    let legacy_options = LegacyOptions {
        request_timeout: options.request_timeout,
        step_timeout: options.step_timeout,
        reset_timeout: options.reset_timeout(Codec::Msgpack).unwrap_or(Duration::MAX),
        idle_timeout: expires.then_some(options.idle_timeout),
        is_lossy: probes > 0,
        is_observer: options.identity.role == Role::Observer,
    };
    let connections = Connections::new(core, link, None, &shared.pacing, lost);
    let (core, control) = (Arc::clone(&connections.core), Arc::clone(&connections.control));
    let wire = Arc::new(LegacyWire::new(core, control, legacy_options, probes));
    let session = Session::start(connections, wire.clone(), wire, &shared.pool, options.wait())?;
    if probes == 0 {
        let waited = options.request_timeout;
        let metadata = timeout(waited, session.wire.request(Request::GetMetadata)).await;
        metadata.map_err(|_| Error::Timeout { what: "metadata", waited })??;
    }
    Ok((session, welcome))
}

/// What a welcome would say of a server that declares nothing: its name is the address, and its actions have
/// dimension 0, which stands for any.
fn undeclared(uri: &str) -> Welcome {
    let action_spec = ActionSpec::undeclared();
    Welcome {
        protocol: PROTOCOL_VERSION,
        software: String::new(),
        session: 1,
        episode: 0,
        robot: RobotInfo { name: uri.to_owned(), cameras: Vec::new(), proprios: Vec::new(), action_spec },
        attach_token: Bytes::new(),
        controller: String::new(),
        max_chunk_rows: 0,
    }
}
