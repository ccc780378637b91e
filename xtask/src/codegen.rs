//! Generates what is committed of the schema: the prost types and the descriptor set, without a protoc.

use std::path::Path;

use anyhow::{Context, Result};

/// The schema, the one source of both outputs.
const SCHEMA: &str = "proto/chiral/v1/chiral.proto";

/// The generated files, each with what it ought to hold.
pub(crate) fn generate(root: &Path) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let descriptors = protox::Compiler::new([root.join("proto")])?
        .include_source_info(true)
        .open_file(root.join(SCHEMA))
        .context("compiling the schema")?
        .file_descriptor_set();
    let mut without_comments = descriptors.clone();
    for file in &mut without_comments.file {
        file.source_code_info = None;
    }

    let modules = prost_build::Config::new()
        .btree_map(["."])
        .bytes(["."])
        .generate(
            descriptors
                .file
                .into_iter()
                .map(|file| (prost_build::Module::from_protobuf_package_name(file.package()), file))
                .collect(),
        )?;
    let rust = modules.into_values().next().context("the schema has one package")?;
    Ok(vec![
        ("chiral-proto/src/codec/wire.rs", rust.into_bytes()),
        ("proto/chiral.binpb", prost::Message::encode_to_vec(&without_comments)),
    ])
}
