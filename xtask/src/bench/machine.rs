//! Properties of the machine that affect the figures: stolen CPU time, and TCP's congestion control.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result};

/// The state of the machine at one time.
pub(super) struct Machine {
    at: Instant,
    congestion_control: String,
    cores: usize,
    /// Ticks of all cores: total, and stolen by the host (proc_stat(5)).
    ticks: [u64; 2],
}

impl Machine {
    pub(super) fn read() -> Result<Machine> {
        let read_file = |path: &str| fs::read_to_string(path).with_context(|| format!("reading {path}"));
        let stat = read_file("/proc/stat")?;
        let fields: Vec<u64> = stat
            .lines()
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .filter_map(|field| field.parse().ok())
            .collect();
        // The fields after steal are time of guests, which user time includes already.
        let all = fields.iter().take(8).sum();
        let congestion_control = read_file("/proc/sys/net/ipv4/tcp_congestion_control")?.trim().to_owned();
        let cores = std::thread::available_parallelism().context("counting cores")?.get();
        Ok(Machine {
            at: Instant::now(),
            congestion_control,
            cores,
            ticks: [all, fields.get(7).copied().unwrap_or(0)],
        })
    }

    /// Describes the machine over the time until `now`.
    pub(super) fn describe_until(&self, now: &Machine) -> String {
        let [all, stolen] = [0, 1].map(|i| now.ticks[i].saturating_sub(self.ticks[i]) as f64);
        format!(
            "{} cores, {:.2} % of their time stolen over {:.0} s; congestion control: {} by default, reno for \
             the baselines, chosen by Chiral for its own sockets",
            self.cores,
            100.0 * stolen / all.max(1.0),
            (now.at - self.at).as_secs_f64(),
            self.congestion_control
        )
    }
}
