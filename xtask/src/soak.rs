//! `cargo xtask soak`: long trials that measure times, which a busy machine may miss.

use anyhow::Result;

use crate::command::{self, cargo};

/// What reaches the robot when its link is cut while policies drive (about 8 minutes, as root, in network
/// namespaces), and how soon it holds when policies are stopped or hang (about 5 minutes; within 20 ms of the
/// command timeout each time).
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// How often to stop a policy's process (SIGSTOP)
    #[arg(long, default_value_t = 200)]
    stops: u32,
    /// How often to make a policy's own thread hang, while its client goes on pinging
    #[arg(long, default_value_t = 200)]
    hangs: u32,
    /// Leave out the trials that cut links
    #[arg(long)]
    no_cuts: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    command::run(&mut cargo(["build", "--release", "-p", "chiral-sim", "--bin", "chiral-bench"]))?;
    let (stops, hangs) = (arguments.stops.to_string(), arguments.hangs.to_string());
    let program = command::target()?.join("release/chiral-bench");
    command::run(std::process::Command::new(program).args(["holds", "--stops", &stops, "--hangs", &hangs]))?;
    if arguments.no_cuts {
        return Ok(());
    }
    let test = "a_cut_of_a_link_delivers_nothing_old_and_nothing_in_a_burst";
    command::run(cargo(["test", "--workspace", "--test", "stalls"]).args([
        "--",
        "--ignored",
        "--exact",
        test,
        "--nocapture",
    ]))
}
