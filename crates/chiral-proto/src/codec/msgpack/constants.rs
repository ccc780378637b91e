//! What encoding and decoding have in common.

/// The id of every decoded request and reply. The wire has no ids, and 0 would mean that no reply is
/// expected.
pub const ID: u64 = 1;

/// The name of this wire in error texts.
pub const NAME: &str = "legacy msgpack";

/// The parts of a payload have no padding between them.
pub(super) const ALIGNMENT: usize = 1;
