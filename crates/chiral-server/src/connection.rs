//! One connection of a session: a receive loop that passes actions directly to the control thread, and a send
//! loop that owns the stream. The session itself is in `session`.

use std::{
    convert::Infallible,
    future::pending,
    pin::pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use chiral_proto::{
    Code, Fault, Message, Notice, Observation, Reply, Request, Timestamp, Transport, TransportError,
    clock::PingSample,
    error::{DecodeError, UnknownName},
    message::{Subscribe, Welcome},
};
use chiral_transport::IdleTimeout;
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval, sleep, timeout},
};

use crate::{
    control::StepRequest,
    core::ServerCore,
    send_queue::{SEND_QUEUE_CAPACITY, SendItem, SendPermit, SendQueue, enqueue, error_message, reply},
    session::{CLOSE_TIMEOUT, End, Session},
    stream::Stream,
};

/// A connection, while its loops run.
struct Connection<'a, T> {
    session: &'a Arc<Session>,
    core: &'a Arc<ServerCore>,
    transport: &'a T,
    idle_timeout: IdleTimeout,
    send_queue: SendQueue,
    /// Whether the controller's actions arrive here.
    is_control: bool,
}

/// How often the client is pinged on the connection on which its actions arrive.
const PING_PERIOD: Duration = Duration::from_secs(1);

/// Serves a connection of this session until either ends: sends the welcome, runs the two loops, sends the
/// goodbye.
pub(crate) async fn serve<T: Transport>(
    session: &Arc<Session>,
    transport: &T,
    idle_timeout: IdleTimeout,
    hello_id: u64,
    welcome: Welcome,
    is_control: bool,
) {
    let (send_queue, items) = mpsc::channel(SEND_QUEUE_CAPACITY);
    let carries_observations = welcome.attach_token.is_empty();
    let welcome =
        SendItem::Message(Message::Reply { id: hello_id, reply: Reply::Welcome(Box::new(welcome)) });
    send_queue.try_send(welcome).unwrap_or_else(|_| unreachable!("the send queue is new and empty"));
    if carries_observations {
        session.set_observations_queue(send_queue.clone());
    }
    let connection =
        Connection { session, core: &session.core, transport, idle_timeout, send_queue, is_control };
    let end = session.run(connection.receive(), connection.send(items)).await;
    let closing = async {
        let _ = write(transport, Message::Notice(Notice::Goodbye { reason: end.to_string() })).await;
        transport.close().await;
    };
    let _ = timeout(CLOSE_TIMEOUT, closing).await;
}

impl<T: Transport> Connection<'_, T> {
    // ---- Receiving ----------------------------------------------------------------------------------------

    async fn receive(&self) -> End {
        let receiving = async {
            tokio::select! {
                biased;
                end = self.receive_frames() => end,
                never = self.notice_silence() => match never {},
            }
        };
        let received = self.idle_timeout.watch(receiving).await;
        received.unwrap_or_else(|| End::Idle(self.idle_timeout.limit()))
    }

    /// Notices that nothing arrives from the client any more, where its actions do.
    async fn notice_silence(&self) -> Infallible {
        match self.is_control {
            true => self.session.notice_silence(&self.idle_timeout).await,
            false => pending().await,
        }
    }

    async fn receive_frames(&self) -> End {
        loop {
            let Ok(permit) = self.send_queue.clone().reserve_owned().await else { return End::Closed };
            let frame = match self.transport.recv().await {
                Ok(Some(frame)) => frame,
                Ok(None) => return End::Closed,
                Err(error) => return End::Lost(error),
            };
            // Our transports have recorded every byte of it; a host's transport has not.
            self.idle_timeout.record();
            let received_at = self.core.clock.now();
            if let Err(end) = self.handle(self.transport.codec().decode(frame), received_at, permit) {
                return end;
            }
        }
    }

    fn handle(
        &self,
        message: Result<Message, DecodeError>,
        received_at: Timestamp,
        permit: SendPermit,
    ) -> Result<(), End> {
        match message {
            Ok(Message::Request { id, request }) => match self.permit_for(&request, permit) {
                Ok(permit) => self.handle_request(id, request, permit),
                Err((permit, fault)) => reply(permit, id, Err(fault)),
            },
            Ok(Message::Notice(Notice::Action(message))) => {
                self.core.pacing.note_action();
                let report =
                    |fault| enqueue(permit, SendItem::Message(Message::Notice(Notice::Error(fault))));
                self.core.control.submit_actions(self.session.id, message, Box::new(report));
                self.report_dropped();
            }
            Ok(Message::Notice(Notice::Credit { received, window })) => {
                enqueue(permit, SendItem::Credit { received, window })
            }
            Ok(Message::Notice(Notice::Ping { t1 })) => {
                self.core.control.note_ping(self.session.id, t1, received_at);
                enqueue(permit, SendItem::Pong { t1, t2: received_at });
                self.report_dropped();
            }
            Ok(Message::Notice(Notice::Pong { t1, t2, t3 })) => {
                let sample = PingSample { t1, t2, t3, t4: received_at };
                self.core.control.note_pong(self.session.id, sample);
            }
            Ok(Message::Notice(Notice::Goodbye { reason })) => return Err(End::Goodbye(reason)),
            Ok(Message::Notice(Notice::Error(fault))) => {
                tracing::warn!(session = self.session.id, "the peer reports an error: {fault}")
            }
            Ok(Message::Unknown { id: 0 }) => {}
            Ok(Message::Unknown { id }) => reply(
                permit,
                id,
                Err(Fault::new(
                    Code::Unsupported,
                    "expected a known kind of message, found one unknown to this server",
                )),
            ),
            Ok(
                Message::Reply { .. }
                | Message::Notice(
                    Notice::Observation(_) | Notice::StreamEnd { .. } | Notice::ActionsDropped(_),
                ),
            ) => {
                reply(
                    permit,
                    0,
                    Err(Fault::new(
                        Code::Protocol,
                        "expected a message that a client sends, found one that a server sends",
                    )),
                );
            }
            Err(error) => {
                tracing::debug!(session = self.session.id, "malformed message: {error}");
                reply(permit, error.id, Err(error.into()));
            }
        }
        Ok(())
    }

    /// Returns the permit for the reply: on the observations lane, if there is one, unless the reply can
    /// carry no observation.
    fn permit_for(&self, request: &Request, permit: SendPermit) -> Result<SendPermit, (SendPermit, Fault)> {
        match (request, self.session.observations_queue()) {
            (Request::Hello(_) | Request::GetMetadata, _) | (_, None) => Ok(permit),
            (_, Some(send_queue)) if send_queue.same_channel(&self.send_queue) => Ok(permit),
            (_, Some(send_queue)) => send_queue.clone().try_reserve_owned().map_err(|_| {
                let text = format!(
                    "expected at most {SEND_QUEUE_CAPACITY} requests with unread replies, found more"
                );
                (permit, Fault::new(Code::QueueFull, text).retryable())
            }),
        }
    }

    fn handle_request(&self, id: u64, request: Request, permit: SendPermit) {
        let control = &self.core.control;
        match request {
            Request::Hello(_) => {
                reply(permit, id, Err(Fault::new(Code::Protocol, "expected one hello, found a second")))
            }
            Request::GetMetadata => reply(permit, id, control.metadata().map(Reply::Metadata)),
            Request::Reset { seed, options } => {
                let done = move |outcome: Result<_, _>| {
                    reply(permit, id, outcome.map(|(obs, info)| Reply::Reset { obs, info }))
                };
                control.reset(self.session.reset_request(seed, options), Box::new(done));
            }
            Request::GetObs => self.get_obs(id, permit),
            Request::Step { session, episode, actions } => {
                let request = StepRequest {
                    session: self.session.id,
                    stated_session: session,
                    episode,
                    chunk: actions,
                };
                control.step(request, Box::new(move |outcome| reply(permit, id, outcome.map(Reply::Step))));
            }
            Request::Subscribe(subscribe) => {
                // The stream stays on this connection: from now on, no second one may join.
                self.session.set_observations_queue(self.send_queue.clone());
                self.subscribe(id, subscribe, permit);
            }
            Request::Unsubscribe => enqueue(permit, SendItem::Unsubscribe { id }),
        }
    }

    fn get_obs(&self, id: u64, permit: SendPermit) {
        if self.core.sampler.is_ready(&[]) {
            return enqueue(permit, SendItem::Observation { id });
        }
        let (sampler, session) = (Arc::clone(&self.core.sampler), self.session.id);
        tokio::spawn(async move {
            let observed = sampler.observe(&[]).await;
            reply(
                permit,
                id,
                observed.map(|observed| Reply::Observation(Arc::new(Observation { session, ..observed }))),
            );
        });
    }

    fn subscribe(&self, id: u64, mut subscribe: Subscribe, permit: SendPermit) {
        let known = &self.core.robot.cameras;
        if let Some(name) =
            subscribe.cameras.iter().find(|name| known.iter().all(|camera| camera.name != **name))
        {
            let unknown = UnknownName::new("camera", name, known.iter().map(|camera| &*camera.name));
            return reply(
                permit,
                id,
                Err(Fault::new(Code::Invalid, unknown.to_string()).field("subscribe.cameras")),
            );
        }
        if subscribe.cameras.is_empty() {
            subscribe.cameras = known.iter().map(|camera| camera.name.clone()).collect();
        }
        // Confirmed once there is an observation, so that a stream that cannot start is reported as an error.
        if self.core.sampler.is_ready(&subscribe.cameras) {
            return enqueue(permit, SendItem::Subscribe { id, subscribe });
        }
        let sampler = Arc::clone(&self.core.sampler);
        tokio::spawn(async move {
            match sampler.observe(&subscribe.cameras).await {
                Ok(_) => enqueue(permit, SendItem::Subscribe { id, subscribe }),
                Err(fault) => reply(permit, id, Err(fault)),
            }
        });
    }

    /// Tells the client which of its rows were dropped. The counts are sums, so one that finds no room in the
    /// queue is made up for by the next.
    fn report_dropped(&self) {
        if let Ok(permit) = self.send_queue.clone().try_reserve_owned()
            && let Some(dropped) = self.core.control.take_dropped(self.session.id)
        {
            enqueue(permit, SendItem::Message(Message::Notice(Notice::ActionsDropped(dropped))));
        }
    }

    // ---- Sending ------------------------------------------------------------------------------------------

    async fn send(&self, mut items: mpsc::Receiver<SendItem>) -> End {
        let mut stream: Option<Stream> = None;
        // The future of the stream's next observation.
        let mut observing = None;
        let mut ended = pin!(self.session.ended());
        let mut pings = interval(PING_PERIOD);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // The session's end interrupts the choice of what to send, but not the sending.
            let message = tokio::select! {
                biased;
                item = items.recv() => match item {
                    Some(item) => {
                        if matches!(item, SendItem::Subscribe { .. } | SendItem::Unsubscribe { .. }) {
                            // It has the cameras of the stream that this one ends.
                            observing = None;
                        }
                        self.prepare(item, &mut stream).await
                    }
                    None => return End::Closed,
                },
                end = &mut ended => return end,
                observed = async { observing.as_mut().expect("checked below").await },
                    if observing.is_some() =>
                {
                    observing = None;
                    self.stream_message(observed, &mut stream)
                }
                () = self.stream_due(stream.as_ref()), if observing.is_none() => {
                    let cameras = stream.as_ref().map(Stream::cameras).unwrap_or_default();
                    observing = Some(Box::pin(async move { self.observe(&cameras).await }));
                    None
                }
                _ = pings.tick(), if self.is_control => {
                    Some(Message::Notice(Notice::Ping { t1: self.core.clock.now() }))
                }
            };
            if let Some(message) = message
                && let Err(error) = write(self.transport, message).await
            {
                return End::Lost(error);
            }
        }
    }

    async fn prepare(&self, item: SendItem, stream: &mut Option<Stream>) -> Option<Message> {
        match item {
            SendItem::Message(message) => Some(message),
            SendItem::Observation { id } => Some(match self.observe(&[]).await {
                Ok(observation) => Message::Reply { id, reply: Reply::Observation(Arc::new(observation)) },
                Err(fault) => error_message(id, fault),
            }),
            SendItem::Pong { t1, t2 } => {
                Some(Message::Notice(Notice::Pong { t1, t2, t3: self.core.clock.now() }))
            }
            SendItem::Subscribe { id, subscribe } => {
                let (hz, cameras) = (subscribe.rate.hz(), subscribe.cameras.clone());
                *stream = Some(Stream::new(subscribe, self.core.clock.now()));
                Some(Message::Reply { id, reply: Reply::Subscribed { hz, cameras } })
            }
            SendItem::Unsubscribe { id } => {
                *stream = None;
                Some(Message::Reply { id, reply: Reply::StreamEnd { reason: "unsubscribed".to_owned() } })
            }
            SendItem::Credit { received, window } => {
                if let Some(stream) = stream {
                    stream.set_credit(received, window);
                }
                None
            }
        }
    }

    /// Returns when the stream's next observation is due.
    async fn stream_due(&self, stream: Option<&Stream>) {
        match stream.and_then(|stream| stream.due_in(self.core.clock.now())) {
            Some(wait) => sleep(wait).await,
            None => pending().await,
        }
    }

    fn stream_message(
        &self,
        observed: Result<Observation, Fault>,
        stream: &mut Option<Stream>,
    ) -> Option<Message> {
        let running = stream.as_mut()?;
        match observed {
            Ok(observation) => {
                let skipped = running.advance(self.core.clock.now());
                self.core.observations_skipped.fetch_add(skipped, Ordering::Relaxed);
                Some(Message::Notice(Notice::Observation(Arc::new(running.select(observation)))))
            }
            Err(fault) => {
                *stream = None;
                Some(Message::Notice(Notice::StreamEnd { reason: fault.to_string() }))
            }
        }
    }

    async fn observe(&self, cameras: &[String]) -> Result<Observation, Fault> {
        Ok(Observation { session: self.session.id, ..self.core.sampler.observe(cameras).await? })
    }
}

/// Sends a message. If the codec cannot encode it, sends an error in its place.
async fn write<T: Transport>(transport: &T, message: Message) -> Result<(), TransportError> {
    let codec = transport.codec();
    let frame = codec.encode(&message).or_else(|error| {
        tracing::warn!("cannot encode a message: {error}");
        let id = if let Message::Reply { id, .. } = message { id } else { 0 };
        codec.encode(&error_message(
            id,
            Fault::new(Code::RobotFailed, format!("the robot's reply cannot be encoded: {error}")),
        ))
    });
    match frame {
        Ok(frame) => transport.send(frame).await,
        Err(_) => Ok(()),
    }
}
