//! The performance targets.

use super::figures::Row;

/// A bound on one figure.
pub(super) struct Target {
    row: &'static str,
    workload: &'static str,
    metric: &'static str,
    /// The baseline of the bounded ratio; without one the value itself is bounded.
    against: Option<&'static str>,
    cores: u8,
    bound: Bound,
}

/// The required range.
#[derive(Clone, Copy)]
pub(super) enum Bound {
    AtMost(f64),
    Under(f64),
    AtLeast(f64),
}

use Bound::{AtLeast, AtMost, Under};

const fn ratio(
    row: &'static str,
    workload: &'static str,
    metric: &'static str,
    against: &'static str,
    cores: u8,
    bound: Bound,
) -> Target {
    Target { row, workload, metric, against: Some(against), cores, bound }
}

const fn value(row: &'static str, workload: &'static str, metric: &'static str, bound: Bound) -> Target {
    Target { row, workload, metric, against: None, cores: 2, bound }
}

const TARGETS: &[Target] = &[
    ratio("get_obs", "L", "p50_ms", "raw_tcp", 2, AtMost(1.25)),
    ratio("get_obs", "L", "p50_ms", "naive", 2, AtMost(0.70)),
    ratio("get_obs", "M", "p50_ms", "raw_tcp", 1, AtMost(1.6)),
    ratio("get_obs", "S", "p50_ms", "raw_tcp", 1, AtMost(2.5)),
    ratio("cpu_server", "L", "ms_per_obs", "raw_tcp", 2, AtMost(1.2)),
    ratio("get_obs.msgpack", "L", "p50_ms", "chiral", 2, AtMost(1.15)),
    // Bare puts of the same bytes are the fastest that Zenoh's connection can be.
    ratio("get_obs.zenoh_tcp", "L", "p50_ms", "zenoh_put", 2, AtMost(1.2)),
    // To aim at: 0.05.
    ratio("get_obs.zenoh_shm", "L", "p50_ms", "raw_tcp", 2, AtMost(0.10)),
    // The legacy wire compared with ours, as over WebSocket.
    ratio("get_obs.zenoh_msgpack", "L", "p50_ms", "zenoh_tcp", 2, AtMost(1.15)),
    // 56 bytes are too few for shared memory.
    ratio("get_obs.zenoh_tcp", "S", "p50_ms", "zenoh_query", 2, AtMost(1.25)),
    ratio("cpu_server.zenoh_shm", "L", "ms_per_obs", "raw_tcp", 2, AtMost(0.25)),
    // 30 Hz wherever raw TCP reaches it; the tolerance is for rounding.
    ratio("stream_30hz", "L", "achieved_hz", "raw_tcp", 2, AtLeast(0.999)),
    ratio("action", "L", "p90_us", "idle", 2, AtMost(1.5)),
    ratio("dispatch_100hz", "idle", "achieved_hz", "asked", 2, AtLeast(0.999)),
    ratio("dispatch_100hz", "L", "achieved_hz", "asked", 2, AtLeast(0.999)),
    value("dispatch_100hz", "idle", "late_p50_us", AtMost(50.0)),
    value("dispatch_500hz", "idle", "late_p50_us", AtMost(50.0)),
    value("snapshot", "L", "p50_us", AtMost(100.0)),
    value("page_faults", "L", "client_per_obs", Under(50.0)),
    // Three observations (17.2 MB each) and 32 MB.
    value("rss", "L", "client_added_mb", AtMost(83.6)),
    value("soak.zenoh_tcp", "L", "client_peak_growth", Under(1.05)),
    value("soak.zenoh_tcp", "L", "server_peak_growth", Under(1.05)),
    value("soak.zenoh_shm", "L", "client_peak_growth", Under(1.05)),
    value("soak.zenoh_shm", "L", "server_peak_growth", Under(1.05)),
];

impl Bound {
    fn holds(self, value: f64) -> bool {
        match self {
            AtMost(limit) => value <= limit,
            Under(limit) => value < limit,
            AtLeast(limit) => value >= limit,
        }
    }
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            AtMost(limit) => write!(f, "at most {limit}"),
            Under(limit) => write!(f, "under {limit}"),
            AtLeast(limit) => write!(f, "at least {limit}"),
        }
    }
}

/// The bound of this row's target, the figure that it bounds, and whether the target is met; `None` without a
/// target.
pub(super) fn judge(row: &Row) -> Option<(Bound, f64, bool)> {
    let target = TARGETS.iter().find(|target| {
        (target.row, target.workload, target.metric, target.cores)
            == (&*row.row, &*row.workload, &*row.metric, row.cores)
            && target.against == row.against
    })?;
    let found = row.ratio.unwrap_or(row.value);
    Some((target.bound, found, target.bound.holds(found)))
}
