//! One connection of a session: a receive loop that hands actions straight to the control thread, and a send
//! loop that owns the stream.

use std::{
    future::pending,
    pin::pin,
    sync::{Arc, atomic::Ordering},
};

use chiral_proto::{
    Code, DecodeError, Fault, Message, Notice, Observation, Reply, Request, Timestamp, Transport,
    TransportError,
    error::UnknownName,
    message::{Subscribe, Welcome},
};
use chiral_transport::IdleTimeout;
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

use crate::{
    control::StepRequest,
    core::ServerCore,
    send_queue::{Place, SEND_QUEUE, SendItem, SendQueue, fault_message, put, reply},
    session::{End, PARTING_LIMIT, Session},
    stream::Stream,
};

/// One connection of a session, while its loops run.
struct Connection<'a, T> {
    session: &'a Arc<Session>,
    server: &'a Arc<ServerCore>,
    transport: &'a T,
    idle_timeout: IdleTimeout,
    outbox: SendQueue,
}

/// Serves a connection of this session until either ends, from the welcome to the last word.
pub(crate) async fn serve<T: Transport>(
    session: &Arc<Session>,
    transport: &T,
    idle_timeout: IdleTimeout,
    hello_id: u64,
    welcome: Welcome,
) {
    let (outbox, outgoing) = mpsc::channel(SEND_QUEUE);
    let is_second = welcome.attach_token.is_empty();
    let welcome =
        SendItem::Message(Message::Reply { id: hello_id, reply: Reply::Welcome(Box::new(welcome)) });
    outbox.try_send(welcome).unwrap_or_else(|_| unreachable!("the outbox is new and empty"));
    if is_second {
        session.send_observations_on(outbox.clone());
    }
    let lane = Connection { session, server: &session.server, transport, idle_timeout, outbox };
    let end = session.run(lane.receive(), lane.send(outgoing)).await;
    let parting = async {
        let _ = write(transport, Message::Notice(Notice::Goodbye { reason: end.to_string() })).await;
        transport.close().await;
    };
    let _ = timeout(PARTING_LIMIT, parting).await;
}

impl<T: Transport> Connection<'_, T> {
    // ---- Receiving ----------------------------------------------------------------------------------------

    async fn receive(&self) -> End {
        self.idle_timeout.record();
        tokio::select! {
            biased;
            end = self.receive_frames() => end,
            () = self.idle_timeout.expired() => End::Idle(self.idle_timeout.limit()),
        }
    }

    async fn receive_frames(&self) -> End {
        loop {
            let Ok(place) = self.outbox.clone().reserve_owned().await else { return End::Closed };
            let frame = match self.transport.recv().await {
                Ok(Some(frame)) => frame,
                Ok(None) => return End::Closed,
                Err(error) => return End::Lost(error),
            };
            self.idle_timeout.record();
            let arrived = self.server.clock.now();
            if let Err(end) = self.handle(self.transport.codec().decode(frame), arrived, place) {
                return end;
            }
        }
    }

    fn handle(
        &self,
        message: Result<Message, DecodeError>,
        arrived: Timestamp,
        place: Place,
    ) -> Result<(), End> {
        match message {
            Ok(Message::Request { id, request }) => match self.place_for(&request, place) {
                Ok(place) => self.answer(id, request, place),
                Err((place, fault)) => reply(place, id, Err(fault)),
            },
            Ok(Message::Notice(Notice::Action(message))) => {
                self.server.pacing.ask();
                let tell = |fault| put(place, SendItem::Message(Message::Notice(Notice::Error(fault))));
                self.server.control.act(self.session.id, message, Box::new(tell));
            }
            Ok(Message::Notice(Notice::Credit { received, window })) => {
                put(place, SendItem::Credit { received, window })
            }
            Ok(Message::Notice(Notice::Ping { t1 })) => put(place, SendItem::Pong { t1, t2: arrived }),
            Ok(Message::Notice(Notice::Goodbye { reason })) => return Err(End::Goodbye(reason)),
            Ok(Message::Notice(Notice::Error(fault))) => {
                tracing::warn!(session = self.session.id, "the peer reports: {fault}")
            }
            Ok(Message::Notice(Notice::Pong { .. }) | Message::Unknown { id: 0 }) => {}
            Ok(Message::Unknown { id }) => reply(
                place,
                id,
                Err(Fault::new(Code::Unsupported, "a kind of message unknown to this server")),
            ),
            Ok(
                Message::Reply { .. } | Message::Notice(Notice::Observation(_) | Notice::StreamEnd { .. }),
            ) => {
                reply(
                    place,
                    0,
                    Err(Fault::new(Code::Protocol, "expected what a client says, found what a server says")),
                );
            }
            Err(error) => {
                tracing::debug!(session = self.session.id, "malformed: {error}");
                reply(place, error.id, Err(error.into()));
            }
        }
        Ok(())
    }

    /// Where the answer goes: if the session has a connection for what carries observations, there.
    fn place_for(&self, request: &Request, place: Place) -> Result<Place, (Place, Fault)> {
        match (request, self.session.observations()) {
            (Request::Hello(_) | Request::GetMetadata, _) | (_, None) => Ok(place),
            (_, Some(outbox)) if outbox.same_channel(&self.outbox) => Ok(place),
            (_, Some(outbox)) => outbox.clone().try_reserve_owned().map_err(|_| {
                let text =
                    format!("expected at most {SEND_QUEUE} requests whose answers were not read, found more");
                (place, Fault::new(Code::QueueFull, text).retryable())
            }),
        }
    }

    fn answer(&self, id: u64, request: Request, place: Place) {
        let control = &self.server.control;
        match request {
            Request::Hello(_) => {
                reply(place, id, Err(Fault::new(Code::Protocol, "expected one hello, found a second")))
            }
            Request::GetMetadata => reply(place, id, control.metadata().map(Reply::Metadata)),
            Request::Reset { seed, options } => {
                let done = move |outcome: Result<_, _>| {
                    reply(place, id, outcome.map(|(obs, info)| Reply::Reset { obs, info }))
                };
                control.reset(self.session.id, seed, options, Box::new(done));
            }
            Request::GetObs => self.get_obs(id, place),
            Request::Step { session, episode, actions } => {
                let request =
                    StepRequest { session: self.session.id, chosen_in: session, episode, chunk: actions };
                control.step(request, Box::new(move |outcome| reply(place, id, outcome.map(Reply::Step))));
            }
            Request::Subscribe(asked) => {
                // If no second connection has joined until now, none will.
                self.session.send_observations_on(self.outbox.clone());
                self.subscribe(id, asked, place);
            }
            Request::Unsubscribe => put(place, SendItem::Unsubscribe { id }),
        }
    }

    fn get_obs(&self, id: u64, place: Place) {
        if self.server.observations.are_at_hand() {
            return put(place, SendItem::Observation { id });
        }
        let (observations, session) = (Arc::clone(&self.server.observations), self.session.id);
        tokio::spawn(async move {
            let observed = observations.observe().await;
            reply(
                place,
                id,
                observed.map(|observed| Reply::Observation(Arc::new(Observation { session, ..observed }))),
            );
        });
    }

    fn subscribe(&self, id: u64, mut asked: Subscribe, place: Place) {
        let known = &self.server.robot.cameras;
        if let Some(name) = asked.cameras.iter().find(|name| known.iter().all(|camera| camera.name != **name))
        {
            let unknown = UnknownName::new("camera", name, known.iter().map(|camera| &*camera.name));
            return reply(
                place,
                id,
                Err(Fault::new(Code::Invalid, unknown.to_string()).field("subscribe.cameras")),
            );
        }
        if asked.cameras.is_empty() {
            asked.cameras = known.iter().map(|camera| camera.name.clone()).collect();
        }
        // Granted once there is something to send, so that a stream that can never begin is an error and not
        // a silence.
        if self.server.observations.are_at_hand() {
            return put(place, SendItem::Subscribe { id, asked });
        }
        let observations = Arc::clone(&self.server.observations);
        tokio::spawn(async move {
            match observations.observe().await {
                Ok(_) => put(place, SendItem::Subscribe { id, asked }),
                Err(fault) => reply(place, id, Err(fault)),
            }
        });
    }

    // ---- Sending ------------------------------------------------------------------------------------------

    async fn send(&self, mut outgoing: mpsc::Receiver<SendItem>) -> End {
        let mut stream: Option<Stream> = None;
        // The stream's next observation, being taken.
        let mut taking = None;
        let mut ended = pin!(self.session.ended());
        loop {
            // Only the choice of what to send is interruptible, never the sending.
            let message = tokio::select! {
                biased;
                next = outgoing.recv() => match next {
                    Some(next) => self.prepare(next, &mut stream).await,
                    None => return End::Closed,
                },
                end = &mut ended => return end,
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
                && let Err(error) = write(self.transport, message).await
            {
                return End::Lost(error);
            }
        }
    }

    async fn prepare(&self, next: SendItem, stream: &mut Option<Stream>) -> Option<Message> {
        match next {
            SendItem::Message(message) => Some(message),
            SendItem::Observation { id } => Some(match self.observe().await {
                Ok(observation) => Message::Reply { id, reply: Reply::Observation(Arc::new(observation)) },
                Err(fault) => fault_message(id, fault),
            }),
            SendItem::Pong { t1, t2 } => {
                Some(Message::Notice(Notice::Pong { t1, t2, t3: self.server.clock.now() }))
            }
            SendItem::Subscribe { id, asked } => {
                let (hz, cameras) = (asked.rate.hz(), asked.cameras.clone());
                *stream = Some(Stream::new(asked, self.server.clock.now()));
                Some(Message::Reply { id, reply: Reply::Subscribed { hz, cameras } })
            }
            SendItem::Unsubscribe { id } => {
                *stream = None;
                Some(Message::Reply { id, reply: Reply::StreamEnd { reason: "unsubscribed".to_owned() } })
            }
            SendItem::Credit { received, window } => {
                if let Some(stream) = stream {
                    stream.credit(received, window);
                }
                None
            }
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
                let skipped = running.take(self.server.clock.now());
                self.server.observations_skipped.fetch_add(skipped, Ordering::Relaxed);
                Some(Message::Notice(Notice::Observation(Arc::new(running.select(observation)))))
            }
            Err(fault) => {
                *stream = None;
                Some(Message::Notice(Notice::StreamEnd { reason: fault.to_string() }))
            }
        }
    }

    async fn observe(&self) -> Result<Observation, Fault> {
        Ok(Observation { session: self.session.id, ..self.server.observations.observe().await? })
    }
}

/// Sends a message; what the codec has no words for is told to the peer instead.
async fn write<T: Transport>(transport: &T, message: Message) -> Result<(), TransportError> {
    let codec = transport.codec();
    let frame = codec.encode(&message).or_else(|unsayable| {
        tracing::warn!("not sent: {unsayable}");
        let id = if let Message::Reply { id, .. } = message { id } else { 0 };
        codec.encode(&fault_message(
            id,
            Fault::new(Code::RobotFailed, format!("the robot's answer cannot be sent: {unsayable}")),
        ))
    });
    match frame {
        Ok(frame) => transport.send(frame).await,
        Err(_) => Ok(()),
    }
}
