//! `chiral-sim discover`: lists the robots on the Zenoh networks in reach.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use chiral_client::{DiscoveredRobot, PolicyClient};

/// List the robots on the Zenoh networks in reach, without knowing an address.
///
/// Exit status: 0 if any was found, 1 if none.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// How long to search, in seconds
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// A Zenoh configuration file: TLS, user and password, further addresses to search
    #[arg(long, value_name = "FILE")]
    zenoh_config: Option<PathBuf>,
}

const NONE: &str = "\
no robot was found. A robot is found only if
  - it serves on a Zenoh network, not only over WebSocket: chiral-sim serve --zenoh tcp/0.0.0.0:7447,
    without --no-discovery
  - it listens on more than loopback, or runs on this host
  - it, or a Zenoh router of its network, is in this network segment: multicast (224.0.0.224:7446, UDP)
    does not pass IP routers, nor many WLANs and containers
  - it can be reached: no firewall blocks UDP port 7446 or the robot's TCP port, and its certificates, users
    and access control admit this client";

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    super::log("warn");
    let duration = Duration::try_from_secs_f64(arguments.seconds).context("--seconds")?;
    let builder = PolicyClient::builder(PolicyClient::DEFAULT_ZENOH_URI);
    let builder = if let Some(file) = &arguments.zenoh_config { builder.zenoh_config(file) } else { builder };
    let robots = builder.discover_blocking(duration)?;
    if robots.is_empty() {
        eprintln!("{NONE}");
        return Ok(ExitCode::FAILURE);
    }
    let rows = robots.iter().map(row);
    let head = ["robot", "cameras", "controller", "addresses"].map(str::to_owned);
    print!("{}", table(&std::iter::once(head).chain(rows).collect::<Vec<_>>()));
    Ok(ExitCode::SUCCESS)
}

fn row(robot: &DiscoveredRobot) -> [String; 4] {
    let cameras = robot.cameras.iter().map(|camera| {
        let [height, width, _] = camera.image_shape;
        format!(
            "{} {width}x{height}{}",
            camera.name,
            if camera.depth_shape.is_some() { " + depth" } else { "" }
        )
    });
    let cameras = cameras.collect::<Vec<_>>().join(", ");
    [
        robot.name.clone(),
        cameras,
        robot.controller.clone().unwrap_or_else(|| "none".to_owned()),
        robot.addresses.join(" "),
    ]
}

/// Pads each column to its widest cell.
fn table(rows: &[[String; 4]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths = [0, 1, 2].map(width);
    let line = |[a, b, c, d]: &[String; 4]| {
        format!("{a:0$}  {b:1$}  {c:2$}  {d}\n", widths[0], widths[1], widths[2])
    };
    rows.iter().map(line).collect()
}
