//! A stream at 30 Hz from cameras that publish at 30 Hz: the achieved rate and the observations' age, and
//! whether raw TCP achieves the same rate.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use chiral_client::blocking::PolicyClient;

use crate::control::Control;
use crate::raw;
use crate::report::{Report, percentile};
use crate::server_info::{Path, ServerInfo};

const HZ: f64 = 30.0;
const OBSERVATIONS: u32 = 60;
const TIMEOUT: Duration = Duration::from_secs(5);

pub(crate) fn run(control: &mut Control, info: &ServerInfo, report: &Report, rounds: usize) -> Result<()> {
    let mut tcp = raw::Blocking::connect(info.raw_blocking, info.bytes)?;
    let client = info.connect_observer(Path::WebSocket)?;
    control.set_cameras_hz(HZ)?;
    let (mut raw_hz, mut hz, mut p50_ms, mut p99_ms) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        raw_hz.push(request_at_rate(&mut tcp)?);
        let (achieved, ages_ms) = stream(&client)?;
        hz.push(achieved);
        p50_ms.push(percentile(&ages_ms, 50));
        p99_ms.push(percentile(&ages_ms, 99));
    }
    control.set_cameras_hz(0.0)?;
    report.print("stream_30hz", "asked", "achieved_hz", &[HZ]);
    report.print("stream_30hz", "raw_blocking", "achieved_hz", &raw_hz);
    report.print("stream_30hz", "chiral", "achieved_hz", &hz);
    report.print("stream_30hz", "chiral", "age_p50_ms", &p50_ms);
    report.print("stream_30hz", "chiral", "age_p99_ms", &p99_ms);
    client.close().context("closing")
}

/// Sends requests on absolute deadlines and returns the achieved rate.
fn request_at_rate(tcp: &mut raw::Blocking) -> Result<f64> {
    tcp.request()?;
    let start = Instant::now();
    for i in 1..=OBSERVATIONS {
        thread::sleep(
            (start + Duration::from_secs_f64(f64::from(i) / HZ)).saturating_duration_since(Instant::now()),
        );
        tcp.request()?;
    }
    // The time that the last request takes belongs to no period.
    let seconds = start.elapsed().as_secs_f64();
    Ok(if seconds < f64::from(OBSERVATIONS + 1) / HZ { HZ } else { f64::from(OBSERVATIONS) / seconds })
}

/// Streams, and returns the achieved rate and the age of each observation's oldest picture in milliseconds.
fn stream(client: &PolicyClient) -> Result<(f64, Vec<f64>)> {
    client.start_obs_stream(HZ).context("starting the stream")?;
    let mut last = client.next_obs(TIMEOUT).context("the first observation")?.seq;
    let (start, first) = (Instant::now(), last);
    let mut ages_ms = Vec::new();
    let mut ended = start;
    for _ in 0..OBSERVATIONS {
        let obs = client.next_obs(TIMEOUT).context("the next observation")?;
        (ended, last) = (Instant::now(), obs.seq);
        let captured_at = obs
            .cameras
            .iter()
            .map(|camera| camera.captured_at)
            .min()
            .context("an observation without cameras")?;
        ages_ms.extend(client.age(captured_at).map(|age| age.as_secs_f64() * 1e3));
    }
    // By sequence numbers: an observation that was replaced before this thread woke has arrived, too.
    let achieved = (last - first) as f64 / (ended - start).as_secs_f64();
    client.stop_obs_stream().context("stopping the stream")?;
    Ok((achieved, ages_ms))
}
