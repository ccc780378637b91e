//! Python: checks golden frames with Python's packages, and makes the virtual environment in which the peers
//! of `tests/peers` run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::{self, cargo};

/// Every Python package used here; pinned, so that results depend only on our code.
const PACKAGES: &[&str] =
    &["protobuf==6.33.6", "msgpack==1.2.4", "websockets==17.4", "eclipse-zenoh==1.10.2", "numpy==2.4.6"];

/// Checks that Python reads every golden frame, that chiral-proto reads frames written by Python, and that
/// the committed msgpack frames are what Python writes.
pub(crate) fn check() -> Result<()> {
    let python = interpreter()?;
    let target = command::target()?;
    check_msgpack(&python, &target.join("python-msgpack"))?;

    let frames = target.join("python-frames");
    make_empty(&frames)?;
    let script = Path::new("crates/chiral-proto/tests/golden.py");
    command::run(
        Command::new(&python)
            .current_dir(command::root())
            .arg(script)
            .args(["proto/chiral.binpb", "crates/chiral-proto/tests/golden"])
            .arg(&frames),
    )?;
    // For the whole workspace, so that the features are those of the other tests and nothing is rebuilt.
    let test = ["test", "--workspace", "--test", "golden", "--", "--nocapture", "python"];
    command::run(cargo(test).env("CHIRAL_PYTHON_FRAMES", &frames))
}

/// Fails if the committed msgpack frames, which chiral-proto's tests rely on, differ from what Python's
/// `msgpack` writes.
fn check_msgpack(python: &Path, directory: &Path) -> Result<()> {
    let script = "crates/chiral-proto/tests/golden_msgpack.py";
    let [frames, seeds] = ["frames", "seeds"].map(|name| directory.join(name));
    make_empty(directory)?;
    command::run(Command::new(python).current_dir(command::root()).arg(script).args([&frames, &seeds]))?;
    // Only files that the script writes: the fuzzers' own finds are in the same directory as the seeds.
    for (written, committed) in [(frames, "crates/chiral-proto/tests/msgpack"), (seeds, "fuzz/seeds/msgpack")]
    {
        for file in fs::read_dir(&written).with_context(|| format!("reading {}", written.display()))? {
            let file = file.context("listing the files that Python wrote")?;
            let committed = Path::new(committed).join(file.file_name());
            let wanted =
                fs::read(file.path()).with_context(|| format!("reading {}", file.path().display()))?;
            if !fs::read(command::root().join(&committed)).is_ok_and(|found| found == wanted) {
                bail!(
                    "{} differs from what {script} writes: run it and commit the result",
                    committed.display()
                );
            }
        }
    }
    println!("the msgpack frames are up to date with {script}");
    Ok(())
}

/// Makes an empty directory, removing what an earlier run left.
fn make_empty(directory: &Path) -> Result<()> {
    if directory.exists() {
        fs::remove_dir_all(directory).with_context(|| format!("removing {}", directory.display()))?;
    }
    fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))
}

/// The interpreter of a virtual environment with all packages. Makes the environment unless there is a
/// complete one.
pub(crate) fn interpreter() -> Result<PathBuf> {
    let directory = command::target()?.join("python");
    let python = directory.join("bin/python");
    let pip = |arguments: &[&str]| {
        let mut command = Command::new(&python);
        command.args(["-m", "pip", "--disable-pip-version-check"]).args(arguments);
        command
    };
    let found = command::output(&mut pip(&["freeze"])).unwrap_or_default();
    if PACKAGES.iter().all(|package| found.lines().any(|line| line == *package)) {
        return Ok(python);
    }
    println!("creating a virtual environment with {}", PACKAGES.join(", "));
    let make = ["-m", "venv", "--clear"];
    command::run(Command::new("python3").args(make).arg(&directory))
        .context("creating a virtual environment (on Debian this needs the package python3-venv)")?;
    command::run(pip(&["install", "--quiet"]).args(PACKAGES))?;
    Ok(python)
}
