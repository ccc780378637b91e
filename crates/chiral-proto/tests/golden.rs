//! The protocol's bytes, held fast: a golden frame of every kind that we must go on writing and reading, and
//! frames that another language's protobuf wrote from the schema alone. `cargo xtask codegen --bless`
//! rewrites the golden frames, and nothing else does.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]

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

/// The names of the frames in a directory.
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
fn golden_frames_are_what_we_write_and_read() {
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
            "{name} is written in other bytes than the golden frame: old peers would notice; see `cargo xtask codegen --help`"
        );
        check_decodes(name, golden, message);
    }
    let known: BTreeSet<String> = messages.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(known.len(), messages.len(), "two golden frames of one name");
    assert_eq!(names(&directory), known, "the golden frames and the files there are");
}

/// Writes the golden frames, and the seeds that the fuzzers grow from.
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
        // Two cuts: within the header, and within the first bytes of the payload where there is one.
        seed("segments", &[&[2, 7, 0, 65, 0][..], &frame].concat());
        seed("header", &frame[4..4 + header_len]);
    }
}

/// `cargo xtask test` has Python write the frames and sets the variable.
#[test]
fn frames_that_python_wrote_are_understood() {
    let Some(directory) = std::env::var_os("CHIRAL_PYTHON_FRAMES").map(PathBuf::from) else {
        println!(
            "CHIRAL_PYTHON_FRAMES is not set: there are no frames of Python's to read; `cargo xtask test python` makes some"
        );
        return;
    };
    let messages = frames::python::all();
    for (name, message) in &messages {
        check_decodes(name, read(&directory, name), message);
    }
    let known: BTreeSet<String> = messages.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names(&directory), known, "the frames expected of Python and the files there are");
}
