//! The measured processes: a server of one workload and a client that measures it, each pinned to a core.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::Cores;
use crate::child::Running;

/// How long a server may take to print its address.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// Much longer than any measurement takes.
const MEASURE_TIMEOUT: Duration = Duration::from_secs(400);

/// A metric that a client printed, with one value per round.
#[derive(Deserialize)]
pub(super) struct Measured {
    pub(super) row: String,
    pub(super) workload: String,
    pub(super) path: String,
    pub(super) metric: String,
    pub(super) rounds: Vec<f64>,
}

/// Starts the processes.
pub(super) struct Peers {
    program: PathBuf,
    logs: PathBuf,
}

/// A server that is killed when it is dropped.
pub(super) struct Server {
    running: Running,
    workload: String,
    control: String,
}

impl Peers {
    pub(super) fn new(program: PathBuf, logs: PathBuf) -> Peers {
        Peers { program, logs }
    }

    /// Starts a server of this workload on the first core.
    pub(super) fn serve(&mut self, workload: &str) -> Result<Server> {
        #[derive(Deserialize)]
        struct Ready {
            control: String,
        }
        let mut command = Command::new(&self.program);
        command.args(["--cpu", "0", "serve", workload]);
        let stdout = self.logs.join("server.json");
        let mut running =
            Running::start("server", &mut command, &self.logs.join("server.log"), Some(&stdout))?;
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            let output = fs::read_to_string(&stdout).context("reading the output of the server")?;
            if output.ends_with('\n') {
                let Ready { control } =
                    serde_json::from_str(&output).context("reading the address of the server")?;
                return Ok(Server { running, workload: workload.to_owned(), control });
            }
            running.check_running().with_context(|| running.tail())?;
            if Instant::now() > deadline {
                bail!("the server did not print its address in time\n{}", running.tail());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Runs a client that measures, on the server's core or on the next.
    pub(super) fn measure(
        &mut self,
        server: &mut Server,
        what: &str,
        cores: Cores,
        rounds: usize,
    ) -> Result<Vec<Measured>> {
        let cpu = if cores == Cores::One { "0" } else { "1" };
        let mut command = Command::new(&self.program);
        command.args(["--cpu", cpu, "measure", what, &server.control, "--rounds", &rounds.to_string()]);
        self.run(
            &mut command,
            &format!("{what} of {} on {} core(s)", server.workload, cores.count()),
            MEASURE_TIMEOUT,
        )
        .with_context(|| server.running.tail())
    }

    /// Runs a client that streams over this path for this long.
    pub(super) fn soak(
        &mut self,
        server: &mut Server,
        path: &str,
        length: Duration,
    ) -> Result<Vec<Measured>> {
        let mut command = Command::new(&self.program);
        command.args([
            "--cpu",
            "1",
            "soak",
            &server.control,
            "--over",
            path,
            "--seconds",
            &length.as_secs().to_string(),
        ]);
        let title = format!("{} s of {} over {path}", length.as_secs(), server.workload);
        self.run(&mut command, &title, MEASURE_TIMEOUT + length).with_context(|| server.running.tail())
    }

    /// Runs the measurements that need no server.
    pub(super) fn micro(&mut self, rounds: usize) -> Result<Vec<Measured>> {
        let mut command = Command::new(&self.program);
        command.args(["--cpu", "1", "micro", "--rounds", &rounds.to_string()]);
        self.run(&mut command, "memcpy, snapshot, encode, decode", MEASURE_TIMEOUT)
    }

    fn run(&mut self, command: &mut Command, title: &str, timeout: Duration) -> Result<Vec<Measured>> {
        let start = Instant::now();
        let stdout = self.logs.join("client.json");
        let mut running = Running::start("client", command, &self.logs.join("client.log"), Some(&stdout))?;
        let status = running.wait_until(start + timeout).with_context(|| running.tail())?;
        if !status.success() {
            bail!("measuring {title}: {status}\n{}", running.tail());
        }
        println!("{title}: {:.1} s", start.elapsed().as_secs_f64());
        let output = fs::read_to_string(&stdout).context("reading the output of the client")?;
        output
            .lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("reading {line:?}")))
            .collect()
    }
}
