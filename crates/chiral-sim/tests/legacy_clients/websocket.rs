//! A legacy client over WebSocket, as a WebSocket library makes one.

use std::net::SocketAddr;

use bytes::Bytes;
use chiral_proto::{Reply, Request};
use futures_util::{SinkExt, StreamExt};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async_with_config,
    tungstenite::{self, protocol::WebSocketConfig},
};

use crate::{
    frame_of, reply_of,
    support::{TEST_TIMEOUT, harness::Harness},
};

pub(crate) struct Peer(pub(crate) WebSocketStream<MaybeTlsStream<TcpStream>>);

impl Peer {
    pub(crate) async fn connect(address: SocketAddr) -> Peer {
        // Messages of any size, as the wire's description requires.
        let config = WebSocketConfig::default().max_message_size(None).max_frame_size(None);
        Peer(connect_async_with_config(format!("ws://{address}"), Some(config), true).await.unwrap().0)
    }

    pub(crate) async fn send(&mut self, frame: Bytes) {
        self.0.send(tungstenite::Message::Binary(frame)).await.unwrap();
    }

    /// Returns the next message that is not a ping. The library answers the server's pings.
    pub(crate) async fn receive(&mut self) -> tungstenite::Message {
        loop {
            let message = timeout(TEST_TIMEOUT, self.0.next())
                .await
                .expect("a message")
                .expect("the connection is open")
                .unwrap();
            if !message.is_ping() {
                return message;
            }
        }
    }

    pub(crate) async fn reply(&mut self) -> Reply {
        match self.receive().await {
            tungstenite::Message::Binary(frame) => reply_of(frame),
            other => panic!("expected a frame, found {other:?}"),
        }
    }

    pub(crate) async fn request(&mut self, request: Request) -> Reply {
        self.send(frame_of(request)).await;
        self.reply().await
    }

    /// Returns the code and the reason with which the server closes.
    pub(crate) async fn close_reason(&mut self) -> (u16, String) {
        match self.receive().await {
            tungstenite::Message::Close(Some(frame)) => (frame.code.into(), frame.reason.to_string()),
            other => panic!("expected the server to close, found {other:?}"),
        }
    }
}

/// Serves on an ephemeral port.
pub(crate) async fn serve(harness: &Harness) -> SocketAddr {
    harness.serve_websocket().await.0
}

/// Sends a handshake with these additional headers; returns the head of the response and the connection.
pub(crate) async fn shake_hands(address: SocketAddr, headers: &str) -> (String, TcpStream) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!(
        "GET / HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(timeout(TEST_TIMEOUT, stream.read_u8()).await.expect("a response").unwrap());
    }
    (String::from_utf8(head).unwrap().to_lowercase(), stream)
}
