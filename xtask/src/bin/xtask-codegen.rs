//! Generates the prost types and the descriptor set from the schema, without a protoc. `cargo xtask codegen`
//! starts it and compares or installs what it writes. A binary of its own, so that the other commands need
//! not build the protobuf compiler.
//!
//! Usage: `xtask-codegen PROTO_DIRECTORY OUTPUT_DIRECTORY`.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

fn main() -> Result<()> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    ensure!(arguments.len() == 2, "expected a directory of schemas and one for the output");
    let (schemas, output) = (&arguments[0], &arguments[1]);

    let descriptors = protox::Compiler::new([schemas])?
        .include_source_info(true)
        .open_file(schemas.join("chiral/v1/chiral.proto"))
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
    let descriptors = prost::Message::encode_to_vec(&without_comments);
    for (name, bytes) in [("wire.rs", rust.into_bytes()), ("chiral.binpb", descriptors)] {
        let path = output.join(name);
        std::fs::write(&path, bytes).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}
