//! `chiral-sim watch`: an observer that measures the stream.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use chiral_client::Observation;
use chiral_sim::any_client::AnyClient;
use chiral_sim::episode::{age_ms, percentile};
use serde_json::json;

use super::{Interrupt, Target};

/// Observe without control, and measure: achieved rate, age, throughput, CPU.
///
/// Any number of observers can connect, with or without a policy that controls the robot.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Arguments {
    #[command(flatten)]
    target: Target,
    /// Requested observations per second
    #[arg(long, default_value_t = 30.0)]
    hz: f64,
    /// How long to observe, in seconds
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

const EXAMPLE: &str = "\
A load test with prerendered pictures, which cost the robot nothing:
  chiral-sim serve --cameras 8 --width 640 --height 480 --prerender 8
  chiral-sim watch --hz 30 --seconds 10";

/// What was measured.
#[derive(Default)]
struct Measured {
    observations: u64,
    bytes: u64,
    ages_ms: Vec<f64>,
    seconds: f64,
    cpu_seconds: f64,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    super::log("warn");
    let duration = Duration::try_from_secs_f64(arguments.seconds).context("--seconds")?;
    let interrupt = Interrupt::listen()?;
    let builder = arguments.target.client()?.observer();
    let runtime = tokio::runtime::Runtime::new().context("starting a runtime")?;
    let measured = runtime.block_on(async {
        let client = AnyClient::Async(builder.connect().await?);
        interrupt.connected();
        let measured = measure(&client, arguments.hz, duration, interrupt).await;
        client.close().await?;
        measured
    })?;
    print(arguments, &measured);
    Ok(())
}

async fn measure(client: &AnyClient, hz: f64, duration: Duration, interrupt: &Interrupt) -> Result<Measured> {
    client.start_obs_stream(hz).await?;
    // Not measured: the first observation may have waited for the sensors, and the clock offset must be
    // known.
    client.next_obs(Duration::from_secs(5)).await?;
    let (start, cpu_before, before) = (Instant::now(), super::cpu_seconds(), client.stats().observations);
    let mut measured = Measured::default();
    while start.elapsed() < duration && !interrupt.is_requested() {
        let obs = client.next_obs(Duration::from_secs(5)).await?;
        measured.ages_ms.extend(age_ms(client, &obs));
        measured.bytes += bytes(&obs);
    }
    measured.observations = client.stats().observations - before;
    measured.seconds = start.elapsed().as_secs_f64();
    measured.cpu_seconds = super::cpu_seconds() - cpu_before;
    Ok(measured)
}

/// Bytes of pixels and depth.
fn bytes(obs: &Observation) -> u64 {
    let of = |camera: &chiral_client::Camera| {
        camera.image.data().len() + camera.depth.as_ref().map_or(0, |d| d.data().len())
    };
    obs.cameras.iter().map(|camera| of(camera) as u64).sum()
}

fn print(arguments: &Arguments, measured: &Measured) {
    let Measured { observations, bytes, ages_ms, seconds, cpu_seconds } = measured;
    let (hz, megabytes_s) = (*observations as f64 / seconds, *bytes as f64 / seconds / 1e6);
    let [p50, p99] = [50, 99].map(|percent| percentile(ages_ms, percent));
    if arguments.json {
        let report = json!({
            "asked_hz": arguments.hz, "obs_hz": hz, "obs_age_ms_p50": p50, "obs_age_ms_p99": p99,
            "megabytes_s": megabytes_s, "observations": observations, "seconds": seconds,
            "cpu_seconds": cpu_seconds,
        });
        println!("{report}");
        return;
    }
    let age =
        p50.zip(p99).map_or("unknown".to_owned(), |(p50, p99)| format!("p50 {p50:.1} ms p99 {p99:.1} ms"));
    let size = *bytes as f64 / (*observations).max(1) as f64 / 1e6;
    println!(
        "{hz:.2} Hz of {} requested, {observations} observations of {size:.1} MB in {seconds:.1} s",
        arguments.hz
    );
    println!("age {age}, {megabytes_s:.0} MB/s, {cpu_seconds:.2} s of CPU in this process");
}
