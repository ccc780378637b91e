//! `cargo xtask soak`: long trials whose pass mark is a time, which a busy machine may miss.

use anyhow::Result;

use crate::command::{self, cargo};

/// Stop policies and make them hang while a robot moves, over WebSocket and Zenoh, and check that the robot
/// holds within 20 ms of the command timeout each time. About 5 minutes on an idle machine.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// How often to stop a policy's process (SIGSTOP)
    #[arg(long, default_value_t = 200)]
    stops: u32,
    /// How often to make a policy's own thread hang, while its client goes on pinging
    #[arg(long, default_value_t = 200)]
    hangs: u32,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    command::run(&mut cargo(["build", "--release", "-p", "chiral-sim", "--bin", "chiral-bench"]))?;
    let (stops, hangs) = (arguments.stops.to_string(), arguments.hangs.to_string());
    let program = command::target()?.join("release/chiral-bench");
    command::run(std::process::Command::new(program).args(["holds", "--stops", &stops, "--hangs", &hangs]))
}
