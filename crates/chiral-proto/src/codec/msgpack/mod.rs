//! The msgpack wire of Chiral peers that were there before us, in both of its generations: the only place
//! that names msgpack.
//!
//! A frame is `u32 LE header_len | one MessagePack map | payload`, like ours but without padding. Both
//! generations are understood in one connection; which of them a peer speaks is for the session to find out.
//! The wire knows less than [`Message`] does:
//!
//! | on the wire | as a message | what the wire does not say |
//! |---|---|---|
//! | `metadata` / `metadata_response` | [`Request::GetMetadata`] / [`Reply::Metadata`] | |
//! | `reset` / `reset_response` | [`Request::Reset`] / [`Reply::Reset`] | seed and options: a reset that has them is [`EncodeError`] |
//! | `obs_request` / `obs_response` | [`Request::GetObs`] / [`Reply::Observation`] | |
//! | `action` / `step_response` | [`Request::Step`] / [`Reply::Step`] | session and episode: 0 |
//! | `apply_action` | [`Notice::Action`] | session, episode, `seq` and `observation_seq`: 0 |
//! | any other type | [`Message::Unknown`] with id 0 | |
//!
//! - **Ids**: there are none; replies come in the order of the requests. Every request and reply decodes with
//!   [`ID`], and whatever id a message has is not written. A [`DecodeError`]'s `id` is [`ID`] too, except for
//!   0 where the frame was an `apply_action` or could not be told.
//! - **Errors**: there are no words for them, nor for anything else that is not in the table:
//!   [`EncodeError::Unsupported`]. A session that refuses a request closes the connection instead.
//! - **Observations** have no session, episode or `seq`, cameras no `seq`, proprioception no `captured_at`:
//!   all 0.
//! - **Capture times** are seconds as f64, or nanoseconds where above [`MAX_SECONDS`]; in `captured_at` they
//!   are nanoseconds. What was on the wire, bit for bit, is in [`TimedMessage::capture_times`]: of an
//!   observation's cameras, or an action's `obs_timestamps`. A client's session keeps those of the
//!   observation that the policy saw and gives them to [`encode`] with the action. [`Codec`](super::Codec)
//!   does without: it drops them, and sends none.
//! - **Values**: a whole number above `i64::MAX` becomes a float, text that is not UTF-8 and extension types
//!   become bytes, keys that are numbers, booleans or nil become text. Nil in place of a field is as if the
//!   field were absent.
//!
//! One row is written with shape `[D]` in an `apply_action`, and with `[1, D]` in an `action`: what each
//! generation expects first.
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
//! [`EncodeError`]: crate::EncodeError
//! [`EncodeError::Unsupported`]: crate::EncodeError::Unsupported
//! [`DecodeError`]: crate::DecodeError

mod decode;
mod encode;
mod read;
mod seconds;

pub use decode::{TimedMessage, decode};
pub use encode::encode;
pub use seconds::MAX_SECONDS;

/// The id of every request and reply that is decoded: the wire has none, and 0 would mean that none is
/// expected.
pub const ID: u64 = 1;

/// The name of this wire in error texts.
pub const NAME: &str = "legacy msgpack";

/// Parts of a payload follow each other without padding.
const ALIGNMENT: usize = 1;
