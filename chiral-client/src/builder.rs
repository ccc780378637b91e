//! How a client is configured, and how it finds its server.

use std::{future::Future, sync::Arc, time::Duration};

use bytes::Bytes;
use chiral_link::monotonic;
use chiral_proto::{Clock, Transport, message::Role};
use tokio::{
    sync::{Notify, mpsc, watch},
    time::{sleep, timeout},
};

use crate::{
    client::PolicyClient,
    error::Error,
    session::{self, Identity, Shared},
    state::State,
};

/// Between two attempts to connect.
const RETRY_PERIOD: Duration = Duration::from_millis(100);
/// Requests that may wait for the send loop.
const OUTBOX: usize = 64;

/// Makes a [`PolicyClient`].
#[derive(Clone, Debug)]
pub struct PolicyClientBuilder {
    uri: String,
    identity: Identity,
    quiet: bool,
    deadline: Option<Duration>,
    request_timeout: Duration,
    silence_limit: Duration,
    queue_capacity: usize,
    clock: Clock,
    pub(crate) max_frame: usize,
    pub(crate) root_certificates: Option<Vec<u8>>,
}

/// What became of one attempt to connect.
#[cfg_attr(not(feature = "websocket"), expect(dead_code, reason = "transports make them"))]
pub(crate) enum Attempt {
    /// Nobody is there yet; it is worth trying again.
    Absent(String),
    /// Trying again would not help.
    Failed(Error),
}

impl PolicyClientBuilder {
    pub(crate) fn new(uri: &str) -> PolicyClientBuilder {
        PolicyClientBuilder {
            uri: uri.to_owned(),
            identity: Identity { name: default_name(), ..Identity::default() },
            quiet: false,
            deadline: None,
            request_timeout: Duration::from_secs(5),
            silence_limit: Duration::from_secs(10),
            queue_capacity: 256,
            clock: monotonic(),
            max_frame: 256 << 20,
            root_certificates: None,
        }
    }

    /// Connects to watch and not to move: any number of observers may. By default the client is the robot's one controller.
    #[must_use]
    pub fn observer(mut self) -> Self {
        self.identity.role = Role::Observer;
        self
    }

    /// Who this is, for people: told to others who find the robot taken. By default the program's name and process id.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.identity.name = name.into();
        self
    }

    /// Whatever the server's operator asks for. No server looks at it yet.
    #[must_use]
    pub fn auth(mut self, auth: impl Into<Bytes>) -> Self {
        self.identity.auth = auth.into();
        self
    }

    /// Says nothing on stderr while waiting for the server.
    #[must_use]
    pub fn quiet(mut self) -> Self {
        self.quiet = true;
        self
    }

    /// How long to wait for a server; for ever by default.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// How long `get_metadata`, `get_obs` and the stream's start and stop may take; 5 s by default. `reset` and `step` have no limit.
    #[must_use]
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        self.request_timeout = timeout;
        self
    }

    /// After how long without a word the server counts as lost; 10 s by default. An observation that is still arriving is no word yet: raise this for a
    /// link on which one takes longer.
    #[must_use]
    pub fn silence_limit(mut self, limit: Duration) -> Self {
        self.silence_limit = limit;
        self
    }

    /// How many rows the action queue holds; 256 by default.
    #[must_use]
    pub fn queue_capacity(mut self, rows: usize) -> Self {
        self.queue_capacity = rows;
        self
    }

    /// The largest frame that is taken from the server, in bytes; 256 MiB by default.
    #[must_use]
    pub fn max_frame(mut self, bytes: usize) -> Self {
        self.max_frame = bytes;
        self
    }

    /// Trusts these certificates (PEM) for `wss://`, in place of the system's.
    #[must_use]
    pub fn root_certificates(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.root_certificates = Some(pem.into());
        self
    }

    /// The clock that actions are timed by and ages measured with; CLOCK_MONOTONIC by default.
    #[must_use]
    pub fn clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// Connects, waiting until there is a server: while nobody listens, the name does not resolve or the handshake times out, it tries again every 100 ms
    /// and says so once on stderr.
    ///
    /// # Errors
    /// At once: [`Error::Address`], [`Error::Busy`] naming the holder, [`Error::VersionMismatch`], [`Error::Http`], [`Error::Tls`], [`Error::Handshake`].
    /// [`Error::NoServer`] after the deadline, if one was set.
    #[cfg(feature = "websocket")]
    pub async fn connect(self) -> Result<PolicyClient, Error> {
        let address = crate::websocket::Address::parse(&self.uri)?;
        let tls = crate::websocket::tls_for(&address, self.root_certificates.as_deref())?;
        let transport = self.wait_for(|| crate::websocket::connect(&address, tls.as_ref(), self.max_frame)).await?;
        self.connect_over(transport).await
    }

    /// The same, for code without a runtime; blocks.
    ///
    /// # Errors
    /// As [`PolicyClientBuilder::connect`], and [`Error::Runtime`].
    #[cfg(feature = "websocket")]
    pub fn connect_blocking(self) -> Result<crate::blocking::PolicyClient, Error> {
        crate::blocking::PolicyClient::start(self.connect())
    }

    /// Connects over a transport of the caller's.
    ///
    /// # Errors
    /// [`Error::Busy`], [`Error::VersionMismatch`], [`Error::Rejected`], or how the connection broke.
    pub async fn connect_over(self, transport: impl Transport) -> Result<PolicyClient, Error> {
        let began = self.clock.now();
        let welcome = session::greet(&transport, &self.identity).await?;
        let now = self.clock.now();
        let state = State::new(welcome.session, welcome.episode, self.queue_capacity, now.since(began), now);
        let shared = Arc::new(Shared {
            state: state.into(),
            latest: watch::Sender::new(None),
            changed: Notify::new(),
            room: Notify::new(),
            clock: self.clock,
            codec: transport.codec(),
            silence_limit: self.silence_limit,
        });
        let (outgoing, queued) = mpsc::channel(OUTBOX);
        tokio::spawn(session::run(Arc::clone(&shared), transport, queued));
        Ok(PolicyClient::new(shared, outgoing, welcome, self.request_timeout))
    }

    /// Attempts to connect until somebody is there.
    #[cfg_attr(not(feature = "websocket"), expect(dead_code, reason = "transports use it"))]
    async fn wait_for<T, F: Future<Output = Result<T, Attempt>>>(&self, attempt: impl Fn() -> F) -> Result<T, Error> {
        let mut said = self.quiet;
        let mut last = "the first attempt is not over".to_owned();
        let attempts = async {
            loop {
                match attempt().await {
                    Ok(connected) => return Ok(connected),
                    Err(Attempt::Failed(error)) => return Err(error),
                    Err(Attempt::Absent(reason)) => last = reason,
                }
                if !said {
                    eprintln!("chiral: waiting for server at {} …", self.uri);
                    said = true;
                }
                sleep(RETRY_PERIOD).await;
            }
        };
        let Some(deadline) = self.deadline else { return attempts.await };
        let outcome = timeout(deadline, attempts).await;
        outcome.unwrap_or_else(|_| Err(Error::NoServer { uri: self.uri.clone(), deadline, last }))
    }
}

fn default_name() -> String {
    let program = std::env::args_os().next().map(std::path::PathBuf::from);
    let program = program.as_ref().and_then(|path| path.file_name()).map_or("policy".into(), |name| name.to_string_lossy());
    format!("{program} ({})", std::process::id())
}
