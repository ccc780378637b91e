//! The server process: one workload, by raw TCP, by the naive path and by Chiral, and a control connection for the client that measures.

use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use chiral_server::PolicyServer;
use serde_json::json;

use crate::control::{self, Host};
use crate::workload::{Arrivals, Noting, Prepared, Workload};
use crate::{naive, raw};

/// No part of a bench takes so long; a server that was forgotten ends by itself.
const LIFETIME: Duration = Duration::from_secs(900);

/// Serves until it is killed. Prints where the control connection is.
pub(crate) fn run(workload: Workload) -> Result<()> {
    let prepared = Prepared::new(workload)?;
    let bytes = prepared.observed_bytes()?;
    let reply = Bytes::from(vec![1; bytes]);
    let arrivals = Arrivals::default();
    let server = PolicyServer::builder(Noting(Arc::clone(&arrivals)), prepared.sensors.clone()).name("bench").build()?;

    let (blocking, tokio, axum) = (raw::listen()?, raw::listen()?, raw::listen()?);
    // Chiral's is as every user's: what suits loopback, it must find out by itself.
    let chiral = TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).context("listening")?;
    let address = |listener: &TcpListener| listener.local_addr().map(|address| address.to_string());
    let about = json!({
        "workload": workload.to_string(), "bytes": bytes, "raw_blocking": address(&blocking)?, "raw_tokio": address(&tokio)?,
        "naive": address(&axum)?, "chiral": address(&chiral)?,
    });

    let reply_by = |serve: fn(TcpListener, &Bytes) -> Result<()>, listener| {
        let reply = reply.clone();
        thread::spawn(move || serve(listener, &reply))
    };
    reply_by(raw::serve_blocking, blocking);
    reply_by(raw::serve_tokio, tokio);
    reply_by(naive::serve, axum);
    thread::spawn(move || serve_chiral(server, chiral));

    let rate_hz = Arc::new(Mutex::new(0.0));
    let publisher = Arc::clone(&rate_hz);
    thread::spawn(move || publish(prepared, &publisher));
    thread::spawn(|| {
        thread::sleep(LIFETIME);
        std::process::exit(1);
    });
    let host = Host { about, arrivals, rate_hz };
    let listener = raw::listen()?;
    println!("{}", json!({"control": address(&listener)?}));
    control::serve(&listener, &host)
}

fn serve_chiral(server: PolicyServer, listener: TcpListener) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting a runtime")?;
    runtime.block_on(async { Ok(server.serve_on(raw::from_std(listener)?).await?) })
}

/// Publishes at the rate that the client sets, on absolute deadlines; nothing at 0.
fn publish(mut prepared: Prepared, rate_hz: &Mutex<f64>) -> Result<()> {
    const IDLE: Duration = Duration::from_millis(20);
    let mut due = Instant::now();
    loop {
        let hz = *rate_hz.lock().unwrap_or_else(PoisonError::into_inner);
        due = if hz > 0.0 { due.max(Instant::now()) } else { Instant::now() + IDLE };
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if hz > 0.0 {
            prepared.publish()?;
            due += Duration::from_secs_f64(1.0 / hz);
            thread::sleep(due.saturating_duration_since(Instant::now()));
        }
    }
}

/// Where a server can be asked for what.
#[derive(Clone, Debug)]
pub(crate) struct About {
    pub(crate) workload: String,
    pub(crate) bytes: usize,
    pub(crate) raw_blocking: SocketAddr,
    pub(crate) raw_tokio: SocketAddr,
    pub(crate) naive: SocketAddr,
    pub(crate) chiral: SocketAddr,
}

impl About {
    pub(crate) fn uri(&self) -> String {
        format!("ws://{}", self.chiral)
    }
}
