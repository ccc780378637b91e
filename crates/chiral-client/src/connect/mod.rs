//! How a client gets its session: an attempt to connect until there is a server, the wire that it speaks, and
//! the second connection.

mod hello;
pub(crate) mod options;
#[cfg(any(feature = "websocket", feature = "zenoh"))]
mod waiting;

use std::sync::Arc;
#[cfg(any(feature = "websocket", feature = "zenoh"))]
use std::time::Duration;

use bytes::Bytes;
use chiral_proto::{Codec, Timestamp, Transport, message::Welcome};
use chiral_transport::{IdleTimeout, Runtime};

use self::{
    hello::exchange_hello,
    options::{ConnectOptions, Shared},
};
#[cfg(any(feature = "websocket", feature = "zenoh"))]
use self::{
    options::{ConnectError, LinkOptions},
    waiting::wait_for_server,
};
#[cfg(any(feature = "websocket", feature = "zenoh"))]
use crate::{connection::Lane, endpoint::Endpoint};
use crate::{
    connection::Link,
    core::Core,
    error::Error,
    legacy,
    native::{NativeWire, lost},
    session::{Connections, Session},
};

/// For the second connection, its hello included.
#[cfg(any(feature = "websocket", feature = "zenoh"))]
const ATTACH_TIMEOUT: Duration = Duration::from_secs(5);

/// A session, and the server's welcome.
pub(crate) type Connected = (Session, Welcome);

/// Connects to the server at the options' address, on `runtime`.
#[cfg(any(feature = "websocket", feature = "zenoh"))]
pub(crate) async fn connect(options: &ConnectOptions, runtime: Runtime) -> Result<Connected, Error> {
    let endpoint = Endpoint::parse(options)?;
    let shared = Shared::new();
    let prober = legacy::Prober::default();
    let attempt = || async {
        match try_connect(options, &endpoint, Lane::Control, &runtime, &shared).await {
            Ok(link) => Ok((link, 0)),
            Err(error) => prober.try_connect(options, &endpoint, &runtime, &shared, error).await,
        }
    };
    let (control, probes) = wait_for_server(options, endpoint.retry_period(), attempt).await?;
    if control.transport.codec() == Codec::Msgpack {
        return legacy::start(options, control, probes, shared).await;
    }
    let started = options.clock().now();
    let welcome = exchange_hello(&control.transport, &options.identity, Bytes::new()).await?;
    let observations = if options.one_connection || welcome.attach_token.is_empty() {
        None
    } else {
        // Meanwhile the first connection is not read from.
        let attaching = attach(options, &endpoint, &welcome, &shared);
        let attached = match tokio::time::timeout(ATTACH_TIMEOUT, attaching).await {
            Ok(attached) => attached.map_err(|error| error.to_string()),
            Err(_) => Err(format!("not within {} s", ATTACH_TIMEOUT.as_secs())),
        };
        attached
            .inspect_err(|reason| {
                let uri = &options.uri;
                tracing::warn!(
                    "no second connection to {uri}, so that actions may have to wait for \
                     observations: {reason}"
                );
            })
            .ok()
    };
    start(options, started, welcome, control, observations, shared)
}

/// One attempt to connect, on the runtime that will drive the connection.
#[cfg(any(feature = "websocket", feature = "zenoh"))]
async fn try_connect(
    options: &ConnectOptions,
    endpoint: &Endpoint,
    lane: Lane,
    runtime: &Runtime,
    shared: &Shared,
) -> Result<Link, ConnectError> {
    let link_options = LinkOptions { lane, max_frame: options.max_frame, shared: shared.clone() };
    let endpoint = endpoint.clone();
    let connecting = runtime.spawn(async move { endpoint.connect(link_options).await });
    let connected =
        connecting.await.unwrap_or_else(|ended| Err(ConnectError::Unavailable(ended.to_string())));
    let (transport, idle_timeout) = connected?;
    Ok(Link { transport, runtime: runtime.clone(), idle_timeout })
}

/// Makes the session's second connection, for the observations lane, on a thread of its own.
#[cfg(any(feature = "websocket", feature = "zenoh"))]
async fn attach(
    options: &ConnectOptions,
    endpoint: &Endpoint,
    welcome: &Welcome,
    shared: &Shared,
) -> Result<Link, Error> {
    let runtime = thread("chiral-client-o")?;
    let link = try_connect(options, endpoint, Lane::Observations, &runtime, shared).await;
    let link = link.map_err(|error| match error {
        ConnectError::Failed(error) => error,
        ConnectError::Unavailable(reason) => Error::Disconnected { reason, cause: None },
    })?;
    exchange_hello(&link.transport, &options.identity, welcome.attach_token.clone()).await?;
    Ok(link)
}

/// A runtime for one connection, on a thread of its own.
#[cfg(any(feature = "websocket", feature = "zenoh"))]
pub(crate) fn thread(name: &str) -> Result<Runtime, Error> {
    Runtime::thread(name).map_err(|error| Error::Thread(Arc::new(error)))
}

/// Connects over a transport of the caller's, on the current runtime.
pub(crate) async fn connect_over(
    options: &ConnectOptions,
    transport: impl Transport,
) -> Result<Connected, Error> {
    let mut control = link_here(options, transport);
    if control.transport.codec() == Codec::Msgpack {
        // Nothing that the caller's transport does shows that such a server is alive while it has nothing to
        // send.
        control.idle_timeout = IdleTimeout::never();
        return legacy::start(options, control, 0, Shared::new()).await;
    }
    let started = options.clock().now();
    let welcome = exchange_hello(&control.transport, &options.identity, Bytes::new()).await?;
    start(options, started, welcome, control, None, Shared::new())
}

/// Connects over two transports of the caller's, one for each lane, on the current runtime.
pub(crate) async fn connect_over_two<T: Transport>(
    options: &ConnectOptions,
    control: T,
    observations: T,
) -> Result<Connected, Error> {
    let (control, observations) = (link_here(options, control), link_here(options, observations));
    let started = options.clock().now();
    let welcome = exchange_hello(&control.transport, &options.identity, Bytes::new()).await?;
    if welcome.attach_token.is_empty() {
        return Err(Error::Protocol { expected: "a token for a second connection" });
    }
    exchange_hello(&observations.transport, &options.identity, welcome.attach_token.clone()).await?;
    start(options, started, welcome, control, Some(observations), Shared::new())
}

fn link_here(options: &ConnectOptions, transport: impl Transport) -> Link {
    let idle_timeout = IdleTimeout::new(options.idle_timeout);
    Link { transport: Arc::new(transport), runtime: Runtime::current(), idle_timeout }
}

/// Starts a session on the protobuf wire, whose hello was sent at `started`.
fn start(
    options: &ConnectOptions,
    started: Timestamp,
    welcome: Welcome,
    control: Link,
    observations: Option<Link>,
    shared: Shared,
) -> Result<Connected, Error> {
    let first_round_trip = options.clock().now().since(started);
    let core = Arc::new(Core::new(options.state(&welcome, first_round_trip), options.clock()));
    let connections = Connections::new(core, control, observations, &shared.pacing, lost);
    let wire = NativeWire::new(&connections);
    let sink = Arc::clone(&connections.control);
    let session = Session::start(connections, Arc::new(wire), sink, &shared.pool, options.wait())?;
    Ok((session, welcome))
}
