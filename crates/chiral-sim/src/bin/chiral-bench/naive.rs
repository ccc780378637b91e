//! The naive path, as one would write it first: axum sends a `Message::Binary`, tokio-tungstenite receives
//! it. The comparison favours it, since its message is already in one piece.

use std::net::{SocketAddr, TcpListener};

use anyhow::{Context, Result, bail};
use axum::Router;
use axum::extract::WebSocketUpgrade;
use axum::extract::ws::{Message, WebSocket};
use axum::routing::get;
use axum::serve::ListenerExt;
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use tokio::runtime::{Builder, Runtime};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::{WebSocketStream, client_async_with_config, tungstenite};

use crate::raw;

/// Serves until the process ends.
pub(crate) fn serve(listener: TcpListener, reply: &Bytes) -> Result<()> {
    let runtime = Builder::new_multi_thread().enable_all().build().context("starting a runtime")?;
    let reply = reply.clone();
    let upgrade = async move |upgrade: WebSocketUpgrade| {
        upgrade.on_upgrade(move |socket| reply_to_all(socket, reply.clone()))
    };
    let app = Router::new().route("/", get(upgrade));
    runtime.block_on(async {
        let listener = raw::from_std(listener)?.tap_io(|stream| drop(stream.set_nodelay(true)));
        axum::serve(listener, app).await.context("serving axum")
    })
}

async fn reply_to_all(mut socket: WebSocket, reply: Bytes) {
    while let Some(Ok(message)) = socket.next().await {
        if matches!(message, Message::Binary(_)) && socket.send(Message::Binary(reply.clone())).await.is_err()
        {
            return;
        }
    }
}

/// A client of that server.
pub(crate) struct Client {
    runtime: Runtime,
    socket: WebSocketStream<tokio::net::TcpStream>,
    reply_len: usize,
}

impl Client {
    pub(crate) fn connect(address: SocketAddr, reply_len: usize) -> Result<Client> {
        let (runtime, stream) = (raw::runtime()?, raw::connect(address)?);
        stream.set_nonblocking(true).context("making a stream non-blocking")?;
        // The default size limits are below an observation; all else is left at its default.
        let config = WebSocketConfig::default().max_message_size(None).max_frame_size(None);
        let (socket, _) = runtime.block_on(async {
            let stream = tokio::net::TcpStream::from_std(stream).context("handing a stream to tokio")?;
            client_async_with_config(format!("ws://{address}/"), stream, Some(config))
                .await
                .context("the handshake with axum")
        })?;
        Ok(Client { runtime, socket, reply_len })
    }

    pub(crate) fn request(&mut self) -> Result<()> {
        let Client { runtime, socket, reply_len } = self;
        runtime.block_on(async {
            socket
                .send(tungstenite::Message::Binary(Bytes::from_static(&[7; 56])))
                .await
                .context("sending a request to axum")?;
            match socket.next().await.context("axum closed the connection")?.context("receiving from axum")? {
                tungstenite::Message::Binary(bytes) if bytes.len() == *reply_len => Ok(()),
                other => {
                    bail!("expected a message of {reply_len} bytes from axum, found {} bytes", other.len())
                }
            }
        })
    }
}
