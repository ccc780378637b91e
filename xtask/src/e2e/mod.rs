//! `cargo xtask e2e`: robot and policy as separate processes over real sockets, with every transport, codec,
//! robot, client and mode. The rows are data in `rows`.

mod outcome;
mod pair;
mod report;
mod rows;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::child;
use crate::command::{self, Profile};
use crate::python;
use outcome::{Outcome, Row};
use pair::Pair;
use report::{Report, RowSpec};
use rows::{Client, Link, Programs, ROWS, Robot, SEED};

/// Run robot and policy as separate processes, in every combination, and tabulate the results.
///
/// In half of the rows the policy starts first and waits for its robot. A failed episode fails the run, after
/// all rows, and shows the ends of the logs, which are kept under target/e2e.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Episodes per row, with the same seeds in every row.
    #[arg(long, default_value_t = 10, value_name = "N")]
    episodes: u32,
    /// Run only rows and guide programs whose name contains this text, such as msgpack or
    /// zenoh-tcp-protobuf-rust-async-step.
    #[arg(long, default_value = "", value_name = "TEXT")]
    only: String,
    /// Write the figures to this file as {"rows": [...]}, even if a row failed.
    #[arg(long, value_name = "PATH")]
    json: Option<PathBuf>,
    /// Build for release, for figures that are to be quoted.
    #[arg(long)]
    release: bool,
}

/// The complete programs of the client guide. Each takes the server's URI and exits on its own.
const GUIDES: &[&str] = &["guide_streaming", "guide_episode"];

/// How long a program of the guide may take.
const GUIDE_TIMEOUT: Duration = Duration::from_secs(20);

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let profile = match arguments.release {
        true => Profile::Release,
        false => Profile::Dev,
    };
    let outcome = play_all(profile, arguments.episodes, &arguments.only)?;
    if let Some(path) = &arguments.json {
        let rows: Vec<_> = outcome.rows.iter().filter_map(Row::json).collect();
        let text = serde_json::to_string_pretty(&serde_json::json!({ "rows": rows }))?;
        std::fs::write(path, text + "\n").with_context(|| format!("writing {}", path.display()))?;
    }
    outcome.conclude()
}

/// Plays every row and every program of the guide. Fails after all were played if any failed.
pub(crate) fn check(profile: Profile, episodes: u32) -> Result<()> {
    play_all(profile, episodes, "")?.conclude()
}

fn play_all(profile: Profile, episodes: u32, only: &str) -> Result<Outcome> {
    let programs = Programs { built: command::build(profile)?, python: python::interpreter()? };
    let logs = command::target()?.join("e2e");

    let mut rows = Vec::new();
    for group in ROWS {
        for (i, link) in group.links.iter().enumerate() {
            for (j, mode) in group.modes.iter().enumerate() {
                for (k, client) in group.clients.iter().enumerate() {
                    let spec = RowSpec {
                        robot: group.robot.name,
                        client: client.name,
                        mode,
                        transport: link.transport,
                        reported: link.reported,
                        codec: group.codec,
                        episodes: if group.robot.homing > 0 { 1 } else { episodes },
                    };
                    if !spec.name().contains(only) {
                        continue;
                    }
                    // Alternates by link, mode and client, so that each client is first in some row.
                    let client_first = (i + j + k) % 2 == 1;
                    let row = play_row(&programs, &logs, link, group.robot, client, spec, client_first)?;
                    print_result(&row.spec.name(), &row.result);
                    rows.push(row);
                }
            }
        }
    }
    let mut guides = Vec::new();
    for name in GUIDES.iter().filter(|name| name.contains(only)) {
        let result = play_guide(&programs, &logs, name);
        print_result(name, &result);
        guides.push((*name, result));
    }
    if rows.is_empty() && guides.is_empty() {
        bail!("no row or guide program has a name that contains {only:?}");
    }
    Ok(Outcome { rows, guides })
}

fn print_result<T>(name: &str, result: &Result<T>) {
    match result {
        Ok(_) => println!("{name}: ok"),
        Err(error) => println!("{name}: FAILED: {error:#}"),
    }
}

/// Plays one row. Fails only if it could not be started; failures while playing are the row's result.
fn play_row(
    programs: &Programs,
    logs: &Path,
    link: &Link,
    robot: &Robot,
    client: &Client,
    spec: RowSpec,
    client_first: bool,
) -> Result<Row> {
    let address = child::free_address()?;
    let mut policy = (client.command)(programs, &(link.uri)(address), &spec);
    policy.args(["--episodes", &spec.episodes.to_string(), "--seed", &SEED.to_string(), "--json", "--quiet"]);
    let logs = logs.join(spec.name());
    let pair = Pair {
        router: link.is_routed.then(|| rows::router(programs, address)),
        robot: (robot.command)(programs, link, address),
        client: policy,
        address,
        client_first,
        logs: logs.clone(),
        timeout: Duration::from_secs(30) + (10 + robot.homing) * Duration::from_secs(spec.episodes.into()),
    };
    let (result, stdout) = pair.play();
    let report = Report::read(&stdout);
    // An error of the processes explains more than one of the report, which goes into the table in any case.
    let result = result.and_then(|()| report.as_ref().map_err(|error| anyhow!("{error:#}"))?.check(&spec));
    let result = result.and_then(|()| link.logged.map_or(Ok(()), |text| pair::check_robot_log(&logs, text)));
    Ok(Row { spec, client_first, report: report.ok(), result })
}

fn play_guide(programs: &Programs, logs: &Path, name: &str) -> Result<Duration> {
    let address = child::free_address()?;
    let mut client = Command::new(programs.built.join("examples").join(name));
    client.arg(format!("ws://{address}"));
    let start = Instant::now();
    let pair = Pair {
        router: None,
        robot: rows::robot(programs, vec!["--bind".to_owned(), address.to_string()]),
        client,
        address,
        client_first: false,
        logs: logs.join(name),
        timeout: GUIDE_TIMEOUT,
    };
    pair.play().0?;
    Ok(start.elapsed())
}
