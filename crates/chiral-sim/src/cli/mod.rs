//! The commands, one file each, and what they share: logging, Ctrl-C, CPU time, how a client finds its robot.

#[cfg(feature = "zenoh")]
pub(crate) mod discover;
pub(crate) mod policy;
#[cfg(feature = "zenoh")]
pub(crate) mod router;
pub(crate) mod serve;
pub(crate) mod watch;
#[cfg(feature = "zenoh")]
mod zenoh;

use std::io::IsTerminal;
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use chiral_client::{Codec, PolicyClient, PolicyClientBuilder};
use rustix::time::{ClockId, clock_gettime};
use tracing_subscriber::EnvFilter;

/// The exit status that shells expect of a program ended by Ctrl-C.
pub(crate) const INTERRUPTED: u8 = 130;

/// Logs to stderr, at this level unless `RUST_LOG` is set. Zenoh's own log is limited to errors, since it
/// warns of every attempt to reach a robot that has not started yet.
pub(crate) fn log(level: &str) {
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(format!("{level},zenoh=error")));
    let ansi = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(ansi)
        .with_target(false)
        .init();
}

/// CPU time that this process has used so far, in seconds over all cores.
pub(crate) fn cpu_seconds() -> f64 {
    let used = clock_gettime(ClockId::ProcessCPUTime);
    used.tv_sec as f64 + used.tv_nsec as f64 * 1e-9
}

/// How a client finds its robot.
#[derive(clap::Args)]
pub(crate) struct Target {
    /// Address of the robot: ws:// or wss://; for Zenoh tcp/HOST:PORT, tls/HOST:PORT, quic/HOST:PORT,
    /// unixsock-stream/PATH, or zenoh:NAME to find it by its name. Default: ws://localhost:8765; with
    /// --robot tcp/localhost:7447; with --zenoh-config zenoh:
    #[arg(value_name = "URI")]
    uri: Option<String>,
    #[cfg(feature = "zenoh")]
    #[command(flatten)]
    zenoh: zenoh::ClientOptions,
    /// Accept only this wire format; by default protobuf, and msgpack if the server is a legacy server
    #[arg(long, value_enum)]
    codec: Option<Wire>,
    /// Print nothing while waiting for the server, and only the summary at the end
    #[arg(long)]
    pub(crate) quiet: bool,
    /// Fail if no server is reached within this time; by default wait without limit
    #[arg(long, value_name = "SECONDS")]
    wait: Option<f64>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Wire {
    /// The format of chiral.v1 servers
    Protobuf,
    /// The format of legacy servers
    Msgpack,
}

/// A codec's name, for tables.
pub(crate) fn name(codec: Codec) -> &'static str {
    if codec == Codec::Msgpack { "msgpack" } else { "protobuf" }
}

impl Target {
    pub(crate) fn uri(&self) -> &str {
        #[cfg(feature = "zenoh")]
        let default = self.zenoh.default_uri();
        #[cfg(not(feature = "zenoh"))]
        let default = None;
        self.uri.as_deref().or(default).unwrap_or(PolicyClient::DEFAULT_URI)
    }

    /// A client that has yet to connect.
    pub(crate) fn client(&self) -> Result<PolicyClientBuilder> {
        let builder = PolicyClient::builder(self.uri());
        #[cfg(feature = "zenoh")]
        let builder = self.zenoh.apply(builder);
        let builder = match self.codec {
            Some(Wire::Protobuf) => builder.codec(Codec::Protobuf),
            Some(Wire::Msgpack) => builder.codec(Codec::Msgpack),
            None => builder,
        };
        let builder = if self.quiet { builder.quiet() } else { builder };
        Ok(match self.wait {
            Some(seconds) => builder.deadline(Duration::try_from_secs_f64(seconds).context("--wait")?),
            None => builder,
        })
    }
}

/// Completes on Ctrl-C or SIGTERM.
pub(crate) async fn shutdown_signal() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
            return;
        }
    }
    let _ = tokio::signal::ctrl_c().await;
}

/// Handles Ctrl-C in a client's process.
pub(crate) struct Interrupt {
    requested: AtomicBool,
    /// Whether there is a session to close before the process exits.
    connected: AtomicBool,
}

impl Interrupt {
    /// How long closing may take after Ctrl-C.
    const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);

    /// Starts to listen for Ctrl-C. Before [`Interrupt::connected`] it ends the process at once. After that
    /// it sets [`Interrupt::requested`]; a second Ctrl-C, or a timeout, still ends the process at once.
    pub(crate) fn listen() -> Result<&'static Interrupt> {
        static INTERRUPT: Interrupt =
            Interrupt { requested: AtomicBool::new(false), connected: AtomicBool::new(false) };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("starting a runtime")?;
        let wait = async || {
            if tokio::signal::ctrl_c().await.is_err() {
                std::future::pending().await
            }
        };
        let listen = move || {
            runtime.block_on(async {
                wait().await;
                INTERRUPT.requested.store(true, Ordering::Relaxed);
                if INTERRUPT.connected.load(Ordering::Relaxed) {
                    let _ = tokio::time::timeout(Interrupt::CLOSE_TIMEOUT, wait()).await;
                }
                process::exit(INTERRUPTED.into());
            });
        };
        thread::Builder::new().name("interrupt".to_owned()).spawn(listen).context("starting a thread")?;
        Ok(&INTERRUPT)
    }

    /// Notes that there is a session, which is to be closed before the process exits.
    pub(crate) fn connected(&self) {
        self.connected.store(true, Ordering::Relaxed);
    }

    /// Set by Ctrl-C.
    pub(crate) fn requested(&self) -> &AtomicBool {
        &self.requested
    }

    pub(crate) fn is_requested(&self) -> bool {
        self.requested.load(Ordering::Relaxed)
    }
}
