//! One connection to a server, from the hello to the end: a receive loop and a send loop, which never wait for each other.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use chiral_proto::{
    Clock, Code, Codec, Fault, Frame, Message, Notice, PROTOCOL_VERSION, Reply, Request, Timestamp, Transport, TransportError,
    clock::PingSample,
    error::chain,
    message::{Hello, Role, Welcome},
};
use tokio::{
    sync::{Notify, mpsc, watch},
    time::{sleep, timeout},
};

use crate::{
    error::Error,
    lock,
    state::{Latest, Next, State, Stream},
};

/// Within this the server must answer the hello.
pub(crate) const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// For a last word and an orderly close.
const PARTING_LIMIT: Duration = Duration::from_secs(1);

/// What the send loop is given by the client's calls.
pub(crate) enum Outgoing {
    /// A message, encoded where it can still fail without harm.
    Frame(Frame),
    /// The last word.
    Goodbye,
}

/// What the loops and the client share.
pub(crate) struct Shared {
    pub(crate) state: Mutex<State>,
    pub(crate) latest: watch::Sender<Latest>,
    /// Something for the send loop has changed.
    pub(crate) changed: Notify,
    /// The action queue may have room, or has lost what empties it.
    pub(crate) room: Notify,
    pub(crate) clock: Clock,
    pub(crate) codec: Codec,
    pub(crate) silence_limit: Duration,
}

impl Shared {
    pub(crate) fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// What there is to say next; who waits for room in the action queue is woken if that made some.
    fn next(&self) -> Next {
        let mut state = lock(&self.state);
        let queued = state.dispatch.queued();
        let next = state.next(self.now());
        if state.dispatch.queued() < queued {
            self.room.notify_waiters();
        }
        next
    }

    /// The session is over: every call from now on, and every one that waits, gets this error or an earlier one.
    fn end(&self, error: Error) {
        lock(&self.state).end(error);
        self.latest.send_modify(|_| ());
        self.room.notify_waiters();
    }
}

/// Who a client is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Identity {
    pub(crate) role: Role,
    pub(crate) name: String,
    pub(crate) auth: Bytes,
}

/// Says hello; returns the server's welcome.
pub(crate) async fn greet<T: Transport>(transport: &T, identity: &Identity) -> Result<Welcome, Error> {
    let hello = Message::Request {
        id: 1,
        request: Request::Hello(Hello {
            protocol: PROTOCOL_VERSION,
            software: concat!("chiral-client ", env!("CARGO_PKG_VERSION")).to_owned(),
            role: identity.role,
            client_name: identity.name.clone(),
            auth: identity.auth.clone(),
            attach_token: Bytes::new(),
        }),
    };
    let exchange = async {
        write(transport, &hello).await.map_err(lost)?;
        match transport.recv().await.map_err(lost)? {
            Some(frame) => transport.codec().decode(frame).map_err(Error::Malformed),
            None => Err(Error::Disconnected { reason: "the server closed the connection at the hello".to_owned(), cause: None }),
        }
    };
    let answer = timeout(HELLO_LIMIT, exchange)
        .await
        .map_err(|_| Error::Timeout { what: "the server's welcome", waited: HELLO_LIMIT })??;
    match answer {
        Message::Reply { reply: Reply::Welcome(welcome), .. } if welcome.protocol == PROTOCOL_VERSION => Ok(*welcome),
        Message::Reply { reply: Reply::Welcome(welcome), .. } => {
            let text = format!("it answered in version {}", welcome.protocol);
            Err(Error::VersionMismatch(Fault::new(Code::VersionMismatch, text)))
        }
        Message::Reply { reply: Reply::Error(fault), .. } | Message::Notice(Notice::Error(fault)) => Err(match fault.code {
            Code::Busy => Error::Busy(fault),
            Code::VersionMismatch => Error::VersionMismatch(fault),
            _ => Error::Rejected(fault),
        }),
        _ => Err(Error::Protocol { expected: "a welcome" }),
    }
}

/// Runs a session until it ends, and tells everyone why it did.
pub(crate) async fn run<T: Transport>(shared: Arc<Shared>, transport: T, outgoing: mpsc::Receiver<Outgoing>) {
    let end = tokio::select! {
        end = receive(&shared, &transport) => end,
        end = send(&shared, &transport, outgoing) => end,
    };
    match &end {
        Error::Closed => tracing::debug!("closed"),
        error => tracing::warn!("{error}"),
    }
    shared.end(end);
    let _ = timeout(PARTING_LIMIT, transport.close()).await;
}

// ---- Receiving ---------------------------------------------------------------------------------------------------------------------------

async fn receive<T: Transport>(shared: &Shared, transport: &T) -> Error {
    loop {
        let frame = match timeout(shared.silence_limit, transport.recv()).await {
            Ok(Ok(Some(frame))) => frame,
            Ok(Ok(None)) => return Error::Disconnected { reason: "the server closed the connection".to_owned(), cause: None },
            Ok(Err(error)) => return lost(error),
            Err(_) => {
                let reason = format!("nothing heard from the server for {} s", shared.silence_limit.as_secs_f64());
                return Error::Disconnected { reason, cause: None };
            }
        };
        if let Err(end) = handle(shared, transport, frame) {
            return end;
        }
    }
}

fn handle<T: Transport>(shared: &Shared, transport: &T, frame: Frame) -> Result<(), Error> {
    let now = shared.now();
    let message = match transport.codec().decode(frame) {
        Ok(message) => message,
        // Only the request that it answers has failed; but what belongs to no request must not vanish in silence.
        Err(error) if error.id != 0 => {
            settle(shared, error.id, Err(Error::Malformed(error)), now);
            return Ok(());
        }
        Err(error) => return Err(Error::Malformed(error)),
    };
    match message {
        Message::Reply { id, reply } => {
            let outcome = if let Reply::Error(fault) = reply { Err(Error::Rejected(fault)) } else { Ok(reply) };
            settle(shared, id, outcome, now);
        }
        Message::Notice(Notice::Observation(observation)) => {
            if lock(&shared.state).arrived(&observation, now) {
                shared.latest.send_replace(Some(observation));
            }
            shared.changed.notify_one();
        }
        Message::Notice(Notice::StreamEnd { reason }) => {
            lock(&shared.state).stream = Stream::Failed(Error::StreamEnded { reason });
            shared.latest.send_modify(|_| ());
        }
        Message::Notice(Notice::Error(fault)) if fault.action_seq != 0 => {
            lock(&shared.state).refused(fault);
            shared.room.notify_waiters();
        }
        Message::Notice(Notice::Error(fault)) => tracing::warn!("the server reports: {fault}"),
        Message::Notice(Notice::Pong { t1, t2, t3 }) => lock(&shared.state).pong(PingSample { t1, t2, t3, t4: now }),
        Message::Notice(Notice::Goodbye { reason }) => return Err(Error::Disconnected { reason, cause: None }),
        // What only a client says, or a newer server: nothing that anybody here waits for.
        Message::Notice(Notice::Ping { .. } | Notice::Action(_) | Notice::Credit { .. })
        | Message::Request { .. }
        | Message::Unknown { id: 0 } => {}
        Message::Unknown { id } => settle(shared, id, Err(Error::Protocol { expected: "a known kind of reply" }), now),
    }
    Ok(())
}

fn settle(shared: &Shared, id: u64, outcome: Result<Reply, Error>, now: Timestamp) {
    let mut state = lock(&shared.state);
    let episode = state.episode;
    state.settle(id, outcome, now);
    if state.episode > episode {
        // What came before the reset is not the latest any more.
        shared.latest.send_replace(None);
    }
    drop(state);
    shared.changed.notify_one();
    shared.room.notify_waiters();
}

// ---- Sending -----------------------------------------------------------------------------------------------------------------------------

async fn send<T: Transport>(shared: &Shared, transport: &T, mut outgoing: mpsc::Receiver<Outgoing>) -> Error {
    loop {
        let next = shared.next();
        // Only the choice of what to send is interruptible, never the sending.
        let sent = match next {
            Next::Say(message) => write(transport, &message).await,
            Next::Wait(wait) => tokio::select! {
                biased;
                next = outgoing.recv() => match next {
                    Some(Outgoing::Frame(frame)) => transport.send(frame).await,
                    // Or every client of this session was dropped.
                    Some(Outgoing::Goodbye) | None => {
                        let goodbye = Notice::Goodbye { reason: "the client was closed".to_owned() };
                        let _ = write(transport, &Message::Notice(goodbye)).await;
                        return Error::Closed;
                    }
                },
                () = shared.changed.notified() => Ok(()),
                () = sleep(wait) => Ok(()),
            },
        };
        if let Err(error) = sent {
            return lost(error);
        }
    }
}

async fn write<T: Transport>(transport: &T, message: &Message) -> Result<(), TransportError> {
    match transport.codec().encode(message) {
        Ok(frame) => transport.send(frame).await,
        Err(unsayable) => Err(TransportError::lost(unsayable)),
    }
}

fn lost(cause: TransportError) -> Error {
    Error::Disconnected { reason: chain(&cause), cause: Some(cause) }
}
