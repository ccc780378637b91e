//! How long an action takes from `send_action` to `apply_action`, with nothing else on the wire and under a
//! stream of observations.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use chiral_client::blocking::PolicyClient;
use chiral_server::monotonic;

use crate::control::Control;
use crate::server::About;
use crate::sheet::{Sheet, percentile};

const HZ: f64 = 30.0;
const ACTIONS: usize = 150;
/// No multiple or part of the stream's period, so that actions meet it everywhere.
const PAUSE: Duration = Duration::from_micros(5_300);

pub(crate) fn run(control: &mut Control, about: &About, sheet: &Sheet, rounds: usize) -> Result<()> {
    let client = about.drive()?;
    // The observation after a reset is one captured after it.
    control.set_cameras_hz(HZ)?;
    client.reset().context("reset")?;
    control.set_cameras_hz(0.0)?;
    send(&client, control)?;
    let (mut idle, mut streaming) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for _ in 0..rounds {
        note(&mut idle, &send(&client, control)?);
        control.set_cameras_hz(HZ)?;
        client.start_obs_stream(HZ).context("starting the stream")?;
        note(&mut streaming, &send(&client, control)?);
        client.stop_obs_stream().context("stopping the stream")?;
        control.set_cameras_hz(0.0)?;
    }
    for (workload, [p50, p90]) in [("idle", idle), (&about.workload, streaming)] {
        sheet.put_under(workload, "action", "chiral", "p50_us", &p50);
        sheet.put_under(workload, "action", "chiral", "p90_us", &p90);
    }
    client.close().context("closing")
}

/// Microseconds under way, of each action.
fn send(client: &PolicyClient, control: &mut Control) -> Result<Vec<f64>> {
    let clock = monotonic();
    let mut sent = Vec::with_capacity(ACTIONS);
    for i in 0..ACTIONS {
        let mut action = [0.0; 7];
        action[0] = i as f32;
        sent.push(clock.now().0);
        client.send_action(action).context("sending an action")?;
        thread::sleep(PAUSE);
    }
    let arrivals = control.arrivals(ACTIONS)?;
    arrivals
        .iter()
        .map(|&(i, at)| Ok((at - sent.get(i).context("an action that was never sent")?) as f64 * 1e-3))
        .collect()
}

fn note([p50, p90]: &mut [Vec<f64>; 2], took_us: &[f64]) {
    p50.push(percentile(took_us, 50));
    p90.push(percentile(took_us, 90));
}
