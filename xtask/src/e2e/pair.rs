//! A robot process and a client process, and sometimes a router between them, from start to exit.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::child::Running;

/// How long a client that starts first runs without its robot, to see that it waits.
const ROBOT_DELAY: Duration = Duration::from_millis(500);

const ROBOT_LOG: &str = "robot.log";

/// Fails unless the robot's log in this directory contains the text.
pub(super) fn check_robot_log(logs: &Path, text: &str) -> Result<()> {
    let path = logs.join(ROBOT_LOG);
    let log = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    if !log.contains(text) {
        bail!("expected {text:?} in the robot's log, found:\n{log}");
    }
    Ok(())
}

/// The processes to start.
pub(super) struct Pair {
    /// Routes between the two; started before them.
    pub(super) router: Option<Command>,
    pub(super) robot: Command,
    pub(super) client: Command,
    /// Where the router listens, or else the robot.
    pub(super) address: SocketAddr,
    pub(super) client_first: bool,
    /// The directory for all logs.
    pub(super) logs: PathBuf,
    /// For the whole run.
    pub(super) timeout: Duration,
}

/// The running processes, kept for the ends of their logs in error messages.
#[derive(Default)]
struct Processes {
    router: Option<Running>,
    robot: Option<Running>,
    client: Option<Running>,
}

impl Pair {
    /// Runs until the client exits with success, then interrupts the robot, which must exit cleanly. Returns
    /// the result and, in any case, the client's stdout.
    ///
    /// # Errors
    ///
    /// The first failure, with the ends of all logs.
    pub(super) fn play(mut self) -> (Result<()>, String) {
        let mut processes = Processes::default();
        let played = self.play_with(&mut processes).map_err(|error| {
            let logs = [&processes.router, &processes.robot, &processes.client].into_iter().flatten();
            let tails: String = logs.map(Running::tail).collect();
            anyhow!("{error:#}\n{tails}")
        });
        drop(processes);
        let stdout = fs::read_to_string(self.stdout_path()).unwrap_or_default();
        (played, stdout)
    }

    fn play_with(&mut self, processes: &mut Processes) -> Result<()> {
        let deadline = Instant::now() + self.timeout;
        let Processes { router, robot, client } = processes;
        fs::create_dir_all(&self.logs).with_context(|| format!("creating {}", self.logs.display()))?;
        // Do not take the output of an earlier run for one of this run.
        fs::write(self.stdout_path(), "").context("emptying the client's output")?;

        if let Some(command) = &mut self.router {
            let router =
                router.insert(Running::start("router", command, &self.logs.join("router.log"), None)?);
            router.wait_until_it_listens(self.address, deadline)?;
        }
        let (robot, client) = if self.client_first {
            let client = client.insert(self.start_client()?);
            // Not a wait for an event: the robot is missing for this long.
            std::thread::sleep(ROBOT_DELAY);
            client.check_running().context("started before its robot")?;
            (robot.insert(self.start_robot()?), client)
        } else {
            let robot = robot.insert(self.start_robot()?);
            robot.wait_until_it_listens(self.address, deadline)?;
            (robot, client.insert(self.start_client()?))
        };

        let status = client.wait_until(deadline)?;
        if !status.success() {
            bail!("the client failed: {status}");
        }
        robot.interrupt()
    }

    fn start_robot(&mut self) -> Result<Running> {
        Running::start("robot", &mut self.robot, &self.logs.join(ROBOT_LOG), None)
    }

    fn start_client(&mut self) -> Result<Running> {
        let stdout = self.stdout_path();
        Running::start("client", &mut self.client, &self.logs.join("client.log"), Some(&stdout))
    }

    fn stdout_path(&self) -> PathBuf {
        self.logs.join("client.out")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::child::free_address;

    const ROBOT: &str = "trap 'exit 0' INT; echo serving; while :; do sleep 0.02; done";

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    /// Runs two scripts. The error must contain these texts, or there must be none if there are no texts; the
    /// stdout is what the client printed, in any case.
    fn check(name: &str, robot: &str, client: &str, stdout: &str, expected: &[&str]) {
        let logs = std::env::temp_dir().join(format!("xtask-pair-{}-{name}", std::process::id()));
        let pair = Pair {
            router: None,
            robot: shell(robot),
            client: shell(client),
            address: free_address().unwrap(),
            // The scripts do not listen.
            client_first: true,
            logs: logs.clone(),
            timeout: Duration::from_secs(3),
        };
        let (result, found) = pair.play();
        fs::remove_dir_all(logs).unwrap();
        assert_eq!(found, stdout, "{name}");
        let error = result.map_or_else(|error| format!("{error:#}"), |()| String::new());
        assert_eq!(error.is_empty(), expected.is_empty(), "{name}: {error}");
        for text in expected {
            assert!(error.contains(text), "{name}: expected {text:?} in {error}");
        }
    }

    #[test]
    fn an_error_includes_both_logs() {
        let untidy = "trap 'exit 5' INT; while :; do sleep 0.02; done";
        let cases: [(&str, &str, &str, &str, &[&str]); 6] = [
            ("good", ROBOT, "sleep 0.7; echo '{}'", "{}\n", &[]),
            (
                "eager",
                ROBOT,
                "exit 1",
                "",
                &["started before its robot", "the client exited too early", "(no output)"],
            ),
            (
                "failing",
                ROBOT,
                "sleep 0.7; echo 1; echo lost >&2; exit 3",
                "1\n",
                &["the client failed: exit status: 3", "serving", "lost"],
            ),
            ("hanging", ROBOT, "exec sleep 60", "", &["the client was still running at its deadline"]),
            ("dead robot", "exit 7", "sleep 0.7", "", &["the robot exited too early: exit status: 7"]),
            (
                "untidy robot",
                untidy,
                "sleep 0.7",
                "",
                &["did not exit cleanly after an interrupt: exit status: 5"],
            ),
        ];
        std::thread::scope(|scope| {
            for (name, robot, client, stdout, expected) in cases {
                scope.spawn(move || check(name, robot, client, stdout, expected));
            }
        });
    }
}
