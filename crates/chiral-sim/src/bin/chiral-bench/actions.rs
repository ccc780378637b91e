//! How long an action takes from `send_action` to `apply_action`, on an otherwise idle connection and during
//! a stream of observations.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use chiral_client::blocking::PolicyClient;
use chiral_server::monotonic;

use crate::control::Control;
use crate::report::{Report, percentile};
use crate::server_info::ServerInfo;

const HZ: f64 = 30.0;
const ACTIONS: usize = 150;
/// No multiple or fraction of the stream's period, so that actions are sent at every phase of it.
const PERIOD: Duration = Duration::from_micros(5_300);

pub(crate) fn run(control: &mut Control, info: &ServerInfo, report: &Report, rounds: usize) -> Result<()> {
    let client = info.connect_controller()?;
    // A reset waits for an observation that is captured after it.
    control.set_cameras_hz(HZ)?;
    client.reset().context("reset")?;
    control.set_cameras_hz(0.0)?;
    send(&client, control)?;
    let (mut idle, mut streaming) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for _ in 0..rounds {
        add_round(&mut idle, &send(&client, control)?);
        control.set_cameras_hz(HZ)?;
        client.start_obs_stream(HZ).context("starting the stream")?;
        add_round(&mut streaming, &send(&client, control)?);
        client.stop_obs_stream().context("stopping the stream")?;
        control.set_cameras_hz(0.0)?;
    }
    for (workload, [p50, p90]) in [("idle", idle), (&info.workload, streaming)] {
        report.print_for(workload, "action", "chiral", "p50_us", &p50);
        report.print_for(workload, "action", "chiral", "p90_us", &p90);
    }
    client.close().context("closing")
}

/// Sends the actions and returns how long each took, in microseconds.
fn send(client: &PolicyClient, control: &mut Control) -> Result<Vec<f64>> {
    let clock = monotonic();
    let mut sent = Vec::with_capacity(ACTIONS);
    for i in 0..ACTIONS {
        let mut action = [0.0; 7];
        action[0] = i as f32;
        sent.push(clock.now().0);
        client.send_action(action).context("sending an action")?;
        thread::sleep(PERIOD);
    }
    let arrivals = control.arrivals(ACTIONS)?;
    arrivals
        .iter()
        .map(
            |&(i, at)| Ok((at - sent.get(i).context("an action arrived that was never sent")?) as f64 * 1e-3),
        )
        .collect()
}

fn add_round([p50, p90]: &mut [Vec<f64>; 2], took_us: &[f64]) {
    p50.push(percentile(took_us, 50));
    p90.push(percentile(took_us, 90));
}
