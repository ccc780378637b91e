//! The error types of codecs and transports, and [`Fault`], the error that one peer sends to the other.
//! Errors of a single type, such as `TensorError`, live beside that type.

use std::{error::Error, fmt, sync::Arc};

/// Returns the text of an error and its causes, for a log line or a peer. A cause whose text the error
/// already ends with is not repeated.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let cause_text = error.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        cause = error.source();
    }
    text
}

/// An unknown camera or proprio name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no {kind} named {name:?}, expected one of: {}",
    if known.is_empty() { "none".to_owned() } else { known.join(", ") }
)]
pub struct UnknownName {
    /// `camera` or `proprio`.
    pub kind: &'static str,
    /// The unknown name.
    pub name: String,
    /// The existing names.
    pub known: Vec<String>,
}

impl UnknownName {
    /// Creates the error for looking up `name` among `known`.
    pub fn new<'a>(kind: &'static str, name: &str, known: impl IntoIterator<Item = &'a str>) -> UnknownName {
        UnknownName { kind, name: name.to_owned(), known: known.into_iter().map(str::to_owned).collect() }
    }
}

/// An error from encoding a message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// [`Message::Unknown`](crate::Message::Unknown) can be received but not sent.
    #[error("cannot encode a message of unknown kind")]
    Unknown,
    /// The wire has no representation for the message.
    #[error("the {wire} wire cannot carry {what}")]
    Unsupported {
        /// The wire's name.
        wire: &'static str,
        /// What cannot be sent, such as `a hello`.
        what: &'static str,
    },
    /// Free-form values are nested too deeply.
    #[error("expected values nested at most {limit} deep, found deeper nesting in {field}")]
    TooDeep {
        /// The field that contains them.
        field: &'static str,
        /// The greatest depth.
        limit: usize,
    },
    /// The header is too long for its length field.
    #[error("expected a header of less than 4 GiB, found {len} bytes")]
    TooLong {
        /// The header's length in bytes.
        len: usize,
    },
}

/// An error from decoding a frame: the field, what was expected and what was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: expected {expected}, found {found}")]
pub struct DecodeError {
    /// The id in the frame's header; 0 if it has none or it could not be read.
    pub id: u64,
    /// The `seq` of the action that could not be decoded; 0 if the frame is not an action.
    pub action_seq: u64,
    /// The invalid field, such as `observation.cameras[1].depth`.
    pub field: String,
    /// What the protocol requires.
    pub expected: String,
    /// What the frame contains.
    pub found: String,
}

impl DecodeError {
    pub(crate) fn new(
        field: impl Into<String>,
        expected: impl fmt::Display,
        found: impl fmt::Display,
    ) -> DecodeError {
        DecodeError {
            id: 0,
            action_seq: 0,
            field: field.into(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    /// Prefixes the field's path with `outer`.
    pub(crate) fn in_field(mut self, outer: impl fmt::Display) -> DecodeError {
        self.field = format!("{outer}.{}", self.field);
        self
    }
}

/// The kind of a [`Fault`], to match on: `Code` in the schema.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Code {
    /// No code, or one that only newer peers know.
    Unspecified,
    /// The frame could not be decoded.
    Malformed,
    /// The frame was decoded, but its content is invalid: a wrong shape, NaN, an unknown camera.
    Invalid,
    /// The receiver does not know this kind of message.
    Unsupported,
    /// The server does not support the client's protocol version.
    VersionMismatch,
    /// The server requires credentials.
    Unauthenticated,
    /// The robot already has a controller.
    Busy,
    /// An observer sent what only a controller may send.
    NotController,
    /// The action belongs to another session or to an earlier episode.
    Stale,
    /// A reset is pending or running.
    Resetting,
    /// The server holds as many rows that are not applied yet as it may.
    QueueFull,
    /// The robot's own code returned an error.
    RobotFailed,
    /// The robot's own code panicked; the robot is out of service until the server is restarted.
    OutOfService,
    /// A camera or proprio did not publish in time, or a camera has stopped publishing.
    SensorTimeout,
    /// The server is shutting down.
    ShuttingDown,
    /// The first frame was not a hello, or a second hello was sent.
    Protocol,
    /// The robot holds because no action came for its command timeout, and is configured to wait for a reset.
    Holding,
}

/// An error that one peer sends to the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The kind of error.
    pub code: Code,
    /// A message for people.
    pub text: String,
    /// The field that caused the error; may be empty.
    pub field: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// The `seq` of the refused action; otherwise 0.
    pub action_seq: u64,
}

impl Fault {
    /// Creates an error that is not retryable and names no field.
    pub fn new(code: Code, text: impl Into<String>) -> Fault {
        Fault { code, text: text.into(), field: String::new(), retryable: false, action_seq: 0 }
    }

    /// Sets the field that caused the error.
    #[must_use]
    pub fn field(mut self, field: impl Into<String>) -> Fault {
        self.field = field.into();
        self
    }

    /// Marks the error as retryable.
    #[must_use]
    pub fn retryable(mut self) -> Fault {
        self.retryable = true;
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.field.is_empty() && !self.text.starts_with(&self.field) {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.text)
    }
}

impl Error for Fault {}

impl From<DecodeError> for Fault {
    fn from(error: DecodeError) -> Fault {
        Fault {
            action_seq: error.action_seq,
            ..Fault::new(Code::Malformed, error.to_string()).field(error.field)
        }
    }
}

/// An error that ended a connection.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The connection broke.
    #[error("connection lost")]
    Lost(#[source] Arc<dyn Error + Send + Sync>),
    /// The peer closed the connection with an error code.
    #[error(
        "the peer closed the connection with {code}{}{reason}",
        if reason.is_empty() { "" } else { ": " }
    )]
    Closed {
        /// A WebSocket close code, such as 1011.
        code: u16,
        /// The peer's reason; may be empty.
        reason: String,
    },
    /// The peer violated the transport's rules.
    #[error("expected {expected}, found {found}")]
    Protocol {
        /// What the transport requires.
        expected: &'static str,
        /// What was received.
        found: String,
    },
}

impl TransportError {
    /// Creates [`TransportError::Lost`] from its cause.
    pub fn lost(source: impl Into<Box<dyn Error + Send + Sync>>) -> TransportError {
        TransportError::Lost(Arc::from(source.into()))
    }
}
