//! `cargo xtask bench`: measures Chiral against raw TCP, bare Zenoh and a naive WebSocket path. chiral-sim's
//! binary `chiral-bench` measures; here it is built, started and pinned to cores, and its figures are
//! evaluated.

mod figures;
mod machine;
mod peers;
mod plot;
mod report;
mod targets;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use self::figures::Figures;
use self::machine::Machine;
use self::peers::Peers;
use crate::command::{self, cargo};

/// Measure Chiral against raw TCP, bare Zenoh and a naive WebSocket path, and compare with the targets.
///
/// Takes minutes and both cores: let nothing else run. A missed target is shown; the command still succeeds.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Also write the figures to this file.
    #[arg(long, value_name = "PATH")]
    json: Option<PathBuf>,
    /// Measure fewer rounds; takes a few minutes.
    #[arg(long)]
    quick: bool,
    /// Only measure whether memory grows: stream 17.2 MB at 30 Hz over Zenoh, first over TCP, then over
    /// shared memory, for this long each (default 300 s).
    #[arg(
        long,
        value_name = "SECONDS",
        num_args = 0..=1,
        default_missing_value = "300",
        conflicts_with_all = ["quick", "plot"],
    )]
    soak: Option<u64>,
    /// Also measure get_obs for observations of 1 kB to 64 MB, and draw a plot (SVG).
    #[arg(long, value_name = "PATH")]
    plot: Option<PathBuf>,
}

/// The cores on which the two processes run: both on one, or each on its own.
#[derive(Clone, Copy, PartialEq)]
enum Cores {
    One,
    Two,
}

impl Cores {
    fn count(self) -> u8 {
        match self {
            Cores::One => 1,
            Cores::Two => 2,
        }
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    println!("building chiral-bench for release (the first time this takes several minutes)");
    command::run(&mut cargo(["build", "--release", "-p", "chiral-sim", "--bin", "chiral-bench"]))?;
    let target = command::target()?;
    let logs = target.join("bench");
    fs::create_dir_all(&logs).with_context(|| format!("creating {}", logs.display()))?;
    let mut peers = Peers::new(target.join("release/chiral-bench"), logs);

    let (start, before) = (Instant::now(), Machine::read()?);
    let rounds = if arguments.quick { 7 } else { 15 };
    let figures = match arguments.soak {
        Some(seconds) => soak(&mut peers, Duration::from_secs(seconds))?,
        None => measure(&mut peers, rounds)?,
    };
    let curve = arguments.plot.as_ref().map(|_| sweep(&mut peers)).transpose()?;
    let rows = figures.rows();

    println!("\n{}", report::tables(&rows));
    println!("{}", before.describe_until(&Machine::read()?));
    let extent =
        arguments.soak.map_or_else(|| format!("{rounds} rounds"), |seconds| format!("{seconds} s each"));
    println!("{extent}, {:.0} s", start.elapsed().as_secs_f64());
    if let (Some(path), Some(curve)) = (&arguments.plot, curve) {
        write(path, &plot::svg(&curve))?;
    }
    if let Some(path) = &arguments.json {
        write(path, &report::json(&rows)?)?;
    }
    Ok(())
}

/// Measures everything, the most important first, so that a late failure costs little.
fn measure(peers: &mut Peers, rounds: usize) -> Result<Figures> {
    let mut figures = Figures::default();
    for (workload, cores) in
        [("L", Cores::Two), ("M", Cores::Two), ("S", Cores::Two), ("M", Cores::One), ("S", Cores::One)]
    {
        let mut server = peers.serve(workload)?;
        figures.add(cores, peers.measure(&mut server, "get-obs", cores, 2 * rounds)?);
    }
    let mut server = peers.serve("L")?;
    for (what, rounds) in [("stream", rounds.min(9)), ("actions", rounds), ("dispatch", 5), ("held", rounds)]
    {
        figures.add(Cores::Two, peers.measure(&mut server, what, Cores::Two, rounds)?);
    }
    drop(server);
    figures.add(Cores::Two, peers.micro(rounds)?);
    Ok(figures)
}

/// Measures memory growth, with a server of its own for each path, since peaks are per process.
fn soak(peers: &mut Peers, length: Duration) -> Result<Figures> {
    let mut figures = Figures::default();
    for path in ["zenoh_tcp", "zenoh_shm"] {
        let mut server = peers.serve("L")?;
        figures.add(Cores::Two, peers.soak(&mut server, path, length)?);
    }
    Ok(figures)
}

/// Measures round trips by size on every path.
fn sweep(peers: &mut Peers) -> Result<plot::Curve> {
    let mut curve = plot::Curve::default();
    for kilobytes in [1, 4, 16, 64, 256, 1_000, 4_000, 16_000, 64_000_u64] {
        let bytes = kilobytes * 1000;
        let mut server = peers.serve(&bytes.to_string())?;
        let mut figures = Figures::default();
        figures.add(Cores::Two, peers.measure(&mut server, "get-obs", Cores::Two, 7)?);
        curve.add(bytes as f64, &figures.rows());
    }
    Ok(curve)
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    println!("wrote {}", path.display());
    Ok(())
}
