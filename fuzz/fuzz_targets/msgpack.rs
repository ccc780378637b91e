//! Arbitrary bytes, taken for a frame of the msgpack wire.
#![no_main]

#[allow(dead_code, reason = "each fuzzer runs one of them")]
#[path = "../targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::msgpack(data));
