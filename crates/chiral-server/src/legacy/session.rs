//! The session of a legacy client: one connection, no hello, no words for errors.
//!
//! Its requests are carried out one after another, as the servers do that it knows: the next begins when the
//! last one was answered, so that answers come in the order of the requests. Its actions never wait for them.
//! What the wire does not say, the session and the episode that actions belong to, is the newest.

use std::{
    pin::pin,
    sync::{Arc, Mutex},
};

use chiral_proto::{
    Code, Fault, Frame, Message, Notice, Reply, Request, Transport, TransportError,
    codec::msgpack,
    message::{ActionMessage, Role},
};
use chiral_transport::{IdleTimeout, lock};
use tokio::{
    sync::{Notify, oneshot},
    time::{sleep, timeout},
};

use crate::{
    control::{OnReply, StepRequest},
    core::ServerCore,
    legacy::requests::{CheckedRequest, Next, RequestQueue},
    log_throttle::LogThrottle,
    session::{CLOSE_TIMEOUT, End, Session},
};

/// Serves a connection of a legacy client's own until it ends.
pub(crate) async fn serve<T: Transport>(core: &Arc<ServerCore>, transport: &T, idle_timeout: IdleTimeout) {
    // Until its last word is said it counts, so that a stopping server waits for that.
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
    Fault::new(Code::Protocol, "expected what a client says, found something else")
}

/// The first connection controls the robot, since on this wire there is nobody who only watches.
pub(super) fn open_session<T: Transport>(
    core: &Arc<ServerCore>,
    transport: &T,
) -> Result<Arc<Session>, Fault> {
    let name = format!("a legacy client at {}", transport.peer());
    Session::open(core, Role::Controller, &name, "unknown", transport.peer())
}

/// A session, while its loops run.
pub(super) struct LegacySession<'a, T> {
    session: &'a Arc<Session>,
    core: &'a Arc<ServerCore>,
    transport: &'a T,
    idle_timeout: IdleTimeout,
    requests: Mutex<RequestQueue>,
    is_shared: bool,
    /// Something was asked.
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
        tokio::select! {
            biased;
            end = self.receive_frames() => end,
            () = self.idle_timeout.expired() => End::Idle(self.idle_timeout.limit()),
        }
    }

    async fn receive_frames(&self) -> End {
        loop {
            let heard = match self.transport.recv().await {
                Ok(Some(frame)) => self.handle_frame(frame),
                Ok(None) => return End::Closed,
                Err(error @ TransportError::Protocol { .. }) => {
                    return End::Refused(Fault::new(Code::Protocol, error.to_string()));
                }
                Err(error) => return End::Lost(error),
            };
            if let Some(end) = heard {
                return end;
            }
        }
    }

    /// Takes a frame in; what comes of its refusal, if it is refused at once.
    pub(super) fn handle_frame(&self, frame: Frame) -> Option<End> {
        self.handle_message(frame).err().and_then(|fault| self.handle_refusal(fault))
    }

    fn handle_message(&self, frame: Frame) -> Result<(), Fault> {
        let asked = match self.transport.codec().decode(frame) {
            Ok(Message::Notice(Notice::Action(message))) => {
                self.handle_actions(message);
                return Ok(());
            }
            Ok(Message::Request { request, .. }) => self.check(request),
            Ok(Message::Unknown { .. }) => {
                tracing::debug!(
                    session = self.session.id,
                    "passed over what is unknown to this wire, as legacy servers do"
                );
                return Ok(());
            }
            Ok(Message::Reply { .. } | Message::Notice(_)) => Err(not_a_client_message()),
            Err(error) if error.field.starts_with("apply_action.") => {
                self.core.control.count_refused();
                log_dropped(&self.dropped_actions, self.session.id, &error.into());
                return Ok(());
            }
            Err(error) => Err(error.into()),
        };
        // What is wrong is refused in its turn, after what was asked before it.
        let taken = lock(&self.requests).push(asked, self.core.clock.now());
        self.request_arrived.notify_one();
        taken
    }

    /// What no robot should see need not wait for its turn in memory.
    fn check(&self, request: Request) -> CheckedRequest {
        if let Request::Step { actions, .. } = &request {
            self.core.robot.action_spec.check(actions)?;
        }
        Ok(request)
    }

    fn handle_actions(&self, message: ActionMessage) {
        let session = self.session.id;
        let has_pending_reset = {
            let mut requests = lock(&self.requests);
            requests.note_actions(self.core.clock.now());
            requests.has_pending_reset()
        };
        if has_pending_reset {
            self.core.control.count_refused();
            let fault = Fault::new(
                Code::Resetting,
                "expected actions after the reset's reply, found a reset that waits",
            );
            return log_dropped(&self.dropped_actions, session, &fault);
        }
        self.core.pacing.ask();
        let message = ActionMessage { session, episode: self.core.sampler.episode(), ..message };
        let dropped = Arc::clone(&self.dropped_actions);
        self.core.control.submit_actions(
            session,
            message,
            Box::new(move |fault| log_dropped(&dropped, session, &fault)),
        );
    }

    /// A request was refused: the end of a connection, since its caller would wait for ever; but who shares
    /// the keys with others is not even told.
    fn handle_refusal(&self, fault: Fault) -> Option<End> {
        if !self.is_shared {
            return Some(End::Refused(fault));
        }
        let session = self.session.id;
        self.dropped_requests.record(|count| tracing::warn!(session, count, "no answer: {fault}"));
        None
    }

    // ---- Sending ------------------------------------------------------------------------------------------

    async fn send(&self) -> End {
        let mut ended = pin!(self.session.ended());
        loop {
            let next = lock(&self.requests).next(self.core.clock.now());
            let asked = match next {
                Next::Serve(asked) => asked,
                Next::Idle => return End::Idle(self.core.options.idle_timeout),
                Next::Wait(limit) => {
                    tokio::select! {
                        biased;
                        end = &mut ended => return end,
                        () = self.request_arrived.notified() => {}
                        () = sleep(limit.unwrap_or_default()), if limit.is_some() => {}
                    }
                    continue;
                }
            };
            // Only the choice of what to send is interruptible, never the sending.
            let answer = tokio::select! {
                biased;
                end = &mut ended => return end,
                answer = self.reply_to(asked) => answer,
            };
            lock(&self.requests).begin_reply();
            let end = match answer {
                Ok(frame) => self.transport.send(frame).await.err().map(End::Lost),
                Err(fault) => self.handle_refusal(fault),
            };
            if let Some(end) = end {
                return end;
            }
            lock(&self.requests).reply_sent(self.core.clock.now());
        }
    }

    /// The frame that answers.
    async fn reply_to(&self, asked: CheckedRequest) -> Result<Frame, Fault> {
        let message = Message::Reply { id: msgpack::ID, reply: self.serve_request(asked?).await? };
        let encode_failed =
            |error| Fault::new(Code::RobotFailed, format!("the robot's answer cannot be sent: {error}"));
        self.transport.codec().encode(&message).map_err(encode_failed)
    }

    async fn serve_request(&self, request: Request) -> Result<Reply, Fault> {
        let (control, session) = (&self.core.control, self.session.id);
        match request {
            Request::GetMetadata => control.metadata().map(Reply::Metadata),
            Request::GetObs => Ok(Reply::Observation(Arc::new(self.core.sampler.observe().await?))),
            Request::Reset { seed, options } => {
                let (obs, info) =
                    call_control(|on_reply| control.reset(session, seed, options, on_reply)).await?;
                Ok(Reply::Reset { obs, info })
            }
            Request::Step { actions: chunk, .. } => {
                let episode = self.core.sampler.episode();
                let request = StepRequest { session, stated_session: session, episode, chunk };
                call_control(|on_reply| control.step(request, on_reply)).await.map(Reply::Step)
            }
            Request::Hello(_) | Request::Subscribe(_) | Request::Unsubscribe => {
                Err(Fault::new(Code::Unsupported, "expected a request of this wire's, found another"))
            }
        }
    }
}

/// What the control thread answers.
async fn call_control<R: Send + 'static>(call: impl FnOnce(OnReply<R>)) -> Result<R, Fault> {
    let (sender, receiver) = oneshot::channel();
    call(Box::new(move |outcome| drop(sender.send(outcome))));
    let dropped = |_| Err(Fault::new(Code::ShuttingDown, "the session ended before the robot answered"));
    receiver.await.unwrap_or_else(dropped)
}

fn log_dropped(dropped: &LogThrottle, session: u64, fault: &Fault) {
    dropped.record(|count| {
        tracing::warn!(session, count, "a legacy client's apply_action was dropped: {fault}")
    });
}
