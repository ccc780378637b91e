//! The codec of legacy peers, the msgpack wire, in both of its generations. Only this module encodes and
//! decodes msgpack.
//!
//! A frame is `u32 LE header_len | one MessagePack map | payload`, as in the current protocol but without
//! padding. Both generations are decoded on the same connection; the session finds out which of them a peer
//! uses. The wire carries less than a [`Message`] does:
//!
//! | on the wire | as a message | what the wire lacks |
//! |---|---|---|
//! | `metadata` / `metadata_response` | [`Request::GetMetadata`] / [`Reply::Metadata`] | |
//! | `reset` / `reset_response` | [`Request::Reset`] / [`Reply::Reset`] | seed and options: [`EncodeError`] |
//! | `obs_request` / `obs_response` | [`Request::GetObs`] / [`Reply::Observation`] | |
//! | `action` / `step_response` | [`Request::Step`] / [`Reply::Step`] | session and episode: 0 |
//! | `apply_action` | [`Notice::Action`] | session, episode, `seq` and `observation_seq`: 0 |
//! | any other type | [`Message::Unknown`] with id 0 | |
//!
//! - **Ids**: the wire has none; replies arrive in the order of the requests. Every request and reply decodes
//!   with [`ID`], and the id of an encoded message is not written. The `id` of a [`DecodeError`] is [`ID`]
//!   too, or 0 if the frame was an `apply_action` or its type could not be read.
//! - **Errors** and everything else that is not in the table cannot be encoded: [`EncodeError::Unsupported`].
//!   To refuse a request, a session closes the connection.
//! - **Observations** have no session, episode or `seq`, cameras no `seq`, proprioception no `captured_at`:
//!   all 0. Cameras have no `is_stale`, which decodes as false.
//! - **Depth** shares the image's size and K. Depth that has another size or K is left out, since a peer would
//!   place its points wrongly.
//! - **Images** are raw. An encoded one is an [`EncodeError`].
//! - **Capture times** are f64 seconds, or nanoseconds if greater than [`MAX_SECONDS`]. `captured_at` is in
//!   nanoseconds. The value on the wire is preserved bit for bit in [`TimedMessage::capture_times`], both for
//!   the cameras of an observation and for the `obs_timestamps` of an action. A client's session stores those
//!   of the observation from which the policy chose an action, and passes them to [`encode`] with the action.
//!   [`Codec`](super::Codec) drops capture times when it decodes and sends none.
//! - **Values**: an integer above `i64::MAX` becomes a float; text that is not UTF-8 and extension types
//!   become bytes; keys that are numbers, booleans or nil become text. A field that is nil counts as absent.
//!
//! A single row is written with shape `[D]` in an `apply_action`, and with `[1, D]` in an `action`: the shape
//! that each generation tries first. Decoding tells them apart: shape `[D]` is a single action.
//!
//! [`Message`]: crate::Message
//! [`Message::Unknown`]: crate::Message::Unknown
//! [`Request::GetMetadata`]: crate::Request::GetMetadata
//! [`Request::GetObs`]: crate::Request::GetObs
//! [`Request::Reset`]: crate::Request::Reset
//! [`Request::Step`]: crate::Request::Step
//! [`Reply::Metadata`]: crate::Reply::Metadata
//! [`Reply::Reset`]: crate::Reply::Reset
//! [`Reply::Observation`]: crate::Reply::Observation
//! [`Reply::Step`]: crate::Reply::Step
//! [`Notice::Action`]: crate::Notice::Action
//! [`EncodeError`]: crate::error::EncodeError
//! [`EncodeError::Unsupported`]: crate::error::EncodeError::Unsupported
//! [`DecodeError`]: crate::error::DecodeError

mod constants;
mod decode;
mod encode;
mod read;
mod seconds;

pub use constants::{ID, NAME};
pub use decode::{TimedMessage, decode};
pub use encode::encode;
pub use seconds::{MAX_SECONDS, timestamp};
