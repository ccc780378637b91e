//! Streams freshly drawn pictures at 30 Hz for minutes, and measures whether memory grows.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::control::{Cameras, Control};
use crate::report::{Report, percentile};
use crate::server_info::{Path, ServerInfo};
use crate::usage::Usage;

const HZ: f64 = 30.0;
const TIMEOUT: Duration = Duration::from_secs(5);
/// How long the policy stalls at first.
const STALL: Duration = Duration::from_millis(500);
/// When memory has settled: everything has been used once. In a shorter soak, after a fifth of it.
const SETTLING_TIME: Duration = Duration::from_secs(60);

pub(crate) fn run(
    control: &mut Control,
    info: &ServerInfo,
    report: &Report,
    path: Path,
    length: Duration,
) -> Result<()> {
    let client = info.connect_observer(path)?;
    control.set_cameras(Cameras { hz: HZ, draw: true })?;
    client.start_obs_stream(HZ).context("starting the stream")?;
    let former = client.next_obs(TIMEOUT).context("the first observation")?;
    let mut last = client.next_obs(TIMEOUT).context("the second observation")?;
    // Force the most that a client ever holds: the policy's last and current observation, the newest, and one
    // that is arriving. Otherwise the machine's first stall would do so later and look like a leak.
    sleep(STALL);
    drop(former);
    let (start, first) = (Instant::now(), last.seq);
    let mut ages_ms = Vec::new();
    let mut settled = None;
    while start.elapsed() < length {
        last = client.next_obs(TIMEOUT).context("the next observation")?;
        let captured_at = last
            .cameras
            .iter()
            .map(|camera| camera.captured_at)
            .min()
            .context("an observation without cameras")?;
        ages_ms.extend(client.age(captured_at).map(|age| age.as_secs_f64() * 1e3));
        if settled.is_none() && start.elapsed() >= SETTLING_TIME.min(length / 5) {
            settled = Some(peaks(control)?);
        }
    }
    let hz = (last.seq - first) as f64 / start.elapsed().as_secs_f64();
    let settled = settled.context("the soak was too short to settle")?;
    for (side, (before, after)) in ["client", "server"].iter().zip(settled.iter().zip(peaks(control)?)) {
        report.print("soak", path.name(), &format!("{side}_peak_mb"), &[after * 1e-6]);
        report.print("soak", path.name(), &format!("{side}_peak_growth"), &[after / before]);
    }
    report.print("soak", path.name(), "achieved_hz", &[hz]);
    report.print("soak", path.name(), "age_p99_ms", &[percentile(&ages_ms, 99)]);
    control.set_cameras(Cameras::OFF)?;
    client.close().context("closing")
}

/// Peak resident bytes of client and server, shared memory included.
fn peaks(control: &mut Control) -> Result<[f64; 2]> {
    Ok([Usage::now()?.peak_resident_bytes, control.usage()?.peak_resident_bytes])
}
