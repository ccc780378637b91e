//! WebSocket over axum, with tungstenite's handshake: the routes, and the thread of each connection. The
//! frames after the handshake are `chiral-transport`'s.

use std::{future::IntoFuture, net::SocketAddr, sync::Arc};

use axum::{
    Router,
    body::Body,
    extract::{ConnectInfo, Request},
    http::{
        HeaderValue, StatusCode,
        header::{SEC_WEBSOCKET_PROTOCOL, UPGRADE},
    },
    response::{IntoResponse, Response},
    routing::get,
};
use chiral_proto::{Codec, pool::Pool};
use chiral_transport::{Role, SUBPROTOCOL, WebSocketOptions, WebSocketTransport, tcp};
use hyper::upgrade::Upgraded;
use hyper_util::{
    rt::TokioIo,
    server::conn::auto::upgrade::{Parts, downcast},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
};
use tungstenite::handshake::server::create_response_with_body;

use crate::{
    accept::Acceptor,
    core::{ServerCore, connection_runtime},
    error::Error,
};

/// Serves at `/`, and `/healthz`, until the server is shut down.
pub(crate) async fn serve(acceptor: Arc<Acceptor>, listener: TcpListener) -> Result<(), Error> {
    let core = Arc::clone(&acceptor.core);
    let address = listener.local_addr().map_err(Error::Listener)?;
    tracing::info!("serving robot {:?} at ws://{address}", core.robot.name);
    if !address.ip().is_loopback() {
        tracing::warn!(
            "listening on {address}: without authentication, any host that can connect can move the robot"
        );
    }
    let app = health_router(Arc::clone(&core)).merge(router(acceptor));
    let stopping = Arc::clone(&core);
    let serving = axum::serve(listener, app.into_make_service_with_connect_info::<SocketAddr>())
        .with_graceful_shutdown(async move { stopping.stop_requested().await })
        .into_future();
    let stopped = async {
        core.stop_requested().await;
        core.wait_until_stopped().await;
    };
    // Connections without a session must not keep a stopping server alive.
    tokio::select! {
        served = serving => {
            served.map_err(Error::Listener)?;
            core.wait_until_stopped().await;
        }
        () = stopped => {}
    }
    Ok(())
}

/// The WebSocket route, at `/`.
pub(crate) fn router(acceptor: Arc<Acceptor>) -> Router {
    Router::new().route("/", get(move |request| upgrade_or_explain(acceptor, request)))
}

/// The health route, `GET /healthz`.
pub(crate) fn health_router(core: Arc<ServerCore>) -> Router {
    let health = move || async move {
        match core.control.out_of_service() {
            None => (StatusCode::OK, "ok\n".to_owned()),
            Some(fault) => (StatusCode::SERVICE_UNAVAILABLE, format!("{fault}\n")),
        }
    };
    Router::new().route("/healthz", get(health))
}

/// A legacy client may leave pings unanswered for this many times the idle timeout: it may be busy with its
/// model, or read only the replies to its requests. If its host is gone, TCP notices after the idle timeout
/// itself.
const PINGED_IDLE_FACTOR: u32 = 4;

/// Upgrades the connection, or explains why not. The handshake is done here since axum's own WebSocket does
/// not give out its byte stream.
async fn upgrade_or_explain(acceptor: Arc<Acceptor>, mut request: Request) -> Response {
    let offered =
        request.headers().get_all(SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|value| value.to_str().ok());
    // Legacy clients offer no subprotocol.
    let codec = match offered.flat_map(|names| names.split(',')).any(|name| name.trim() == SUBPROTOCOL) {
        true => Some(Codec::Protobuf),
        false => (!request.headers().contains_key(SEC_WEBSOCKET_PROTOCOL)).then_some(Codec::Msgpack),
    };
    let mut response = match create_response_with_body(&request, Body::empty) {
        Ok(response) => response,
        Err(error) => {
            let text = format!("this is a Chiral policy server: connect with a PolicyClient ({error})\n");
            return (StatusCode::UPGRADE_REQUIRED, [(UPGRADE, "websocket")], text).into_response();
        }
    };
    let Some(codec) = codec else {
        let text = format!("expected WebSocket subprotocol {SUBPROTOCOL}, found only others\n");
        return (StatusCode::BAD_REQUEST, text).into_response();
    };
    if codec == Codec::Protobuf {
        response.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(SUBPROTOCOL));
    }
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>();
    let peer =
        peer.map_or_else(|| "an unknown address".to_owned(), |ConnectInfo(address)| address.to_string());
    let upgrading = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match upgrading.await {
            Ok(upgraded) => serve_upgraded(acceptor, upgraded, codec, peer).await,
            Err(error) => tracing::debug!(peer, "WebSocket upgrade failed: {error}"),
        }
    });
    response
}

/// Serves a connection on a thread of its own if it is a TCP socket. If the host's listener has wrapped the
/// socket, for instance in TLS, serves it on the current runtime.
async fn serve_upgraded(acceptor: Arc<Acceptor>, upgraded: Upgraded, codec: Codec, peer: String) {
    let max_message = acceptor.core.options.max_frame;
    // Frames from clients are small, so no buffers are kept.
    let (pool, pacing) = (Pool::new(0), acceptor.core.pacing.clone());
    // Clients with protobuf ping every second. Legacy clients may compute for long, so they are pinged
    // instead.
    let (idle_timeout, pings) = match codec {
        Codec::Protobuf => (acceptor.core.options.idle_timeout, false),
        _ => (acceptor.core.options.idle_timeout.saturating_mul(PINGED_IDLE_FACTOR), true),
    };
    let options =
        WebSocketOptions { role: Role::Server, max_message, pool, pacing, codec, peer, idle_timeout, pings };
    let (stream, read_already) = match downcast::<TokioIo<TcpStream>>(upgraded) {
        Ok(Parts { io, read_buf, .. }) => (io.into_inner(), read_buf),
        Err(upgraded) => {
            acceptor.core.host_runtime_logged.call_once(|| {
                tracing::info!(
                    "connections are served on the host's runtime, since they are not plain TCP sockets"
                )
            });
            return serve_stream(&acceptor, TokioIo::new(upgraded), &[], options).await;
        }
    };
    if let Ok(address) = stream.peer_addr() {
        tcp::set_options(&stream, address);
    }
    if pings {
        tcp::set_user_timeout(&stream, acceptor.core.options.idle_timeout);
    }
    let stream = stream.into_std();
    connection_runtime().spawn(async move {
        match stream.and_then(TcpStream::from_std) {
            Ok(stream) => serve_stream(&acceptor, stream, &read_already, options).await,
            Err(error) => {
                tracing::warn!(peer = options.peer, "cannot move the connection to its thread: {error}")
            }
        }
    });
}

async fn serve_stream<S>(acceptor: &Acceptor, stream: S, read_already: &[u8], options: WebSocketOptions)
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let transport = WebSocketTransport::new(stream, read_already, options);
    let idle_timeout = transport.idle_timeout();
    acceptor.serve(transport, idle_timeout).await;
}
