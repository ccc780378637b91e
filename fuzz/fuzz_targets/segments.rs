//! Fuzzes the protobuf codec with arbitrary frames in arbitrary segments.
#![no_main]

#[allow(dead_code, reason = "each fuzzer uses one of the functions")]
#[path = "../targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::segments(data));
