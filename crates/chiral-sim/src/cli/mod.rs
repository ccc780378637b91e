//! The commands, a file each, and what they share: logs, Ctrl-C, the process's own CPU time.

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

/// What shells expect of a program that Ctrl-C ended.
pub(crate) const INTERRUPTED: u8 = 130;

/// Logs to stderr, as `RUST_LOG` says, else from this level up; of Zenoh errors only, since it warns of each
/// attempt to find a robot that is not there yet.
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

/// Seconds that the CPU has spent on this process so far, on all cores together.
pub(crate) fn cpu_seconds() -> f64 {
    let used = clock_gettime(ClockId::ProcessCPUTime);
    used.tv_sec as f64 + used.tv_nsec as f64 * 1e-9
}

/// How a client finds its robot.
#[derive(clap::Args)]
pub(crate) struct Target {
    /// The robot: ws:// or wss://, or of Zenoh's tcp/HOST:PORT, tls/HOST:PORT, quic/HOST:PORT,
    /// unixsock-stream/PATH, or zenoh:NAME for one found by its name; by default ws://localhost:8765, with
    /// --robot tcp/localhost:7447, with --zenoh-config zenoh:
    #[arg(value_name = "URI")]
    uri: Option<String>,
    #[cfg(feature = "zenoh")]
    #[command(flatten)]
    zenoh: zenoh::ClientOptions,
    /// The one wire that will do; by default ours, or else that of legacy servers
    #[arg(long, value_enum)]
    codec: Option<Wire>,
    /// Say nothing while waiting for the server, and print the summary only
    #[arg(long)]
    pub(crate) quiet: bool,
    /// Give up if there is no server for so long; without, wait for ever
    #[arg(long, value_name = "SECONDS")]
    wait: Option<f64>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Wire {
    /// That of our own servers
    Protobuf,
    /// That of the peers before us
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

    /// A client yet to be connected.
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

/// Returns on Ctrl-C, or when a supervisor asks for the end.
pub(crate) async fn asked_to_end() {
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

/// Ctrl-C of a client's process.
pub(crate) struct Interrupt {
    asked: AtomicBool,
    /// Whether there is a session that should be closed first.
    connected: AtomicBool,
}

impl Interrupt {
    /// How long the end may take once it was asked for.
    const LIMIT: Duration = Duration::from_secs(3);

    /// From now on Ctrl-C ends the process at once, or, once connected, by [`Interrupt::asked`]; if that
    /// takes long, or asked again, at once, too.
    pub(crate) fn listen() -> Result<&'static Interrupt> {
        static INTERRUPT: Interrupt =
            Interrupt { asked: AtomicBool::new(false), connected: AtomicBool::new(false) };
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
                INTERRUPT.asked.store(true, Ordering::Relaxed);
                if INTERRUPT.connected.load(Ordering::Relaxed) {
                    let _ = tokio::time::timeout(Interrupt::LIMIT, wait()).await;
                }
                process::exit(INTERRUPTED.into());
            });
        };
        thread::Builder::new().name("interrupt".to_owned()).spawn(listen).context("starting a thread")?;
        Ok(&INTERRUPT)
    }

    /// A session is there: it is closed before the process ends.
    pub(crate) fn connected(&self) {
        self.connected.store(true, Ordering::Relaxed);
    }

    /// Set by Ctrl-C.
    pub(crate) fn asked(&self) -> &AtomicBool {
        &self.asked
    }

    pub(crate) fn was_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }
}
