//! The keys that all legacy clients of a Zenoh network share. Frames on them name neither robot nor client.
//! Whether this server alone is meant, and who sent a frame, is known from the network around it.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
};

use chiral_proto::{
    Code, Codec, Fault, Frame, Message, Request, Transport, TransportError, error::chain, lock,
    message::Role, pool::Pool,
};
use chiral_transport::{
    IdleTimeout,
    zenoh::{LegacyEvent, LegacySender, LegacyTransport, ZenohSession},
};
use tokio::{sync::oneshot, time::timeout};

use crate::{
    core::{ServerCore, connection_runtime},
    legacy::{
        neighbours::{Neighbours, Presence},
        requests::RequestQueue,
        session::LegacySession,
    },
    log_throttle::LogThrottle,
    session::Session,
};

/// Serves legacy clients on this network, or logs that it does not, on a thread of its own until the returned
/// sender is dropped.
pub(crate) async fn start(core: &Arc<ServerCore>, network: &ZenohSession) -> oneshot::Sender<Infallible> {
    let (guard, dropped) = oneshot::channel();
    let never = why_never(core, network);
    match network.legacy_server(core.options.max_frame, Pool::new(0), never.is_none()).await {
        Ok(transport) => {
            match &never {
                None => tracing::info!("serving legacy clients that are given this server's address"),
                Some(never) if core.options.network.legacy => {
                    tracing::warn!("legacy clients get no reply on Zenoh: {never}")
                }
                Some(_) => {}
            }
            let server = SharedKeys {
                transport: Arc::new(transport),
                neighbours: Arc::new(Mutex::new(Neighbours::new(never))),
                refusals: Arc::new(LogThrottle::new(core.clock.clone())),
                core: Arc::clone(core),
            };
            connection_runtime().spawn(async move {
                tokio::select! {
                    () = server.serve() => {}
                    _ = dropped => {}
                }
            });
        }
        Err(error) => tracing::warn!("legacy clients are not served on Zenoh: {}", chain(&error)),
    }
    guard
}

/// Why this server serves no legacy client on this network, whoever is on it.
fn why_never(core: &ServerCore, network: &ZenohSession) -> Option<String> {
    if !core.options.network.legacy {
        let text = "legacy clients are served on Zenoh only where the operator says so: legacy_zenoh(true) of \
                    the builder, chiral-sim serve --legacy-zenoh";
        return Some(text.to_owned());
    }
    network.other_way_in().map(|way| {
        format!("expected that only its address leads to a server of legacy clients, found that {way}")
    })
}

/// A server on the shared keys.
struct SharedKeys {
    core: Arc<ServerCore>,
    transport: Arc<LegacyTransport>,
    neighbours: Arc<Mutex<Neighbours<LegacySender>>>,
    refusals: Arc<LogThrottle>,
}

impl SharedKeys {
    /// Serves one session after another; returns when the Zenoh session is closed.
    async fn serve(&self) {
        while let Ok(event) = self.transport.next_event().await {
            let (frame, sender) = match event {
                LegacyEvent::Frame(frame, sender) => (frame, sender),
                LegacyEvent::Network(event) => {
                    lock(&self.neighbours).apply(event, self.core.clock.now());
                    continue;
                }
                _ => continue,
            };
            match self.open_session(frame.clone(), sender) {
                Ok((session, client)) => {
                    let must_reset = lock(&self.neighbours).begin_session(client.sender);
                    let requests = RequestQueue::for_shared_keys(must_reset);
                    // A client that thinks is not gone: the network shows when it is.
                    let session = LegacySession::new(&session, &client, IdleTimeout::never(), requests);
                    session.handle_frame(frame);
                    session.run().await;
                }
                Err(fault) => self.refusals.record(|count| {
                    tracing::warn!(count, "dropped a legacy client's message: {fault}");
                }),
            }
        }
    }

    /// Opens a session for the client that sent the frame, if there is none and this server is meant.
    fn open_session(
        &self,
        frame: Frame,
        sender: Option<LegacySender>,
    ) -> Result<(Arc<Session>, Client), Fault> {
        let mut neighbours = lock(&self.neighbours);
        neighbours.check_alone().map_err(|text| Fault::new(Code::Busy, text).retryable())?;
        let unknown = || Fault::new(Code::Busy, "expected a message by a known connection, found another");
        let sender = sender.filter(|sender| neighbours.note_frame(*sender)).ok_or_else(unknown)?;
        check_opens_session(frame)?;
        let peer = neighbours.describe(sender);
        drop(neighbours);
        let name = format!("a legacy client at {peer}");
        let session = Session::open(&self.core, Role::Controller, &name, "unknown", &peer)?;
        let client = Client {
            transport: Arc::clone(&self.transport),
            neighbours: Arc::clone(&self.neighbours),
            refusals: Arc::clone(&self.refusals),
            core: Arc::clone(&self.core),
            sender,
            peer,
        };
        Ok((session, client))
    }
}

/// Fails unless a client begins with this frame. Actions do not begin a session: those of a client that wakes
/// up after its session ended must not reach the robot.
fn check_opens_session(frame: Frame) -> Result<(), Fault> {
    match Codec::Msgpack.decode(frame)? {
        Message::Request { request: Request::GetMetadata | Request::Reset { .. }, .. } => Ok(()),
        _ => Err(Fault::new(Code::Protocol, "expected metadata or reset to begin a session, found another")),
    }
}

/// One client on the shared keys: what it sends, while this server is meant. It ends when the client's process
/// has left.
struct Client {
    core: Arc<ServerCore>,
    transport: Arc<LegacyTransport>,
    neighbours: Arc<Mutex<Neighbours<LegacySender>>>,
    refusals: Arc<LogThrottle>,
    sender: LegacySender,
    peer: String,
}

impl Client {
    /// Takes note of an event; returns what it means for the client.
    fn handle(&self, event: LegacyEvent) -> Result<Received, TransportError> {
        let mut neighbours = lock(&self.neighbours);
        match event {
            LegacyEvent::AllLeft => return Ok(Received::Left),
            LegacyEvent::Network(event) => neighbours.apply(event, self.core.clock.now()),
            LegacyEvent::Frame(frame, sender) => {
                let is_known = sender.is_some_and(|sender| neighbours.note_frame(sender));
                if sender == Some(self.sender) && is_known {
                    return Ok(Received::Frame(frame));
                }
                let other = sender.map(|sender| neighbours.describe(sender)).unwrap_or_default();
                let peer = &self.peer;
                self.refusals.record(|count| {
                    tracing::warn!(
                        count,
                        "refused a second legacy client at {other}: the robot is controlled by a legacy \
                         client at {peer}, and no message of another one is heeded"
                    );
                });
            }
            _ => {}
        }
        if let Err(text) = neighbours.check_alone() {
            return Err(TransportError::lost(text));
        }
        Ok(if neighbours.presence(self.sender) == Presence::Gone {
            Received::Left
        } else {
            Received::Nothing
        })
    }

    /// Waits for the next event, while the client may be there.
    async fn next_event(&self) -> Result<Option<LegacyEvent>, TransportError> {
        let presence = lock(&self.neighbours).presence(self.sender);
        let Presence::Doubtful(since) = presence else {
            return self.transport.next_event().await.map(Some);
        };
        let left = self.core.options.idle_timeout.saturating_sub(self.core.clock.now().since(since));
        timeout(left, self.transport.next_event()).await.ok().transpose()
    }
}

/// What an event means for a client.
enum Received {
    Frame(Frame),
    Left,
    Nothing,
}

impl Transport for Client {
    async fn send(&self, frame: Frame) -> Result<(), TransportError> {
        self.transport.send(frame).await
    }

    async fn recv(&self) -> Result<Option<Frame>, TransportError> {
        loop {
            let Some(event) = self.next_event().await? else { return Ok(None) };
            match self.handle(event)? {
                Received::Frame(frame) => return Ok(Some(frame)),
                Received::Left => return Ok(None),
                Received::Nothing => {}
            }
        }
    }

    async fn close(&self) {}

    fn codec(&self) -> Codec {
        Codec::Msgpack
    }

    fn peer(&self) -> &str {
        &self.peer
    }
}
