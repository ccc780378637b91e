//! The protobuf wire: requests and replies by id, credit for the stream, pings, notices.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use chiral_proto::{
    Frame, Message, Notice, Reply, Request, Timestamp, TransportError, clock::PingSample, error::chain, lock,
};
use tokio::time::sleep;

use crate::{
    connection::{Connection, Lane},
    core::{Core, PendingReply},
    error::Error,
    session::Connections,
    state::RequestKind,
    transport::BoxFuture,
    wire::Wire,
};

/// How often each connection is pinged, so that one that is dead is noticed.
const PING_PERIOD: Duration = Duration::from_secs(1);
/// The first pings come faster, for an early estimate of the round trip.
const FIRST_PING_PERIOD: Duration = Duration::from_millis(50);
const FIRST_PINGS: u32 = 5;

/// The most pings of the server's whose pongs wait for a connection. Beyond that the oldest gets none.
const MAX_DUE_PONGS: usize = 16;

/// A session's protobuf wire, on its one or two connections.
pub(crate) struct NativeWire {
    core: Arc<Core>,
    control: Arc<Connection>,
    observations: Arc<Connection>,
    /// Pings that arrived and have yet to be answered, on the connection that each arrived on: when they were
    /// sent and when they arrived.
    due_pongs: Mutex<VecDeque<(Lane, Timestamp, Timestamp)>>,
}

impl Wire for NativeWire {
    fn request(&self, request: Request) -> BoxFuture<'_, Result<Reply, Error>> {
        let (connection, kind) = match &request {
            Request::GetObs => (&self.observations, RequestKind::Other),
            Request::Subscribe(_) => (&self.observations, RequestKind::Subscribe),
            Request::Unsubscribe => (&self.observations, RequestKind::Unsubscribe),
            Request::Reset { .. } => (&self.control, RequestKind::Reset),
            Request::Hello(_) | Request::GetMetadata | Request::Step { .. } => {
                (&self.control, RequestKind::Other)
            }
        };
        Box::pin(async move {
            let (frame, reply) = {
                let mut state = self.core.state();
                let id = state.next_request()?;
                let frame = connection.codec.encode(&Message::Request { id, request })?;
                (frame, PendingReply::new(&self.core, id, state.add_request(id, kind)))
            };
            if kind == RequestKind::Reset {
                // It has emptied the action queue.
                self.core.room.notify_waiters();
            }
            connection.send(frame).await?;
            reply.wait().await
        })
    }

    fn receive(&self, connection: &Connection, frame: Frame) -> Result<(), Error> {
        let core = &*self.core;
        let arrived_at = core.now();
        let message = match connection.codec.decode(frame) {
            Ok(message) => message,
            // Only this request has failed. What belongs to no request must not be lost silently.
            Err(error) if error.id != 0 => {
                return core.complete_request(error.id, Err(Error::Malformed(error)));
            }
            Err(error) => return Err(Error::Malformed(error)),
        };
        match message {
            Message::Reply { id, reply: Reply::Error(fault) } => {
                core.complete_request(id, Err(Error::Rejected(fault)))?;
            }
            Message::Reply { id, reply } => core.complete_request(id, Ok(reply))?,
            Message::Notice(Notice::Observation(observation)) => {
                core.add_arrival(observation);
                self.observations.changed.notify_one();
            }
            Message::Notice(Notice::StreamEnd { reason }) => core.fail_stream(reason),
            Message::Notice(Notice::Error(fault)) if fault.action_seq != 0 => {
                core.state().actions.refused(fault);
                core.room.notify_waiters();
            }
            Message::Notice(Notice::Error(fault)) => tracing::warn!("the server reports: {fault}"),
            // Observations on the same connection would delay it and spoil the estimate.
            Message::Notice(Notice::Pong { .. }) if connection.lane == Lane::Observations => {}
            Message::Notice(Notice::Pong { t1, t2, t3 }) => {
                core.state().add_ping_sample(PingSample { t1, t2, t3, t4: arrived_at });
            }
            Message::Notice(Notice::Goodbye { reason }) => {
                return Err(Error::Disconnected { reason, cause: None });
            }
            Message::Notice(Notice::Ping { t1 }) => {
                let mut due = lock(&self.due_pongs);
                if due.len() == MAX_DUE_PONGS {
                    due.pop_front();
                }
                due.push_back((connection.lane, t1, arrived_at));
                drop(due);
                connection.changed.notify_one();
            }
            Message::Notice(Notice::ActionsDropped(totals)) => {
                core.state().actions.dropped(totals, arrived_at);
            }
            // What only a client sends, or a newer server: nothing that anybody here waits for.
            Message::Notice(Notice::Action(_) | Notice::Credit { .. })
            | Message::Request { .. }
            | Message::Unknown { id: 0 } => {}
            Message::Unknown { id } => {
                core.complete_request(id, Err(Error::Protocol { expected: "a known kind of reply" }))?;
            }
        }
        Ok(())
    }

    fn run_sender<'a>(&'a self, connection: &'a Connection) -> BoxFuture<'a, Error> {
        Box::pin(async move {
            match self.send_unrequested(connection).await {
                Ok(never) => match never {},
                Err(error) => error,
            }
        })
    }

    fn awaits_close(&self) -> bool {
        true
    }
}

impl NativeWire {
    pub(crate) fn new(connections: &Connections) -> NativeWire {
        NativeWire {
            core: Arc::clone(&connections.core),
            control: Arc::clone(&connections.control),
            observations: Arc::clone(&connections.observations),
            due_pongs: Mutex::default(),
        }
    }

    /// The answer to a ping that arrived on this connection.
    fn take_pong(&self, lane: Lane) -> Option<Message> {
        let mut due = lock(&self.due_pongs);
        let at = due.iter().position(|(of, ..)| *of == lane)?;
        let (_, t1, t2) = due.remove(at)?;
        Some(Message::Notice(Notice::Pong { t1, t2, t3: self.core.now() }))
    }

    /// Sends pongs, credit and pings on a connection until it fails. Requests and actions are sent by their callers.
    async fn send_unrequested(&self, connection: &Connection) -> Result<std::convert::Infallible, Error> {
        let mut pings = Pings::new(self.core.now());
        loop {
            if let Some(pong) = self.take_pong(connection.lane) {
                connection.send_message(&pong).await?;
                continue;
            }
            let carries_stream = connection.lane != Lane::Control;
            let credit = if carries_stream { self.core.state().take_credit() } else { None };
            if let Some(credit) = credit {
                connection.send_message(&credit).await?;
                continue;
            }
            let wait = pings.due_in(self.core.now());
            if wait.is_zero() {
                connection.send_message(&pings.take(self.core.now())).await?;
                continue;
            }
            tokio::select! {
                () = connection.changed.notified() => {}
                () = sleep(wait) => {}
            }
        }
    }
}

/// When a connection is pinged next.
#[derive(Debug)]
struct Pings {
    next: Timestamp,
    sent: u32,
}

impl Pings {
    fn new(now: Timestamp) -> Pings {
        Pings { next: now, sent: 0 }
    }

    fn due_in(&self, now: Timestamp) -> Duration {
        self.next.since(now)
    }

    fn take(&mut self, now: Timestamp) -> Message {
        self.sent += 1;
        self.next = now + if self.sent < FIRST_PINGS { FIRST_PING_PERIOD } else { PING_PERIOD };
        Message::Notice(Notice::Ping { t1: now })
    }
}

/// The end of a session whose connection failed.
pub(crate) fn lost(cause: TransportError) -> Error {
    Error::Disconnected { reason: chain(&cause), cause: Some(cause) }
}
