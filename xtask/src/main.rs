//! `cargo xtask`: every task of this repository. One file or folder per command; shared code is in `command`
//! (programs that run to completion), `child` (programs that run in the background) and `table`.

mod bench;
mod child;
mod codegen;
mod command;
mod demo;
mod dependencies;
mod e2e;
mod python;
mod size;
mod soak;
mod table;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The tasks of this repository: demo, tests, measurements, generated code.
///
/// Start with `cargo xtask demo`. Before a commit run `cargo xtask test`, which is exactly what CI runs.
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
    Soak(soak::Arguments),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Demo(arguments) => demo::run(&arguments),
        Command::E2e(arguments) => e2e::run(&arguments),
        Command::Test(arguments) => test::run(&arguments),
        Command::Codegen(arguments) => codegen::run(&arguments),
        Command::Size(arguments) => size::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Soak(arguments) => soak::run(&arguments),
    };
    // Print the chain of causes without a backtrace, which would bury it.
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
