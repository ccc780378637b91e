//! The size of the smallest server that anyone ships.

use anyhow::{Context, Result, bail};

use crate::command::{self, cargo};

/// The stripped minimal server stays under this, in bytes.
const LIMIT: u64 = 4_000_000;

/// Build the minimal server for release, strip it, and check its size (under 4 MB).
#[derive(clap::Args)]
pub(crate) struct Arguments {}

pub(crate) fn run(_: &Arguments) -> Result<()> {
    let example = "minimal_server";
    // Stripped by the linker, so that no tool is needed, and in a directory of its own, since another setting
    // would build everything anew each time.
    let directory = command::target()?.join("size");
    command::run(
        cargo(["build", "--release", "-p", "chiral-server", "--no-default-features"])
            .args(["--features", "websocket", "--example", example])
            .args(["--config", "profile.release.strip=true"])
            .arg("--target-dir")
            .arg(&directory),
    )?;
    let binary = directory.join("release/examples").join(example);
    let size = std::fs::metadata(&binary).with_context(|| format!("looking at {}", binary.display()))?.len();
    println!("{example}: {:.2} MB stripped, at most {:.2}", size as f64 / 1e6, LIMIT as f64 / 1e6);
    if size >= LIMIT {
        bail!("the minimal server has {size} bytes, at least the {LIMIT} it must stay under");
    }
    Ok(())
}
