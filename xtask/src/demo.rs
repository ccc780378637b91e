//! `cargo xtask demo`: a policy drives the simulated robot from pixels.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::child::{self, Running};
use crate::command::{self, cargo};

/// The profile that the demo is built with; its settings are in Cargo.toml.
const PROFILE: &str = "quick-build";

/// How long the robot may take to accept connections.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// Watch a policy drive the simulated robot from pixels.
///
/// Builds the simulator (one to three minutes on two cores the first time) and plays three episodes (a few
/// seconds). The robot serves on a free port of this machine; the policy knows only what it receives over
/// the connection. Pictures of what the cameras saw are written to target/demo.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Number of episodes to play.
    #[arg(long, default_value_t = 3)]
    episodes: u32,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    println!("building the simulator (the first time this takes one to three minutes on two cores)");
    let start = Instant::now();
    let program = build()?;
    let built = start.elapsed().as_secs_f64();

    let start = Instant::now();
    let directory = command::target()?.join("demo");
    // The pictures of an earlier run would be taken for those of this one.
    if directory.exists() {
        std::fs::remove_dir_all(&directory).with_context(|| format!("removing {}", directory.display()))?;
    }
    std::fs::create_dir_all(&directory).with_context(|| format!("creating {}", directory.display()))?;
    play(&program, arguments.episodes, &directory)?;
    let pictures = pictures(&directory)?;
    let played = start.elapsed().as_secs_f64();

    println!("\nThe policy reached every target, from pixels alone. What the cameras saw:");
    for picture in pictures {
        println!("    {}", picture.display());
    }
    println!("Built in {built:.0} s, played in {played:.0} s.");
    Ok(())
}

/// Builds only what the demo uses: no Zenoh, no bench.
fn build() -> Result<PathBuf> {
    let arguments = ["build", "--profile", PROFILE, "-p", "chiral-sim", "--no-default-features"];
    command::run(cargo(arguments).args(["--bin", "chiral-sim"]))?;
    Ok(command::target()?.join(PROFILE).join("chiral-sim"))
}

/// Runs the robot and the policy until every episode has been played.
fn play(program: &Path, episodes: u32, directory: &Path) -> Result<()> {
    let address = child::free_address()?;
    let mut serve = Command::new(program);
    serve.args(["serve", "--quiet", "--bind"]).arg(address.to_string());
    println!("$ {}", command::shown(&serve));
    let mut robot = Running::start("robot", &mut serve, &directory.join("robot.log"), None)?;

    let played = robot
        .wait_until_it_listens(address, Instant::now() + START_TIMEOUT)
        .and_then(|()| {
            let mut policy = Command::new(program);
            policy
                .args(["policy", &format!("ws://{address}"), "--mode", "stream"])
                .args(["--episodes", &episodes.to_string(), "--save"])
                .arg(directory);
            println!("$ {}", command::shown(&policy));
            command::run(&mut policy)
        })
        .and_then(|()| robot.interrupt());
    if let Err(error) = played {
        bail!("{error:#}\n{}", robot.tail());
    }
    Ok(())
}

/// The pictures in the directory, in the order of the episodes.
fn pictures(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(directory).context("listing the pictures")?;
    let mut pictures: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "png"))
        .collect();
    pictures.sort();
    if pictures.is_empty() {
        bail!("the policy wrote no picture to {}", directory.display());
    }
    Ok(pictures)
}
