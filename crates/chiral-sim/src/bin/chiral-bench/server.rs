//! The server process: one workload, by raw TCP, by the naive path and by Chiral, and a control connection
//! for the client that measures.

use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use chiral_client::PolicyClient;
use chiral_client::blocking;
use chiral_proto::Codec;
use chiral_server::PolicyServer;
use serde_json::json;

use crate::control::{self, Cameras, Runtime};
use crate::workload::{Arrivals, Noting, Prepared, Workload};
use crate::{naive, put, query, raw};

/// No part of a bench takes so long; a server that was forgotten ends by itself.
const LIFETIME: Duration = Duration::from_secs(900);

/// Serves until it is killed. Prints where the control connection is.
pub(crate) fn run(workload: Workload) -> Result<()> {
    // Two robots, since the pictures of one that is on Zenoh lie in shared memory, whose pages are small.
    let (mut heap, mut shared) = (Prepared::new(workload)?, Prepared::new(workload)?);
    let arrivals = Arrivals::default();
    let [zenoh, zenoh_query, zenoh_put] =
        [query::free_address()?, query::free_address()?, query::free_address()?];
    let server =
        PolicyServer::builder(Noting(Arc::clone(&arrivals)), heap.sensors.clone()).name("bench").build()?;
    let on_zenoh = PolicyServer::builder(Noting(Arc::default()), shared.sensors.clone()).name("bench");
    let on_zenoh = on_zenoh.listen_zenoh(format!("tcp/{zenoh}")).discovery(false).build()?;
    // Now that there is shared memory for the pictures to lie in.
    heap.prepare()?;
    shared.prepare()?;
    let bytes = heap.observed_bytes()?;
    let reply = Bytes::from(vec![1; bytes]);
    let _answering = (query::serve(zenoh_query, &reply)?, put::serve(zenoh_put, &reply)?);

    let (blocking, tokio, axum) = (raw::listen()?, raw::listen()?, raw::listen()?);
    // Chiral's is as every user's: what suits loopback, it must find out by itself.
    let chiral = TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).context("listening")?;
    let address = |listener: &TcpListener| listener.local_addr().map(|address| address.to_string());
    let about = json!({
        "workload": workload.to_string(), "bytes": bytes, "raw_blocking": address(&blocking)?, "raw_tokio": address(&tokio)?,
        "naive": address(&axum)?, "chiral": address(&chiral)?, "zenoh": zenoh, "zenoh_query": zenoh_query,
        "zenoh_put": zenoh_put,
    });

    let reply_by = |serve: fn(TcpListener, &Bytes) -> Result<()>, listener| {
        let reply = reply.clone();
        thread::spawn(move || serve(listener, &reply))
    };
    reply_by(raw::serve_blocking, blocking);
    reply_by(raw::serve_tokio, tokio);
    reply_by(naive::serve, axum);
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
    let host = Runtime { about, arrivals, cameras };
    let listener = raw::listen()?;
    println!("{}", json!({"control": address(&listener)?}));
    control::serve(&listener, &host)
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting a runtime")
}

/// Publishes as the client says, on absolute deadlines.
fn publish(mut heap: Prepared, mut shared: Prepared, cameras: &Mutex<Cameras>) -> Result<()> {
    const IDLE: Duration = Duration::from_millis(20);
    let mut due = Instant::now();
    loop {
        let Cameras { hz, draw } = *cameras.lock().unwrap_or_else(PoisonError::into_inner);
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

/// Where a server can be asked for what.
#[derive(Clone, Debug)]
pub(crate) struct About {
    pub(crate) workload: String,
    pub(crate) bytes: usize,
    pub(crate) raw_blocking: SocketAddr,
    pub(crate) raw_tokio: SocketAddr,
    pub(crate) naive: SocketAddr,
    pub(crate) chiral: SocketAddr,
    pub(crate) zenoh: SocketAddr,
    pub(crate) zenoh_query: SocketAddr,
    pub(crate) zenoh_put: SocketAddr,
}

/// By what Chiral's client reaches Chiral's server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Path {
    #[value(name = "chiral")]
    WebSocket,
    #[value(name = "msgpack")]
    Legacy,
    #[value(name = "zenoh_tcp")]
    ZenohTcp,
    #[value(name = "zenoh_shm")]
    ZenohSharedMemory,
    #[value(name = "zenoh_msgpack")]
    ZenohLegacy,
}

impl Path {
    pub(crate) const ALL: [Path; 5] =
        [Path::WebSocket, Path::Legacy, Path::ZenohTcp, Path::ZenohSharedMemory, Path::ZenohLegacy];

    /// As figures are told under.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Path::WebSocket => "chiral",
            // By the wire of legacy peers, both ends ours.
            Path::Legacy => "msgpack",
            Path::ZenohTcp => "zenoh_tcp",
            Path::ZenohSharedMemory => "zenoh_shm",
            // On the keys that legacy peers share.
            Path::ZenohLegacy => "zenoh_msgpack",
        }
    }
}

impl About {
    /// The one client that drives.
    pub(crate) fn drive(&self) -> Result<blocking::PolicyClient> {
        self.connect(Path::WebSocket, true)
    }

    /// A client that looks on.
    pub(crate) fn watch(&self, path: Path) -> Result<blocking::PolicyClient> {
        if path != Path::ZenohLegacy {
            return self.connect(path, false);
        }
        // Which may be asked for observations only once it has reset, in case that its first question was
        // lost.
        let client = self.connect(path, true)?;
        client.reset().context("reset")?;
        Ok(client)
    }

    fn connect(&self, path: Path, drives: bool) -> Result<blocking::PolicyClient> {
        let uri = match path {
            Path::WebSocket | Path::Legacy => format!("ws://{}", self.chiral),
            Path::ZenohTcp | Path::ZenohSharedMemory | Path::ZenohLegacy => format!("tcp/{}", self.zenoh),
        };
        let builder = PolicyClient::builder(&uri).quiet().shared_memory(path == Path::ZenohSharedMemory);
        let builder = if drives { builder } else { builder.observer() };
        let is_legacy = matches!(path, Path::Legacy | Path::ZenohLegacy);
        let builder = if is_legacy { builder.codec(Codec::Msgpack) } else { builder };
        builder.connect_blocking().with_context(|| format!("connecting to {uri}"))
    }
}
