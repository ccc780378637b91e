//! A Zenoh session, which is opened, closed and dropped on plain threads: Zenoh panics if that happens in a
//! tokio runtime of one thread.

use std::{
    mem::ManuallyDrop,
    net::{TcpStream, ToSocketAddrs},
    sync::{Arc, Once},
    thread,
    time::{Duration, Instant},
};

use chiral_proto::keys;
use tokio::time::timeout;
use zenoh::{Session, Wait, shm::ShmClientStorage};

use super::{
    config::{Configured, OPEN_TIMEOUT_MS, Purpose, ZenohSessionOptions, configure},
    error::{Cause, ZenohError, cause, failed},
    shm::is_available,
    thread::run_on_thread,
};

/// How long opening may take: name resolution, connection and handshake.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
/// How long closing may take. Zenoh's own may take ten seconds on a link that loses packets.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long to wait for answers to a query of the network.
pub(super) const QUERY_TIMEOUT: Duration = Duration::from_secs(1);
/// How long to wait for a TCP connection that shows whether something listens.
const LISTENING_TIMEOUT: Duration = Duration::from_millis(500);

/// One thread writes and another reads the one TLS state of such a connection, without a lock:
/// <https://github.com/eclipse-zenoh/zenoh/issues/2557>.
const UNSOUND_PROTOCOL: &str = "tls/";
/// Warns once, since attempts to connect are many.
static WARNED: Once = Once::new();

/// A session on a Zenoh network. A clone is the same session; it ends when the last one is dropped.
#[derive(Clone, Debug)]
pub struct ZenohSession {
    owned: Arc<OwnedSession>,
    other_way_in: Option<Arc<str>>,
}

/// Owns Zenoh's session, and drops it on a plain thread. `Some` until this is dropped.
#[derive(Debug)]
struct OwnedSession(Option<Session>);

impl Drop for OwnedSession {
    fn drop(&mut self) {
        let Some(session) = self.0.take() else { return };
        // If no thread can be started the session is leaked, which is better than a panic.
        let session = ManuallyDrop::new(session);
        let end = move || {
            let session = ManuallyDrop::into_inner(session);
            let _ = session.close().wait();
        };
        let _ = thread::Builder::new().name("chiral-zenoh".to_owned()).spawn(end);
    }
}

impl ZenohSession {
    /// Joins a network in one attempt, of at most 5 s.
    ///
    /// # Errors
    /// [`ZenohError::Config`], [`ZenohError::Locator`], [`ZenohError::NoLocator`];
    /// [`ZenohError::Listen`] if it cannot listen, [`ZenohError::Open`] if nothing listens there, [`ZenohError::HandshakeFailed`] if something does;
    /// [`ZenohError::Thread`].
    pub async fn open(options: &ZenohSessionOptions) -> Result<ZenohSession, ZenohError> {
        let mut options = options.clone();
        // A session configured for shared memory that it cannot allocate would not open.
        options.shared_memory = options.shared_memory && run_on_thread(is_available)?.await.unwrap_or(true);
        let configured = configure(&options, Purpose::Member)?;
        if [&configured.listen, &configured.connect]
            .into_iter()
            .flatten()
            .any(|locator| locator.starts_with(UNSOUND_PROTOCOL))
        {
            WARNED.call_once(|| {
                tracing::warn!(
                    "Zenoh's connections by {UNSOUND_PROTOCOL} are not sound: under traffic in both \
                     directions they break off, and may corrupt memory (eclipse-zenoh/zenoh#2557); use \
                     quic/, which takes the same certificates"
                );
            });
        }
        ZenohSession::open_configured(configured).await
    }

    /// The locators at which this session listens.
    pub async fn locators(&self) -> Vec<String> {
        let locators = self.session().info().locators().await;
        locators.iter().map(ToString::to_string).collect()
    }

    /// Opens a session with this configuration.
    pub(super) async fn open_configured(
        Configured { config, listen, connect, other_way_in }: Configured,
    ) -> Result<ZenohSession, ZenohError> {
        let started = Instant::now();
        // Wrapped on its own thread, so that a caller that stops waiting drops no bare session.
        let opening = run_on_thread(move || {
            // Clients of its own, so that memory which the peer has released is unmapped when this session
            // ends, not when the process does.
            let shm_clients = Arc::new(ShmClientStorage::builder().with_default_client_set().build());
            let session = zenoh::open(config).with_shm_clients(shm_clients).wait()?;
            let owned = Arc::new(OwnedSession(Some(session)));
            zenoh::Result::Ok(ZenohSession { owned, other_way_in: other_way_in.map(Arc::from) })
        })?;
        let source: Cause = match timeout(OPEN_TIMEOUT, opening).await {
            Ok(Ok(Ok(network))) => return Ok(network),
            Ok(Ok(Err(error))) => cause(&error),
            Ok(Err(_)) => "the thread that opens it ended".into(),
            Err(_) => format!("no handshake within {} s", OPEN_TIMEOUT.as_secs()).into(),
        };
        if connect.is_empty() && !listen.is_empty() {
            return Err(ZenohError::Listen { locators: listen, source });
        }
        let locators = [&listen[..], &connect[..]].concat();
        // Zenoh reports a refused handshake like an absent listener. Only the time differs, and not even that
        // from a closed port.
        let failed_early = started.elapsed() < Duration::from_millis(OPEN_TIMEOUT_MS.into());
        if failed_early
            && listen.is_empty()
            && run_on_thread(move || connect.iter().any(|locator| is_listening(locator)))?.await == Ok(true)
        {
            return Err(ZenohError::HandshakeFailed { locators });
        }
        Err(ZenohError::Open { locators, source })
    }

    /// Returns the robots that are alive on this network, each with its server, `<Zenoh id>@<host>`; in order
    /// of their names.
    ///
    /// # Errors
    /// [`ZenohError::LivelinessTimeout`] if the network has not answered completely within a second,
    /// [`ZenohError::Failed`].
    pub async fn robots(&self) -> Result<Vec<(String, String)>, ZenohError> {
        self.alive(&keys::alive("*", "*")).await
    }

    /// Returns the robots whose tokens match this key expression, each with its server.
    pub(super) async fn alive(&self, tokens: &str) -> Result<Vec<(String, String)>, ZenohError> {
        let replies = self.session().liveliness().get(tokens).timeout(QUERY_TIMEOUT).await.map_err(failed)?;
        let mut robots = Vec::new();
        while let Ok(reply) = replies.recv_async().await {
            // An error is a timeout: the robots received so far may not be all.
            let sample =
                reply.result().map_err(|_| ZenohError::LivelinessTimeout { waited: QUERY_TIMEOUT })?;
            let found = keys::robot_and_server(sample.key_expr().as_str());
            robots.extend(found.map(|(robot, server)| (robot.to_owned(), server.to_owned())));
        }
        robots.sort();
        robots.dedup();
        Ok(robots)
    }

    /// Returns what, by its configuration, leads to this session besides the addresses at which it listens, or
    /// connects it to others: multicast, gossip, a router. `None` if nothing does.
    pub fn other_way_in(&self) -> Option<&str> {
        self.other_way_in.as_deref()
    }

    /// Closes the session, for all clones. Returns when that is done, or after a second.
    pub async fn close(&self) {
        let session = self.session().clone();
        let closing = run_on_thread(move || {
            let _ = session.close().wait();
            drop(session);
        });
        if let Ok(closing) = closing {
            let _ = timeout(CLOSE_TIMEOUT, closing).await;
        }
    }

    pub(super) fn session(&self) -> &Session {
        self.owned.0.as_ref().expect("it is taken only when the last clone is dropped")
    }
}

/// Whether something listens at this locator; false for protocols where that is not known.
fn is_listening(locator: &str) -> bool {
    let Some((protocol, rest)) = locator.split_once('/') else { return false };
    let address = rest.split(['?', '#']).next().unwrap_or_default();
    match protocol {
        "tcp" | "tls" => {
            let addresses = address.to_socket_addrs().into_iter().flatten();
            addresses
                .into_iter()
                .any(|address| TcpStream::connect_timeout(&address, LISTENING_TIMEOUT).is_ok())
        }
        #[cfg(unix)]
        "unixsock-stream" => std::os::unix::net::UnixStream::connect(address).is_ok(),
        _ => false,
    }
}
