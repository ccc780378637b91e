//! A robot and its client, two processes, from their start to their end.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::child::Running;

/// How long a client that is started first is left alone, to see that it waits.
const ALONE: Duration = Duration::from_millis(500);

const ROBOTS_LOG: &str = "robot.log";

/// Whether the robot whose log is in this directory said so.
pub(super) fn check_robots_log(logs: &Path, words: &str) -> Result<()> {
    let path = logs.join(ROBOTS_LOG);
    let log = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    if !log.contains(words) {
        bail!("expected {words:?} in the robot's log, found:\n{log}");
    }
    Ok(())
}

/// What is started, and how.
pub(super) struct Pair {
    /// Between the two, if there is one; it is there before them.
    pub(super) router: Option<Command>,
    pub(super) robot: Command,
    pub(super) client: Command,
    /// Where the robot will listen, or the router does.
    pub(super) address: SocketAddr,
    pub(super) client_first: bool,
    /// The directory that all write their logs to.
    pub(super) logs: PathBuf,
    /// For all of it.
    pub(super) limit: Duration,
}

/// The processes that run, for their logs where something goes wrong.
#[derive(Default)]
struct Processes {
    router: Option<Running>,
    robot: Option<Running>,
    client: Option<Running>,
}

impl Pair {
    /// Plays until the client ends: it must succeed, and the robot must then leave when asked to. Returns
    /// what the client printed on stdout.
    ///
    /// # Errors
    ///
    /// Whatever went wrong, with the ends of all logs; what the client had printed until then comes with it
    /// in any case.
    pub(super) fn play(mut self) -> (Result<()>, String) {
        let mut processes = Processes::default();
        let played = self.play_with(&mut processes).map_err(|error| {
            let logs = [&processes.router, &processes.robot, &processes.client].into_iter().flatten();
            let tails: String = logs.map(Running::tail).collect();
            anyhow!("{error:#}\n{tails}")
        });
        drop(processes);
        let answer = fs::read_to_string(self.answer()).unwrap_or_default();
        (played, answer)
    }

    fn play_with(&mut self, processes: &mut Processes) -> Result<()> {
        let deadline = Instant::now() + self.limit;
        let Processes { router, robot, client } = processes;
        fs::create_dir_all(&self.logs).with_context(|| format!("creating {}", self.logs.display()))?;
        // The answer of an earlier run must not be taken for one of this.
        fs::write(self.answer(), "").context("emptying the client's answer")?;

        if let Some(command) = &mut self.router {
            let router =
                router.insert(Running::start("router", command, &self.logs.join("router.log"), None)?);
            router.wait_until_it_listens(self.address, deadline)?;
        }
        let (robot, client) = if self.client_first {
            let client = client.insert(self.start_client()?);
            // Not a wait for something: this is how long its robot is missing.
            std::thread::sleep(ALONE);
            client.still_runs().context("started before its robot")?;
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
        Running::start("robot", &mut self.robot, &self.logs.join(ROBOTS_LOG), None)
    }

    fn start_client(&mut self) -> Result<Running> {
        let answer = self.answer();
        Running::start("client", &mut self.client, &self.logs.join("client.log"), Some(&answer))
    }

    fn answer(&self) -> PathBuf {
        self.logs.join("answer.txt")
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

    /// Plays two scripts; what goes wrong must be told with these words, and the answer is what the client
    /// printed in any case.
    fn check(name: &str, robot: &str, client: &str, answer: &str, complaints: &[&str]) {
        let logs = std::env::temp_dir().join(format!("xtask-pair-{}-{name}", std::process::id()));
        let pair = Pair {
            router: None,
            robot: shell(robot),
            client: shell(client),
            address: free_address().unwrap(),
            // The scripts do not listen.
            client_first: true,
            logs: logs.clone(),
            limit: Duration::from_secs(3),
        };
        let (result, found) = pair.play();
        fs::remove_dir_all(logs).unwrap();
        assert_eq!(found, answer, "{name}");
        let said = result.map_or_else(|error| format!("{error:#}"), |()| String::new());
        assert_eq!(said.is_empty(), complaints.is_empty(), "{name}: {said}");
        for complaint in complaints {
            assert!(said.contains(complaint), "{name}: expected {complaint:?} in {said}");
        }
    }

    #[test]
    fn what_goes_wrong_is_told_with_both_logs() {
        let untidy = "trap 'exit 5' INT; while :; do sleep 0.02; done";
        let cases: [(&str, &str, &str, &str, &[&str]); 6] = [
            ("good", ROBOT, "sleep 0.7; echo '{}'", "{}\n", &[]),
            (
                "eager",
                ROBOT,
                "exit 1",
                "",
                &["started before its robot", "the client ended too early", "(said nothing)"],
            ),
            (
                "failing",
                ROBOT,
                "sleep 0.7; echo 1; echo lost >&2; exit 3",
                "1\n",
                &["the client failed: exit status: 3", "serving", "lost"],
            ),
            ("hanging", ROBOT, "exec sleep 60", "", &["the client was still running at its time limit"]),
            ("dead robot", "exit 7", "sleep 0.7", "", &["the robot ended too early: exit status: 7"]),
            ("untidy robot", untidy, "sleep 0.7", "", &["did not end cleanly: exit status: 5"]),
        ];
        std::thread::scope(|scope| {
            for (name, robot, client, answer, complaints) in cases {
                scope.spawn(move || check(name, robot, client, answer, complaints));
            }
        });
    }
}
