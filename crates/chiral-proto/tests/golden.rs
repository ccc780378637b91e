//! Compatibility of the protocol: golden frames of every kind, whose bytes must not change, and frames that
//! Python's protobuf encoded from the schema alone. Only `cargo xtask codegen --bless` rewrites the golden
//! frames.
#![allow(clippy::unwrap_used, reason = "test helpers may panic")]

mod frames;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use chiral_proto::{Codec, Frame, Message};

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap()
}

fn golden() -> PathBuf {
    repository().join("crates/chiral-proto/tests/golden")
}

/// Returns the names of the frames in a directory.
fn names(directory: &Path) -> BTreeSet<String> {
    let files = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    files.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}

fn read(directory: &Path, name: &str) -> Bytes {
    let path = directory.join(name).with_extension("bin");
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).into()
}

#[track_caller]
fn check_decodes(name: &str, bytes: Bytes, expected: &Message) {
    let found = Codec::Protobuf.decode(Frame::from(bytes)).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(&found, expected, "{name}");
}

#[test]
fn golden_frames_are_encoded_and_decoded() {
    let messages = frames::golden::all();
    let directory = golden();
    if std::env::var_os("CHIRAL_BLESS").is_some_and(|value| value == "1") {
        bless(&directory, &messages);
    }
    for (name, message) in &messages {
        let frame = Codec::Protobuf.encode(message).unwrap().into_bytes();
        let golden = read(&directory, name);
        assert!(
            frame == golden,
            "{name}: expected the bytes of the golden frame, found others, which old peers may not decode; \
             see `cargo xtask codegen --help`"
        );
        check_decodes(name, golden, message);
    }
    let known: BTreeSet<String> = messages.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(known.len(), messages.len(), "two golden frames have the same name");
    assert_eq!(names(&directory), known, "expected one file per golden frame");
}

/// Writes the golden frames, and the seeds of the fuzzers.
fn bless(directory: &Path, messages: &[(&str, Message)]) {
    let seeds = repository().join("fuzz/seeds");
    for stale in names(directory) {
        fs::remove_file(directory.join(stale).with_extension("bin")).unwrap();
    }
    for (name, message) in messages {
        let frame = Codec::Protobuf.encode(message).unwrap().into_bytes();
        let header_len = u32::from_le_bytes(frame[..4].try_into().unwrap()) as usize;
        let file = format!("{name}.bin");
        fs::write(directory.join(&file), &frame).unwrap();
        let seed = |target: &str, bytes: &[u8]| {
            fs::create_dir_all(seeds.join(target)).unwrap();
            fs::write(seeds.join(target).join(&file), bytes).unwrap();
        };
        seed("frame", &frame);
        // Two cuts: within the header, and within the first bytes of the payload if there is one.
        seed("segments", &[&[2, 7, 0, 65, 0][..], &frame].concat());
        seed("header", &frame[4..4 + header_len]);
    }
}

/// `cargo xtask test` runs Python, which writes the frames, and sets the variable.
#[test]
fn frames_encoded_by_python_are_decoded() {
    let Some(directory) = std::env::var_os("CHIRAL_PYTHON_FRAMES").map(PathBuf::from) else {
        println!(
            "skipped: CHIRAL_PYTHON_FRAMES is not set; run `cargo xtask test python` to create the frames"
        );
        return;
    };
    let messages = frames::python::all();
    for (name, message) in &messages {
        check_decodes(name, read(&directory, name), message);
    }
    let known: BTreeSet<String> = messages.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names(&directory), known, "expected one file per frame of Python");
}
