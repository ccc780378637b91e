//! A peer's session: how it begins, which connections belong to it, and its end, which comes once.

use std::{
    future::{Future, pending},
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use chiral_proto::{
    Code, Codec, Fault, Message, PROTOCOL_VERSION, Request, Transport, TransportError,
    error::chain,
    message::{Hello, Role},
};
use chiral_transport::IdleTimeout;
use tokio::{
    sync::{mpsc, watch},
    time::{sleep, timeout},
};

use crate::{
    connection::{self, SendItem, fault_message},
    legacy, lock,
    server::Inner,
};

/// Within this the first frame must have come.
const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// For a last word and an orderly close.
pub(crate) const PARTING_LIMIT: Duration = Duration::from_secs(1);

/// Serves one connection until it ends.
pub(crate) async fn serve<T: Transport>(server: &Arc<Inner>, transport: T, idle_timeout: IdleTimeout) {
    if transport.codec() == Codec::Msgpack {
        return legacy::session::serve(server, &transport, idle_timeout).await;
    }
    let (id, hello) = match timeout(HELLO_LIMIT, receive_hello(&transport)).await {
        Ok(Ok(hello)) => hello,
        Ok(Err(refusal)) => return refuse(&transport, refusal).await,
        Err(_) => return tracing::debug!(peer = transport.peer(), "no hello within {HELLO_LIMIT:?}"),
    };
    let session = if hello.attach_token.is_empty() {
        Session::begin(server, &hello, transport.peer())
    } else {
        Session::join(server, &hello)
    };
    match session {
        Ok((session, attach_token)) => {
            let welcome = server.welcome(session.id, attach_token);
            connection::serve(&session, &transport, idle_timeout, id, welcome).await;
        }
        Err(fault) => refuse(&transport, Some((id, fault))).await,
    }
}

/// Why a session ended.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum End {
    #[error("the peer said goodbye ({0})")]
    Goodbye(String),
    #[error("the peer closed the connection")]
    Closed,
    #[error("{}", chain(.0))]
    Lost(TransportError),
    #[error("nothing received for {} s", .0.as_secs_f64())]
    Idle(Duration),
    #[error("refused: {0}")]
    Refused(Fault),
    #[error("the server is shutting down")]
    ShuttingDown,
}

/// A hello and its id; or why there is none, and the reply for a peer that wants one.
async fn receive_hello<T: Transport>(transport: &T) -> Result<(u64, Hello), Option<(u64, Fault)>> {
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

async fn refuse<T: Transport>(transport: &T, refusal: Option<(u64, Fault)>) {
    let parting = async {
        if let Some((id, fault)) = refusal {
            tracing::info!(peer = transport.peer(), "refused: {fault}");
            if let Ok(frame) = transport.codec().encode(&fault_message(id, fault)) {
                let _ = transport.send(frame).await;
            }
        }
        transport.close().await;
    };
    let _ = timeout(PARTING_LIMIT, parting).await;
}

/// An admitted peer, on one connection or two.
pub(crate) struct Session {
    pub(crate) id: u64,
    pub(crate) server: Arc<Inner>,
    /// What the second connection has to send.
    observations: OnceLock<mpsc::Sender<SendItem>>,
    ended: watch::Sender<Option<End>>,
    span: tracing::Span,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.server.session_ended();
    }
}

impl Session {
    /// A new session, and the token by which a second connection joins it.
    fn begin(server: &Arc<Inner>, hello: &Hello, peer: &str) -> Result<(Arc<Session>, Bytes), Fault> {
        check_version(hello)?;
        let session = Session::open(server, hello.role, &hello.client_name, &hello.software, peer)?;
        let mut token = [0; 16];
        if let Err(error) = getrandom::fill(&mut token) {
            tracing::warn!(parent: &session.span, "no second connection, for want of random bits: {error}");
            return Ok((session, Bytes::new()));
        }
        lock(&server.lobby).expect(token, &session, server.clock.now());
        Ok((session, Bytes::copy_from_slice(&token)))
    }

    /// A new session, which controls the robot if it is to.
    pub(crate) fn open(
        server: &Arc<Inner>,
        role: Role,
        name: &str,
        software: &str,
        peer: &str,
    ) -> Result<Arc<Session>, Fault> {
        let id = server.session_began()?;
        let session = Arc::new(Session {
            id,
            server: Arc::clone(server),
            observations: OnceLock::new(),
            ended: watch::Sender::new(None),
            span: tracing::info_span!("session", id, peer, client = name),
        });
        if role == Role::Controller {
            server.control.claim(id, name)?;
        }
        tracing::info!(parent: &session.span, ?role, software, "connected");
        Ok(session)
    }

    /// The session that a second connection belongs to.
    fn join(server: &Arc<Inner>, hello: &Hello) -> Result<(Arc<Session>, Bytes), Fault> {
        check_version(hello)?;
        let session = lock(&server.lobby).join(&hello.attach_token, server.clock.now());
        // One that is still saying goodbye is over, and a stream that has begun stays where it is.
        let may_join =
            |session: &Arc<Session>| session.ended.borrow().is_none() && session.observations().is_none();
        let session = session.filter(may_join).ok_or_else(|| {
            let text = "expected the token of a welcome not older than 5 s, never used before, of a session that lasts and has no stream; found another";
            Fault::new(Code::Invalid, text).field("hello.attach_token")
        })?;
        tracing::debug!(parent: &session.span, "second connection");
        Ok((session, Bytes::new()))
    }

    /// From now on, and for good, what carries observations is sent by this connection.
    pub(crate) fn send_observations_on(&self, outbox: mpsc::Sender<SendItem>) {
        let _ = self.observations.set(outbox);
    }

    pub(crate) fn observations(&self) -> Option<&mpsc::Sender<SendItem>> {
        self.observations.get()
    }

    /// Ends the session, if it has not ended before: at once another may control the robot.
    pub(crate) fn end(&self, end: End) {
        let is_first = self.ended.send_if_modified(|ended| {
            let is_first = ended.is_none();
            ended.get_or_insert_with(|| end.clone());
            is_first
        });
        if is_first {
            self.server.control.release(self.id);
            tracing::info!(parent: &self.span, "disconnected: {end}");
        }
    }

    /// Runs the two loops of a connection, until the session has ended and nothing is half said; and why it
    /// has.
    pub(crate) async fn run(
        &self,
        receiving: impl Future<Output = End>,
        sending: impl Future<Output = End>,
    ) -> End {
        // Also if this future is dropped.
        let _ending = Ending(self);
        let receiving = async {
            self.end(receiving.await);
            pending().await
        };
        let stopping = async {
            self.server.stopping().await;
            self.end(End::ShuttingDown);
            pending().await
        };
        let given_up = async {
            self.ended().await;
            sleep(PARTING_LIMIT).await;
        };
        tokio::select! {
            biased;
            () = receiving => {}
            () = stopping => {}
            // Ends when the session does, but with nothing half said.
            () = async { self.end(sending.await) } => {}
            () = given_up => {}
        }
        self.ended().await
    }

    /// Returns when the session has ended, and why.
    pub(crate) async fn ended(&self) -> End {
        let mut ended = self.ended.subscribe();
        let end = ended.wait_for(Option::is_some).await;
        end.ok().and_then(|end| end.clone()).unwrap_or(End::ShuttingDown)
    }
}

struct Ending<'a>(&'a Session);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.end(End::ShuttingDown);
    }
}

fn check_version(hello: &Hello) -> Result<(), Fault> {
    if hello.protocol == PROTOCOL_VERSION {
        return Ok(());
    }
    let text = format!("expected protocol version {PROTOCOL_VERSION}, found {}", hello.protocol);
    Err(Fault::new(Code::VersionMismatch, text).field("hello.protocol"))
}
