//! WebSocket by tungstenite's handshake: addresses, TLS, and attempts to connect. What comes after the
//! handshake is `chiral-transport`'s.

use std::{
    error::Error as StdError,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use chiral_proto::Codec;
use chiral_transport::{Role, SUBPROTOCOL, WebSocketOptions, WebSocketTransport, tcp};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, ServerName, pem::PemObject},
    },
};
use tokio_tungstenite::{
    client_async,
    tungstenite::{
        self,
        client::IntoClientRequest,
        error::{ProtocolError::SecWebSocketSubProtocolError, SubProtocolError},
        http::{HeaderValue, StatusCode, Uri, header::SEC_WEBSOCKET_PROTOCOL},
    },
};

use crate::{
    connect::options::{ConnectError, ConnectOptions, LinkOptions},
    connection::Lane,
    error::Error,
};

/// For the name, the connection, TLS and the upgrade together.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// How much of an HTTP error's body an error shows, in bytes.
const MAX_HTTP_TEXT: usize = 200;

/// How to reach a server at a `ws://` or `wss://` address.
#[derive(Clone)]
pub(crate) struct Endpoint {
    uri: Uri,
    host: String,
    port: u16,
    tls: Option<TlsConnector>,
    /// The only wire to speak; without one, protobuf is offered, and msgpack used if the server does not know
    /// it.
    codec: Option<Codec>,
    idle_timeout: Duration,
}

impl Endpoint {
    pub(crate) fn parse(options: &ConnectOptions) -> Result<Endpoint, Error> {
        let refuse = |reason: String| Error::Address { uri: options.uri.clone(), reason };
        let uri: Uri = options.uri.parse().map_err(|error| refuse(format!("{error}")))?;
        let (is_tls, default_port) = match uri.scheme_str() {
            Some("ws") => (false, 80),
            Some("wss") => (true, 443),
            Some(other) => return Err(refuse(format!("no transport for {other}://"))),
            None => return Err(refuse("it does not begin with ws:// or wss://".to_owned())),
        };
        let host = uri
            .host()
            .filter(|host| !host.is_empty())
            .ok_or_else(|| refuse("it names no host".to_owned()))?;
        // `port_u16` does not distinguish a port that is no number from none.
        let authority = uri.authority().map_or("", |authority| authority.as_str());
        let has_port = authority.rsplit('@').next().is_some_and(|address| address != host);
        let port = match uri.port_u16() {
            Some(port) => port,
            None if has_port => return Err(refuse("its port is not a number up to 65535".to_owned())),
            None => default_port,
        };
        let host = host.trim_matches(['[', ']']).to_owned();
        let tls = if is_tls { Some(tls(options.root_certificates.as_deref())?) } else { None };
        let (codec, idle_timeout) = (options.codec, options.idle_timeout);
        Ok(Endpoint { port, host, tls, uri, codec, idle_timeout })
    }
}

fn tls(root_certificates: Option<&[u8]>) -> Result<TlsConnector, Error> {
    let tls = |error: Box<dyn StdError + Send + Sync>| Error::Tls(Arc::from(error));
    let mut roots = RootCertStore::empty();
    match root_certificates {
        Some(pem) => {
            for certificate in CertificateDer::pem_slice_iter(pem) {
                roots
                    .add(certificate.map_err(|error| tls(error.into()))?)
                    .map_err(|error| tls(error.into()))?;
            }
        }
        None => {
            let (added, _) = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            tracing::debug!("trusting {added} certificates of the system");
        }
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions();
    let config =
        config.map_err(|error| tls(error.into()))?.with_root_certificates(roots).with_no_client_auth();
    Ok(Arc::new(config).into())
}

/// A TCP stream with or without TLS. An enum, since the compiler cannot prove futures that hold a boxed trait
/// object to be `Send`.
pub(crate) enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Stream::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Stream::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(context),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

/// One attempt to connect.
pub(crate) async fn connect(
    endpoint: &Endpoint,
    options: LinkOptions,
) -> Result<WebSocketTransport<Stream>, ConnectError> {
    let attempt = async {
        // Only our own servers accept a second connection.
        let codec = if options.lane == Lane::Observations { Some(Codec::Protobuf) } else { endpoint.codec };
        let (stream, codec) = negotiate(endpoint, codec).await?;
        let peer = endpoint.uri.to_string();
        let options = WebSocketOptions {
            role: Role::Client,
            max_message: options.max_frame,
            pool: options.shared.pool,
            pacing: options.shared.pacing,
            codec,
            peer,
            idle_timeout: endpoint.idle_timeout,
            pings: codec == Codec::Msgpack,
        };
        Ok(WebSocketTransport::new(stream, &[], options))
    };
    match timeout(HANDSHAKE_TIMEOUT, attempt).await {
        Ok(outcome) => outcome,
        Err(_) => {
            Err(ConnectError::Unavailable(format!("no handshake within {} s", HANDSHAKE_TIMEOUT.as_secs())))
        }
    }
}

/// Opens a connection, upgrades it and agrees on the codec. Legacy servers know no subprotocol: they upgrade
/// and choose none, or refuse the upgrade because of it, as some libraries do with any that they were not
/// configured for. Then the upgrade is repeated without.
async fn negotiate(endpoint: &Endpoint, codec: Option<Codec>) -> Result<(Stream, Codec), ConnectError> {
    let mut stream = open(endpoint).await?;
    if codec == Some(Codec::Msgpack) {
        upgrade(endpoint, &mut stream, None).await.map_err(judge)?;
        return Ok((stream, Codec::Msgpack));
    }
    let Err(error) = upgrade(endpoint, &mut stream, Some(SUBPROTOCOL)).await else {
        return Ok((stream, Codec::Protobuf));
    };
    let chose_none = matches!(
        error,
        tungstenite::Error::Protocol(SecWebSocketSubProtocolError(SubProtocolError::NoSubProtocol))
    );
    let refused =
        matches!(&error, tungstenite::Error::Http(response) if response.status() == StatusCode::BAD_REQUEST);
    match codec {
        // tungstenite checks the subprotocol last, so that everything else was good: use this connection.
        None if chose_none => {}
        None if refused => {
            stream = open(endpoint).await?;
            if upgrade(endpoint, &mut stream, None).await.is_err() {
                // The subprotocol was not the reason.
                return Err(judge(error));
            }
        }
        Some(Codec::Protobuf) if chose_none => return Err(ConnectError::Failed(Error::NotProtobuf)),
        _ => return Err(judge(error)),
    }
    tracing::info!(
        "the server at {} does not know {SUBPROTOCOL}: speaking msgpack, as to a legacy server",
        endpoint.uri
    );
    Ok((stream, Codec::Msgpack))
}

/// The opening handshake, with this subprotocol offered.
async fn upgrade(
    endpoint: &Endpoint,
    stream: &mut Stream,
    subprotocol: Option<&'static str>,
) -> Result<(), tungstenite::Error> {
    let mut request = endpoint.uri.clone().into_client_request()?;
    if let Some(subprotocol) = subprotocol {
        request.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(subprotocol));
    }
    client_async(request, HandshakeReader::new(stream)).await?;
    Ok(())
}

async fn open(endpoint: &Endpoint) -> Result<Stream, ConnectError> {
    let absent = |error: io::Error| ConnectError::Unavailable(error.to_string());
    let stream = TcpStream::connect((endpoint.host.as_str(), endpoint.port)).await.map_err(absent)?;
    tcp::set_options(&stream, stream.peer_addr().map_err(absent)?);
    let Some(tls) = &endpoint.tls else { return Ok(Stream::Plain(stream)) };
    let distrust = |error: Arc<dyn StdError + Send + Sync>| ConnectError::Failed(Error::Tls(error));
    let name = ServerName::try_from(endpoint.host.clone()).map_err(|error| distrust(Arc::new(error)))?;
    match tls.connect(name, stream).await {
        Ok(stream) => Ok(Stream::Tls(Box::new(stream))),
        Err(error) => Err(distrust(Arc::new(error))),
    }
}

/// Whether a failed handshake is worth another attempt.
fn judge(error: tungstenite::Error) -> ConnectError {
    use tungstenite::{Error::*, error::ProtocolError::HandshakeIncomplete};
    match error {
        Http(response) => {
            let body = response.body().as_deref().unwrap_or_default();
            let text = String::from_utf8_lossy(&body[..body.len().min(MAX_HTTP_TEXT)]).trim().to_owned();
            ConnectError::Failed(Error::Http { status: response.status().as_u16(), text })
        }
        // A server that is just stopping or starting.
        Io(error)
            if matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted) =>
        {
            ConnectError::Unavailable(error.to_string())
        }
        Protocol(HandshakeIncomplete) => {
            ConnectError::Unavailable("the connection closed during the handshake".to_owned())
        }
        error => ConnectError::Failed(Error::Handshake(Arc::new(error))),
    }
}

/// Reads exactly the head of the response: tungstenite would read ahead and drop the first frames. Returns
/// the head in one piece, since tungstenite takes a handshake in small pieces for an attack. The head of a
/// refusal is followed by as much of the body as has arrived.
struct HandshakeReader<'a> {
    stream: &'a mut Stream,
    head: Vec<u8>,
    is_complete: bool,
    handed_over: usize,
}

impl<'a> HandshakeReader<'a> {
    const END: &'static [u8] = b"\r\n\r\n";
    const MAX_HEAD: usize = 8 * 1024;
    const STATUS: std::ops::Range<usize> = 9..12;

    fn new(stream: &'a mut Stream) -> HandshakeReader<'a> {
        HandshakeReader { stream, head: Vec::new(), is_complete: false, handed_over: 0 }
    }

    /// Reads up to `N` bytes more; none at the stream's end.
    fn poll_more<const N: usize>(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut bytes = [0; N];
        let mut buffer = ReadBuf::new(&mut bytes);
        ready!(Pin::new(&mut *self.stream).poll_read(context, &mut buffer))?;
        self.head.extend_from_slice(buffer.filled());
        Poll::Ready(Ok(buffer.filled().len()))
    }
}

impl AsyncRead for HandshakeReader<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while !self.is_complete {
            let read = ready!(self.poll_more::<1>(context))?;
            self.is_complete =
                read == 0 || self.head.ends_with(Self::END) || self.head.len() == Self::MAX_HEAD;
            if self.is_complete && self.head.get(Self::STATUS).is_some_and(|status| status != b"101") {
                let _ = self.poll_more::<1024>(context)?;
            }
        }
        let rest = &self.head[self.handed_over..];
        let taken = rest.len().min(buffer.remaining());
        buffer.put_slice(&rest[..taken]);
        self.handed_over += taken;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for HandshakeReader<'_> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_a_host_and_a_valid_port_or_none() {
        let port = |uri: &str| Endpoint::parse(&ConnectOptions::new(uri)).map(|endpoint| endpoint.port);
        for (uri, expected) in [
            ("ws://robot", 80),
            ("ws://robot/path", 80),
            ("ws://robot:8765", 8765),
            ("ws://[::1]", 80),
            ("ws://[::1]:8765/path", 8765),
            ("ws://user@robot:1", 1),
        ] {
            assert_eq!(port(uri).unwrap(), expected, "{uri}");
        }
        for uri in [
            "ws://robot:99999",
            "ws://robot:abc",
            "ws://robot:-1",
            "ws://robot:",
            "ws://:1",
            "robot:1",
            "http://robot",
        ] {
            assert!(matches!(port(uri), Err(Error::Address { .. })), "{uri}");
        }
    }
}
