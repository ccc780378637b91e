//! What the figures depend on and the bench cannot change: time stolen by neighbours, and TCP's congestion
//! control.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result};

/// A look at the machine.
pub(super) struct Machine {
    at: Instant,
    congestion_control: String,
    cores: usize,
    /// Of all cores, in ticks: all, and stolen by the host (proc_stat(5)).
    ticks: [u64; 2],
}

impl Machine {
    pub(super) fn look() -> Result<Machine> {
        let read = |path: &str| fs::read_to_string(path).with_context(|| format!("reading {path}"));
        let stat = read("/proc/stat")?;
        let fields: Vec<u64> = stat
            .lines()
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .filter_map(|field| field.parse().ok())
            .collect();
        // What guests took, the fields after steal, is within user time already.
        let all = fields.iter().take(8).sum();
        let congestion_control = read("/proc/sys/net/ipv4/tcp_congestion_control")?.trim().to_owned();
        let cores = std::thread::available_parallelism().context("counting cores")?.get();
        Ok(Machine {
            at: Instant::now(),
            congestion_control,
            cores,
            ticks: [all, fields.get(7).copied().unwrap_or(0)],
        })
    }

    /// In words, what happened since.
    pub(super) fn since_then(&self, now: &Machine) -> String {
        let [all, stolen] = [0, 1].map(|i| now.ticks[i].saturating_sub(self.ticks[i]) as f64);
        format!(
            "{} cores; {:.2} % of their time stolen over {:.0} s; congestion control: {} is the system's, the \
             baselines ask for reno, Chiral chooses for itself",
            self.cores,
            100.0 * stolen / all.max(1.0),
            (now.at - self.at).as_secs_f64(),
            self.congestion_control
        )
    }
}
