//! Programs that run to completion, cargo above all, and the directories of the repository. Programs that run
//! in the background are in `child`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The repository's root, the working directory of every command.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a directory of the repository")
}

/// The cargo that started xtask, with the repository's root as working directory.
pub(crate) fn cargo<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.current_dir(root()).args(arguments);
    // Do not pass on what cargo set for xtask's own package. Build scripts that depend on these variables
    // (ring's) would run again, and everything above them be rebuilt, whenever xtask calls cargo after a
    // person has.
    for (name, _) in std::env::vars_os() {
        if name
            .to_str()
            .is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_"))
        {
            command.env_remove(name);
        }
    }
    command
}

/// Runs a program that shares our output; fails if it fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting `{}`", shown(command)))?;
    if !status.success() {
        bail!("`{}` failed: {status}", shown(command));
    }
    Ok(())
}

/// Runs a program and returns its stdout; fails with its stderr if it fails.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("starting `{}`", shown(command)))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed: {}\n{}", shown(command), output.status, errors.trim_end());
    }
    String::from_utf8(output.stdout).with_context(|| format!("decoding the output of `{}`", shown(command)))
}

/// The command line, without the directory of the program.
pub(crate) fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    std::iter::once(name)
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Cargo's target directory, which the environment may have moved.
pub(crate) fn target() -> Result<PathBuf> {
    let text = output(&mut cargo(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&text).context("reading cargo's metadata")?;
    let path = metadata["target_directory"].as_str().context("cargo's metadata has no target directory")?;
    Ok(PathBuf::from(path))
}

/// The profiles of [`build`].
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Profile {
    Dev,
    Release,
}

/// Builds every binary and example. Returns the directory with the binaries, which has the examples in
/// `examples`.
///
/// Builds the whole workspace with its examples, so that cargo resolves the same features as for the tests
/// and reuses what `cargo xtask test` has built.
pub(crate) fn build(profile: Profile) -> Result<PathBuf> {
    let mut command = cargo(["build", "--workspace", "--bins", "--examples"]);
    if profile == Profile::Release {
        command.arg("--release");
    }
    run(&mut command)?;
    Ok(target()?.join(profile.directory()))
}

impl Profile {
    pub(crate) fn directory(self) -> &'static str {
        match self {
            Profile::Dev => "debug",
            Profile::Release => "release",
        }
    }
}
