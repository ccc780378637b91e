//! The codec of `proto/chiral/v1/chiral.proto`. Only this module names the generated types of
//! `codec/wire.rs`. Protobuf encodes the header; pixels never pass through it.

mod decode;
mod encode;
mod tables;

pub(super) use decode::decode;
pub(super) use encode::encode;
