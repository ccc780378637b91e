//! Runs the seeds of the fuzzers, which include what they once found, as a plain test: every file of
//! `fuzz/seeds/<target>` is passed to that target's function.
#![allow(clippy::unwrap_used, reason = "test helpers may panic")]

#[path = "../../../fuzz/targets.rs"]
mod targets;

use std::{fs, panic, path::Path};

#[track_caller]
fn check(target: &str, run: fn(&[u8])) {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(target);
    let files = fs::read_dir(&seeds).unwrap_or_else(|error| panic!("{}: {error}", seeds.display()));
    let mut failed = Vec::new();
    let mut count = 0;
    for file in files {
        let file = file.unwrap();
        let seed = fs::read(file.path()).unwrap();
        let name = file.file_name().into_string().unwrap();
        assert!(seed.len() <= 4096, "{name}: expected at most 4096 bytes, found {}", seed.len());
        if panic::catch_unwind(|| run(&seed)).is_err() {
            failed.push(name);
        }
        count += 1;
    }
    assert!(
        failed.is_empty(),
        "the fuzz target {target} panicked, as printed above, on the seeds {failed:?}"
    );
    assert!(count >= 20, "expected at least 20 seeds for {target}, found {count}");
}

#[test]
fn frame() {
    check("frame", targets::frame);
}

#[test]
fn header() {
    check("header", targets::header);
}

#[test]
fn segments() {
    check("segments", targets::segments);
}

#[test]
fn msgpack() {
    check("msgpack", targets::msgpack);
}
