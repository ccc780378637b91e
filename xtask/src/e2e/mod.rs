//! Robot and policy as separate processes, over real sockets: every transport, codec, robot, client and mode,
//! as rows of data here.

mod pair;
mod report;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::child;
use crate::command::{self, Profile};
use crate::python;
use crate::table::table;
use pair::Pair;
use report::{Asked, Report};

/// Run robot and policy as separate processes, in every combination, and tabulate how they did.
///
/// In half of the rows the policy is started first and waits for its robot. A failed episode fails the run
/// and shows all logs, which are kept under target/e2e.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Episodes a row, with the same seeds in every row.
    #[arg(long, default_value_t = 10, value_name = "N")]
    episodes: u32,
    /// Only rows whose name contains this, such as msgpack or zenoh-tcp-protobuf-rust-async-step; of the
    /// guide, too.
    #[arg(long, default_value = "", value_name = "WORDS")]
    only: String,
    /// Write the figures as {"rows": [...]}, also when a row failed.
    #[arg(long, value_name = "PATH")]
    json: Option<PathBuf>,
    /// Build for release, as is right for figures to be shown.
    #[arg(long)]
    release: bool,
}

/// A way for two peers to meet.
struct Link {
    transport: &'static str,
    /// What the policy calls it, which does not see all of the way.
    reported: &'static str,
    /// Whether a router of Zenoh's listens at the address, and the robot joins it there.
    is_routed: bool,
    /// What the robot's log must say.
    logged: Option<&'static str>,
    /// What `chiral-sim serve` is told.
    serve: fn(SocketAddr) -> Vec<String>,
    /// What the client is told.
    uri: fn(SocketAddr) -> String,
}

/// A program that is a robot.
struct Robot {
    name: &'static str,
    /// How long each reset takes, in seconds; one episode is enough where that is long.
    homing: u32,
    command: fn(&Programs, &Link, SocketAddr) -> Command,
}

/// A program that drives the robot, and prints a [`Report`].
struct Client {
    name: &'static str,
    /// Given the robot's address. Episodes and seed are said to all of them in the same words.
    command: fn(&Programs, &str, &Asked) -> Command,
}

/// Rows that belong together: each client in each mode over each link.
struct Rows {
    codec: &'static str,
    links: &'static [&'static Link],
    robot: &'static Robot,
    clients: &'static [&'static Client],
    modes: &'static [&'static str],
}

/// Where programs lie.
struct Programs {
    /// The directory of those that were built.
    built: PathBuf,
    /// Python with all that its peers need.
    python: PathBuf,
}

const ROWS: &[Rows] = &[
    Rows {
        codec: "protobuf",
        links: &[&WEBSOCKET, &ZENOH_TCP, &ZENOH_SHM, &ZENOH_ROUTER],
        robot: &RUST,
        clients: &[&ASYNC, &BLOCKING],
        modes: &["stream", "step"],
    },
    Rows {
        codec: "msgpack",
        links: &[&WEBSOCKET, &ZENOH_TCP],
        robot: &RUST,
        clients: &[&PYTHON],
        modes: &["stream", "step"],
    },
    // Neither end nor router gives up a reset because it takes long.
    Rows {
        codec: "protobuf",
        links: &[&ZENOH_ROUTER],
        robot: &RUST_HOMING_FOR_LONG,
        clients: &[&BLOCKING],
        modes: &["step"],
    },
    // Pings must be answered while the robot homes.
    Rows {
        codec: "msgpack",
        links: &[&WEBSOCKET],
        robot: &RUST_HOMING_FOR_LONGER,
        clients: &[&PYTHON],
        modes: &["step"],
    },
    // There, steps are emulated.
    Rows {
        codec: "msgpack",
        links: &[&WEBSOCKET, &ZENOH_TCP],
        robot: &PYTHON_STREAMING,
        clients: &[&ASYNC, &BLOCKING],
        modes: &["stream", "step"],
    },
    // There, nothing can be streamed.
    Rows {
        codec: "msgpack",
        links: &[&WEBSOCKET, &ZENOH_TCP],
        robot: &PYTHON_GYM,
        clients: &[&ASYNC, &BLOCKING],
        modes: &["step"],
    },
];

const WEBSOCKET: Link = Link {
    transport: "websocket",
    reported: "websocket",
    is_routed: false,
    logged: None,
    serve: |address| vec!["--bind".to_owned(), address.to_string()],
    uri: |address| format!("ws://{address}"),
};

const ZENOH_TCP: Link = Link {
    transport: "zenoh-tcp",
    reported: "zenoh-tcp",
    is_routed: false,
    logged: None,
    serve: |address| {
        vec![
            "--zenoh".to_owned(),
            format!("tcp/{address}"),
            "--no-discovery".to_owned(),
            "--no-shared-memory".to_owned(),
        ]
    },
    uri: |address| format!("tcp/{address}"),
};

const ZENOH_SHM: Link = Link {
    transport: "zenoh-shm",
    reported: "zenoh-tcp",
    is_routed: false,
    logged: Some("travel by shared memory"),
    serve: |address| vec!["--zenoh".to_owned(), format!("tcp/{address}"), "--no-discovery".to_owned()],
    uri: |address| format!("tcp/{address}"),
};

const ZENOH_ROUTER: Link = Link {
    transport: "zenoh-router",
    reported: "zenoh-tcp",
    is_routed: true,
    logged: None,
    serve: |address| vec!["--zenoh-join".to_owned(), format!("tcp/{address}")],
    uri: |address| format!("tcp/{address}"),
};

const RUST: Robot = Robot {
    name: "rust",
    homing: 0,
    command: |programs, link, address| robot(programs, (link.serve)(address)),
};
const RUST_HOMING_FOR_LONG: Robot = Robot {
    name: "rust-homing",
    homing: LONG,
    command: |programs, link, address| homing_robot(programs, (link.serve)(address), LONG),
};
const RUST_HOMING_FOR_LONGER: Robot = Robot {
    name: "rust-homing",
    homing: LONGER,
    command: |programs, link, address| homing_robot(programs, (link.serve)(address), LONGER),
};
const PYTHON_STREAMING: Robot = Robot {
    name: "python-streaming",
    homing: 0,
    command: |programs, link, address| robot_in_python(programs, &(link.uri)(address), "streaming"),
};
const PYTHON_GYM: Robot = Robot {
    name: "python-gym",
    homing: 0,
    command: |programs, link, address| robot_in_python(programs, &(link.uri)(address), "gym"),
};

const ASYNC: Client = Client { name: "async", command: policy_in_rust };
const BLOCKING: Client = Client { name: "blocking", command: policy_in_rust };
const PYTHON: Client = Client { name: "python", command: policy_in_python };

/// More than Zenoh gives a query, 10 s.
const LONG: u32 = 15;
/// More than two of the pings that a legacy client sends during a reset, one every 20 s.
const LONGER: u32 = 45;

/// The guide's complete programs; each takes the server's URI and ends by itself.
const GUIDES: &[&str] = &["guide_streaming", "guide_episode"];

/// What the guide's programs may take.
const GUIDE_LIMIT: Duration = Duration::from_secs(20);

/// The seed of every row's first episode.
const SEED: u32 = 1;

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let profile = match arguments.release {
        true => Profile::Release,
        false => Profile::Dev,
    };
    let outcome = play_all(profile, arguments.episodes, &arguments.only)?;
    if let Some(path) = &arguments.json {
        let rows: Vec<_> = outcome.rows.iter().filter_map(Played::figures).collect();
        let text = serde_json::to_string_pretty(&serde_json::json!({ "rows": rows }))?;
        std::fs::write(path, text + "\n").with_context(|| format!("writing {}", path.display()))?;
    }
    outcome.conclude()
}

/// Plays every row and every program of the guide, and fails, when all are played, if one failed.
pub(crate) fn check(profile: Profile, episodes: u32) -> Result<()> {
    play_all(profile, episodes, "")?.conclude()
}

/// All that was played.
struct Outcome {
    rows: Vec<Played>,
    guides: Vec<(&'static str, Result<Duration>)>,
}

/// A row that was played, whether it went well or not.
struct Played {
    asked: Asked,
    client_first: bool,
    /// Absent where the policy did not get as far as to print one.
    report: Option<Report>,
    result: Result<()>,
}

fn play_all(profile: Profile, episodes: u32, only: &str) -> Result<Outcome> {
    let programs = Programs { built: command::build(profile)?, python: python::interpreter()? };
    let logs = command::target()?.join("e2e");

    let mut rows = Vec::new();
    for these in ROWS {
        for (i, link) in these.links.iter().enumerate() {
            for (j, mode) in these.modes.iter().enumerate() {
                for (k, client) in these.clients.iter().enumerate() {
                    let asked = Asked {
                        robot: these.robot.name,
                        client: client.name,
                        mode,
                        transport: link.transport,
                        reported: link.reported,
                        codec: these.codec,
                        episodes: if these.robot.homing > 0 { 1 } else { episodes },
                    };
                    if !asked.name().contains(only) {
                        continue;
                    }
                    // Every other row, and the other ones over the next link and in the next mode, so that
                    // each client is first somewhere.
                    let client_first = (i + j + k) % 2 == 1;
                    let row = play_row(&programs, &logs, link, these.robot, client, asked, client_first)?;
                    say(&row.asked.name(), &row.result);
                    rows.push(row);
                }
            }
        }
    }
    let mut guides = Vec::new();
    for name in GUIDES.iter().filter(|name| name.contains(only)) {
        let result = play_guide(&programs, &logs, name);
        say(name, &result);
        guides.push((*name, result));
    }
    if rows.is_empty() && guides.is_empty() {
        bail!("no row's name contains {only:?}");
    }
    Ok(Outcome { rows, guides })
}

fn say<T>(name: &str, result: &Result<T>) {
    match result {
        Ok(_) => println!("{name}: ok"),
        Err(error) => println!("{name}: FAILED: {error:#}"),
    }
}

/// Fails only where nothing could be played; what went wrong in playing is the row's result.
fn play_row(
    programs: &Programs,
    logs: &Path,
    link: &Link,
    robot: &Robot,
    client: &Client,
    asked: Asked,
    client_first: bool,
) -> Result<Played> {
    let address = child::free_address()?;
    let mut policy = (client.command)(programs, &(link.uri)(address), &asked);
    policy.args([
        "--episodes",
        &asked.episodes.to_string(),
        "--seed",
        &SEED.to_string(),
        "--json",
        "--quiet",
    ]);
    let logs = logs.join(asked.name());
    let pair = Pair {
        router: link.is_routed.then(|| router(programs, address)),
        robot: (robot.command)(programs, link, address),
        client: policy,
        address,
        client_first,
        logs: logs.clone(),
        limit: Duration::from_secs(30) + (10 + robot.homing) * Duration::from_secs(asked.episodes.into()),
    };
    let (result, answer) = pair.play();
    let report = Report::read(&answer);
    // A policy that fails tells most itself; its report, if there is one, goes into the table all the same.
    let result = result.and_then(|()| report.as_ref().map_err(|error| anyhow!("{error:#}"))?.check(&asked));
    let result =
        result.and_then(|()| link.logged.map_or(Ok(()), |words| pair::check_robots_log(&logs, words)));
    Ok(Played { asked, client_first, report: report.ok(), result })
}

fn play_guide(programs: &Programs, logs: &Path, name: &str) -> Result<Duration> {
    let address = child::free_address()?;
    let mut client = Command::new(programs.built.join("examples").join(name));
    client.arg(format!("ws://{address}"));
    let start = Instant::now();
    let pair = Pair {
        router: None,
        robot: robot(programs, vec!["--bind".to_owned(), address.to_string()]),
        client,
        address,
        client_first: false,
        logs: logs.join(name),
        limit: GUIDE_LIMIT,
    };
    pair.play().0?;
    Ok(start.elapsed())
}

fn robot(programs: &Programs, link: Vec<String>) -> Command {
    let mut command = Command::new(programs.built.join("chiral-sim"));
    // Which way observations take is told at this level.
    command
        .arg("serve")
        .args(link)
        .args(["--width", "160", "--height", "120"])
        .env("RUST_LOG", "info,zenoh=error");
    command
}

fn homing_robot(programs: &Programs, link: Vec<String>, seconds: u32) -> Command {
    robot(programs, [link, vec![format!("--homing={seconds}")]].concat())
}

fn router(programs: &Programs, address: SocketAddr) -> Command {
    let mut command = Command::new(programs.built.join("chiral-sim"));
    command.args(["router", "--listen", &format!("tcp/{address}")]);
    command
}

fn policy_in_rust(programs: &Programs, uri: &str, asked: &Asked) -> Command {
    let mut command = Command::new(programs.built.join("chiral-sim"));
    command.arg("policy").arg(uri).args(["--mode", asked.mode, "--client", asked.client]);
    command
}

fn policy_in_python(programs: &Programs, uri: &str, asked: &Asked) -> Command {
    let generation = if asked.mode == "stream" { "streaming" } else { "gym" };
    peer_in_python(programs, "client.py", uri, generation)
}

fn robot_in_python(programs: &Programs, uri: &str, generation: &str) -> Command {
    let mut command = peer_in_python(programs, "server.py", uri, generation);
    command.args(["--seed", &SEED.to_string()]);
    command
}

fn peer_in_python(programs: &Programs, script: &str, uri: &str, generation: &str) -> Command {
    let mut command = Command::new(&programs.python);
    command.arg(command::root().join("tests/peers").join(script)).args([uri, "--generation", generation]);
    command
}

impl Outcome {
    /// Prints the table, and fails if anything that was played failed.
    fn conclude(&self) -> Result<()> {
        let heading = "transport codec robot client mode first episodes successes obs_hz age_p50_ms age_p99_ms step_p50_ms step_p99_ms s/episode result";
        let mut cells = vec![heading.split(' ').map(str::to_owned).collect()];
        cells.extend(self.rows.iter().map(Played::cells));
        if !self.rows.is_empty() {
            println!("\n{}", table(&cells));
        }

        let mut cells = vec![["guide", "seconds", "result"].map(str::to_owned).to_vec()];
        cells.extend(self.guides.iter().map(|(name, result)| {
            let seconds = figure(result.as_ref().ok().map(Duration::as_secs_f64));
            vec![name.to_string(), seconds, word(result)]
        }));
        if !self.guides.is_empty() {
            println!("{}", table(&cells));
        }

        let rows = self.rows.iter().filter(|row| row.result.is_err()).count();
        let guides = self.guides.iter().filter(|(_, result)| result.is_err()).count();
        if rows + guides > 0 {
            bail!(
                "{rows} of {} rows and {guides} of {} guides failed: see above",
                self.rows.len(),
                self.guides.len()
            );
        }
        Ok(())
    }
}

impl Played {
    /// What the policy reported, and of which robot.
    fn figures(&self) -> Option<serde_json::Value> {
        let mut figures = serde_json::to_value(self.report.as_ref()?).ok()?;
        figures["robot"] = self.asked.robot.into();
        Some(figures)
    }

    fn cells(&self) -> Vec<String> {
        let asked = &self.asked;
        let first = if self.client_first { "client" } else { "robot" };
        let report = self.report.as_ref();
        let mut cells = [asked.transport, asked.codec, asked.robot, asked.client, asked.mode, first]
            .map(str::to_owned)
            .to_vec();
        cells.push(asked.episodes.to_string());
        cells.push(report.map_or("-".to_owned(), |report| report.successes.to_string()));
        let figures = [
            report.and_then(|report| report.obs_hz),
            report.and_then(|report| report.obs_age_ms_p50),
            report.and_then(|report| report.obs_age_ms_p99),
            report.and_then(|report| report.step_ms_p50),
            report.and_then(|report| report.step_ms_p99),
            report.map(|report| report.seconds / f64::from(report.episodes)),
        ];
        cells.extend(figures.map(figure));
        cells.push(word(&self.result));
        cells
    }
}

fn figure(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.2}"))
}

fn word<T>(result: &Result<T>) -> String {
    if result.is_ok() { "ok" } else { "FAILED" }.to_owned()
}
