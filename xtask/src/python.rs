//! The golden frames in another language: Python's protobuf reads ours, and we read what it wrote.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command::{self, cargo};

/// The one Python package that the check needs; pinned, so that its result is the code's alone.
const PROTOBUF: &str = "6.33.6";

/// Lets Python read every golden frame and write frames of its own, which a test of chiral-proto then reads.
pub(crate) fn check() -> Result<()> {
    let target = command::target()?;
    let python = environment(&target.join("python"))?;
    let frames = target.join("python-frames");
    if frames.exists() {
        std::fs::remove_dir_all(&frames).context("removing the frames of an earlier run")?;
    }
    std::fs::create_dir_all(&frames).context("creating a directory for Python's frames")?;

    let script = Path::new("chiral-proto/tests/golden.py");
    command::run(
        Command::new(&python)
            .current_dir(command::root())
            .arg(script)
            .args(["proto/chiral.binpb", "chiral-proto/tests/golden"])
            .arg(&frames),
    )?;
    // The whole workspace is named so that the features, and with them what is built already, are those of the other tests.
    let test = ["test", "--workspace", "--test", "golden", "--", "--nocapture", "python"];
    command::run(cargo(test).env("CHIRAL_PYTHON_FRAMES", &frames))
}

/// A virtual environment with the package in it, made anew only if there is none that is good. Returns its interpreter.
fn environment(directory: &Path) -> Result<PathBuf> {
    let python = directory.join("bin/python");
    let version = ["-c", "import google.protobuf; print(google.protobuf.__version__)"];
    let found = command::output(Command::new(&python).args(version)).unwrap_or_default();
    if found.trim() == PROTOBUF {
        return Ok(python);
    }
    println!("making a virtual environment with protobuf {PROTOBUF}");
    let make = ["-m", "venv", "--clear"];
    command::run(Command::new("python3").args(make).arg(directory))
        .context("making a virtual environment (on Debian it needs the package python3-venv)")?;
    let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
    command::run(Command::new(&python).args(install).arg(format!("protobuf=={PROTOBUF}")))?;
    Ok(python)
}
