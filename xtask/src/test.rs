//! `cargo xtask test`: every check that must pass before a commit, in parts that run one after the other.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::builder::PossibleValuesParser;

use crate::command::{self, Profile, cargo};
use crate::table::table;
use crate::{codegen, dependencies, e2e, python};

/// Run every check, as CI does; stop at the first that fails.
///
/// Prints how long each part took. All parts build with the dev profile and, where they can, with the same
/// features, so that little is built twice.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Run only these parts; by default all of them, in this order.
    #[arg(value_parser = PossibleValuesParser::new(PARTS.iter().map(|part| part.name)))]
    parts: Vec<String>,
}

struct Part {
    name: &'static str,
    run: fn() -> Result<()>,
}

/// Parts that fail fast come first; parts that reuse what others have built come after those.
const PARTS: &[Part] = &[
    Part { name: "fmt", run: fmt },
    Part { name: "codegen", run: codegen::check },
    Part { name: "banned", run: dependencies::check_banned },
    Part { name: "budget", run: dependencies::check_budget },
    Part { name: "clippy", run: clippy },
    Part { name: "tests", run: tests },
    Part { name: "doctests", run: doctests },
    Part { name: "python", run: python::check },
    Part { name: "e2e", run: two_episodes_per_row },
];

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let wanted =
        |part: &&Part| arguments.parts.is_empty() || arguments.parts.iter().any(|name| name == part.name);
    let start = Instant::now();
    let mut rows = vec![row("part", "result", "seconds")];
    for part in PARTS.iter().filter(wanted) {
        println!("\n==== {} ====", part.name);
        let start = Instant::now();
        let result = (part.run)();
        let word = if result.is_ok() { "ok" } else { "FAILED" };
        rows.push(row(part.name, word, &seconds(start.elapsed())));
        if result.is_err() {
            println!("\n{}", table(&rows));
            return result.with_context(|| format!("part `{}` of `cargo xtask test` failed", part.name));
        }
    }
    rows.push(row("total", "ok", &seconds(start.elapsed())));
    println!("\n{}", table(&rows));
    Ok(())
}

fn row(part: &str, result: &str, seconds: &str) -> Vec<String> {
    [part, result, seconds].map(str::to_owned).to_vec()
}

fn seconds(duration: Duration) -> String {
    format!("{:.1}", duration.as_secs_f64())
}

fn fmt() -> Result<()> {
    command::run(&mut cargo(["fmt", "--all", "--check"]))?;
    command::run(&mut cargo(["fmt", "--manifest-path", "fuzz/Cargo.toml", "--check"]))
}

fn clippy() -> Result<()> {
    command::run(&mut cargo(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    // A host can leave out one of the transports, or both.
    let libraries = ["clippy", "-p", "chiral-client", "-p", "chiral-server", "--no-default-features"];
    for features in ["", "chiral-client/zenoh,chiral-server/zenoh"] {
        command::run(cargo(libraries).args(["--features", features, "--", "-D", "warnings"]))?;
    }
    // What `cargo xtask demo` and `cargo xtask codegen` build.
    let demo = ["clippy", "-p", "chiral-sim", "--no-default-features", "--bins", "--", "-D", "warnings"];
    command::run(&mut cargo(demo))?;
    let codegen = ["clippy", "-p", "xtask", "--features", "codegen", "--bins", "--", "-D", "warnings"];
    command::run(&mut cargo(codegen))
}

/// Uses nextest if it is installed: it runs the tests of all crates in parallel and names one that hangs.
/// Both build the same, including the binaries and examples of the part `e2e`.
fn tests() -> Result<()> {
    if has_nextest() {
        command::run(&mut cargo(["nextest", "run", "--workspace", "--no-fail-fast"]))
    } else {
        let targets = ["--lib", "--bins", "--tests", "--examples"];
        command::run(cargo(["test", "--workspace", "--no-fail-fast"]).args(targets))
    }
}

fn has_nextest() -> bool {
    cargo(["nextest", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn doctests() -> Result<()> {
    command::run(&mut cargo(["test", "--workspace", "--doc"]))
}

fn two_episodes_per_row() -> Result<()> {
    e2e::check(Profile::Dev, 2)
}
