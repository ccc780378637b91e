//! Request and reply over every path in turn: how long one takes, and the CPU time it costs on either side.

use std::time::Instant;

use anyhow::{Context, Result};

use crate::control::{Cameras, Control};
use crate::report::{Report, percentile};
use crate::server_info::{Path, ServerInfo};
use crate::usage::Usage;
use crate::{naive, put, query, raw};

/// A path, and its figures: one value per round each.
struct Series {
    name: &'static str,
    request: Box<dyn FnMut() -> Result<()>>,
    p50_ms: Vec<f64>,
    client_cpu_ms: Vec<f64>,
    server_cpu_ms: Vec<f64>,
}

impl Series {
    fn new(name: &'static str, request: impl FnMut() -> Result<()> + 'static) -> Series {
        Series {
            name,
            request: Box::new(request),
            p50_ms: Vec::new(),
            client_cpu_ms: Vec::new(),
            server_cpu_ms: Vec::new(),
        }
    }

    fn measure_round(&mut self, control: &mut Control, count: usize) -> Result<()> {
        // One request outside the measurement: the other paths have evicted this one from the caches.
        (self.request)()?;
        let (server, client) = (control.usage()?, Usage::now()?);
        let mut took_ms = Vec::with_capacity(count);
        for _ in 0..count {
            let start = Instant::now();
            (self.request)()?;
            took_ms.push(start.elapsed().as_secs_f64() * 1e3);
        }
        let (client, server) = (Usage::now()? - client, control.usage()? - server);
        self.p50_ms.push(percentile(&took_ms, 50));
        self.client_cpu_ms.push(client.cpu_s * 1e3 / count as f64);
        self.server_cpu_ms.push(server.cpu_s * 1e3 / count as f64);
        Ok(())
    }
}

pub(crate) fn run(control: &mut Control, info: &ServerInfo, report: &Report, rounds: usize) -> Result<()> {
    // About the same amount of data in every round, within limits.
    let count = (160_000_000 / info.bytes.max(1)).clamp(4, 200);
    let mut blocking = raw::Blocking::connect(info.raw_blocking, info.bytes)?;
    let mut tokio = raw::Tokio::connect(info.raw_tokio, info.bytes)?;
    let mut naive = naive::Client::connect(info.naive, info.bytes)?;
    let mut query = query::Client::connect(info.zenoh_query, info.bytes)?;
    let mut put = put::Client::connect(info.zenoh_put, info.bytes)?;
    let mut all = vec![
        Series::new("raw_blocking", move || blocking.request()),
        Series::new("raw_tokio", move || tokio.request()),
        Series::new("naive", move || naive.request()),
        Series::new("zenoh_query", move || query.request()),
        Series::new("zenoh_put", move || put.request()),
    ];
    let mut clients = Vec::new();
    // The legacy Zenoh client resets on connecting, and a reset waits for newer pictures.
    control.set_cameras(Cameras { hz: 30.0, draw: true })?;
    for path in Path::ALL {
        let client = info.connect_observer(path)?;
        clients.push(client.clone());
        all.push(Series::new(path.name(), move || client.get_obs().map(drop).context("get_obs")));
    }
    control.set_cameras(Cameras::OFF)?;
    // Warm up: let TCP's windows and all buffers grow.
    for series in &mut all {
        for _ in 0..count.max(20) {
            (series.request)()?;
        }
    }
    for _ in 0..rounds {
        for series in &mut all {
            series.measure_round(control, count)?;
        }
    }
    for series in &all {
        report.print("get_obs", series.name, "p50_ms", &series.p50_ms);
        report.print("cpu_client", series.name, "ms_per_obs", &series.client_cpu_ms);
        report.print("cpu_server", series.name, "ms_per_obs", &series.server_cpu_ms);
    }
    clients.iter().try_for_each(|client| client.close()).context("closing")
}
