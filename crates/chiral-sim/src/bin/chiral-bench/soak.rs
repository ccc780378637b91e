//! A stream at 30 Hz for minutes, of pictures that are drawn anew each time: whether memory grows.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::control::{Cameras, Control};
use crate::server::{About, Path};
use crate::sheet::{Sheet, percentile};
use crate::usage::Usage;

const HZ: f64 = 30.0;
const LIMIT: Duration = Duration::from_secs(5);
/// For so long the policy stands still at first.
const STALL: Duration = Duration::from_millis(500);
/// After so much everything has been used once; of a shorter soak, after a fifth.
const SETTLED: Duration = Duration::from_secs(60);

pub(crate) fn run(
    control: &mut Control,
    about: &About,
    sheet: &Sheet,
    path: Path,
    length: Duration,
) -> Result<()> {
    let client = about.watch(path)?;
    control.set_cameras(Cameras { hz: HZ, draw: true })?;
    client.start_obs_stream(HZ).context("starting the stream")?;
    let former = client.next_obs(LIMIT).context("the first observation")?;
    let mut last = client.next_obs(LIMIT).context("the second observation")?;
    // The most that a client ever holds: what its policy had and what it has, the newest, and one that is
    // arriving. Were that left to the first stall of the machine, what grows then could not be told from what
    // should not.
    sleep(STALL);
    drop(former);
    let (began, first) = (Instant::now(), last.seq);
    let mut ages_ms = Vec::new();
    let mut settled = None;
    while began.elapsed() < length {
        last = client.next_obs(LIMIT).context("the next observation")?;
        let captured_at = last
            .cameras
            .iter()
            .map(|camera| camera.captured_at)
            .min()
            .context("an observation without cameras")?;
        ages_ms.extend(client.age(captured_at).map(|age| age.as_secs_f64() * 1e3));
        if settled.is_none() && began.elapsed() >= SETTLED.min(length / 5) {
            settled = Some(peaks(control)?);
        }
    }
    let hz = (last.seq - first) as f64 / began.elapsed().as_secs_f64();
    let settled = settled.context("a soak that ended before it began")?;
    for (who, (before, after)) in ["client", "server"].iter().zip(settled.iter().zip(peaks(control)?)) {
        sheet.put("soak", path.name(), &format!("{who}_peak_mb"), &[after * 1e-6]);
        sheet.put("soak", path.name(), &format!("{who}_peak_growth"), &[after / before]);
    }
    sheet.put("soak", path.name(), "achieved_hz", &[hz]);
    sheet.put("soak", path.name(), "age_p99_ms", &[percentile(&ages_ms, 99)]);
    control.set_cameras(Cameras::OFF)?;
    client.close().context("closing")
}

/// The most that client and server have been resident in, shared memory included.
fn peaks(control: &mut Control) -> Result<[f64; 2]> {
    Ok([Usage::now()?.peak_resident_bytes, control.usage()?.peak_resident_bytes])
}
