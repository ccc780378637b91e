//! `chiral-bench`: the processes that `cargo xtask bench` measures and that nobody else starts. A server
//! process serves one workload in every way that is compared, a client process asks for it and prints what it
//! measured, a JSON object a line. What is made of it is the bench's own business.

mod actions;
mod control;
mod dispatch;
mod get_obs;
mod held;
mod micro;
mod naive;
mod put;
mod query;
mod raw;
mod server;
mod sheet;
mod soak;
mod stream;
mod usage;
mod workload;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::sheet::Sheet;
use crate::workload::Workload;

/// The measured processes of `cargo xtask bench`.
#[derive(Parser)]
struct Arguments {
    /// Run on this core alone
    #[arg(long, global = true, value_name = "N")]
    cpu: Option<usize>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve a workload; prints where
    Serve { workload: Workload },
    /// Measure against the server whose control address this is
    Measure {
        what: What,
        control: SocketAddr,
        /// How often everything is measured
        #[arg(long, default_value_t = 5)]
        rounds: usize,
    },
    /// Stream for long, and see whether memory grows
    Soak {
        control: SocketAddr,
        #[arg(long)]
        over: server::Path,
        #[arg(long)]
        seconds: u64,
    },
    /// Measure what needs no server
    Micro {
        /// How often everything is measured
        #[arg(long, default_value_t = 5)]
        rounds: usize,
    },
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum What {
    GetObs,
    Stream,
    Actions,
    ActionQueue,
    Held,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("chiral-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(Arguments { cpu, command }: Arguments) -> Result<()> {
    if let Some(cpu) = cpu {
        // Before any thread is started: they all inherit it.
        let mut set = CpuSet::new();
        set.set(cpu);
        sched_setaffinity(None, &set).with_context(|| format!("moving to core {cpu}"))?;
    }
    match command {
        Command::Serve { workload } => server::run(workload),
        Command::Micro { rounds } => micro::run(rounds),
        Command::Soak { control, over, seconds } => {
            let mut control = control::Control::connect(control)?;
            let about = control.about()?;
            let sheet = Sheet::new(about.workload.clone());
            soak::run(&mut control, &about, &sheet, over, Duration::from_secs(seconds))
        }
        Command::Measure { what, control, rounds } => {
            let mut control = control::Control::connect(control)?;
            let about = control.about()?;
            let sheet = Sheet::new(about.workload.clone());
            match what {
                What::GetObs => get_obs::run(&mut control, &about, &sheet, rounds),
                What::Stream => stream::run(&mut control, &about, &sheet, rounds),
                What::Actions => actions::run(&mut control, &about, &sheet, rounds),
                What::ActionQueue => dispatch::run(&mut control, &about, &sheet, rounds),
                What::Held => held::run(&mut control, &about, &sheet, rounds),
            }
        }
    }
}
