//! `chiral-sim`: a robot to serve, a policy to drive it, an observer to measure with.

mod cli;

use std::process::ExitCode;

use clap::Parser;

#[cfg(feature = "zenoh")]
use crate::cli::{discover, router};
use crate::cli::{policy, serve, watch};

/// A simulated robot, and a policy that drives it from pixels.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
enum Command {
    Serve(serve::Arguments),
    Policy(policy::Arguments),
    Watch(watch::Arguments),
    #[cfg(feature = "zenoh")]
    Discover(discover::Arguments),
    #[cfg(feature = "zenoh")]
    #[command(hide = true)]
    Router(router::Arguments),
}

const EXAMPLES: &str = "\
Examples:
  chiral-sim serve                         a Panda arm at ws://127.0.0.1:8765, two cameras
  chiral-sim policy --episodes 3           drive it, in another terminal
  chiral-sim policy --mode step --save .   in lock-step, and save what the cameras saw
  chiral-sim watch ws://robot:8765         look on: rate, age, throughput
  chiral-sim serve --zenoh tcp/0.0.0.0:7447 --name left     on a Zenoh network
  chiral-sim policy tcp/robot:7447 --robot left             and by way of it
  chiral-sim discover                                       which robots there are
  chiral-sim policy zenoh:left                              one of them, found by its name

RUST_LOG sets what is logged on stderr, such as RUST_LOG=debug.";

fn main() -> ExitCode {
    let ended = match Command::parse() {
        Command::Serve(arguments) => serve::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Policy(arguments) => policy::run(&arguments),
        Command::Watch(arguments) => watch::run(&arguments).map(|()| ExitCode::SUCCESS),
        #[cfg(feature = "zenoh")]
        Command::Discover(arguments) => discover::run(&arguments),
        #[cfg(feature = "zenoh")]
        Command::Router(arguments) => router::run(&arguments).map(|()| ExitCode::SUCCESS),
    };
    ended.unwrap_or_else(|error| {
        eprintln!("chiral-sim: {error:#}");
        ExitCode::FAILURE
    })
}
