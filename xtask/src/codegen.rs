//! Generates what is committed of the schema: the prost types and the descriptor set, without a protoc.
//! `--bless` rewrites the golden frames too.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::command::{self, cargo};

/// The schema, the one source of both outputs.
const SCHEMA: &str = "proto/chiral/v1/chiral.proto";

/// Write what is generated from the schema, and say what changed.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Write nothing: fail, naming the file, if a committed one is not what the schema gives.
    #[arg(long)]
    check: bool,
    /// Rewrite the golden frames and the fuzz seeds too. Do so only when the protocol was meant to change,
    /// and read the diff: old peers speak the old frames.
    #[arg(long, conflicts_with = "check")]
    bless: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.check {
        return check();
    }
    let stale = stale()?;
    if stale.is_empty() {
        println!("the generated files are what {SCHEMA} gives");
    }
    for (path, bytes) in stale {
        std::fs::write(command::root().join(path), bytes).with_context(|| format!("writing {path}"))?;
        println!("wrote {path}");
    }
    if arguments.bless {
        let test = ["test", "--workspace", "--test", "golden", "--", "--nocapture", "golden"];
        command::run(cargo(test).env("CHIRAL_BLESS", "1"))?;
    }
    Ok(())
}

/// Fails, naming the file, if a committed file is not what the schema gives.
pub(crate) fn check() -> Result<()> {
    if let Some((path, _)) = stale()?.first() {
        bail!("{path} is not what {SCHEMA} gives: run `cargo xtask codegen` and commit the result");
    }
    println!("the generated files are what {SCHEMA} gives");
    Ok(())
}

/// The generated files whose committed content is another, each with what it ought to hold.
fn stale() -> Result<Vec<(&'static str, Vec<u8>)>> {
    let root = command::root();
    let mut files = generate(root)?;
    files.retain(|(path, wanted)| !std::fs::read(root.join(path)).is_ok_and(|found| found == *wanted));
    Ok(files)
}

/// The generated files, each with what it ought to hold.
fn generate(root: &Path) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let descriptors = protox::Compiler::new([root.join("proto")])?
        .include_source_info(true)
        .open_file(root.join(SCHEMA))
        .context("compiling the schema")?
        .file_descriptor_set();
    let mut without_comments = descriptors.clone();
    for file in &mut without_comments.file {
        file.source_code_info = None;
    }

    let requests = descriptors.file.into_iter().map(|file| {
        let module = prost_build::Module::from_protobuf_package_name(file.package());
        (module, file)
    });
    let modules = prost_build::Config::new().btree_map(["."]).bytes(["."]).generate(requests.collect())?;
    let rust = modules.into_values().next().context("the schema has one package")?;
    Ok(vec![
        ("crates/chiral-proto/src/codec/wire.rs", rust.into_bytes()),
        ("proto/chiral.binpb", prost::Message::encode_to_vec(&without_comments)),
    ])
}
