//! A stream at 30 Hz of cameras that publish at 30 Hz: what arrives, and how old it is. And whether raw TCP
//! carries as much.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use chiral_client::blocking::PolicyClient;

use crate::control::Control;
use crate::raw;
use crate::server::{About, Path};
use crate::sheet::{Sheet, percentile};

const HZ: f64 = 30.0;
const OBSERVATIONS: u32 = 60;
const LIMIT: Duration = Duration::from_secs(5);

pub(crate) fn run(control: &mut Control, about: &About, sheet: &Sheet, rounds: usize) -> Result<()> {
    let mut tcp = raw::Blocking::connect(about.raw_blocking, about.bytes)?;
    let client = about.watch(Path::WebSocket)?;
    control.set_cameras_hz(HZ)?;
    let (mut raw_hz, mut hz, mut p50_ms, mut p99_ms) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        raw_hz.push(paced(&mut tcp)?);
        let (achieved, ages_ms) = streamed(&client)?;
        hz.push(achieved);
        p50_ms.push(percentile(&ages_ms, 50));
        p99_ms.push(percentile(&ages_ms, 99));
    }
    control.set_cameras_hz(0.0)?;
    sheet.put("stream_30hz", "asked", "achieved_hz", &[HZ]);
    sheet.put("stream_30hz", "raw_blocking", "achieved_hz", &raw_hz);
    sheet.put("stream_30hz", "chiral", "achieved_hz", &hz);
    sheet.put("stream_30hz", "chiral", "age_p50_ms", &p50_ms);
    sheet.put("stream_30hz", "chiral", "age_p99_ms", &p99_ms);
    client.close().context("closing")
}

/// Asks on absolute deadlines; how often a second that worked.
fn paced(tcp: &mut raw::Blocking) -> Result<f64> {
    tcp.ask()?;
    let began = Instant::now();
    for i in 1..=OBSERVATIONS {
        thread::sleep(
            (began + Duration::from_secs_f64(f64::from(i) / HZ)).saturating_duration_since(Instant::now()),
        );
        tcp.ask()?;
    }
    // The last one's own time belongs to no period.
    let seconds = began.elapsed().as_secs_f64();
    Ok(if seconds < f64::from(OBSERVATIONS + 1) / HZ { HZ } else { f64::from(OBSERVATIONS) / seconds })
}

/// Streams; the achieved rate and the ages, in milliseconds, of the oldest picture in each observation.
fn streamed(client: &PolicyClient) -> Result<(f64, Vec<f64>)> {
    client.start_obs_stream(HZ).context("starting the stream")?;
    let mut last = client.next_obs(LIMIT).context("the first observation")?.seq;
    let (began, first) = (Instant::now(), last);
    let mut ages_ms = Vec::new();
    let mut ended = began;
    for _ in 0..OBSERVATIONS {
        let obs = client.next_obs(LIMIT).context("the next observation")?;
        (ended, last) = (Instant::now(), obs.seq);
        let captured_at = obs
            .cameras
            .iter()
            .map(|camera| camera.captured_at)
            .min()
            .context("an observation without cameras")?;
        ages_ms.extend(client.age(captured_at).map(|age| age.as_secs_f64() * 1e3));
    }
    // One that was overtaken by a newer before this thread woke has arrived all the same.
    let achieved = (last - first) as f64 / (ended - began).as_secs_f64();
    client.stop_obs_stream().context("stopping the stream")?;
    Ok((achieved, ages_ms))
}
