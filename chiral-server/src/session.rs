//! One peer, from its hello to its end: a receive loop that hands actions straight to the control thread, and a send loop that owns the stream.

use std::{future::pending, sync::Arc, time::Duration};

use bytes::Bytes;
use chiral_proto::{
    Code, DecodeError, Fault, Message, Notice, Observation, PROTOCOL_VERSION, Reply, Request, Timestamp, Transport,
    TransportError,
    error::{UnknownName, chain},
    message::{Hello, Role, Subscribe, Welcome},
};
use tokio::{
    sync::mpsc::{self, OwnedPermit},
    time::{sleep, timeout},
};

use crate::{control::StepRequest, server::Inner, stream::Stream};

/// Within this the first frame must have come.
const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// For a last word and an orderly close.
const PARTING_LIMIT: Duration = Duration::from_secs(1);
/// Replies that may wait or be owed; a peer that asks for more is not read from until some are sent.
const OUTBOX: usize = 256;

/// Serves one connection until it ends.
pub(crate) async fn serve<T: Transport>(server: &Arc<Inner>, transport: T) {
    let (id, hello) = match timeout(HELLO_LIMIT, receive_hello(&transport)).await {
        Ok(Ok(hello)) => hello,
        Ok(Err(refusal)) => return refuse(&transport, refusal).await,
        Err(_) => return tracing::debug!(peer = transport.peer(), "no hello within {HELLO_LIMIT:?}"),
    };
    let session = match Session::admit(server, &hello) {
        Ok(session) => session,
        Err(fault) => return refuse(&transport, Some((id, fault))).await,
    };
    let span = tracing::info_span!("session", id = session.id, peer = transport.peer(), client = hello.client_name);
    tracing::info!(parent: &span, role = ?hello.role, software = hello.software, "connected");
    let end = session.run(&transport, id).await;
    drop(session);
    let _ = timeout(PARTING_LIMIT, transport.close()).await;
    tracing::info!(parent: &span, "disconnected: {end}");
}

/// Why a session ended.
#[derive(Clone, Debug, thiserror::Error)]
enum End {
    #[error("the peer said goodbye ({0})")]
    Goodbye(String),
    #[error("the peer closed the connection")]
    Closed,
    #[error("{}", chain(.0))]
    Lost(TransportError),
    #[error("nothing heard for {} s", .0.as_secs_f64())]
    Silent(Duration),
    #[error("the server is shutting down")]
    ShuttingDown,
}

/// A hello and its id; or why there is none, and the reply for a peer that wants one.
async fn receive_hello<T: Transport>(transport: &T) -> Result<(u64, Hello), Option<(u64, Fault)>> {
    let frame = match transport.recv().await {
        Ok(Some(frame)) => frame,
        Ok(None) | Err(_) => return Err(None),
    };
    let expected = |id| Err(Some((id, Fault::new(Code::Protocol, "expected a hello as the first message, found another"))));
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
            if let Ok(frame) = transport.codec().encode(&error_message(id, fault)) {
                let _ = transport.send(frame).await;
            }
        }
        transport.close().await;
    };
    let _ = timeout(PARTING_LIMIT, parting).await;
}

fn error_message(id: u64, fault: Fault) -> Message {
    match id {
        0 => Message::Notice(Notice::Error(fault)),
        id => Message::Reply { id, reply: Reply::Error(fault) },
    }
}

/// What the send loop has to do, in order.
enum Outgoing {
    Message(Message),
    /// The observation is taken when its turn comes, so that it is never old.
    Observation {
        id: u64,
    },
    Pong {
        t1: Timestamp,
        t2: Timestamp,
    },
    Subscribe {
        id: u64,
        asked: Subscribe,
    },
    Unsubscribe {
        id: u64,
    },
    Credit {
        received: u64,
        window: u32,
    },
    /// The last word, and why.
    Goodbye(End),
}

/// A place in the outbox, reserved before a message is read, so that no answer ever waits and no flood of requests fills the memory.
type Place = OwnedPermit<Outgoing>;

/// An admitted peer. Dropping it frees the robot.
struct Session {
    id: u64,
    server: Arc<Inner>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.server.control.release(self.id);
        self.server.session_ended();
    }
}

impl Session {
    fn admit(server: &Arc<Inner>, hello: &Hello) -> Result<Session, Fault> {
        if hello.protocol != PROTOCOL_VERSION {
            let text = format!("expected protocol version {PROTOCOL_VERSION}, found {}", hello.protocol);
            return Err(Fault::new(Code::VersionMismatch, text).field("hello.protocol"));
        }
        if !hello.attach_token.is_empty() {
            return Err(
                Fault::new(Code::Unsupported, "this server joins no second connection to a session").field("hello.attach_token")
            );
        }
        let id = server.session_began()?;
        let session = Session { id, server: Arc::clone(server) };
        if hello.role == Role::Controller {
            server.control.claim(id, &hello.client_name)?;
        }
        Ok(session)
    }

    async fn run<T: Transport>(&self, transport: &T, hello_id: u64) -> End {
        let (outbox, outgoing) = mpsc::channel(OUTBOX);
        let welcome = Reply::Welcome(Box::new(Welcome {
            protocol: PROTOCOL_VERSION,
            software: concat!("chiral-server ", env!("CARGO_PKG_VERSION")).to_owned(),
            session: self.id,
            episode: self.server.observations.episode(),
            robot: self.server.robot.clone(),
            attach_token: Bytes::new(),
        }));
        let welcome = Outgoing::Message(Message::Reply { id: hello_id, reply: welcome });
        outbox.try_send(welcome).unwrap_or_else(|_| unreachable!("the outbox is new and empty"));
        tokio::select! {
            end = self.receive(transport, outbox) => end,
            end = self.send(transport, outgoing) => end,
        }
    }

    // ---- Receiving ---------------------------------------------------------------------------------------------------------------------

    async fn receive<T: Transport>(&self, transport: &T, outbox: mpsc::Sender<Outgoing>) -> End {
        let silence = self.server.options.silence_limit;
        loop {
            let next = async {
                let place = outbox.clone().reserve_owned().await.ok()?;
                Some((place, transport.recv().await))
            };
            let (place, received) = tokio::select! {
                next = timeout(silence, next) => match next {
                    Ok(Some(next)) => next,
                    Ok(None) => return End::Closed,
                    Err(_) => return End::Silent(silence),
                },
                () = self.server.stopping() => return part(&outbox, End::ShuttingDown).await,
            };
            let frame = match received {
                Ok(Some(frame)) => frame,
                Ok(None) => return End::Closed,
                // A peer that can still hear is told what was wrong.
                Err(error) => return part(&outbox, End::Lost(error)).await,
            };
            let arrived = self.server.clock.now();
            if let Err(end) = self.handle(transport.codec().decode(frame), arrived, place) {
                return end;
            }
        }
    }

    fn handle(&self, message: Result<Message, DecodeError>, arrived: Timestamp, place: Place) -> Result<(), End> {
        match message {
            Ok(Message::Request { id, request }) => self.answer(id, request, place),
            Ok(Message::Notice(Notice::Action(message))) => {
                let tell = |fault| put(place, Outgoing::Message(Message::Notice(Notice::Error(fault))));
                self.server.control.act(self.id, message, Box::new(tell));
            }
            Ok(Message::Notice(Notice::Credit { received, window })) => put(place, Outgoing::Credit { received, window }),
            Ok(Message::Notice(Notice::Ping { t1 })) => put(place, Outgoing::Pong { t1, t2: arrived }),
            Ok(Message::Notice(Notice::Goodbye { reason })) => return Err(End::Goodbye(reason)),
            Ok(Message::Notice(Notice::Error(fault))) => tracing::warn!(session = self.id, "the peer reports: {fault}"),
            Ok(Message::Notice(Notice::Pong { .. }) | Message::Unknown { id: 0 }) => {}
            Ok(Message::Unknown { id }) => {
                reply(place, id, Err(Fault::new(Code::Unsupported, "a kind of message unknown to this server")))
            }
            Ok(Message::Reply { .. } | Message::Notice(Notice::Observation(_) | Notice::StreamEnd { .. })) => {
                reply(place, 0, Err(Fault::new(Code::Protocol, "expected what a client says, found what a server says")));
            }
            Err(error) => {
                tracing::debug!(session = self.id, "malformed: {error}");
                reply(place, error.id, Err(error.into()));
            }
        }
        Ok(())
    }

    fn answer(&self, id: u64, request: Request, place: Place) {
        let control = &self.server.control;
        match request {
            Request::Hello(_) => reply(place, id, Err(Fault::new(Code::Protocol, "expected one hello, found a second"))),
            Request::GetMetadata => reply(place, id, control.metadata().map(Reply::Metadata)),
            Request::Reset { seed, options } => {
                let done = move |outcome: Result<_, _>| reply(place, id, outcome.map(|(obs, info)| Reply::Reset { obs, info }));
                control.reset(self.id, seed, options, Box::new(done));
            }
            Request::GetObs => self.get_obs(id, place),
            Request::Step { session, episode, actions } => {
                let request = StepRequest { session: self.id, chosen_in: session, episode, chunk: actions };
                control.step(request, Box::new(move |outcome| reply(place, id, outcome.map(Reply::Step))));
            }
            Request::Subscribe(asked) => self.subscribe(id, asked, place),
            Request::Unsubscribe => put(place, Outgoing::Unsubscribe { id }),
        }
    }

    fn get_obs(&self, id: u64, place: Place) {
        if self.server.observations.are_at_hand() {
            return put(place, Outgoing::Observation { id });
        }
        let (observations, session) = (Arc::clone(&self.server.observations), self.id);
        tokio::spawn(async move {
            let observed = observations.observe().await;
            reply(place, id, observed.map(|observed| Reply::Observation(Arc::new(Observation { session, ..observed }))));
        });
    }

    fn subscribe(&self, id: u64, mut asked: Subscribe, place: Place) {
        let known = &self.server.robot.cameras;
        if let Some(name) = asked.cameras.iter().find(|name| known.iter().all(|camera| camera.name != **name)) {
            let unknown = UnknownName::new("camera", name, known.iter().map(|camera| &*camera.name));
            return reply(place, id, Err(Fault::new(Code::Invalid, unknown.to_string()).field("subscribe.cameras")));
        }
        if asked.cameras.is_empty() {
            asked.cameras = known.iter().map(|camera| camera.name.clone()).collect();
        }
        // Granted once there is something to send, so that a stream that can never begin is an error and not a silence.
        if self.server.observations.are_at_hand() {
            return put(place, Outgoing::Subscribe { id, asked });
        }
        let observations = Arc::clone(&self.server.observations);
        tokio::spawn(async move {
            match observations.observe().await {
                Ok(_) => put(place, Outgoing::Subscribe { id, asked }),
                Err(fault) => reply(place, id, Err(fault)),
            }
        });
    }

    // ---- Sending -----------------------------------------------------------------------------------------------------------------------

    async fn send<T: Transport>(&self, transport: &T, mut outgoing: mpsc::Receiver<Outgoing>) -> End {
        let mut stream: Option<Stream> = None;
        // The stream's next observation, being taken.
        let mut taking = None;
        loop {
            // Only the choice of what to send is interruptible, never the sending.
            let message = tokio::select! {
                biased;
                next = outgoing.recv() => match next {
                    Some(Outgoing::Goodbye(end)) => {
                        let _ = write(transport, Message::Notice(Notice::Goodbye { reason: end.to_string() })).await;
                        return end;
                    }
                    Some(next) => self.prepare(next, &mut stream).await,
                    None => return End::Closed,
                },
                observed = async { taking.as_mut().expect("checked below").await }, if taking.is_some() => {
                    taking = None;
                    self.next_of(observed, &mut stream)
                }
                () = self.due(stream.as_ref()), if taking.is_none() => {
                    taking = Some(Box::pin(self.observe()));
                    None
                }
            };
            if let Some(message) = message
                && let Err(error) = write(transport, message).await
            {
                return End::Lost(error);
            }
        }
    }

    async fn prepare(&self, next: Outgoing, stream: &mut Option<Stream>) -> Option<Message> {
        match next {
            Outgoing::Message(message) => Some(message),
            Outgoing::Observation { id } => Some(match self.observe().await {
                Ok(observation) => Message::Reply { id, reply: Reply::Observation(Arc::new(observation)) },
                Err(fault) => error_message(id, fault),
            }),
            Outgoing::Pong { t1, t2 } => Some(Message::Notice(Notice::Pong { t1, t2, t3: self.server.clock.now() })),
            Outgoing::Subscribe { id, asked } => {
                let (hz, cameras) = (asked.hz, asked.cameras.clone());
                *stream = Some(Stream::new(asked, self.server.clock.now()));
                Some(Message::Reply { id, reply: Reply::Subscribed { hz, cameras } })
            }
            Outgoing::Unsubscribe { id } => {
                *stream = None;
                Some(Message::Reply { id, reply: Reply::StreamEnd { reason: "unsubscribed".to_owned() } })
            }
            Outgoing::Credit { received, window } => {
                if let Some(stream) = stream {
                    stream.credit(received, window);
                }
                None
            }
            Outgoing::Goodbye(_) => unreachable!("the send loop ends before"),
        }
    }

    /// Returns when the stream's next observation is due.
    async fn due(&self, stream: Option<&Stream>) {
        match stream.and_then(|stream| stream.due_in(self.server.clock.now())) {
            Some(wait) => sleep(wait).await,
            None => pending().await,
        }
    }

    fn next_of(&self, observed: Result<Observation, Fault>, stream: &mut Option<Stream>) -> Option<Message> {
        let running = stream.as_mut()?;
        match observed {
            Ok(observation) => {
                running.take(self.server.clock.now());
                Some(Message::Notice(Notice::Observation(Arc::new(running.select(observation)))))
            }
            Err(fault) => {
                *stream = None;
                Some(Message::Notice(Notice::StreamEnd { reason: fault.to_string() }))
            }
        }
    }

    async fn observe(&self) -> Result<Observation, Fault> {
        Ok(Observation { session: self.id, ..self.server.observations.observe().await? })
    }
}

/// Has the send loop end the session with a goodbye, after what is already to be sent.
async fn part(outbox: &mpsc::Sender<Outgoing>, end: End) -> End {
    let reason = end.clone();
    let _ = timeout(PARTING_LIMIT, outbox.send(Outgoing::Goodbye(end))).await;
    sleep(PARTING_LIMIT).await;
    reason
}

fn put(place: Place, outgoing: Outgoing) {
    drop(place.send(outgoing));
}

fn reply(place: Place, id: u64, outcome: Result<Reply, Fault>) {
    let message = match outcome {
        Ok(reply) => Message::Reply { id, reply },
        Err(fault) => error_message(id, fault),
    };
    put(place, Outgoing::Message(message));
}

/// Sends a message; what the codec has no words for is told to the peer instead.
async fn write<T: Transport>(transport: &T, message: Message) -> Result<(), TransportError> {
    let codec = transport.codec();
    let frame = codec.encode(&message).or_else(|unsayable| {
        tracing::warn!("not sent: {unsayable}");
        let id = if let Message::Reply { id, .. } = message { id } else { 0 };
        codec.encode(&error_message(id, Fault::new(Code::RobotFailed, format!("the robot's answer cannot be sent: {unsayable}"))))
    });
    match frame {
        Ok(frame) => transport.send(frame).await,
        Err(_) => Ok(()),
    }
}
