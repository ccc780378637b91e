//! What can go wrong, as types: in this crate, and as one peer tells the other.

use std::{error::Error, fmt, sync::Arc};

/// An error and its causes, one after the other: what a log line or a peer needs. Some errors' own text has
/// their causes' already.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// There is no camera or proprio of this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no {kind} named {name:?}; there are: {}", if known.is_empty() { "none".to_owned() } else { known.join(", ") })]
pub struct UnknownName {
    /// `camera` or `proprio`.
    pub kind: &'static str,
    /// What was asked for.
    pub name: String,
    /// What there is.
    pub known: Vec<String>,
}

impl UnknownName {
    /// The error for asking `name` of `known`.
    pub fn new<'a>(kind: &'static str, name: &str, known: impl IntoIterator<Item = &'a str>) -> UnknownName {
        UnknownName { kind, name: name.to_owned(), known: known.into_iter().map(str::to_owned).collect() }
    }
}

/// A message that cannot be put on the wire.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// A message of unknown kind can be received but not sent.
    #[error("a message of unknown kind cannot be sent")]
    Unknown,
    /// The wire cannot carry such a message.
    #[error("the {wire} wire cannot carry {what}")]
    Unsupported {
        /// The wire.
        wire: &'static str,
        /// The message.
        what: &'static str,
    },
    /// Free-form values are nested too deep.
    #[error("expected values nested at most {limit} deep, found deeper ones in {field}")]
    TooDeep {
        /// Where.
        field: &'static str,
        /// The limit.
        limit: usize,
    },
    /// The header does not fit its length field.
    #[error("expected a header of less than 4 GiB, found {len} bytes")]
    TooLong {
        /// Its length.
        len: usize,
    },
}

/// A frame that cannot be understood. It names the field, what was expected and what was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: expected {expected}, found {found}")]
pub struct DecodeError {
    /// The id of the request in which it was found; 0 where there is none, or it could not be read.
    pub id: u64,
    /// The `seq` of the action in which it was found; 0 where there is none.
    pub action_seq: u64,
    /// The field at fault, such as `observation.cameras[1].depth`.
    pub field: String,
    /// What the protocol asks for.
    pub expected: String,
    /// What the frame says.
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

    /// The same, found within `outer`.
    pub(crate) fn in_field(mut self, outer: impl fmt::Display) -> DecodeError {
        self.field = format!("{outer}.{}", self.field);
        self
    }
}

/// What a peer says went wrong, in matchable form; see the schema's `Code` for the meanings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Code {
    /// A code from a newer peer, or none.
    Unspecified,
    /// The frame could not be decoded.
    Malformed,
    /// It says something that cannot be: a wrong shape, NaN, an unknown camera.
    Invalid,
    /// A kind of message that the peer does not know.
    Unsupported,
    /// The peer speaks another version of the protocol.
    VersionMismatch,
    /// The server asks for credentials.
    Unauthenticated,
    /// The robot has a controller already.
    Busy,
    /// An observer asked for what only a controller may.
    NotController,
    /// The action belongs to another session or to an earlier episode.
    Stale,
    /// A reset waits or runs.
    Resetting,
    /// The server holds as many unapplied rows as it may.
    QueueFull,
    /// The robot's own code returned an error.
    RobotFailed,
    /// The robot's own code panicked.
    OutOfService,
    /// A camera or proprio published nothing in time.
    SensorTimeout,
    /// The server is about to stop.
    ShuttingDown,
    /// The first frame was not a hello, or a hello came again.
    Protocol,
}

/// An error as one peer tells it to the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What kind of error.
    pub code: Code,
    /// In words.
    pub text: String,
    /// The field at fault, or empty.
    pub field: String,
    /// Whether the same thing may succeed later.
    pub retryable: bool,
    /// The `seq` of the refused action, where one is meant; else 0.
    pub action_seq: u64,
}

impl Fault {
    /// An error that trying again does not mend.
    pub fn new(code: Code, text: impl Into<String>) -> Fault {
        Fault { code, text: text.into(), field: String::new(), retryable: false, action_seq: 0 }
    }

    /// The same, about this field.
    #[must_use]
    pub fn field(mut self, field: impl Into<String>) -> Fault {
        self.field = field.into();
        self
    }

    /// The same, worth trying again later.
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

/// A connection that carries no more.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The connection broke.
    #[error("connection lost")]
    Lost(#[source] Arc<dyn Error + Send + Sync>),
    /// The peer closed the connection, and says that it had to.
    #[error("the other side closed the connection with {code}{}{reason}", if reason.is_empty() { "" } else { ": " })]
    Closed {
        /// Such as WebSocket's 1011.
        code: u16,
        /// In the peer's words; may be empty.
        reason: String,
    },
    /// The peer does not keep to the transport's rules.
    #[error("expected {expected}, found {found}")]
    Protocol {
        /// What the transport carries.
        expected: &'static str,
        /// What came.
        found: String,
    },
}

impl TransportError {
    /// The connection broke, because of `source`.
    pub fn lost(source: impl Into<Box<dyn Error + Send + Sync>>) -> TransportError {
        TransportError::Lost(Arc::from(source.into()))
    }
}
