//! The measured processes: a server of one workload, and clients that measure against it, each on its core.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::Cores;
use crate::child::Running;

/// How long a server may take to say where it is.
const START: Duration = Duration::from_secs(20);

/// No part takes nearly so long; what does has gone wrong.
const LIMIT: Duration = Duration::from_secs(400);

/// What a client printed: a value a round.
#[derive(Deserialize)]
pub(super) struct Measured {
    pub(super) row: String,
    pub(super) workload: String,
    pub(super) path: String,
    pub(super) metric: String,
    pub(super) rounds: Vec<f64>,
}

/// Starts them.
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

    /// A server of this workload on the first core.
    pub(super) fn serve(&mut self, workload: &str) -> Result<Server> {
        #[derive(Deserialize)]
        struct Ready {
            control: String,
        }
        let mut command = Command::new(&self.program);
        command.args(["--cpu", "0", "serve", workload]);
        let answer = self.logs.join("server.json");
        let mut running =
            Running::start("server", &mut command, &self.logs.join("server.log"), Some(&answer))?;
        let deadline = Instant::now() + START;
        loop {
            let said = fs::read_to_string(&answer).context("reading what the server said")?;
            if said.ends_with('\n') {
                let Ready { control } = serde_json::from_str(&said).context("reading where the server is")?;
                return Ok(Server { running, workload: workload.to_owned(), control });
            }
            running.still_runs().with_context(|| running.tail())?;
            if Instant::now() > deadline {
                bail!("the server did not say where it is\n{}", running.tail());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Has a client measure, on the server's core or on the next.
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
        self.run(&mut command, &format!("{what} of {} on {} core(s)", server.workload, cores.count()), LIMIT)
            .with_context(|| server.running.tail())
    }

    /// Has a client stream over this path for so long.
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
        self.run(&mut command, &title, LIMIT + length).with_context(|| server.running.tail())
    }

    /// What needs no server.
    pub(super) fn micro(&mut self, rounds: usize) -> Result<Vec<Measured>> {
        let mut command = Command::new(&self.program);
        command.args(["--cpu", "1", "micro", "--rounds", &rounds.to_string()]);
        self.run(&mut command, "memcpy, snapshot, encode, decode", LIMIT)
    }

    fn run(&mut self, command: &mut Command, title: &str, limit: Duration) -> Result<Vec<Measured>> {
        let began = Instant::now();
        let answer = self.logs.join("client.json");
        let mut running = Running::start("client", command, &self.logs.join("client.log"), Some(&answer))?;
        let status = running.wait_until(began + limit).with_context(|| running.tail())?;
        if !status.success() {
            bail!("measuring {title}: {status}\n{}", running.tail());
        }
        println!("{title}: {:.1} s", began.elapsed().as_secs_f64());
        let said = fs::read_to_string(&answer).context("reading what the client measured")?;
        said.lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("reading {line:?}")))
            .collect()
    }
}
