//! `chiral-sim policy`: plays episodes and reports how they went.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use chiral_client::Codec;
use chiral_sim::any_client::{AnyClient, run_now};
use chiral_sim::episode::{Coupling, Episode, Runner, percentile};
use chiral_sim::sheet;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::{INTERRUPTED, Interrupt, Target};

/// Drive a robot to the red ball, using only the pixels, depth, K, T and joints that it receives.
///
/// Waits for the robot's server, plays the episodes and reports how they went. Exit status: 0 if every
/// episode succeeded, 1 if not, 130 after Ctrl-C.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    target: Target,
    /// How policy and robot are coupled
    #[arg(long, value_enum, default_value_t = Mode::Stream)]
    mode: Mode,
    /// Which client API to use
    #[arg(long, value_enum, default_value_t = Client::Async)]
    client: Client,
    /// Number of episodes
    #[arg(long, default_value_t = 1, value_name = "N")]
    episodes: u64,
    /// Seed of the first episode; each further episode uses the next
    #[arg(long, default_value_t = 0, value_name = "S")]
    seed: u64,
    /// Requested observations per second, in mode stream
    #[arg(long, default_value_t = 30.0)]
    hz: f64,
    /// Save a picture for each episode: what the cameras saw first and last
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Mode {
    /// Observations and actions stream in real time
    Stream,
    /// The robot waits for every step
    Step,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Client {
    /// The async client, on a tokio runtime
    Async,
    /// The blocking client
    Blocking,
}

/// The results of all episodes.
struct Played {
    episodes: Vec<Episode>,
    /// From the first reset to the last episode's end.
    seconds: f64,
    /// The agreed wire format.
    codec: Codec,
    /// Observations per second over all of that time; only in mode stream.
    obs_hz: Option<f64>,
    interrupted: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    super::log("warn");
    if let Some(directory) = &arguments.save {
        std::fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    }
    let interrupt = Interrupt::listen()?;
    let builder = arguments.target.client()?;
    let played = match arguments.client {
        Client::Async => {
            let runtime = tokio::runtime::Runtime::new().context("starting a runtime")?;
            runtime.block_on(async {
                play(arguments, &AnyClient::Async(builder.connect().await?), interrupt).await
            })?
        }
        Client::Blocking => {
            run_now(play(arguments, &AnyClient::Blocking(builder.connect_blocking()?), interrupt))?
        }
    };
    if arguments.json {
        println!("{}", report(arguments, &played));
    } else {
        summarize(&played);
    }
    let failed = played.successes() < played.episodes.len();
    Ok(match (played.interrupted, failed) {
        (true, _) => ExitCode::from(INTERRUPTED),
        (false, true) => ExitCode::FAILURE,
        (false, false) => ExitCode::SUCCESS,
    })
}

async fn play(arguments: &Arguments, client: &AnyClient, interrupt: &Interrupt) -> Result<Played> {
    interrupt.connected();
    let played = play_all(arguments, client, interrupt).await;
    client.close().await?;
    played
}

async fn play_all(arguments: &Arguments, client: &AnyClient, interrupt: &Interrupt) -> Result<Played> {
    let coupling = match arguments.mode {
        Mode::Stream => Coupling::Stream,
        Mode::Step => Coupling::Step,
    };
    let progress = progress(arguments);
    let runner = Runner::start(client, coupling, arguments.hz, interrupt.requested()).await?;
    let (mut episodes, start) = (Vec::new(), Instant::now());
    for number in 0..arguments.episodes {
        let seed = arguments.seed.wrapping_add(number);
        progress.set_message(format!("seed {seed}"));
        let episode = runner.play(seed).await.with_context(|| format!("the episode of seed {seed}"))?;
        if interrupt.is_requested() {
            break;
        }
        progress.inc(1);
        if let Some(directory) = &arguments.save {
            let path = directory.join(format!("episode-{seed}.png"));
            save(&episode, &path)?;
        }
        if !arguments.json && !arguments.target.quiet {
            progress.suspend(|| println!("{}", line(&episode)));
        }
        episodes.push(episode.without_pictures());
    }
    progress.finish_and_clear();
    let seconds = start.elapsed().as_secs_f64();
    let obs_hz = (coupling == Coupling::Stream).then(|| client.stats().observations as f64 / seconds);
    Ok(Played { episodes, seconds, codec: client.codec(), obs_hz, interrupted: interrupt.is_requested() })
}

/// A progress bar, shown only on a terminal.
fn progress(arguments: &Arguments) -> ProgressBar {
    if arguments.target.quiet {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:24} episode {pos} of {len}, {msg}")
        .expect("the template is well-formed");
    ProgressBar::new(arguments.episodes).with_style(style)
}

fn save(episode: &Episode, path: &Path) -> Result<()> {
    sheet::save(episode, path).with_context(|| format!("writing {}", path.display()))
}

fn line(episode: &Episode) -> String {
    let outcome = if episode.success { "reached    " } else { "NOT REACHED" };
    let Episode { seed, steps, reward, seconds, obs_hz, .. } = episode;
    let rate = obs_hz.map_or(String::new(), |hz| format!(", {hz:.1} Hz"));
    let times = [spread("age", &episode.ages_ms), spread("step", &episode.steps_ms)].concat();
    format!("seed {seed:3}  {outcome}  {seconds:5.2} s, {steps:3} actions, reward {reward:.3}{rate}{times}")
}

/// Median and 99th percentile as text; empty without values.
fn spread(name: &str, values: &[f64]) -> String {
    match (percentile(values, 50), percentile(values, 99)) {
        (Some(p50), Some(p99)) => format!(", {name} p50 {p50:.1} ms p99 {p99:.1} ms"),
        _ => String::new(),
    }
}

impl Played {
    fn successes(&self) -> usize {
        self.episodes.iter().filter(|episode| episode.success).count()
    }

    fn all(&self, values: fn(&Episode) -> &Vec<f64>) -> Vec<f64> {
        self.episodes.iter().flat_map(values).copied().collect()
    }
}

fn summarize(played: &Played) {
    let (successes, count) = (played.successes(), played.episodes.len());
    let rate = played.obs_hz.map_or(String::new(), |hz| format!(", {hz:.1} Hz"));
    let times =
        [spread("age", &played.all(|e| &e.ages_ms)), spread("step", &played.all(|e| &e.steps_ms))].concat();
    let interrupted = if played.interrupted { ", interrupted" } else { "" };
    println!(
        "{successes} of {count} episodes reached the target in {:.1} s{rate}{times}{interrupted}",
        played.seconds
    );
}

/// The transport that an address selects, as named in tables.
fn transport(uri: &str) -> String {
    match uri.split_once('/') {
        Some((protocol, _)) if !protocol.ends_with(':') => format!("zenoh-{protocol}"),
        Some(_) => "websocket".to_owned(),
        None => "zenoh".to_owned(),
    }
}

fn report(arguments: &Arguments, played: &Played) -> serde_json::Value {
    let (ages, steps) = (played.all(|e| &e.ages_ms), played.all(|e| &e.steps_ms));
    json!({
        "client": match arguments.client { Client::Async => "async", Client::Blocking => "blocking" },
        "mode": match arguments.mode { Mode::Stream => "stream", Mode::Step => "step" },
        "transport": transport(arguments.target.uri()),
        "codec": super::name(played.codec),
        "episodes": played.episodes.len(),
        "successes": played.successes(),
        "obs_hz": played.obs_hz,
        "obs_age_ms_p50": percentile(&ages, 50),
        "obs_age_ms_p99": percentile(&ages, 99),
        "step_ms_p50": percentile(&steps, 50),
        "step_ms_p99": percentile(&steps, 99),
        "seconds": played.seconds,
    })
}
