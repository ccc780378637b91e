//! Accepting connections: chooses the wire, reads the hello, and opens or joins a session. `connection`
//! serves the connection or, for the legacy wire, `legacy`.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use chiral_proto::{
    Code, Codec, Fault, Message, PROTOCOL_VERSION, Request, Transport, lock,
    message::{Hello, Role},
};
use chiral_transport::IdleTimeout;
use tokio::time::timeout;

use crate::{
    attach::AttachTokens,
    connection,
    core::ServerCore,
    send_queue::error_message,
    session::{CLOSE_TIMEOUT, Session},
};

/// How long a peer may take to send its hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// Accepts the connections of every transport.
pub(crate) struct Acceptor {
    pub(crate) core: Arc<ServerCore>,
    attach_tokens: Mutex<AttachTokens<Session>>,
}

/// The id of a refused request, and why it is refused.
type Refusal = (u64, Fault);

impl Acceptor {
    pub(crate) fn new(core: ServerCore) -> Acceptor {
        Acceptor { core: Arc::new(core), attach_tokens: Mutex::default() }
    }

    /// Serves one connection until it ends. The one place that chooses the wire.
    pub(crate) async fn serve<T: Transport>(&self, transport: T, idle_timeout: IdleTimeout) {
        match transport.codec() {
            Codec::Msgpack => crate::legacy::serve(&self.core, &transport, idle_timeout).await,
            _ => self.serve_protobuf(transport, idle_timeout).await,
        }
    }

    async fn serve_protobuf<T: Transport>(&self, transport: T, idle_timeout: IdleTimeout) {
        let (id, hello) = match timeout(HELLO_TIMEOUT, receive_hello(&transport)).await {
            Ok(Ok(hello)) => hello,
            Ok(Err(refusal)) => return refuse(&transport, refusal).await,
            Err(_) => {
                return tracing::debug!(
                    peer = transport.peer(),
                    "expected a hello within {HELLO_TIMEOUT:?}, found none"
                );
            }
        };
        match self.admit(&hello, transport.peer()) {
            Ok((session, attach_token)) => {
                let welcome = self.core.welcome(session.id, attach_token);
                let is_control = hello.attach_token.is_empty() && hello.role == Role::Controller;
                connection::serve(&session, &transport, idle_timeout, id, welcome, is_control).await;
            }
            Err(fault) => refuse(&transport, Some((id, fault))).await,
        }
    }

    /// Opens or joins the session that the hello is for. A new one comes with the token for a second
    /// connection.
    fn admit(&self, hello: &Hello, peer: &str) -> Result<(Arc<Session>, Bytes), Fault> {
        check_version(hello)?;
        match hello.attach_token.is_empty() {
            true => self.open(hello, peer),
            false => Ok((self.join(hello)?, Bytes::new())),
        }
    }

    /// Opens a session, and makes the token with which a second connection joins it.
    fn open(&self, hello: &Hello, peer: &str) -> Result<(Arc<Session>, Bytes), Fault> {
        let session = Session::open(&self.core, hello.role, &hello.client_name, &hello.software, peer)?;
        let mut token = [0; 16];
        if let Err(error) = getrandom::fill(&mut token) {
            tracing::warn!(parent: &session.span, "no random bits, so no second connection: {error}");
            return Ok((session, Bytes::new()));
        }
        lock(&self.attach_tokens).insert(token, &session, self.core.clock.now());
        Ok((session, Bytes::copy_from_slice(&token)))
    }

    /// Joins the session that the token of a second connection belongs to.
    fn join(&self, hello: &Hello) -> Result<Arc<Session>, Fault> {
        let session = lock(&self.attach_tokens).redeem(&hello.attach_token, self.core.clock.now());
        let session = session.filter(|session| session.accepts_second_connection()).ok_or_else(|| {
            let text = "expected an unused token, at most 5 s old, of an open session without a stream, \
                        found another";
            Fault::new(Code::Invalid, text).field("hello.attach_token")
        })?;
        tracing::debug!(parent: &session.span, "second connection joined");
        Ok(session)
    }
}

/// Reads the hello and its id. An error holds the refusal to send, if any.
async fn receive_hello<T: Transport>(transport: &T) -> Result<(u64, Hello), Option<Refusal>> {
    let frame = match transport.recv().await {
        Ok(Some(frame)) => frame,
        Ok(None) | Err(_) => return Err(None),
    };
    let expected = |id| {
        Err(Some((id, Fault::new(Code::Protocol, "expected a hello as the first message, found another"))))
    };
    match transport.codec().decode(frame) {
        Ok(Message::Request { id, request: Request::Hello(hello) }) => Ok((id, hello)),
        Ok(Message::Request { id, .. } | Message::Reply { id, .. } | Message::Unknown { id }) => expected(id),
        Ok(Message::Notice(_)) => expected(0),
        Err(error) => Err(Some((error.id, error.into()))),
    }
}

fn check_version(hello: &Hello) -> Result<(), Fault> {
    if hello.protocol == PROTOCOL_VERSION {
        return Ok(());
    }
    let text = format!("expected protocol version {PROTOCOL_VERSION}, found {}", hello.protocol);
    Err(Fault::new(Code::VersionMismatch, text).field("hello.protocol"))
}

async fn refuse<T: Transport>(transport: &T, refusal: Option<Refusal>) {
    let closing = async {
        if let Some((id, fault)) = refusal {
            tracing::info!(peer = transport.peer(), "refused: {fault}");
            if let Ok(frame) = transport.codec().encode(&error_message(id, fault)) {
                let _ = transport.send(frame).await;
            }
        }
        transport.close().await;
    };
    let _ = timeout(CLOSE_TIMEOUT, closing).await;
}
