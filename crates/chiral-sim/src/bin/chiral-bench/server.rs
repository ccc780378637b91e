//! The server process: serves one workload over raw TCP, bare Zenoh, the naive path and Chiral, and answers
//! the measuring client on a control connection.

use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use chiral_server::PolicyServer;
use serde_json::json;

use crate::control::{self, Cameras, ServerState};
use crate::workload::{Arrivals, Prepared, RecordingRobot, Workload};
use crate::{naive, put, query, raw};
use chiral_proto::lock;

/// Longer than any part of the bench takes, so that a server left behind exits.
const LIFETIME: Duration = Duration::from_secs(900);

/// Serves until it is killed. Prints the address for control connections.
pub(crate) fn run(workload: Workload) -> Result<()> {
    // Two robots: on Zenoh pictures are in shared memory, whose pages are small.
    let (mut heap, mut shared) = (Prepared::new(workload)?, Prepared::new(workload)?);
    let arrivals = Arrivals::default();
    let [zenoh, zenoh_query, zenoh_put] =
        [query::free_address()?, query::free_address()?, query::free_address()?];
    let server = PolicyServer::builder(RecordingRobot(Arc::clone(&arrivals)), heap.sensors.clone())
        .name("bench")
        .build()?;
    let on_zenoh =
        PolicyServer::builder(RecordingRobot(Arc::default()), shared.sensors.clone()).name("bench");
    let on_zenoh = on_zenoh.listen_zenoh(format!("tcp/{zenoh}")).legacy_zenoh(true).build()?;
    // Only after `build`, which sets up the shared memory that pictures are drawn into.
    heap.prepare()?;
    shared.prepare()?;
    let bytes = heap.observed_bytes()?;
    let reply = Bytes::from(vec![1; bytes]);
    let _zenoh_baselines = (query::serve(zenoh_query, &reply)?, put::serve(zenoh_put, &reply)?);

    let (blocking, tokio, axum) = (raw::listen()?, raw::listen()?, raw::listen()?);
    // Chiral gets an ordinary listener, as users have: it sets congestion control for loopback itself.
    let chiral = TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).context("listening")?;
    let address = |listener: &TcpListener| listener.local_addr().map(|address| address.to_string());
    let info = json!({
        "workload": workload.to_string(), "bytes": bytes, "raw_blocking": address(&blocking)?,
        "raw_tokio": address(&tokio)?, "naive": address(&axum)?, "chiral": address(&chiral)?, "zenoh": zenoh,
        "zenoh_query": zenoh_query, "zenoh_put": zenoh_put,
    });

    let serve_in_thread = |serve: fn(TcpListener, &Bytes) -> Result<()>, listener| {
        let reply = reply.clone();
        thread::spawn(move || serve(listener, &reply))
    };
    serve_in_thread(raw::serve_blocking, blocking);
    serve_in_thread(raw::serve_tokio, tokio);
    serve_in_thread(naive::serve, axum);
    thread::spawn(move || {
        runtime()?.block_on(async { Ok::<_, anyhow::Error>(server.serve_on(raw::from_std(chiral)?).await?) })
    });
    thread::spawn(move || {
        runtime()?.block_on(async { Ok::<_, anyhow::Error>(on_zenoh.serve_zenoh().await?) })
    });

    let cameras = Arc::new(Mutex::new(Cameras::OFF));
    let publisher = Arc::clone(&cameras);
    thread::spawn(move || publish(heap, shared, &publisher));
    thread::spawn(|| {
        thread::sleep(LIFETIME);
        std::process::exit(1);
    });
    let state = ServerState { info, arrivals, cameras };
    let listener = raw::listen()?;
    println!("{}", json!({"control": address(&listener)?}));
    control::serve(&listener, &state)
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting a runtime")
}

/// Publishes at the rate the client has set, on absolute deadlines.
fn publish(mut heap: Prepared, mut shared: Prepared, cameras: &Mutex<Cameras>) -> Result<()> {
    const IDLE: Duration = Duration::from_millis(20);
    let mut due = Instant::now();
    loop {
        let Cameras { hz, draw } = *lock(cameras);
        due = if hz > 0.0 { due.max(Instant::now()) } else { Instant::now() + IDLE };
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if hz > 0.0 {
            if draw {
                shared.draw()?;
            } else {
                heap.publish()?;
            }
            due += Duration::from_secs_f64(1.0 / hz);
            thread::sleep(due.saturating_duration_since(Instant::now()));
        }
    }
}
