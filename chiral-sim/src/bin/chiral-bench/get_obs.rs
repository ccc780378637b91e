//! Request and reply by every path in turn: how long one takes, and what CPU time it costs either side.

use std::time::Instant;

use anyhow::{Context, Result};
use chiral_client::blocking::PolicyClient;

use crate::control::Control;
use crate::server::About;
use crate::sheet::{Sheet, percentile};
use crate::usage::Usage;
use crate::{naive, raw};

/// One way to ask, and what a round of it gave, each.
struct Path {
    name: &'static str,
    ask: Box<dyn FnMut() -> Result<()>>,
    p50_ms: Vec<f64>,
    client_cpu_ms: Vec<f64>,
    server_cpu_ms: Vec<f64>,
}

impl Path {
    fn new(name: &'static str, ask: impl FnMut() -> Result<()> + 'static) -> Path {
        Path { name, ask: Box::new(ask), p50_ms: Vec::new(), client_cpu_ms: Vec::new(), server_cpu_ms: Vec::new() }
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
    let chiral = PolicyClient::builder(&about.uri()).quiet().connect_blocking().context("connecting")?;
    let ours = chiral.clone();
    let mut paths = [
        Path::new("raw_blocking", move || blocking.ask()),
        Path::new("raw_tokio", move || tokio.ask()),
        Path::new("naive", move || naive.ask()),
        Path::new("chiral", move || ours.get_obs().map(drop).context("get_obs")),
    ];
    // TCP's windows and everyone's buffers have grown by then.
    for path in &mut paths {
        for _ in 0..count.max(20) {
            (path.ask)()?;
        }
    }
    for _ in 0..rounds {
        for path in &mut paths {
            path.round(control, count)?;
        }
    }
    for path in &paths {
        sheet.put("get_obs", path.name, "p50_ms", &path.p50_ms);
        sheet.put("cpu_client", path.name, "ms_per_obs", &path.client_cpu_ms);
        sheet.put("cpu_server", path.name, "ms_per_obs", &path.server_cpu_ms);
    }
    chiral.close().context("closing")
}
