//! Programs that run in the background: each writes its log to a file, is waited for with a timeout, and is
//! killed when its guard is dropped.

use std::fs::File;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::command::shown;

/// How often a running child is polled.
const POLL_PERIOD: Duration = Duration::from_millis(10);

/// How long a child may take to exit after an interrupt.
const EXIT_TIMEOUT: Duration = Duration::from_secs(5);

/// A running program; dropping it kills it.
pub(crate) struct Running {
    name: &'static str,
    command: String,
    child: Child,
    log: PathBuf,
}

impl Running {
    /// Starts a program that writes its stderr to `log`; its stdout goes to the file `stdout` if
    /// given, else to `log`, too.
    pub(crate) fn start(
        name: &'static str,
        command: &mut Command,
        log: &Path,
        stdout: Option<&Path>,
    ) -> Result<Running> {
        let create = |path: &Path| File::create(path).with_context(|| format!("creating {}", path.display()));
        let errors = create(log)?;
        let output = match stdout {
            Some(path) => create(path)?,
            None => errors.try_clone().context("sharing the log")?,
        };
        let child = command
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .with_context(|| format!("starting `{}`", shown(command)))?;
        Ok(Running { name, command: shown(command), child, log: log.to_owned() })
    }

    /// Fails if the program has exited.
    pub(crate) fn check_running(&mut self) -> Result<()> {
        match self.child.try_wait().context("polling a child")? {
            Some(status) => bail!("the {} exited too early: {status}", self.name),
            None => Ok(()),
        }
    }

    /// Waits until the program exits, and fails at `deadline`.
    pub(crate) fn wait_until(&mut self, deadline: Instant) -> Result<ExitStatus> {
        loop {
            if let Some(status) = self.child.try_wait().context("waiting for a child")? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!("the {} was still running at its deadline", self.name);
            }
            std::thread::sleep(POLL_PERIOD);
        }
    }

    /// Waits until the program accepts connections at `address`, and fails at `deadline`.
    pub(crate) fn wait_until_it_listens(&mut self, address: SocketAddr, deadline: Instant) -> Result<()> {
        while TcpStream::connect(address).is_err() {
            self.check_running()?;
            if Instant::now() >= deadline {
                bail!("the {} did not listen on {address} before its deadline", self.name);
            }
            std::thread::sleep(POLL_PERIOD);
        }
        Ok(())
    }

    /// Interrupts the program as Ctrl-C does. It must exit with success within a few seconds.
    pub(crate) fn interrupt(&mut self) -> Result<()> {
        self.check_running()?;
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::INT).with_context(|| format!("interrupting the {}", self.name))?;
        let status = self.wait_until(Instant::now() + EXIT_TIMEOUT).context("after an interrupt")?;
        if !status.success() {
            bail!("the {} did not exit cleanly after an interrupt: {status}", self.name);
        }
        Ok(())
    }

    /// The command line and the last lines of the log, for error messages.
    pub(crate) fn tail(&self) -> String {
        const LINES: usize = 25;
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        let mut text = format!("--- {}: {}\n", self.name, self.command);
        if lines.is_empty() {
            text.push_str("    (no output)\n");
        }
        for line in &lines[lines.len().saturating_sub(LINES)..] {
            text.push_str(&format!("    {line}\n"));
        }
        text
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        match self.child.kill() {
            Err(error) if error.kind() != ErrorKind::InvalidInput => {
                eprintln!("cannot kill the {}: {error}", self.name);
            }
            _ => drop(self.child.wait()),
        }
    }
}

/// An address on loopback that was free a moment ago.
pub(crate) fn free_address() -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("reserving a port")?;
    listener.local_addr().context("reading the reserved port")
}
