//! `chiral-sim watch`: an observer that measures.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use chiral_client::Observation;
use chiral_sim::any_client::AnyClient;
use chiral_sim::episode::{age_ms, percentile};
use serde_json::json;

use super::{Interrupt, Target};

/// Look on without driving, and measure: achieved rate, age, throughput, CPU.
///
/// Any number of observers may look on, beside the policy that drives or without one.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Arguments {
    #[command(flatten)]
    target: Target,
    /// Observations a second to ask for
    #[arg(long, default_value_t = 30.0)]
    hz: f64,
    /// How long to look on
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Print one JSON object in place of words
    #[arg(long)]
    json: bool,
}

const EXAMPLE: &str = "\
A load test, whose pictures cost the robot nothing:
  chiral-sim serve --cameras 8 --width 640 --height 480 --prerender 8
  chiral-sim watch --hz 30 --seconds 10";

/// What was seen.
#[derive(Default)]
struct Seen {
    observations: u64,
    bytes: u64,
    ages_ms: Vec<f64>,
    seconds: f64,
    cpu_seconds: f64,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    super::log("warn");
    let limit = Duration::try_from_secs_f64(arguments.seconds).context("--seconds")?;
    let interrupt = Interrupt::listen()?;
    let builder = arguments.target.client()?.observer();
    let runtime = tokio::runtime::Runtime::new().context("starting a runtime")?;
    let seen = runtime.block_on(async {
        let client = AnyClient::Async(builder.connect().await?);
        interrupt.connected();
        let seen = look_on(&client, arguments.hz, limit, interrupt).await;
        client.close().await?;
        seen
    })?;
    tell(arguments, &seen);
    Ok(())
}

async fn look_on(client: &AnyClient, hz: f64, limit: Duration, interrupt: &Interrupt) -> Result<Seen> {
    client.start_obs_stream(hz).await?;
    // The first one may have waited for the sensors, and the clocks must be compared once.
    client.next_obs(Duration::from_secs(5)).await?;
    let (began, cpu_before, before) = (Instant::now(), super::cpu_seconds(), client.stats().observations);
    let mut seen = Seen::default();
    while began.elapsed() < limit && !interrupt.was_asked() {
        let obs = client.next_obs(Duration::from_secs(5)).await?;
        seen.ages_ms.extend(age_ms(client, &obs));
        seen.bytes += bytes(&obs);
    }
    seen.observations = client.stats().observations - before;
    seen.seconds = began.elapsed().as_secs_f64();
    seen.cpu_seconds = super::cpu_seconds() - cpu_before;
    Ok(seen)
}

/// Of pixels and depth.
fn bytes(obs: &Observation) -> u64 {
    let of = |camera: &chiral_client::Camera| {
        camera.image.data().len() + camera.depth.as_ref().map_or(0, |d| d.data().len())
    };
    obs.cameras.iter().map(|camera| of(camera) as u64).sum()
}

fn tell(arguments: &Arguments, seen: &Seen) {
    let Seen { observations, bytes, ages_ms, seconds, cpu_seconds } = seen;
    let (hz, megabytes_s) = (*observations as f64 / seconds, *bytes as f64 / seconds / 1e6);
    let [p50, p99] = [50, 99].map(|percent| percentile(ages_ms, percent));
    if arguments.json {
        let report = json!({
            "asked_hz": arguments.hz, "obs_hz": hz, "obs_age_ms_p50": p50, "obs_age_ms_p99": p99,
            "megabytes_s": megabytes_s, "observations": observations, "seconds": seconds, "cpu_seconds": cpu_seconds,
        });
        println!("{report}");
        return;
    }
    let age =
        p50.zip(p99).map_or("unknown".to_owned(), |(p50, p99)| format!("p50 {p50:.1} ms p99 {p99:.1} ms"));
    let size = *bytes as f64 / (*observations).max(1) as f64 / 1e6;
    println!(
        "{hz:.2} Hz of {} asked, {observations} observations of {size:.1} MB in {seconds:.1} s",
        arguments.hz
    );
    println!("age {age}, {megabytes_s:.0} MB/s, {cpu_seconds:.2} s of CPU here");
}
