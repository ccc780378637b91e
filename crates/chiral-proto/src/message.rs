//! Everything that two peers can say. The schema's comments say what each message asks of its receiver.

use std::sync::Arc;

use bytes::Bytes;

use crate::{
    action::{ActionChunk, ActionSpec},
    clock::Rate,
    clock::Timestamp,
    error::Fault,
    observation::{CameraSpec, Observation, ProprioSpec},
    value::ValueMap,
};

/// One message. A reply carries the id of the request it answers.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// Asks for exactly one reply.
    Request {
        /// The client's choice, not 0.
        id: u64,
        /// What is asked.
        request: Request,
    },
    /// Answers a request.
    Reply {
        /// The request's id.
        id: u64,
        /// The answer.
        reply: Reply,
    },
    /// Neither asks nor answers.
    Notice(Notice),
    /// Something that a newer peer says.
    Unknown {
        /// Not 0 if an answer is expected.
        id: u64,
    },
}

/// What the client asks of the server.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// Opens a connection.
    Hello(Hello),
    /// Asks for the application's metadata.
    GetMetadata,
    /// Starts a new episode.
    Reset {
        /// Makes the episode repeatable, where the robot can.
        seed: Option<u64>,
        /// The application's own options.
        options: ValueMap,
    },
    /// Asks for an observation.
    GetObs,
    /// Applies the rows of a chunk in turn, then observes.
    Step {
        /// The session they were chosen in.
        session: u64,
        /// The episode they were chosen in.
        episode: u64,
        /// The rows.
        actions: ActionChunk,
    },
    /// Starts the observation stream.
    Subscribe(Subscribe),
    /// Stops the observation stream.
    Unsubscribe,
}

/// What the server answers.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// To a hello.
    Welcome(Box<Welcome>),
    /// To `GetMetadata`.
    Metadata(ValueMap),
    /// To `Reset`: captured after it was done.
    Reset {
        /// The first observation of the episode.
        obs: Arc<Observation>,
        /// The application's own values.
        info: ValueMap,
    },
    /// To `GetObs`.
    Observation(Arc<Observation>),
    /// To `Step`.
    Step(StepResult),
    /// To `Subscribe`: what the stream will be.
    Subscribed {
        /// Observations a second.
        hz: f64,
        /// The cameras in them.
        cameras: Vec<String>,
    },
    /// To `Unsubscribe`, after the stream's last observation.
    StreamEnd {
        /// In words.
        reason: String,
    },
    /// To any request that failed.
    Error(Fault),
}

/// What is said without being asked, and is not answered.
#[derive(Clone, Debug, PartialEq)]
pub enum Notice {
    /// An observation of the stream.
    Observation(Arc<Observation>),
    /// The server ended the stream by itself.
    StreamEnd {
        /// In words.
        reason: String,
    },
    /// Actions to apply now.
    Action(ActionMessage),
    /// How far the client has come with the stream, and how much may be under way.
    Credit {
        /// Observations received since `Subscribed`.
        received: u64,
        /// How many more the server may have sent than that.
        window: u32,
    },
    /// Asks for a pong at once.
    Ping {
        /// When it was sent.
        t1: Timestamp,
    },
    /// Answers a ping.
    Pong {
        /// The ping's own.
        t1: Timestamp,
        /// When the ping arrived, on the answerer's clock.
        t2: Timestamp,
        /// When the pong left, on the answerer's clock.
        t3: Timestamp,
    },
    /// Leaving on purpose; the last message.
    Goodbye {
        /// In words.
        reason: String,
    },
    /// A refused action, or something wrong that answers no request.
    Error(Fault),
}

/// Who may move the robot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Moves the robot; one at a time.
    #[default]
    Controller,
    /// Watches.
    Observer,
}

/// Opens a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The version that the client speaks.
    pub protocol: u32,
    /// For the log.
    pub software: String,
    /// What the client is here for.
    pub role: Role,
    /// Who it is, for people.
    pub client_name: String,
    /// Whatever the server's operator asks for.
    pub auth: Bytes,
    /// Empty on a session's first connection.
    pub attach_token: Bytes,
}

/// Answers a hello.
#[derive(Clone, Debug, PartialEq)]
pub struct Welcome {
    /// The version that the server speaks.
    pub protocol: u32,
    /// For the log.
    pub software: String,
    /// The session's number, not 0.
    pub session: u64,
    /// The current episode.
    pub episode: u64,
    /// What the robot is.
    pub robot: RobotInfo,
    /// Joins a second connection to the session; empty where none is offered.
    pub attach_token: Bytes,
    /// The name of who controls the robot now; empty if nobody does.
    pub controller: String,
}

/// What a robot is: its sensors and its actions.
#[derive(Clone, Debug, PartialEq)]
pub struct RobotInfo {
    /// Its name.
    pub name: String,
    /// Its cameras.
    pub cameras: Vec<CameraSpec>,
    /// Its proprioception.
    pub proprios: Vec<ProprioSpec>,
    /// Its actions.
    pub action_spec: ActionSpec,
}

/// Starts the observation stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Subscribe {
    /// Observations a second asked for.
    pub rate: Rate,
    /// Only these cameras; none means all.
    pub cameras: Vec<String>,
    /// Whether depth is wanted.
    pub depth: bool,
    /// The first credit.
    pub window: u32,
}

/// Actions to apply now.
#[derive(Clone, Debug, PartialEq)]
pub struct ActionMessage {
    /// The session they were chosen in.
    pub session: u64,
    /// The episode they were chosen in.
    pub episode: u64,
    /// Counts the client's actions from 1.
    pub seq: u64,
    /// The rows.
    pub actions: ActionChunk,
    /// `seq` of the observation that the policy looked at; 0 where it did not say.
    pub observation_seq: u64,
}

/// What came of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepResult {
    /// Captured after the actions were applied.
    pub obs: Arc<Observation>,
    /// Summed over the rows.
    pub reward: f64,
    /// The episode reached an end of the task's own.
    pub terminated: bool,
    /// The episode was cut off.
    pub truncated: bool,
    /// The application's own values.
    pub info: ValueMap,
}
