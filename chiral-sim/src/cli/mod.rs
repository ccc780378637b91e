//! The commands, a file each, and what they share: logs, Ctrl-C, the process's own CPU time.

pub(crate) mod policy;
pub(crate) mod router;
pub(crate) mod serve;
pub(crate) mod watch;

use std::io::IsTerminal;
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use chiral_client::{PolicyClient, PolicyClientBuilder};
use rustix::time::{ClockId, clock_gettime};
use tracing_subscriber::EnvFilter;

/// What shells expect of a program that Ctrl-C ended.
pub(crate) const INTERRUPTED: u8 = 130;

/// Logs to stderr, as `RUST_LOG` says, else from this level up; of Zenoh errors only, since it warns of each attempt to find a robot that is not there yet.
pub(crate) fn log(level: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(format!("{level},zenoh=error")));
    let ansi = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi).with_target(false).init();
}

/// Seconds that the CPU has spent on this process so far, on all cores together.
pub(crate) fn cpu_seconds() -> f64 {
    let used = clock_gettime(ClockId::ProcessCPUTime);
    used.tv_sec as f64 + used.tv_nsec as f64 * 1e-9
}

/// A client yet to be connected.
pub(crate) fn client(uri: &str, robot: Option<&str>, quiet: bool, wait: Option<f64>) -> Result<PolicyClientBuilder> {
    let builder = PolicyClient::builder(uri);
    let builder = if let Some(robot) = robot { builder.robot(robot) } else { builder };
    let builder = if quiet { builder.quiet() } else { builder };
    Ok(match wait {
        Some(seconds) => builder.deadline(Duration::try_from_secs_f64(seconds).context("--wait")?),
        None => builder,
    })
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

    /// From now on Ctrl-C ends the process at once, or, once connected, by [`Interrupt::asked`]; if that takes long, or asked again, at once, too.
    pub(crate) fn listen() -> Result<&'static Interrupt> {
        static INTERRUPT: Interrupt = Interrupt { asked: AtomicBool::new(false), connected: AtomicBool::new(false) };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting a runtime")?;
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
