//! Everything that can go wrong on the policy's side. Every failure reaches the caller as one of these, whose
//! text is complete: a log line needs no more.

use std::{error::Error as StdError, path::PathBuf, sync::Arc, time::Duration};

use chiral_proto::{
    Fault, PROTOCOL_VERSION, TransportError,
    action::InvalidAction,
    error::{DecodeError, EncodeError, UnknownName},
    image::ImageError,
    tensor::TensorError,
};

/// Why a call failed. After a session has ended, every call fails with the reason.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The address cannot be understood.
    #[error("expected an address such as ws://localhost:8765, found {uri:?}: {reason}")]
    Address {
        /// The address.
        uri: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No server appeared within the deadline.
    #[error("no server at {uri} within {} s: {last}", deadline.as_secs_f64())]
    NoServer {
        /// The address.
        uri: String,
        /// The deadline.
        deadline: Duration,
        /// Why the last attempt failed.
        last: String,
    },
    /// The server answered with an HTTP error in place of a WebSocket.
    #[error("expected a Chiral server, found HTTP status {status}: {text}")]
    Http {
        /// The status.
        status: u16,
        /// The response body, cut short.
        text: String,
    },
    /// The certificates are not trusted, or the server does not speak TLS.
    #[error("no TLS connection: {0}")]
    Tls(Arc<dyn StdError + Send + Sync>),
    /// The builder allows only protobuf, which the server does not speak.
    #[error(
        "expected a server that speaks protobuf, the only codec that this client was configured for; \
         found one without the subprotocol chiral.v1, such as a legacy server"
    )]
    NotProtobuf,
    /// The server does not speak WebSocket as expected.
    #[error("no WebSocket connection: {0}")]
    Handshake(Arc<dyn StdError + Send + Sync>),
    /// The robot is alive on its Zenoh network, but cannot be connected to.
    #[error("no Zenoh connection: {0}")]
    Zenoh(Arc<dyn StdError + Send + Sync>),
    /// A configuration file of Zenoh's cannot be used.
    #[error("the Zenoh configuration {}: {problem}", file.display())]
    ZenohConfig {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A Zenoh address leads to a network of several robots, and none was chosen.
    #[error("expected one robot at {uri}, found several: {}; ask for one by its name", names.join(", "))]
    SeveralRobots {
        /// The address.
        uri: String,
        /// The robots that are alive there.
        names: Vec<String>,
    },
    /// The robot has a controller already; the text names it.
    #[error("{0}")]
    Busy(Fault),
    /// The server speaks another version of the protocol.
    #[error("this client speaks protocol version {PROTOCOL_VERSION}, and the server does not: {0}")]
    VersionMismatch(Fault),
    /// The server answered the request with an error.
    #[error("{0}")]
    Rejected(Fault),
    /// The server refused an action that was sent earlier, or the robot failed at it.
    #[error("an action was refused: {0}")]
    ActionRefused(Fault),
    /// Rows were sent, and the server dropped all of them because they arrived too late.
    #[error(
        "expected the server to accept actions, found all {dropped} rows dropped as too late for {:.1} s",
        waited.as_secs_f64()
    )]
    ActionsLate {
        /// For how long none was accepted.
        waited: Duration,
        /// The rows that were dropped in this time.
        dropped: u64,
    },
    /// The connection was lost or closed.
    #[error("disconnected: {reason}")]
    Disconnected {
        /// For people, including the error of the transport.
        reason: String,
        /// The error of the transport, if there was one.
        cause: Option<TransportError>,
    },
    /// This client was closed.
    #[error("this client was closed")]
    Closed,
    /// The server ended the observation stream.
    #[error("the observation stream ended: {reason}")]
    StreamEnded {
        /// For people.
        reason: String,
    },
    /// No observation stream runs, so that none can be waited for.
    #[error("no observation stream runs: call start_obs_stream first")]
    NotStreaming,
    /// Nothing arrived in time.
    #[error("expected {what} within {} s, found none", waited.as_secs_f64())]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// How long.
        waited: Duration,
    },
    /// The action queue has no room, and no dispatch empties it.
    #[error(
        "expected room for {rows} rows, found {queued} of {capacity} queued{}",
        if *dispatching { "" } else { " and no action dispatch running" }
    )]
    QueueFull {
        /// Rows to be queued.
        rows: usize,
        /// Rows in the queue.
        queued: usize,
        /// The most there may be.
        capacity: usize,
        /// Whether dispatch runs.
        dispatching: bool,
    },
    /// The action does not fit what the robot declares.
    #[error(transparent)]
    InvalidAction(#[from] InvalidAction),
    /// A start on the server's clock cannot be converted to this host's: the server has not answered a ping
    /// yet, or it is a legacy server, which never does.
    #[error(
        "start_at: expected the clocks of client and server to have been compared, found no reply to a ping \
         yet, and none ever from a legacy server"
    )]
    ClockUnknown,
    /// The call was given up from outside, by the builder's `interrupt_when`.
    #[error("the call was interrupted before it was done")]
    Interrupted,
    /// An argument is out of range.
    #[error("{name}: expected {expected}, found {found}")]
    InvalidArgument {
        /// The argument.
        name: &'static str,
        /// What it must be.
        expected: &'static str,
        /// What it was.
        found: String,
    },
    /// The request cannot be encoded for this wire.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The server sent a message that cannot be decoded.
    #[error("the server sent a malformed message: {0}")]
    Malformed(DecodeError),
    /// An observation has no camera or proprio of this name.
    #[error(transparent)]
    UnknownName(#[from] UnknownName),
    /// A tensor has another type or shape than expected.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// An image has an encoding that this version cannot decode, or another type or shape than expected.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The server sent another message than the protocol allows here.
    #[error("expected {expected} from the server, found another message")]
    Protocol {
        /// What was expected.
        expected: &'static str,
    },
    /// The server sent a reply to no request.
    #[error("expected replies to requests, found {found}")]
    UnexpectedReply {
        /// The reply.
        found: String,
    },
    /// A legacy server cannot do this, or not yet.
    #[error("the server cannot {what}: {why}")]
    Unsupported {
        /// The call.
        what: &'static str,
        /// Why not.
        why: &'static str,
    },
    /// The system gives no thread for a connection or for dispatch.
    #[error("cannot start a thread: {0}")]
    Thread(Arc<std::io::Error>),
}

/// What kind of failure an [`Error`] is: what a loop that tries again distinguishes, and what a binding raises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is no server, or no session with it could be begun.
    ConnectFailed,
    /// The robot has another controller.
    Busy,
    /// The session has ended. Only a new one helps.
    Disconnected,
    /// The client was closed by its own caller.
    Closed,
    /// The server or its robot failed at a request. [`Error::fault`] says at what.
    Rejected,
    /// The server ended the stream, or none was started.
    NotStreaming,
    /// No reply or observation arrived in time. The session goes on; `connect` has made none.
    Timeout,
    /// The call was given up from outside.
    Interrupted,
    /// An argument is wrong. The same call fails again.
    InvalidArgument,
    /// The action queue has no room.
    QueueFull,
    /// An earlier action was refused, or all were too late.
    ActionRefused,
    /// The server cannot do this, or not yet.
    Unsupported,
    /// The server sent what the protocol does not allow.
    Protocol,
    /// The system gives no thread.
    System,
}

impl Error {
    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::NoServer { .. }
            | Error::Http { .. }
            | Error::Tls(_)
            | Error::NotProtobuf
            | Error::Handshake(_)
            | Error::Zenoh(_)
            | Error::SeveralRobots { .. }
            | Error::VersionMismatch(_) => ErrorKind::ConnectFailed,
            Error::Busy(_) => ErrorKind::Busy,
            Error::Disconnected { .. } => ErrorKind::Disconnected,
            Error::Closed => ErrorKind::Closed,
            Error::Rejected(_) => ErrorKind::Rejected,
            Error::StreamEnded { .. } | Error::NotStreaming => ErrorKind::NotStreaming,
            Error::Timeout { .. } => ErrorKind::Timeout,
            Error::Interrupted => ErrorKind::Interrupted,
            Error::Address { .. }
            | Error::ZenohConfig { .. }
            | Error::InvalidAction(_)
            | Error::InvalidArgument { .. }
            | Error::Encode(_)
            | Error::UnknownName(_)
            | Error::Tensor(_)
            | Error::Image(_) => ErrorKind::InvalidArgument,
            Error::QueueFull { .. } => ErrorKind::QueueFull,
            Error::ActionRefused(_) | Error::ActionsLate { .. } => ErrorKind::ActionRefused,
            Error::Unsupported { .. } | Error::ClockUnknown => ErrorKind::Unsupported,
            Error::Malformed(_) | Error::Protocol { .. } | Error::UnexpectedReply { .. } => {
                ErrorKind::Protocol
            }
            Error::Thread(_) => ErrorKind::System,
        }
    }

    /// What the server said, if it is the one that failed: with a code, and whether a retry may help.
    pub fn fault(&self) -> Option<&Fault> {
        match self {
            Error::Busy(fault)
            | Error::VersionMismatch(fault)
            | Error::Rejected(fault)
            | Error::ActionRefused(fault) => Some(fault),
            _ => None,
        }
    }
}
