//! `cargo xtask`: the one door to everything that is done with this repository. One file per command; what
//! they share is in `command` (programs run to their end) and `child` (programs that run beside us).

mod bench;
mod child;
mod codegen;
mod command;
mod demo;
mod dependencies;
mod e2e;
mod python;
mod size;
mod table;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The one door: see it run, test it, generate what is generated.
///
/// A newcomer types `cargo xtask demo`; before a commit everyone types `cargo xtask test`, which is exactly
/// what CI runs.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Arguments),
    E2e(e2e::Arguments),
    Test(test::Arguments),
    Codegen(codegen::Arguments),
    Size(size::Arguments),
    Bench(bench::Arguments),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Demo(arguments) => demo::run(&arguments),
        Command::E2e(arguments) => e2e::run(&arguments),
        Command::Test(arguments) => test::run(&arguments),
        Command::Codegen(arguments) => codegen::run(&arguments),
        Command::Size(arguments) => size::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
    };
    // The chain of causes is what a person needs; a backtrace would bury it.
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
