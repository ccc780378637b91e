//! Rows sent by the client's dispatch: the rate at which they reach the robot, and how late they are.

use std::f64::consts::TAU;

use anyhow::{Context, Result};
use chiral_client::blocking::PolicyClient;

use crate::control::Control;
use crate::report::{Report, percentile};
use crate::server_info::ServerInfo;

const STREAM_HZ: f64 = 30.0;
const RATES_HZ: [u32; 4] = [10, 50, 100, 500];
const SECONDS: u32 = 2;

pub(crate) fn run(control: &mut Control, info: &ServerInfo, report: &Report, rounds: usize) -> Result<()> {
    let client = info.connect_controller()?;
    // A reset waits for an observation that is captured after it.
    control.set_cameras_hz(STREAM_HZ)?;
    client.reset().context("reset")?;
    control.set_cameras_hz(0.0)?;
    for hz in RATES_HZ {
        for workload in ["idle", &info.workload] {
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
            report.print_for(workload, &row, "asked", "achieved_hz", &[hz.into()]);
            report.print_for(workload, &row, "chiral", "achieved_hz", &achieved_hz);
            report.print_for(workload, &row, "chiral", "late_p50_us", &late_us);
            report.print_for(workload, &row, "chiral", "arrival_late_p50_us", &arrival_late_us);
            report.print_for(workload, &row, "chiral", "lost_rows", &lost);
        }
    }
    client.close().context("closing")
}

struct Round {
    /// Rows that were queued and never reached the robot.
    lost: f64,
    achieved_hz: f64,
    /// How late rows arrive, see [`late_us`]. Includes the varying time in transit, so it exceeds dispatch's
    /// own lateness.
    arrival_late_p50_us: f64,
    /// How late the client's ticks are, by its own statistics.
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
    let after_ns: Vec<f64> = times.iter().map(|at| (at - first) as f64).collect();
    let late_us = late_us(&after_ns, period_ns);
    let achieved_hz = (times.len() - 1) as f64 / ((last - first) as f64 * 1e-9);
    let lost = (rows - times.len()) as f64;
    if lost > 0.0 {
        eprintln!("{lost} of {rows} rows at {hz} Hz were lost: {:?}", client.stats());
    }
    Ok(Round { lost, achieved_hz, arrival_late_p50_us: percentile(&late_us, 50), late_p50_us })
}

/// How late arrivals are after the ticks of this period, in microseconds. The ticks' phase is unknown here;
/// the one taken makes the earliest twentieth of the arrivals punctual. Skipped ticks show in the rate, not
/// here.
fn late_us(after_ns: &[f64], period_ns: f64) -> Vec<f64> {
    // Phases are circular, so they are compared with their circular mean.
    let angles = after_ns.iter().map(|at| at / period_ns * TAU);
    let (sin, cos) = angles.fold((0.0, 0.0), |(sin, cos), angle| (sin + angle.sin(), cos + angle.cos()));
    let mean_ns = f64::atan2(sin, cos) / TAU * period_ns;
    let off_ns: Vec<f64> =
        after_ns.iter().map(|at| (at - mean_ns + period_ns / 2.0).rem_euclid(period_ns)).collect();
    let earliest_ns = percentile(&off_ns, 5);
    off_ns.iter().map(|off| (off - earliest_ns).max(0.0) * 1e-3).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lateness_does_not_depend_on_the_phase_of_the_ticks() {
        const PERIOD_NS: f64 = 2e6;
        for phase_ns in [0.0, 0.9e6, 1.0e6, 1.9e6] {
            // A tenth on time, most 100 µs late, a few by more than half a period.
            let late = |i: usize| {
                let usual = if i.is_multiple_of(10) { 0.0 } else { 1e5 };
                usual + if i % 100 == 7 { 1.5e6 } else { 0.0 }
            };
            let after_ns: Vec<f64> = (0..1000).map(|i| phase_ns + i as f64 * PERIOD_NS + late(i)).collect();
            assert!(
                (percentile(&late_us(&after_ns, PERIOD_NS), 50) - 100.0).abs() < 1e-3,
                "phase {phase_ns}"
            );
        }
    }
}
