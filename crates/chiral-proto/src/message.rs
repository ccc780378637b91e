//! All messages that peers exchange. What a receiver must do with each of them is specified in
//! `proto/chiral/v1/chiral.proto`.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;

use crate::{
    action::{ActionChunk, ActionSpec},
    clock::{Rate, Timestamp},
    error::Fault,
    observation::{CameraSpec, Observation, ProprioSpec},
    value::ValueMap,
};

/// One message.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// A request, which gets exactly one reply.
    Request {
        /// Chosen by the client, not 0.
        id: u64,
        /// The request.
        request: Request,
    },
    /// The reply to a request.
    Reply {
        /// The id of the request.
        id: u64,
        /// The reply.
        reply: Reply,
    },
    /// A message that is neither a request nor a reply.
    Notice(Notice),
    /// A message of a kind that only newer peers know.
    Unknown {
        /// Not 0 if the peer expects a reply.
        id: u64,
    },
}

/// A request from the client to the server.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// Opens a connection.
    Hello(Hello),
    /// Returns the application's metadata.
    GetMetadata,
    /// Starts a new episode.
    Reset {
        /// Makes the episode repeatable, if the robot supports it.
        seed: Option<u64>,
        /// The application's own options.
        options: ValueMap,
    },
    /// Returns an observation.
    GetObs,
    /// Applies the rows of a chunk one after the other, then observes.
    Step {
        /// The session for which they were chosen.
        session: u64,
        /// The episode for which they were chosen.
        episode: u64,
        /// The rows.
        actions: ActionChunk,
    },
    /// Starts the observation stream.
    Subscribe(Subscribe),
    /// Stops the observation stream.
    Unsubscribe,
}

/// A reply from the server.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// Reply to `Hello`.
    Welcome(Box<Welcome>),
    /// Reply to `GetMetadata`.
    Metadata(ValueMap),
    /// Reply to `Reset`.
    Reset {
        /// The first observation of the episode, captured after the reset had finished.
        obs: Arc<Observation>,
        /// The application's own values.
        info: ValueMap,
    },
    /// Reply to `GetObs`.
    Observation(Arc<Observation>),
    /// Reply to `Step`.
    Step(StepResult),
    /// Reply to `Subscribe`: what the stream will contain.
    Subscribed {
        /// Observations per second.
        hz: f64,
        /// The names of the cameras.
        cameras: Vec<String>,
    },
    /// Reply to `Unsubscribe`, after the last observation of the stream.
    StreamEnd {
        /// Why the stream ended.
        reason: String,
    },
    /// Reply to a request that failed.
    Error(Fault),
}

/// A message that is neither a request nor a reply.
#[derive(Clone, Debug, PartialEq)]
pub enum Notice {
    /// An observation of the stream.
    Observation(Arc<Observation>),
    /// The server ended the stream.
    StreamEnd {
        /// Why the stream ended.
        reason: String,
    },
    /// Actions to apply now.
    Action(ActionMessage),
    /// Flow control of the stream.
    Credit {
        /// Observations received since `Subscribed`.
        received: u64,
        /// How many observations may be in flight beyond `received`.
        window: u32,
    },
    /// Measures the clock offset and the round trip. The receiver sends a pong at once.
    Ping {
        /// When the ping was sent.
        t1: Timestamp,
    },
    /// The answer to a ping.
    Pong {
        /// `t1` of the ping.
        t1: Timestamp,
        /// When the ping arrived, on the clock of the pong's sender.
        t2: Timestamp,
        /// When the pong was sent, on the same clock.
        t3: Timestamp,
    },
    /// The peer disconnects on purpose; its last message.
    Goodbye {
        /// Why the peer disconnects.
        reason: String,
    },
    /// An action was refused, or an error that no request caused.
    Error(Fault),
    /// Rows of this session's actions were dropped.
    ActionsDropped(ActionsDropped),
}

/// Whether a client may move the robot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Moves the robot. A robot has one controller at a time.
    #[default]
    Controller,
    /// Only watches.
    Observer,
}

/// The request that opens a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The client's protocol version.
    pub protocol: u32,
    /// The peer's software, for logs.
    pub software: String,
    /// The client's role.
    pub role: Role,
    /// The client's name, for people.
    pub client_name: String,
    /// Credentials, as the server's operator requires them.
    pub auth: Bytes,
    /// Empty on a session's first connection; on its second, the token of the first one's [`Welcome`].
    pub attach_token: Bytes,
}

/// The reply to a [`Hello`].
#[derive(Clone, Debug, PartialEq)]
pub struct Welcome {
    /// The server's protocol version.
    pub protocol: u32,
    /// The peer's software, for logs.
    pub software: String,
    /// The session's number, not 0.
    pub session: u64,
    /// The current episode.
    pub episode: u64,
    /// The robot.
    pub robot: RobotInfo,
    /// Attaches a second connection to the session; empty if the server does not offer one.
    pub attach_token: Bytes,
    /// The name of the robot's current controller; empty if it has none.
    pub controller: String,
    /// The most rows in one action; 0 from an old server, which accepts [`ActionChunk::OLD_MAX_ROWS`].
    pub max_chunk_rows: usize,
}

/// The sensors and the action space of a robot.
#[derive(Clone, Debug, PartialEq)]
pub struct RobotInfo {
    /// Its name.
    pub name: String,
    /// Its cameras.
    pub cameras: Vec<CameraSpec>,
    /// Its proprioception.
    pub proprios: Vec<ProprioSpec>,
    /// Its action space.
    pub action_spec: ActionSpec,
}

/// The request that starts the observation stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Subscribe {
    /// The requested rate of observations.
    pub rate: Rate,
    /// The names of the cameras to include; empty means all.
    pub cameras: Vec<String>,
    /// Whether to include depth images.
    pub depth: bool,
    /// The initial window, as in [`Notice::Credit`].
    pub window: u32,
}

/// Actions to apply now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ActionMessage {
    /// The session for which they were chosen.
    pub session: u64,
    /// The episode for which they were chosen.
    pub episode: u64,
    /// Counts the client's actions from 1.
    pub seq: u64,
    /// The rows.
    pub actions: ActionChunk,
    /// `seq` of the observation from which the policy chose the actions; 0 if unknown.
    pub observation_seq: u64,
    /// When the client sent them, on its own clock; `None` if unknown.
    pub sent_at: Option<Timestamp>,
    /// How long after `sent_at`, plus the usual transit, they may be applied; `None` for the server's own
    /// limit alone.
    pub valid_for: Option<Duration>,
    /// The oldest capture time in the observation from which the policy chose the actions, on the clock of
    /// the server's host; `None` if unknown.
    pub observed_at: Option<Timestamp>,
}

/// How many rows of a session's actions were dropped since its beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ActionsDropped {
    /// Rows that were too late.
    pub late: u64,
    /// Rows that newer ones overtook.
    pub superseded: u64,
    /// Rows that were accepted, for comparison.
    pub accepted: u64,
}

/// The result of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepResult {
    /// The observation, captured after the actions had been applied.
    pub obs: Arc<Observation>,
    /// The sum over the rows.
    pub reward: f64,
    /// The task ended the episode: success or failure.
    pub terminated: bool,
    /// The episode was cut off, for example by a time limit.
    pub truncated: bool,
    /// The application's own values.
    pub info: ValueMap,
}
