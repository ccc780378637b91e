//! `cargo xtask size`: the size of a minimal server.

use anyhow::{Context, Result, bail};

use crate::command::{self, cargo};

/// The stripped minimal server must be smaller than this, in bytes.
const MAX_SIZE: u64 = 4_000_000;

/// Build a minimal server for release, strip it, and check that it is smaller than 4 MB.
#[derive(clap::Args)]
pub(crate) struct Arguments {}

pub(crate) fn run(_: &Arguments) -> Result<()> {
    let example = "minimal_server";
    // Stripped by the linker, so that no other tool is needed. In a target directory of its own, since
    // another profile setting would rebuild everything each time.
    let directory = command::target()?.join("size");
    command::run(
        cargo(["build", "--release", "-p", "chiral-server", "--no-default-features"])
            .args(["--features", "websocket", "--example", example])
            .args(["--config", "profile.release.strip=true"])
            .arg("--target-dir")
            .arg(&directory),
    )?;
    let binary = directory.join("release/examples").join(example);
    let size = std::fs::metadata(&binary)
        .with_context(|| format!("reading the size of {}", binary.display()))?
        .len();
    println!(
        "{example}: {:.2} MB stripped, must be under {:.2} MB",
        size as f64 / 1e6,
        MAX_SIZE as f64 / 1e6
    );
    if size >= MAX_SIZE {
        bail!("the minimal server has {size} bytes, expected fewer than {MAX_SIZE}");
    }
    Ok(())
}
