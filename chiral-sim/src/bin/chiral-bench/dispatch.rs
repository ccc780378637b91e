//! Rows sent by the client's dispatch: at which rate they reach the robot, and how far off the grid.

use anyhow::{Context, Result};
use chiral_client::blocking::PolicyClient;

use crate::control::Control;
use crate::server::About;
use crate::sheet::{Sheet, percentile};

const STREAM_HZ: f64 = 30.0;
const RATES_HZ: [u32; 4] = [10, 50, 100, 500];
const SECONDS: u32 = 2;

pub(crate) fn run(control: &mut Control, about: &About, sheet: &Sheet, rounds: usize) -> Result<()> {
    let client = PolicyClient::builder(&about.uri()).quiet().connect_blocking().context("connecting")?;
    // The observation after a reset is one captured after it.
    control.set_cameras_hz(STREAM_HZ)?;
    client.reset().context("reset")?;
    control.set_cameras_hz(0.0)?;
    for hz in RATES_HZ {
        for workload in ["idle", &about.workload] {
            let [mut achieved_hz, mut late_us, mut arrival_late_us, mut lost] = [const { Vec::new() }; 4];
            if workload != "idle" {
                control.set_cameras_hz(STREAM_HZ)?;
                client.start_obs_stream(STREAM_HZ).context("starting the stream")?;
            }
            for _ in 0..rounds {
                let round = dispatch(&client, control, hz)?;
                achieved_hz.push(round.achieved_hz);
                late_us.extend(round.late_p50_us);
                arrival_late_us.push(round.arrival_late_p50_us);
                lost.push(round.lost);
            }
            if workload != "idle" {
                client.stop_obs_stream().context("stopping the stream")?;
                control.set_cameras_hz(0.0)?;
            }
            let row = format!("dispatch_{hz}hz");
            sheet.put_under(workload, &row, "asked", "achieved_hz", &[hz.into()]);
            sheet.put_under(workload, &row, "chiral", "achieved_hz", &achieved_hz);
            sheet.put_under(workload, &row, "chiral", "late_p50_us", &late_us);
            sheet.put_under(workload, &row, "chiral", "arrival_late_p50_us", &arrival_late_us);
            sheet.put_under(workload, &row, "chiral", "lost_rows", &lost);
        }
    }
    client.close().context("closing")
}

struct Round {
    /// Rows that were queued and never reached the robot.
    lost: f64,
    achieved_hz: f64,
    /// Of arrivals after the earliest grid of this period that any arrival touches: the way there varies, so this is more than dispatch's own.
    arrival_late_p50_us: f64,
    /// What the client says of its own ticks.
    late_p50_us: Option<f64>,
}

fn dispatch(client: &PolicyClient, control: &mut Control, hz: u32) -> Result<Round> {
    let rows = (hz * SECONDS) as usize + 1;
    client.start_action_dispatch(hz.into()).context("starting dispatch")?;
    for i in 0..rows {
        let mut action = [0.0; 7];
        action[0] = i as f32;
        client.put_action(action).context("queueing an action")?;
    }
    let arrivals = control.arrivals(rows)?;
    let late_p50_us = client.stats().action_lateness_p50.map(|late| late.as_secs_f64() * 1e6);
    client.stop_action_dispatch();
    let times: Vec<i64> = arrivals.iter().map(|&(_, at)| at).collect();
    let (first, last) = (times.first().context("no arrival")?, times.last().context("no arrival")?);
    let period_ns = 1e9 / f64::from(hz);
    let after: Vec<f64> = times.iter().map(|at| (at - first) as f64).collect();
    // Ticks that were skipped show in the rate, not here.
    let off: Vec<f64> = after.iter().map(|at| at - (at / period_ns).round() * period_ns).collect();
    let earliest = off.iter().copied().fold(f64::INFINITY, f64::min);
    let late_us: Vec<f64> = off.iter().map(|off| (off - earliest) * 1e-3).collect();
    let achieved_hz = (times.len() - 1) as f64 / ((last - first) as f64 * 1e-9);
    let lost = (rows - times.len()) as f64;
    if lost > 0.0 {
        eprintln!("{lost} of {rows} rows at {hz} Hz were lost: {:?}", client.stats());
    }
    Ok(Round { lost, achieved_hz, arrival_late_p50_us: percentile(&late_us, 50), late_p50_us })
}
