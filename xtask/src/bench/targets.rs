//! What Chiral has to reach.

use super::figures::Row;

/// A bound on one figure.
pub(super) struct Target {
    row: &'static str,
    workload: &'static str,
    metric: &'static str,
    /// A ratio is bounded where there is one, else the value.
    against: Option<&'static str>,
    cores: u8,
    must: Bound,
}

/// On which side of what.
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
    must: Bound,
) -> Target {
    Target { row, workload, metric, against: Some(against), cores, must }
}

const fn value(row: &'static str, workload: &'static str, metric: &'static str, must: Bound) -> Target {
    Target { row, workload, metric, against: None, cores: 2, must }
}

const TARGETS: &[Target] = &[
    ratio("get_obs", "L", "p50_ms", "raw_tcp", 2, AtMost(1.25)),
    ratio("get_obs", "L", "p50_ms", "naive", 2, AtMost(0.70)),
    ratio("get_obs", "M", "p50_ms", "raw_tcp", 1, AtMost(1.6)),
    ratio("get_obs", "S", "p50_ms", "raw_tcp", 1, AtMost(2.5)),
    ratio("cpu_server", "L", "ms_per_obs", "raw_tcp", 2, AtMost(1.2)),
    ratio("get_obs.msgpack", "L", "p50_ms", "chiral", 2, AtMost(1.15)),
    // Bare puts of the same bytes are the most that Zenoh's connection can do; 56 bytes are held against a query.
    ratio("get_obs.zenoh_tcp", "L", "p50_ms", "zenoh_put", 2, AtMost(1.2)),
    ratio("get_obs.zenoh_shm", "L", "p50_ms", "raw_tcp", 2, AtMost(0.10)),
    // By the wire of legacy peers against ours, as by WebSocket.
    ratio("get_obs.zenoh_msgpack", "L", "p50_ms", "zenoh_tcp", 2, AtMost(1.15)),
    // 56 bytes, so that nothing is shared.
    ratio("get_obs.zenoh_tcp", "S", "p50_ms", "zenoh_query", 2, AtMost(1.25)),
    ratio("cpu_server.zenoh_shm", "L", "ms_per_obs", "raw_tcp", 2, AtMost(0.25)),
    // 30 Hz wherever raw TCP has them; its clock and ours differ by a rounding.
    ratio("stream_30hz", "L", "achieved_hz", "raw_tcp", 2, AtLeast(0.999)),
    ratio("action", "L", "p90_us", "idle", 2, AtMost(1.5)),
    ratio("dispatch_100hz", "idle", "achieved_hz", "asked", 2, AtLeast(0.999)),
    ratio("dispatch_100hz", "L", "achieved_hz", "asked", 2, AtLeast(0.999)),
    value("dispatch_100hz", "idle", "late_p50_us", AtMost(50.0)),
    value("dispatch_500hz", "idle", "late_p50_us", AtMost(50.0)),
    value("snapshot", "L", "p50_us", AtMost(100.0)),
    value("page_faults", "L", "client_per_obs", Under(50.0)),
    // Three observations and 32 MB.
    value("rss", "L", "client_added_mb", AtMost(83.6)),
    value("soak.zenoh_tcp", "L", "client_peak_growth", Under(1.05)),
    value("soak.zenoh_tcp", "L", "server_peak_growth", Under(1.05)),
    value("soak.zenoh_shm", "L", "client_peak_growth", Under(1.05)),
    value("soak.zenoh_shm", "L", "server_peak_growth", Under(1.05)),
];

impl Bound {
    fn holds(self, value: f64) -> bool {
        match self {
            AtMost(bound) => value <= bound,
            Under(bound) => value < bound,
            AtLeast(bound) => value >= bound,
        }
    }
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            AtMost(bound) => write!(f, "at most {bound}"),
            Under(bound) => write!(f, "under {bound}"),
            AtLeast(bound) => write!(f, "at least {bound}"),
        }
    }
}

/// The target of this row, what is held against it, and whether that is met; `None` where nothing is asked.
pub(super) fn judge(row: &Row) -> Option<(Bound, f64, bool)> {
    let target = TARGETS.iter().find(|target| {
        (target.row, target.workload, target.metric, target.cores)
            == (&*row.row, &*row.workload, &*row.metric, row.cores)
            && target.against == row.against
    })?;
    let found = row.ratio.unwrap_or(row.value);
    Some((target.must, found, target.must.holds(found)))
}
