//! A session with a server, from its hello to its end: on each connection a receive loop and a send loop,
//! which never wait for each other.

use std::{
    pin::pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use chiral_proto::{
    Clock, Code, Fault, Frame, Message, Notice, PROTOCOL_VERSION, Reply, Request, Timestamp, Transport,
    TransportError,
    clock::PingSample,
    error::chain,
    message::{Hello, Role, Welcome},
    pool::Pool,
};
use chiral_transport::Pacing;
use tokio::{
    sync::{Notify, watch},
    time::{sleep, timeout},
};

use crate::{
    connection::{Carries, Lane},
    dispatch::thread::DispatchThread,
    error::Error,
    legacy::session::{self as legacy, LegacySession},
    lock,
    state::{Due, Latest, Outgoing, Pings, State, Stream},
};

/// Within this the server must answer the hello.
pub(crate) const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// For a last word and an orderly close.
const PARTING_LIMIT: Duration = Duration::from_secs(1);
/// Why a WebSocket is closed (IANA's registry of close codes).
const TRY_AGAIN_LATER: u16 = 1013;
/// Memory that no observation used for so long, or at most twice as long, is given back.
const TRIM_PERIOD: Duration = Duration::from_secs(4);

/// What the loops, the dispatcher and the client share.
pub(crate) struct Shared {
    pub(crate) state: Mutex<State>,
    pub(crate) latest: watch::Sender<Latest>,
    /// The action queue may have room, or has lost what empties it.
    pub(crate) room: Notify,
    pub(crate) clock: Clock,
    pub(crate) idle_timeout: Duration,
    pub(crate) dispatcher: DispatchThread,
    pub(crate) control: Arc<Lane>,
    /// The second connection, or the first if there is only one.
    pub(crate) observations: Arc<Lane>,
    /// If the server is none of ours.
    pub(crate) legacy: Option<LegacySession>,
    /// Where received observations lie.
    pub(crate) pool: Pool,
    /// Asked for by the actions that are sent.
    pub(crate) pacing: Pacing,
    pub(crate) ended: watch::Sender<bool>,
}

impl Shared {
    pub(crate) fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Says something to the server. A connection that fails at it ends the session.
    pub(crate) async fn say(&self, lane: &Lane, message: &Message) -> Result<(), Error> {
        self.send(lane, lane.codec.encode(message)?).await
    }

    pub(crate) async fn send(&self, lane: &Lane, frame: Frame) -> Result<(), Error> {
        if let Err(error) = lane.send(frame).await {
            self.end(lost(error));
        }
        lock(&self.state).check_alive()
    }

    /// What the dispatcher has to do.
    pub(crate) fn due(&self) -> Due {
        let mut state = lock(&self.state);
        let discarded = state.dispatch.discarded;
        let due = state.due(self.now());
        let has_discarded = state.dispatch.discarded > discarded;
        drop(state);
        if has_discarded {
            self.room.notify_waiters();
        }
        due
    }

    /// Sends actions.
    pub(crate) async fn act(&self, outgoing: Outgoing) -> Result<(), Error> {
        self.pacing.ask();
        match &self.legacy {
            Some(legacy) => legacy.act(self, outgoing).await,
            None => self.say(&self.control, &Message::Notice(Notice::Action(outgoing.message))).await,
        }
    }

    /// Sends a row that is due. Who waits for room in the queue is woken only afterwards.
    pub(crate) async fn dispatch(&self, row: Outgoing) {
        let action_seq = row.message.seq;
        if let Err(error) = self.act(row).await {
            tracing::debug!("an action was not sent: {error}");
            let mut state = lock(&self.state);
            // Of what a server of ours would have refused, the next to act is told.
            if self.legacy.is_some() && state.check_alive().is_ok() {
                state.refused(match error {
                    Error::ActionRefused(fault) => fault,
                    Error::Rejected(fault) => Fault { action_seq, ..fault },
                    error => Fault { action_seq, ..Fault::new(Code::Unspecified, error.to_string()) },
                });
            }
        }
        self.room.notify_waiters();
    }

    /// The session is over: every call from now on, and every one that waits, gets this error or an earlier
    /// one.
    pub(crate) fn end(&self, error: Error) {
        if !lock(&self.state).end(error.clone()) {
            return;
        }
        match &error {
            Error::Closed => tracing::debug!("closed"),
            error => tracing::warn!("{error}"),
        }
        self.ended.send_replace(true);
        self.latest.send_modify(|_| ());
        self.room.notify_waiters();
        self.dispatcher.wake();
    }

    async fn ended(&self) {
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }
}

/// Who a client is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Identity {
    pub(crate) role: Role,
    pub(crate) name: String,
    pub(crate) auth: Bytes,
}

/// Says hello, on a second connection with the token of the first's welcome; returns the server's welcome.
pub(crate) async fn greet<T: Transport>(
    transport: &T,
    identity: &Identity,
    attach_token: Bytes,
) -> Result<Welcome, Error> {
    let hello = Message::Request {
        id: 1,
        request: Request::Hello(Hello {
            protocol: PROTOCOL_VERSION,
            software: concat!("chiral-client ", env!("CARGO_PKG_VERSION")).to_owned(),
            role: identity.role,
            client_name: identity.name.clone(),
            auth: identity.auth.clone(),
            attach_token,
        }),
    };
    let exchange = async {
        // Who refuses it answers and leaves, maybe before the sending is over: what he says goes before that.
        let sent = transport.send(transport.codec().encode(&hello)?).await;
        match transport.recv().await {
            Ok(Some(frame)) => transport.codec().decode(frame).map_err(Error::Malformed),
            Err(error) => Err(lost(error)),
            Ok(None) => {
                sent.map_err(lost)?;
                Err(Error::Disconnected {
                    reason: "the server closed the connection at the hello".to_owned(),
                    cause: None,
                })
            }
        }
    };
    let answer = timeout(HELLO_LIMIT, exchange)
        .await
        .map_err(|_| Error::Timeout { what: "the server's welcome", waited: HELLO_LIMIT })??;
    match answer {
        Message::Reply { reply: Reply::Welcome(welcome), .. } if welcome.protocol == PROTOCOL_VERSION => {
            Ok(*welcome)
        }
        Message::Reply { reply: Reply::Welcome(welcome), .. } => {
            let text = format!("it answered in version {}", welcome.protocol);
            Err(Error::VersionMismatch(Fault::new(Code::VersionMismatch, text)))
        }
        Message::Reply { reply: Reply::Error(fault), .. } | Message::Notice(Notice::Error(fault)) => {
            Err(match fault.code {
                Code::Busy => Error::Busy(fault),
                Code::VersionMismatch => Error::VersionMismatch(fault),
                _ => Error::Rejected(fault),
            })
        }
        _ => Err(Error::Protocol { expected: "a welcome" }),
    }
}

/// Has a connection's loops run on its host, until the session ends or the connection does: then both do.
pub(crate) fn run<T: Transport>(shared: &Arc<Shared>, lane: &Arc<Lane>, transport: Arc<T>) {
    let running = Running { shared: Arc::clone(shared), lane: Arc::clone(lane) };
    lane.host.spawn(async move {
        let Running { shared, lane } = &running;
        let mut receiving = pin!(receive(shared, lane, &*transport));
        let has_server_left = tokio::select! {
            biased;
            end = &mut receiving => {
                shared.end(end);
                true
            }
            end = say(shared, lane) => {
                shared.end(end);
                false
            }
            () = shared.ended() => false,
        };
        let parting = async {
            part(shared, lane, &*transport).await;
            // Nor does a server that has no word for it.
            let is_told = shared.legacy.as_ref().is_none_or(|legacy| !legacy.is_lossy);
            if !has_server_left && is_told {
                // Until it has parted, too: only then the robot is free for who connects next.
                receiving.await;
            }
        };
        let _ = timeout(PARTING_LIMIT, parting).await;
    });
}

/// Whatever becomes of a connection's loops, also if their runtime is shut down, the session does not outlive
/// them.
struct Running {
    shared: Arc<Shared>,
    lane: Arc<Lane>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shared.end(Error::Disconnected {
            reason: "the runtime of the connection was shut down".to_owned(),
            cause: None,
        });
        self.lane.leave();
    }
}

/// The other side may still hear why.
async fn part<T: Transport>(shared: &Shared, lane: &Lane, transport: &T) {
    let reason = match lock(&shared.state).check_alive() {
        Err(Error::Closed) | Ok(()) => "the client was closed".to_owned(),
        Err(error) => error.to_string(),
    };
    if let Ok(goodbye) = lane.codec.encode(&Message::Notice(Notice::Goodbye { reason })) {
        let _ = lane.send(goodbye).await;
    }
    transport.close().await;
}

// ---- Receiving --------------------------------------------------------------------------------------------

async fn receive<T: Transport>(shared: &Shared, lane: &Lane, transport: &T) -> Error {
    lane.idle_timeout.record();
    tokio::select! {
        biased;
        end = receive_frames(shared, lane, transport) => end,
        () = lane.idle_timeout.expired() => {
            let limit = lane.idle_timeout.limit();
            let reason = format!("nothing received from the server for {} s", limit.as_secs_f64());
            Error::Disconnected { reason, cause: None }
        }
    }
}

async fn receive_frames<T: Transport>(shared: &Shared, lane: &Lane, transport: &T) -> Error {
    loop {
        let frame = match transport.recv().await {
            Ok(Some(frame)) => frame,
            Ok(None) => {
                return Error::Disconnected {
                    reason: "the server closed the connection".to_owned(),
                    cause: None,
                };
            }
            Err(error) => return lost(error),
        };
        lane.idle_timeout.record();
        if let Err(end) = handle(shared, lane, frame) {
            return end;
        }
    }
}

fn handle(shared: &Shared, lane: &Lane, frame: Frame) -> Result<(), Error> {
    if shared.legacy.is_some() {
        return legacy::heard(shared, frame);
    }
    let now = shared.now();
    let message = match lane.codec.decode(frame) {
        Ok(message) => message,
        // Only the request that it answers has failed; but what belongs to no request must not vanish in
        // silence.
        Err(error) if error.id != 0 => {
            settle(shared, error.id, Err(Error::Malformed(error)), now);
            return Ok(());
        }
        Err(error) => return Err(Error::Malformed(error)),
    };
    match message {
        Message::Reply { id, reply } => {
            let outcome =
                if let Reply::Error(fault) = reply { Err(Error::Rejected(fault)) } else { Ok(reply) };
            settle(shared, id, outcome, now);
        }
        Message::Notice(Notice::Observation(observation)) => {
            if lock(&shared.state).arrived(&observation, now) {
                shared.latest.send_replace(Some(observation));
            }
            shared.observations.changed.notify_one();
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
        // Observations would delay it.
        Message::Notice(Notice::Pong { .. }) if lane.carries == Carries::Observations => {}
        Message::Notice(Notice::Pong { t1, t2, t3 }) => {
            lock(&shared.state).pong(PingSample { t1, t2, t3, t4: now })
        }
        Message::Notice(Notice::Goodbye { reason }) => {
            return Err(Error::Disconnected { reason, cause: None });
        }
        // What only a client says, or a newer server: nothing that anybody here waits for.
        Message::Notice(Notice::Ping { .. } | Notice::Action(_) | Notice::Credit { .. })
        | Message::Request { .. }
        | Message::Unknown { id: 0 } => {}
        Message::Unknown { id } => {
            settle(shared, id, Err(Error::Protocol { expected: "a known kind of reply" }), now)
        }
    }
    Ok(())
}

pub(crate) fn settle(shared: &Shared, id: u64, outcome: Result<Reply, Error>, now: Timestamp) {
    let mut state = lock(&shared.state);
    let (episode, was_held_up) = (state.episode, state.dispatch.is_held_up());
    let answer = state.settle(id, &outcome, now);
    let is_new_episode = state.episode > episode;
    drop(state);
    if is_new_episode {
        // What came before the reset is not the latest any more.
        shared.latest.send_replace(None);
    }
    if was_held_up {
        shared.room.notify_waiters();
        shared.dispatcher.wake();
    }
    if let Some(answer) = answer {
        // Whoever asked may have given up waiting.
        let _ = answer.send(outcome);
    }
}

// ---- Sending ----------------------------------------------------------------------------------------------

/// What is said by itself, until the connection fails.
async fn say(shared: &Shared, lane: &Lane) -> Error {
    let Some(legacy) = &shared.legacy else { return send(shared, lane).await };
    tokio::select! {
        () = legacy.poll(shared) => Error::Closed,
        () = trim(&shared.pool) => Error::Closed,
    }
}

/// Gives memory back, for ever.
async fn trim(pool: &Pool) {
    loop {
        sleep(TRIM_PERIOD).await;
        pool.trim();
    }
}

/// What is said to a server of ours by itself: credit and pings. Requests and actions are sent by who makes
/// them.
async fn send(shared: &Shared, lane: &Lane) -> Error {
    let mut pings = Pings::new(shared.now());
    let mut trimmed = shared.now();
    loop {
        let now = shared.now();
        let credit = if lane.carries == Carries::Control { None } else { lock(&shared.state).credit() };
        let message = match credit {
            Some(credit) => credit,
            None if pings.due_in(now).is_zero() => pings.take(now),
            None => {
                tokio::select! {
                    () = lane.changed.notified() => {}
                    () = sleep(pings.due_in(now)) => {}
                }
                continue;
            }
        };
        if let Err(error) = shared.say(lane, &message).await {
            return error;
        }
        if lane.carries != Carries::Control && now.since(trimmed) >= TRIM_PERIOD {
            shared.pool.trim();
            trimmed = now;
        }
    }
}

fn lost(cause: TransportError) -> Error {
    // A server of ours has no other words for it on a legacy peer's wire.
    if let TransportError::Closed { code: TRY_AGAIN_LATER, reason } = &cause
        && reason.starts_with("the robot is controlled by")
    {
        return Error::Busy(Fault::new(Code::Busy, reason).retryable());
    }
    Error::Disconnected { reason: chain(&cause), cause: Some(cause) }
}
