//! WebSocket by axum: the route, the listener around it, and the transport over one socket.

use std::{future::IntoFuture, net::SocketAddr, sync::Arc};

use axum::{
    Router,
    extract::{
        ConnectInfo, Request, WebSocketUpgrade,
        ws::{Message, WebSocket, rejection::WebSocketUpgradeRejection},
    },
    http::{StatusCode, header::UPGRADE},
    response::{IntoResponse, Response},
    routing::get,
    serve::ListenerExt,
};
use chiral_proto::{Codec, Frame, Transport, TransportError};
use futures_util::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use tokio::{net::TcpListener, sync::Mutex};

use crate::{
    error::Error,
    server::{Inner, PolicyServer, STOP_LIMIT},
    session,
};

/// The subprotocol that means the protobuf codec.
const SUBPROTOCOL: &str = "chiral.v1";

impl PolicyServer {
    /// Serves until it is shut down, on a runtime of its own; blocks. Not to be called within a tokio runtime: there, use [`PolicyServer::serve`].
    ///
    /// # Errors
    /// [`Error::Bind`] if the address cannot be listened on, [`Error::Start`] if there can be no runtime.
    pub fn run(self) -> Result<(), Error> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("chiral-server").build();
        let runtime = runtime.map_err(|source| Error::Start { what: "a tokio runtime", source })?;
        let served = runtime.block_on(self.serve());
        runtime.shutdown_timeout(STOP_LIMIT);
        served
    }

    /// Serves until it is shut down, on the caller's runtime, at the address the server was built with.
    ///
    /// # Errors
    /// [`Error::Bind`] if the address cannot be listened on.
    pub async fn serve(self) -> Result<(), Error> {
        let address = self.inner.options.bind;
        let listener = TcpListener::bind(address).await.map_err(|source| Error::Bind { address, source })?;
        self.serve_on(listener).await
    }

    /// Serves until it is shut down, on a listener of the host's: the WebSocket at `/`, and `/healthz`.
    ///
    /// # Errors
    /// [`Error::Listener`] if the listener fails.
    pub async fn serve_on(self, listener: TcpListener) -> Result<(), Error> {
        let address = listener.local_addr().map_err(Error::Listener)?;
        tracing::info!("serving robot {:?} at ws://{address}", self.inner.robot.name);
        if !address.ip().is_loopback() {
            tracing::warn!("listening on {address}: whoever reaches it can move the robot, for there is no authentication yet");
        }
        let inner = Arc::clone(&self.inner);
        let app = self.health_router().merge(self.into_router());
        let no_delay = listener.tap_io(|stream| {
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!("no TCP_NODELAY: {error}");
            }
        });
        let stopping = Arc::clone(&inner);
        let serving = axum::serve(no_delay, app.into_make_service_with_connect_info::<SocketAddr>())
            .with_graceful_shutdown(async move { stopping.stopping().await })
            .into_future();
        let stopped = async {
            inner.stopping().await;
            inner.wind_down().await;
        };
        // A connection that never became a session must not keep a stopping server alive.
        tokio::select! {
            served = serving => {
                served.map_err(Error::Listener)?;
                inner.wind_down().await;
            }
            () = stopped => {}
        }
        Ok(())
    }

    /// The WebSocket route alone, at `/`, for a host to merge or to nest under any path. The server lives as long as the router and its sessions.
    pub fn into_router(self) -> Router {
        let inner = self.inner;
        Router::new().route("/", get(move |upgrade, request| upgrade_or_explain(inner, upgrade, request)))
    }

    /// `GET /healthz`: 200 while the robot is in service, 503 and the reason when it is not.
    pub fn health_router(&self) -> Router {
        let inner = Arc::clone(&self.inner);
        let health = move || async move {
            match inner.control.out_of_service() {
                None => (StatusCode::OK, "ok\n".to_owned()),
                Some(fault) => (StatusCode::SERVICE_UNAVAILABLE, format!("{fault}\n")),
            }
        };
        Router::new().route("/healthz", get(health))
    }
}

async fn upgrade_or_explain(
    inner: Arc<Inner>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
    request: Request,
) -> Response {
    let upgrade = match upgrade {
        Ok(upgrade) => upgrade.protocols([SUBPROTOCOL]),
        Err(rejection) => {
            let text = format!("this is a Chiral policy server: connect with a PolicyClient ({rejection})\n");
            return (StatusCode::UPGRADE_REQUIRED, [(UPGRADE, "websocket")], text).into_response();
        }
    };
    if upgrade.selected_protocol().is_none() {
        let text = format!("expected WebSocket subprotocol {SUBPROTOCOL}, found none that this server speaks\n");
        return (StatusCode::BAD_REQUEST, text).into_response();
    }
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>();
    let peer = peer.map_or_else(|| "a peer of the host's".to_owned(), |ConnectInfo(address)| address.to_string());
    let limit = inner.options.max_frame;
    upgrade
        .max_message_size(limit)
        .max_frame_size(limit)
        .on_upgrade(move |socket| async move { session::serve(&inner, WebSocketTransport::new(socket, peer)).await })
}

struct WebSocketTransport {
    sink: Mutex<SplitSink<WebSocket, Message>>,
    stream: Mutex<SplitStream<WebSocket>>,
    peer: String,
}

impl WebSocketTransport {
    fn new(socket: WebSocket, peer: String) -> WebSocketTransport {
        let (sink, stream) = socket.split();
        WebSocketTransport { sink: Mutex::new(sink), stream: Mutex::new(stream), peer }
    }
}

impl Transport for WebSocketTransport {
    async fn send(&self, frame: Frame) -> Result<(), TransportError> {
        self.sink.lock().await.send(Message::Binary(frame.into_bytes())).await.map_err(TransportError::lost)
    }

    async fn recv(&self) -> Result<Option<Frame>, TransportError> {
        let mut stream = self.stream.lock().await;
        loop {
            match stream.next().await {
                Some(Ok(Message::Binary(bytes))) => return Ok(Some(Frame::from(bytes))),
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Text(_))) => {
                    return Err(TransportError::Protocol { expected: "binary messages", found: "a text message".to_owned() });
                }
                Some(Ok(Message::Close(_))) | None => return Ok(None),
                Some(Err(error)) => return Err(TransportError::lost(error)),
            }
        }
    }

    async fn close(&self) {
        let _ = self.sink.lock().await.close().await;
    }

    fn codec(&self) -> Codec {
        Codec::Protobuf
    }

    fn peer(&self) -> &str {
        &self.peer
    }
}
