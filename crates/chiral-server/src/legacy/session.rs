//! The session of a legacy client: one connection, no hello, no error replies.
//!
//! Its requests are served one after another, as legacy servers do: the next one starts after the reply to
//! the last one, so that replies come in the order of the requests. Its actions never wait for requests. The
//! wire does not carry the session and the episode that actions belong to; they are taken to be the current
//! ones.

use std::{
    pin::pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use chiral_proto::{
    Code, Fault, Frame, Message, Notice, Reply, Request, Timestamp, Transport, TransportError, ValueMap,
    codec::msgpack::{self, TimedMessage},
    lock,
    message::{ActionMessage, Role},
};
use chiral_transport::IdleTimeout;
use tokio::{
    sync::{Notify, oneshot},
    time::timeout,
};

use crate::{
    control::{OnReply, StepRequest},
    core::ServerCore,
    legacy::requests::{CheckedRequest, RequestQueue},
    log_throttle::LogThrottle,
    session::{CLOSE_TIMEOUT, End, Session},
};

/// An older capture time is not of this server's clock.
const MAX_OBSERVATION_AGE: Duration = Duration::from_secs(3600);

/// Serves a legacy client on a connection of its own, until that ends.
pub(crate) async fn serve<T: Transport>(core: &Arc<ServerCore>, transport: &T, idle_timeout: IdleTimeout) {
    // The session is dropped only after the close, so that a stopping server waits for the close frame.
    let session = open_session(core, transport);
    let end = match &session {
        Ok(session) => {
            LegacySession::new(session, transport, idle_timeout, RequestQueue::for_connection()).run().await
        }
        Err(fault) => {
            tracing::info!(peer = transport.peer(), "refused: {fault}");
            End::Refused(fault.clone())
        }
    };
    let closing = async {
        match end {
            End::Refused(fault) => transport.refuse(&fault).await,
            End::ShuttingDown => transport.refuse(&Fault::new(Code::ShuttingDown, end.to_string())).await,
            _ => transport.close().await,
        }
    };
    let _ = timeout(CLOSE_TIMEOUT, closing).await;
}

pub(super) fn not_a_client_message() -> Fault {
    Fault::new(Code::Protocol, "expected a message that a client sends, found another")
}

/// Opens a session as controller: this wire has no observers.
pub(super) fn open_session<T: Transport>(
    core: &Arc<ServerCore>,
    transport: &T,
) -> Result<Arc<Session>, Fault> {
    let name = format!("a legacy client at {}", transport.peer());
    Session::open(core, Role::Controller, &name, "unknown", transport.peer())
}

/// A legacy client's session, while its loops run.
pub(super) struct LegacySession<'a, T> {
    session: &'a Arc<Session>,
    core: &'a Arc<ServerCore>,
    transport: &'a T,
    idle_timeout: IdleTimeout,
    requests: Mutex<RequestQueue>,
    is_shared: bool,
    /// Notified when a request arrives, to wake the send loop.
    request_arrived: Notify,
    dropped_actions: Arc<LogThrottle>,
    dropped_requests: LogThrottle,
}

impl<'a, T: Transport> LegacySession<'a, T> {
    pub(super) fn new(
        session: &'a Arc<Session>,
        transport: &'a T,
        idle_timeout: IdleTimeout,
        requests: RequestQueue,
    ) -> LegacySession<'a, T> {
        let core = &session.core;
        let log_throttle = || LogThrottle::new(core.clock.clone());
        LegacySession {
            session,
            core,
            transport,
            idle_timeout,
            is_shared: requests.is_shared(),
            requests: Mutex::new(requests),
            request_arrived: Notify::new(),
            dropped_actions: Arc::new(log_throttle()),
            dropped_requests: log_throttle(),
        }
    }

    pub(super) async fn run(&self) -> End {
        self.session.run(self.receive(), self.send()).await
    }

    // ---- Receiving ----------------------------------------------------------------------------------------

    async fn receive(&self) -> End {
        let receiving = async {
            tokio::select! {
                biased;
                end = self.receive_frames() => end,
                // On shared keys, what arrives may be another client's.
                never = self.session.notice_silence(&self.idle_timeout), if !self.is_shared => match never {},
            }
        };
        let received = self.idle_timeout.watch(receiving).await;
        received.unwrap_or_else(|| End::Idle(self.idle_timeout.limit()))
    }

    async fn receive_frames(&self) -> End {
        loop {
            let end = match self.transport.recv().await {
                Ok(Some(frame)) => self.handle_frame(frame),
                Ok(None) => return End::Closed,
                Err(error @ TransportError::Protocol { .. }) => {
                    return End::Refused(Fault::new(Code::Protocol, error.to_string()));
                }
                Err(error) => return End::Lost(error),
            };
            if let Some(end) = end {
                return end;
            }
        }
    }

    /// Handles one frame. Returns why the session ends, if it does.
    pub(super) fn handle_frame(&self, frame: Frame) -> Option<End> {
        self.handle_message(frame).err().and_then(|fault| self.handle_refusal(fault))
    }

    fn handle_message(&self, frame: Frame) -> Result<(), Fault> {
        let timed =
            msgpack::decode(frame).map(|TimedMessage { message, capture_times }| (message, capture_times));
        let request = match timed {
            Ok((Message::Notice(Notice::Action(message)), capture_times)) => {
                let observed_at = observed_at(&capture_times, self.core.clock.now());
                self.handle_actions(ActionMessage { observed_at, ..message });
                return Ok(());
            }
            Ok((Message::Request { request, .. }, _)) => self.check(request),
            Ok((Message::Unknown { .. }, _)) => {
                tracing::debug!(
                    session = self.session.id,
                    "ignored a message of an unknown kind, as legacy servers do"
                );
                return Ok(());
            }
            Ok((Message::Reply { .. } | Message::Notice(_), _)) => Err(not_a_client_message()),
            Err(error) if error.field.starts_with("apply_action.") => {
                self.note_refused(&error.into());
                return Ok(());
            }
            Err(error) => Err(error.into()),
        };
        // An invalid request, too, is refused in its turn, after the requests before it.
        let pushed = lock(&self.requests).push(request);
        self.request_arrived.notify_one();
        pushed
    }

    /// Checks a step's actions on arrival, so that invalid ones do not take up memory until their turn.
    fn check(&self, request: Request) -> CheckedRequest {
        if let Request::Step { actions, .. } = &request {
            self.core.robot.action_spec.check(actions)?;
        }
        Ok(request)
    }

    fn handle_actions(&self, message: ActionMessage) {
        let session = self.session.id;
        if let Err(fault) = lock(&self.requests).check_actions() {
            return self.note_refused(&fault);
        }
        self.core.pacing.note_action();
        let message = ActionMessage { session, episode: self.core.sampler.episode(), ..message };
        let dropped = Arc::clone(&self.dropped_actions);
        self.core.control.submit_actions(
            session,
            message,
            Box::new(move |fault| log_dropped(&dropped, session, &fault)),
        );
    }

    fn note_refused(&self, fault: &Fault) {
        self.core.control.note_refused(self.session.id, fault);
        log_dropped(&self.dropped_actions, self.session.id, fault);
    }

    /// Ends a connection on which a request was refused: the wire has no error reply, so the caller would
    /// wait without end. On shared keys, where there is no connection to close, the refusal is only logged.
    fn handle_refusal(&self, fault: Fault) -> Option<End> {
        if !self.is_shared {
            return Some(End::Refused(fault));
        }
        let session = self.session.id;
        self.dropped_requests
            .record(|count| tracing::warn!(session, count, "no reply to a request: {fault}"));
        None
    }

    // ---- Sending ------------------------------------------------------------------------------------------

    async fn send(&self) -> End {
        let mut ended = pin!(self.session.ended());
        loop {
            let next = lock(&self.requests).pop();
            let Some(request) = next else {
                tokio::select! {
                    biased;
                    end = &mut ended => return end,
                    () = self.request_arrived.notified() => {}
                }
                continue;
            };
            // The session's end interrupts the wait for a reply, but not the sending.
            let reply = tokio::select! {
                biased;
                end = &mut ended => return end,
                reply = self.reply_to(request) => reply,
            };
            let end = match reply {
                Ok(frame) => self.transport.send(frame).await.err().map(End::Lost),
                Err(fault) => self.handle_refusal(fault),
            };
            if let Some(end) = end {
                return end;
            }
        }
    }

    /// Serves a request and encodes the reply.
    async fn reply_to(&self, request: CheckedRequest) -> Result<Frame, Fault> {
        let message = Message::Reply { id: msgpack::ID, reply: self.serve_request(request?).await? };
        let encode_failed =
            |error| Fault::new(Code::RobotFailed, format!("the robot's reply cannot be encoded: {error}"));
        self.transport.codec().encode(&message).map_err(encode_failed)
    }

    async fn serve_request(&self, request: Request) -> Result<Reply, Fault> {
        let (control, session) = (&self.core.control, self.session.id);
        match request {
            Request::GetMetadata => control.metadata().map(Reply::Metadata),
            Request::GetObs => Ok(Reply::Observation(Arc::new(self.core.sampler.observe(&[]).await?))),
            Request::Reset { seed, options } => {
                let (obs, info) = call_control(|on_reply| {
                    control.reset(self.session.reset_request(seed, options), on_reply);
                })
                .await?;
                lock(&self.requests).note_reset();
                Ok(Reply::Reset { obs, info })
            }
            Request::Step { actions: chunk, .. } => {
                let episode = self.core.sampler.episode();
                let request = StepRequest { session, stated_session: session, episode, chunk };
                call_control(|on_reply| control.step(request, on_reply)).await.map(Reply::Step)
            }
            Request::Hello(_) | Request::Subscribe(_) | Request::Unsubscribe => {
                Err(Fault::new(Code::Unsupported, "expected a request of the legacy wire, found another"))
            }
        }
    }
}

/// The oldest capture time that an action states. Clients copy the times from the observation, in which they are
/// this server's, but may as well state their own.
fn observed_at(capture_times: &ValueMap, now: Timestamp) -> Option<Timestamp> {
    let is_ours = |time: &Timestamp| *time <= now && now.since(*time) <= MAX_OBSERVATION_AGE;
    let oldest =
        capture_times.values().map(msgpack::timestamp).collect::<Option<Vec<_>>>()?.into_iter().min();
    oldest.filter(is_ours)
}

/// Calls the control thread and waits for its reply.
async fn call_control<R: Send + 'static>(call: impl FnOnce(OnReply<R>)) -> Result<R, Fault> {
    let (sender, receiver) = oneshot::channel();
    call(Box::new(move |outcome| drop(sender.send(outcome))));
    let dropped = |_| Err(Fault::new(Code::ShuttingDown, "the session ended before the robot replied"));
    receiver.await.unwrap_or_else(dropped)
}

/// Logs that actions were dropped, since this wire cannot report it.
fn log_dropped(dropped: &LogThrottle, session: u64, fault: &Fault) {
    dropped.record(|count| {
        tracing::warn!(session, count, "a legacy client's apply_action was dropped: {fault}")
    });
}
