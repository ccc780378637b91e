//! `chiral-bench`: the processes that `cargo xtask bench` starts and measures. A server process serves one
//! workload over every path that is compared; a client process measures requests to it and prints the
//! figures, one JSON object per line. `xtask` computes ratios, compares them with targets and prints the
//! tables.

mod actions;
mod control;
mod dispatch;
mod get_obs;
mod held;
mod holds;
mod micro;
mod naive;
mod put;
mod query;
mod raw;
mod report;
mod server;
mod server_info;
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

use crate::report::Report;
use crate::workload::Workload;

/// The measured processes of `cargo xtask bench`.
#[derive(Parser)]
struct Arguments {
    /// Run on this core only
    #[arg(long, global = true, value_name = "N")]
    cpu: Option<usize>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve a workload; prints the control address
    Serve { workload: Workload },
    /// Measure against the server with this control address
    Measure {
        what: What,
        control: SocketAddr,
        /// Number of rounds
        #[arg(long, default_value_t = 5)]
        rounds: usize,
    },
    /// Stream for a long time, and measure whether memory grows
    Soak {
        control: SocketAddr,
        #[arg(long)]
        over: server_info::Path,
        #[arg(long)]
        seconds: u64,
    },
    /// Interrupt policies while a robot moves, and measure when it holds
    Holds {
        /// How often to stop a policy's process
        #[arg(long, default_value_t = 200)]
        stops: u32,
        /// How often to make a policy hang
        #[arg(long, default_value_t = 200)]
        hangs: u32,
    },
    /// The policy that `holds` interrupts
    HangingPolicy {
        uri: String,
        /// Speak the legacy wire
        #[arg(long)]
        legacy: bool,
    },
    /// Measure what runs within one process
    Micro {
        /// Number of rounds
        #[arg(long, default_value_t = 5)]
        rounds: usize,
    },
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum What {
    GetObs,
    Stream,
    Actions,
    Dispatch,
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
        // Before any thread is started: threads inherit it.
        let mut set = CpuSet::new();
        set.set(cpu);
        sched_setaffinity(None, &set).with_context(|| format!("pinning to core {cpu}"))?;
    }
    match command {
        Command::Serve { workload } => server::run(workload),
        Command::Micro { rounds } => micro::run(rounds),
        Command::Holds { stops, hangs } => holds::run(stops, hangs),
        Command::HangingPolicy { uri, legacy } => holds::policy(&uri, legacy),
        Command::Soak { control, over, seconds } => {
            let mut control = control::Control::connect(control)?;
            let info = control.info()?;
            let report = Report::new(info.workload.clone());
            soak::run(&mut control, &info, &report, over, Duration::from_secs(seconds))
        }
        Command::Measure { what, control, rounds } => {
            let mut control = control::Control::connect(control)?;
            let info = control.info()?;
            let report = Report::new(info.workload.clone());
            match what {
                What::GetObs => get_obs::run(&mut control, &info, &report, rounds),
                What::Stream => stream::run(&mut control, &info, &report, rounds),
                What::Actions => actions::run(&mut control, &info, &report, rounds),
                What::Dispatch => dispatch::run(&mut control, &info, &report, rounds),
                What::Held => held::run(&mut control, &info, &report, rounds),
            }
        }
    }
}
