//! The generated files that are committed: the prost types, the descriptor set and, with `--bless`, the
//! golden frames. The generator is the binary `xtask-codegen`; here its output is compared and installed.

use anyhow::{Context, Result, bail};

use crate::command::{self, cargo};

/// The source of all generated files.
const SCHEMA: &str = "proto/chiral/v1/chiral.proto";

/// What the generator writes, and where it is committed.
const GENERATED: &[(&str, &str)] =
    &[("wire.rs", "crates/chiral-proto/src/codec/wire.rs"), ("chiral.binpb", "proto/chiral.binpb")];

/// Write the files that are generated from the protobuf schema.
///
/// Lists the files that changed. Commit them together with the schema.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Write nothing; fail if a committed file differs from what the schema gives.
    #[arg(long)]
    check: bool,
    /// Also rewrite the golden frames and the fuzz seeds. Only for an intended change of the protocol: read
    /// the diff, since released peers still speak the old frames.
    #[arg(long, conflicts_with = "check")]
    bless: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.check {
        return check();
    }
    let outdated = outdated()?;
    if outdated.is_empty() {
        println!("the generated files are up to date with {SCHEMA}");
    }
    for (path, bytes) in outdated {
        std::fs::write(command::root().join(path), bytes).with_context(|| format!("writing {path}"))?;
        println!("wrote {path}");
    }
    if arguments.bless {
        let test = ["test", "--workspace", "--test", "golden", "--", "--nocapture", "golden"];
        command::run(cargo(test).env("CHIRAL_BLESS", "1"))?;
    }
    Ok(())
}

/// Fails, naming the file, if a committed file differs from what the schema gives.
pub(crate) fn check() -> Result<()> {
    if let Some((path, _)) = outdated()?.first() {
        bail!("{path} is out of date with {SCHEMA}: run `cargo xtask codegen` and commit the result");
    }
    println!("the generated files are up to date with {SCHEMA}");
    Ok(())
}

/// The committed files that differ from what the schema gives, each with its new content.
fn outdated() -> Result<Vec<(&'static str, Vec<u8>)>> {
    let output = command::target()?.join("codegen");
    std::fs::create_dir_all(&output).with_context(|| format!("creating {}", output.display()))?;
    let generator =
        ["run", "--quiet", "--package", "xtask", "--features", "codegen", "--bin", "xtask-codegen"];
    command::run(cargo(generator).args(["--", "proto"]).arg(&output))?;

    let mut outdated = Vec::new();
    for (name, committed) in GENERATED {
        let path = output.join(name);
        let bytes = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        if std::fs::read(command::root().join(committed)).is_ok_and(|found| found == bytes) {
            continue;
        }
        outdated.push((*committed, bytes));
    }
    Ok(outdated)
}
