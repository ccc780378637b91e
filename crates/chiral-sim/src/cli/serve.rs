//! `chiral-sim serve`: serves the simulated robot.

use std::net::{SocketAddr, ToSocketAddrs};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use chiral_server::{OnTimeout, PolicyServer};
use chiral_sim::robot::{self, SimConfig};

/// Serve a simulated robot: a Franka Panda at a table, watched by cameras.
///
/// In each episode the goal is to have a red ball between the fingertips; its place depends on the seed.
/// Cameras deliver colour, depth, and K and T of the same instant. Actions move the arm in real time; `step`
/// moves it in lock-step. Ctrl-C ends the program.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Where to listen for WebSocket connections; by default 127.0.0.1:8765, or nowhere if a Zenoh option is
    /// given. There is no authentication yet
    #[arg(long, value_name = "ADDRESS", value_parser = resolve)]
    bind: Option<SocketAddr>,
    #[cfg(feature = "zenoh")]
    #[command(flatten)]
    zenoh: super::zenoh::ServerOptions,
    /// The robot's name, unique on a Zenoh network; by default the host's name
    #[arg(long)]
    name: Option<String>,
    /// Columns of every picture
    #[arg(long, default_value_t = 320, value_name = "PIXELS")]
    width: usize,
    /// Rows of every picture
    #[arg(long, default_value_t = 240, value_name = "PIXELS")]
    height: usize,
    /// Pictures per second
    #[arg(long, default_value_t = 30.0, value_name = "HZ")]
    fps: f64,
    /// Number of cameras: wrist_cam, head_cam, then table_cam_0, table_cam_1, ...
    #[arg(long, default_value_t = 2, value_name = "N")]
    cameras: usize,
    /// How long a reset takes, like an arm that moves home
    #[arg(long, default_value_t = 0.0, value_name = "SECONDS", value_parser = seconds)]
    homing: f64,
    /// Draw K instants once and replay them, to measure Chiral instead of the renderer; the pictures then do
    /// not follow the arm
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    prerender: Option<u32>,
    /// How late an action may be that still moves the arm, or "off"
    #[arg(long, default_value = "250", value_name = "MS", value_parser = milliseconds)]
    max_action_lateness: Limit,
    /// How long after the last action the arm holds, or "off"
    #[arg(long, default_value = "500", value_name = "MS", value_parser = milliseconds)]
    command_timeout: Limit,
    /// After such a hold, refuse actions until a reset
    #[arg(long)]
    require_reset: bool,
    /// Log warnings and errors only
    #[arg(long)]
    quiet: bool,
}

fn resolve(text: &str) -> Result<SocketAddr, String> {
    let found = text
        .to_socket_addrs()
        .map_err(|error| format!("{error}; expected an address such as 127.0.0.1:8765"))?;
    found.into_iter().next().ok_or_else(|| "the host has no address".to_owned())
}

/// A limit that can be switched off. (For clap, an `Option` would be an argument that may be left out.)
#[derive(Clone, Copy)]
struct Limit(Option<Duration>);

fn milliseconds(text: &str) -> Result<Limit, String> {
    match (text, text.parse()) {
        ("off", _) => Ok(Limit(None)),
        (_, Ok(milliseconds)) => Ok(Limit(Some(Duration::from_millis(milliseconds)))),
        _ => Err("expected a whole number of milliseconds, or off".to_owned()),
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|seconds| Duration::try_from_secs_f64(*seconds).is_ok());
    seconds.ok_or_else(|| "expected a number of seconds".to_owned())
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    super::log(if arguments.quiet { "warn" } else { "info" });
    let Arguments { width, height, fps, cameras, homing, .. } = *arguments;
    let prerender = arguments.prerender.map(|instants| instants as usize);
    if let Some(instants) = prerender {
        let megabytes = (instants * cameras * width * height) as f64 * 7e-6;
        tracing::info!("drawing {instants} instants, {megabytes:.0} MB");
    }
    let config = SimConfig { width, height, fps, cameras, homing, prerender, ..SimConfig::default() };
    let cpu_before = super::cpu_seconds();
    let (robot, sensors) = robot::start(config).context("starting the robot")?;
    if let Some(instants) = prerender {
        let pictures = instants * cameras;
        let each = (super::cpu_seconds() - cpu_before) * 1e3 / pictures.max(1) as f64;
        tracing::info!("drew {pictures} pictures, {each:.2} ms of CPU each");
    }
    let mut builder = PolicyServer::builder(robot, sensors)
        .max_action_lateness(arguments.max_action_lateness.0)
        .command_timeout(arguments.command_timeout.0);
    if arguments.require_reset {
        builder = builder.on_timeout(OnTimeout::RequireReset);
    }
    if let Some(name) = &arguments.name {
        builder = builder.name(name);
    }
    if let Some(address) = arguments.bind {
        builder = builder.bind(address);
    }
    #[cfg(feature = "zenoh")]
    let builder = arguments.zenoh.apply(builder);
    let server = builder.build()?;
    tracing::info!("{cameras} cameras of {width} x {height} at {fps} Hz");

    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting a runtime")?;
    let (start, cpu_before) = (Instant::now(), super::cpu_seconds());
    runtime.block_on(async {
        let handle = server.handle();
        tokio::spawn(async move {
            super::shutdown_signal().await;
            tracing::info!("shutting down");
            handle.shutdown();
        });
        server.serve().await
    })?;
    let (cpu, seconds) = (super::cpu_seconds() - cpu_before, start.elapsed().as_secs_f64());
    tracing::info!("served for {seconds:.1} s, {cpu:.1} s of CPU");
    Ok(())
}
