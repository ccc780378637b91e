//! What a newcomer sees first: a policy that drives a robot from pixels.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::child::{self, Running};
use crate::command::{self, cargo};

/// How long the robot may take to listen.
const START: Duration = Duration::from_secs(30);

/// Watch a policy drive the simulated robot from pixels: three episodes, about half a minute after the build.
///
/// The robot serves on a free port of this machine, the policy knows only what comes over the wire, and a
/// picture of what the cameras saw is written to target/demo.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Episodes to play.
    #[arg(long, default_value_t = 3)]
    episodes: u32,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    println!("building chiral-sim for release (a few minutes the first time)");
    command::run(&mut cargo(["build", "--release", "-p", "chiral-sim", "--bins"]))?;
    let target = command::target()?;
    let program = target.join("release/chiral-sim");
    let pictures = target.join("demo");
    // Only what this run draws is to be found there.
    if pictures.exists() {
        std::fs::remove_dir_all(&pictures).with_context(|| format!("emptying {}", pictures.display()))?;
    }
    std::fs::create_dir_all(&pictures).with_context(|| format!("creating {}", pictures.display()))?;

    let address = child::free_address()?;
    let mut serve = Command::new(&program);
    serve.args(["serve", "--quiet", "--bind"]).arg(address.to_string());
    let log = pictures.join("robot.log");
    println!("$ {}", command::shown(&serve));
    let mut robot = Running::start("robot", &mut serve, &log, None)?;

    let played = robot
        .wait_until_it_listens(address, Instant::now() + START)
        .and_then(|()| {
            let mut policy = Command::new(&program);
            policy
                .args(["policy", &format!("ws://{address}"), "--mode", "stream"])
                .args(["--episodes", &arguments.episodes.to_string(), "--save"])
                .arg(&pictures);
            println!("$ {}", command::shown(&policy));
            command::run(&mut policy)
        })
        .and_then(|()| robot.interrupt());
    if let Err(error) = played {
        bail!("{error:#}\n{}", robot.tail());
    }
    announce(&pictures)
}

/// Says which pictures there are to look at.
fn announce(directory: &std::path::Path) -> Result<()> {
    let entries = std::fs::read_dir(directory).context("listing the pictures")?;
    let mut pictures: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "png"))
        .collect();
    pictures.sort();
    if pictures.is_empty() {
        bail!("the policy wrote no picture to {}", directory.display());
    }
    println!("\nThe policy reached every target, from pixels alone. What the cameras saw:");
    for picture in pictures {
        println!("    {}", picture.display());
    }
    Ok(())
}
