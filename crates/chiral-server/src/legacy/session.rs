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
    control::{Answer, StepRequest},
    core::ServerCore,
    legacy::requests::{Asked, Next, RequestQueue},
    log_throttle::LogThrottle,
    session::{End, PARTING_LIMIT, Session},
};

/// Serves a connection of a legacy client's own until it ends.
pub(crate) async fn serve<T: Transport>(server: &Arc<ServerCore>, transport: &T, idle_timeout: IdleTimeout) {
    // Until its last word is said it counts, so that a stopping server waits for that.
    let session = begin(server, transport);
    let end = match &session {
        Ok(session) => {
            LegacySession::new(session, transport, idle_timeout, RequestQueue::queue()).run().await
        }
        Err(fault) => {
            tracing::info!(peer = transport.peer(), "refused: {fault}");
            End::Refused(fault.clone())
        }
    };
    let parting = async {
        match end {
            End::Refused(fault) => transport.refuse(&fault).await,
            End::ShuttingDown => transport.refuse(&Fault::new(Code::ShuttingDown, end.to_string())).await,
            _ => transport.close().await,
        }
    };
    let _ = timeout(PARTING_LIMIT, parting).await;
}

pub(super) fn not_a_clients() -> Fault {
    Fault::new(Code::Protocol, "expected what a client says, found something else")
}

/// The first connection controls the robot, since on this wire there is nobody who only watches.
pub(super) fn begin<T: Transport>(server: &Arc<ServerCore>, transport: &T) -> Result<Arc<Session>, Fault> {
    let name = format!("a legacy client at {}", transport.peer());
    Session::open(server, Role::Controller, &name, "unknown", transport.peer())
}

/// A session, while its loops run.
pub(super) struct LegacySession<'a, T> {
    session: &'a Arc<Session>,
    server: &'a Arc<ServerCore>,
    transport: &'a T,
    idle_timeout: IdleTimeout,
    turns: Mutex<RequestQueue>,
    is_shared: bool,
    /// Something was asked.
    asked: Notify,
    dropped_actions: Arc<LogThrottle>,
    dropped_requests: LogThrottle,
}

impl<'a, T: Transport> LegacySession<'a, T> {
    pub(super) fn new(
        session: &'a Arc<Session>,
        transport: &'a T,
        idle_timeout: IdleTimeout,
        turns: RequestQueue,
    ) -> LegacySession<'a, T> {
        let server = &session.server;
        let log_throttle = || LogThrottle::new(server.clock.clone());
        LegacySession {
            session,
            server,
            transport,
            idle_timeout,
            is_shared: turns.are_shared(),
            turns: Mutex::new(turns),
            asked: Notify::new(),
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
                Ok(Some(frame)) => self.hear_or_drop(frame),
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
    pub(super) fn hear_or_drop(&self, frame: Frame) -> Option<End> {
        self.hear(frame).err().and_then(|fault| self.refused(fault))
    }

    fn hear(&self, frame: Frame) -> Result<(), Fault> {
        let asked = match self.transport.codec().decode(frame) {
            Ok(Message::Notice(Notice::Action(said))) => {
                self.act(said);
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
            Ok(Message::Reply { .. } | Message::Notice(_)) => Err(not_a_clients()),
            Err(error) if error.field.starts_with("apply_action.") => {
                self.server.control.count_refused();
                tell(&self.dropped_actions, self.session.id, &error.into());
                return Ok(());
            }
            Err(error) => Err(error.into()),
        };
        // What is wrong is refused in its turn, after what was asked before it.
        let taken = lock(&self.turns).ask(asked, self.server.clock.now());
        self.asked.notify_one();
        taken
    }

    /// What no robot should see need not wait for its turn in memory.
    fn check(&self, request: Request) -> Asked {
        if let Request::Step { actions, .. } = &request {
            self.server.robot.action_spec.check(actions)?;
        }
        Ok(request)
    }

    fn act(&self, said: ActionMessage) {
        let session = self.session.id;
        let awaits_reset = {
            let mut turns = lock(&self.turns);
            turns.acted(self.server.clock.now());
            turns.awaits_reset()
        };
        if awaits_reset {
            self.server.control.count_refused();
            let fault = Fault::new(
                Code::Resetting,
                "expected actions after the reset's reply, found a reset that waits",
            );
            return tell(&self.dropped_actions, session, &fault);
        }
        self.server.pacing.ask();
        let message = ActionMessage { session, episode: self.server.observations.episode(), ..said };
        let dropped = Arc::clone(&self.dropped_actions);
        self.server.control.act(session, message, Box::new(move |fault| tell(&dropped, session, &fault)));
    }

    /// A request was refused: the end of a connection, since its caller would wait for ever; but who shares
    /// the keys with others is not even told.
    fn refused(&self, fault: Fault) -> Option<End> {
        if !self.is_shared {
            return Some(End::Refused(fault));
        }
        let session = self.session.id;
        self.dropped_requests.happened(|count| tracing::warn!(session, count, "no answer: {fault}"));
        None
    }

    // ---- Sending ------------------------------------------------------------------------------------------

    async fn send(&self) -> End {
        let mut ended = pin!(self.session.ended());
        loop {
            let next = lock(&self.turns).next(self.server.clock.now());
            let asked = match next {
                Next::Answer(asked) => asked,
                Next::Silent => return End::Idle(self.server.options.idle_timeout),
                Next::Wait(limit) => {
                    tokio::select! {
                        biased;
                        end = &mut ended => return end,
                        () = self.asked.notified() => {}
                        () = sleep(limit.unwrap_or_default()), if limit.is_some() => {}
                    }
                    continue;
                }
            };
            // Only the choice of what to send is interruptible, never the sending.
            let answer = tokio::select! {
                biased;
                end = &mut ended => return end,
                answer = self.answer(asked) => answer,
            };
            lock(&self.turns).answered();
            let end = match answer {
                Ok(frame) => self.transport.send(frame).await.err().map(End::Lost),
                Err(fault) => self.refused(fault),
            };
            if let Some(end) = end {
                return end;
            }
            lock(&self.turns).said(self.server.clock.now());
        }
    }

    /// The frame that answers.
    async fn answer(&self, asked: Asked) -> Result<Frame, Fault> {
        let message = Message::Reply { id: msgpack::ID, reply: self.carry_out(asked?).await? };
        let unsayable =
            |error| Fault::new(Code::RobotFailed, format!("the robot's answer cannot be sent: {error}"));
        self.transport.codec().encode(&message).map_err(unsayable)
    }

    async fn carry_out(&self, request: Request) -> Result<Reply, Fault> {
        let (control, session) = (&self.server.control, self.session.id);
        match request {
            Request::GetMetadata => control.metadata().map(Reply::Metadata),
            Request::GetObs => Ok(Reply::Observation(Arc::new(self.server.observations.observe().await?))),
            Request::Reset { seed, options } => {
                let (obs, info) = asked(|answer| control.reset(session, seed, options, answer)).await?;
                Ok(Reply::Reset { obs, info })
            }
            Request::Step { actions: chunk, .. } => {
                let episode = self.server.observations.episode();
                let request = StepRequest { session, chosen_in: session, episode, chunk };
                asked(|answer| control.step(request, answer)).await.map(Reply::Step)
            }
            Request::Hello(_) | Request::Subscribe(_) | Request::Unsubscribe => {
                Err(Fault::new(Code::Unsupported, "expected a request of this wire's, found another"))
            }
        }
    }
}

/// What the control thread answers.
async fn asked<R: Send + 'static>(ask: impl FnOnce(Answer<R>)) -> Result<R, Fault> {
    let (answer, answered) = oneshot::channel();
    ask(Box::new(move |outcome| drop(answer.send(outcome))));
    let dropped = |_| Err(Fault::new(Code::ShuttingDown, "the session ended before the robot answered"));
    answered.await.unwrap_or_else(dropped)
}

fn tell(dropped: &LogThrottle, session: u64, fault: &Fault) {
    dropped.happened(|count| {
        tracing::warn!(session, count, "a legacy client's apply_action was dropped: {fault}")
    });
}
