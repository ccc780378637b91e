//! What the tests of two peers share.

pub mod harness;
pub mod processes;
