//! WebSocket by tokio-tungstenite: addresses, attempts to connect, and the transport over one socket.

use std::{error::Error as StdError, io, sync::Arc, time::Duration};

use chiral_proto::{Codec, Frame, Transport, TransportError};
use futures_util::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, pem::PemObject},
};
use tokio::{net::TcpStream, sync::Mutex, time::timeout};
use tokio_tungstenite::{
    Connector, MaybeTlsStream, WebSocketStream, client_async_tls_with_config,
    tungstenite::{
        self, Message,
        client::IntoClientRequest,
        http::{HeaderValue, Uri, header::SEC_WEBSOCKET_PROTOCOL},
        protocol::WebSocketConfig,
    },
};

use crate::{builder::Attempt, error::Error};

/// The subprotocol that means the protobuf codec.
const SUBPROTOCOL: &str = "chiral.v1";
/// For the name, the connection, TLS and the upgrade together.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// Of what a server that is none says, as much as an error should show.
const MAX_HTTP_TEXT: usize = 200;

/// A `ws://` or `wss://` address.
#[derive(Debug)]
pub(crate) struct Address {
    uri: Uri,
    host: String,
    port: u16,
    is_tls: bool,
}

impl Address {
    pub(crate) fn parse(text: &str) -> Result<Address, Error> {
        let refuse = |reason: String| Error::Address { uri: text.to_owned(), reason };
        let uri: Uri = text.parse().map_err(|error| refuse(format!("{error}")))?;
        let (is_tls, default_port) = match uri.scheme_str() {
            Some("ws") => (false, 80),
            Some("wss") => (true, 443),
            Some(other) => return Err(refuse(format!("no transport for {other}://"))),
            None => return Err(refuse("it does not begin with ws:// or wss://".to_owned())),
        };
        let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(|| refuse("it names no host".to_owned()))?;
        let host = host.trim_matches(['[', ']']).to_owned();
        Ok(Address { port: uri.port_u16().unwrap_or(default_port), host, is_tls, uri })
    }
}

/// How to reach a server at `address` securely, or plainly.
pub(crate) fn tls_for(address: &Address, root_certificates: Option<&[u8]>) -> Result<Connector, Error> {
    if !address.is_tls {
        return Ok(Connector::Plain);
    }
    let tls = |error: Box<dyn StdError + Send + Sync>| Error::Tls(Arc::from(error));
    let mut roots = RootCertStore::empty();
    match root_certificates {
        Some(pem) => {
            for certificate in CertificateDer::pem_slice_iter(pem) {
                roots.add(certificate.map_err(|error| tls(error.into()))?).map_err(|error| tls(error.into()))?;
            }
        }
        None => {
            let (added, _) = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            tracing::debug!("trusting {added} certificates of the system");
        }
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider())).with_safe_default_protocol_versions();
    let config = config.map_err(|error| tls(error.into()))?.with_root_certificates(roots).with_no_client_auth();
    Ok(Connector::Rustls(Arc::new(config)))
}

/// One attempt to connect.
pub(crate) async fn connect(address: &Address, connector: &Connector, max_frame: usize) -> Result<WebSocketTransport, Attempt> {
    let attempt = async {
        let absent = |error: io::Error| Attempt::Absent(error.to_string());
        let stream = TcpStream::connect((address.host.as_str(), address.port)).await.map_err(absent)?;
        stream.set_nodelay(true).map_err(absent)?;
        let mut request = address.uri.clone().into_client_request().map_err(|error| judge(error, address.is_tls))?;
        request.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(SUBPROTOCOL));
        let config = WebSocketConfig::default().max_message_size(Some(max_frame)).max_frame_size(Some(max_frame));
        let upgraded = client_async_tls_with_config(request, stream, Some(config), Some(connector.clone())).await;
        let (socket, _) = upgraded.map_err(|error| judge(error, address.is_tls))?;
        Ok(WebSocketTransport::new(socket, address.uri.to_string()))
    };
    match timeout(HANDSHAKE_LIMIT, attempt).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Attempt::Absent(format!("no handshake within {} s", HANDSHAKE_LIMIT.as_secs()))),
    }
}

/// Whether a failed handshake is worth another attempt.
fn judge(error: tungstenite::Error, is_tls: bool) -> Attempt {
    use tungstenite::{Error::*, error::ProtocolError::HandshakeIncomplete};
    match error {
        Http(response) => {
            let body = response.body().as_deref().unwrap_or_default();
            let text = String::from_utf8_lossy(&body[..body.len().min(MAX_HTTP_TEXT)]).trim().to_owned();
            Attempt::Failed(Error::Http { status: response.status().as_u16(), text })
        }
        // A server that is just stopping or starting.
        Io(error) if matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted) => {
            Attempt::Absent(error.to_string())
        }
        Protocol(HandshakeIncomplete) if !is_tls => Attempt::Absent("the connection closed during the handshake".to_owned()),
        Io(error) if is_tls => Attempt::Failed(Error::Tls(Arc::new(error))),
        Tls(error) => Attempt::Failed(Error::Tls(Arc::new(error))),
        error => Attempt::Failed(Error::Handshake(Arc::new(error))),
    }
}

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// Frames as binary messages over one socket.
pub(crate) struct WebSocketTransport {
    sink: Mutex<SplitSink<Socket, Message>>,
    stream: Mutex<SplitStream<Socket>>,
    peer: String,
}

impl WebSocketTransport {
    fn new(socket: Socket, peer: String) -> WebSocketTransport {
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
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
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
