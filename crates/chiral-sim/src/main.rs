//! `chiral-sim`: serves a simulated robot, drives it with a policy, or measures as an observer.

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
  chiral-sim watch ws://robot:8765         observe: rate, age, throughput
  chiral-sim serve --zenoh tcp/0.0.0.0:7447 --name left     serve on a Zenoh network
  chiral-sim policy tcp/robot:7447 --robot left             drive that robot
  chiral-sim discover                                       list the robots on the network
  chiral-sim policy zenoh:left                              drive one of them, found by its name

RUST_LOG sets the log level on stderr, for example RUST_LOG=debug.";

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
