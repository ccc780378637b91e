//! What the fuzzers start from and what they once found, as a plain test: every file of `fuzz/seeds/<target>` goes through that target's own function.

#[path = "../../fuzz/targets.rs"]
mod targets;

use std::{fs, panic, path::Path};

#[track_caller]
fn check(target: &str, run: fn(&[u8])) {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(target);
    let files = fs::read_dir(&seeds).unwrap_or_else(|error| panic!("{}: {error}", seeds.display()));
    let mut count = 0;
    for file in files {
        let path = file.unwrap().path();
        let seed = fs::read(&path).unwrap();
        assert!(seed.len() <= 4096, "{} has {} bytes: seeds are small", path.display(), seed.len());
        panic::catch_unwind(|| run(&seed)).unwrap_or_else(|_| panic!("fuzz target {target} fails on {}", path.display()));
        count += 1;
    }
    assert!(count >= 20, "expected a seed of every kind of message for {target}, found {count} seeds");
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
