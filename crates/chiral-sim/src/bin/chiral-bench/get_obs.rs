//! Request and reply by every path in turn: how long one takes, and what CPU time it costs either side.

use std::time::Instant;

use anyhow::{Context, Result};

use crate::control::{Cameras, Control};
use crate::server::{About, Path};
use crate::sheet::{Sheet, percentile};
use crate::usage::Usage;
use crate::{naive, put, query, raw};

/// One way to ask, and what a round of it gave, each.
struct Way {
    name: &'static str,
    ask: Box<dyn FnMut() -> Result<()>>,
    p50_ms: Vec<f64>,
    client_cpu_ms: Vec<f64>,
    server_cpu_ms: Vec<f64>,
}

impl Way {
    fn new(name: &'static str, ask: impl FnMut() -> Result<()> + 'static) -> Way {
        Way {
            name,
            ask: Box::new(ask),
            p50_ms: Vec::new(),
            client_cpu_ms: Vec::new(),
            server_cpu_ms: Vec::new(),
        }
    }

    fn round(&mut self, control: &mut Control, count: usize) -> Result<()> {
        // The first brings back what the other paths have driven from the caches.
        (self.ask)()?;
        let (server, client) = (control.usage()?, Usage::now()?);
        let mut took_ms = Vec::with_capacity(count);
        for _ in 0..count {
            let began = Instant::now();
            (self.ask)()?;
            took_ms.push(began.elapsed().as_secs_f64() * 1e3);
        }
        let (client, server) = (Usage::now()? - client, control.usage()? - server);
        self.p50_ms.push(percentile(&took_ms, 50));
        self.client_cpu_ms.push(client.cpu_s * 1e3 / count as f64);
        self.server_cpu_ms.push(server.cpu_s * 1e3 / count as f64);
        Ok(())
    }
}

pub(crate) fn run(control: &mut Control, about: &About, sheet: &Sheet, rounds: usize) -> Result<()> {
    // About as much data a round whatever the size, within reason.
    let count = (160_000_000 / about.bytes.max(1)).clamp(4, 200);
    let mut blocking = raw::Blocking::connect(about.raw_blocking, about.bytes)?;
    let mut tokio = raw::Tokio::connect(about.raw_tokio, about.bytes)?;
    let mut naive = naive::Client::connect(about.naive, about.bytes)?;
    let mut query = query::Client::connect(about.zenoh_query, about.bytes)?;
    let mut put = put::Client::connect(about.zenoh_put, about.bytes)?;
    let mut ways = vec![
        Way::new("raw_blocking", move || blocking.ask()),
        Way::new("raw_tokio", move || tokio.ask()),
        Way::new("naive", move || naive.ask()),
        Way::new("zenoh_query", move || query.ask()),
        Way::new("zenoh_put", move || put.ask()),
    ];
    let mut clients = Vec::new();
    // A reset waits for pictures that are newer.
    control.set_cameras(Cameras { hz: 30.0, draw: true })?;
    for path in Path::ALL {
        let client = about.watch(path)?;
        clients.push(client.clone());
        ways.push(Way::new(path.name(), move || client.get_obs().map(drop).context("get_obs")));
    }
    control.set_cameras(Cameras::OFF)?;
    // TCP's windows and everyone's buffers have grown by then.
    for way in &mut ways {
        for _ in 0..count.max(20) {
            (way.ask)()?;
        }
    }
    for _ in 0..rounds {
        for way in &mut ways {
            way.round(control, count)?;
        }
    }
    for way in &ways {
        sheet.put("get_obs", way.name, "p50_ms", &way.p50_ms);
        sheet.put("cpu_client", way.name, "ms_per_obs", &way.client_cpu_ms);
        sheet.put("cpu_server", way.name, "ms_per_obs", &way.server_cpu_ms);
    }
    clients.iter().try_for_each(|client| client.close()).context("closing")
}
