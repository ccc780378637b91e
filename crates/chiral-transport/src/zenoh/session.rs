//! A session of a Zenoh network: opened, closed and dropped on plain threads, since Zenoh panics at it in a
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

/// For all of opening: names, connection, handshake.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
/// For an orderly end. Zenoh's own may take ten seconds on a link that loses packets.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// For what the network knows of who is alive.
pub(super) const QUERY_TIMEOUT: Duration = Duration::from_secs(1);
/// For a glance at whether anybody listens.
const LISTENING_TIMEOUT: Duration = Duration::from_millis(500);

/// One thread writes and another reads the one TLS state of such a connection, without a lock:
/// <https://github.com/eclipse-zenoh/zenoh/issues/2557>.
const UNSOUND_PROTOCOL: &str = "tls/";
/// It was said, since attempts to connect are many.
static WARNED: Once = Once::new();

/// A member of a Zenoh network. A clone is the same member; it leaves when the last one is dropped.
#[derive(Clone, Debug)]
pub struct ZenohSession {
    owned: Arc<OwnedSession>,
}

/// A session that is never dropped where it must not be. It is there until this is dropped.
#[derive(Debug)]
struct OwnedSession(Option<Session>);

impl Drop for OwnedSession {
    fn drop(&mut self) {
        let Some(session) = self.0.take() else { return };
        // If there is no thread to be had it is forgotten, which is better than a panic.
        let session = ManuallyDrop::new(session);
        let end = move || {
            let session = ManuallyDrop::into_inner(session);
            let _ = session.close().wait();
        };
        let _ = thread::Builder::new().name("chiral-zenoh".to_owned()).spawn(end);
    }
}

impl ZenohSession {
    /// Joins a network: one attempt, of at most 5 s.
    ///
    /// # Errors
    /// [`ZenohError::Config`], [`ZenohError::Locator`], [`ZenohError::NoLocator`];
    /// [`ZenohError::Open`] if nobody is there, [`ZenohError::HandshakeFailed`] if somebody is;
    /// [`ZenohError::Thread`].
    pub async fn open(options: &ZenohSessionOptions) -> Result<ZenohSession, ZenohError> {
        let mut options = options.clone();
        // A session that is told to use what it cannot have would not open.
        options.shared_memory = options.shared_memory && run_on_thread(is_available)?.await.unwrap_or(true);
        let configured = configure(&options, Purpose::Member)?;
        if [&configured.listen, &configured.connect]
            .into_iter()
            .flatten()
            .any(|locator| locator.starts_with(UNSOUND_PROTOCOL))
        {
            WARNED.call_once(|| {
                tracing::warn!(
                    "Zenoh's connections by {UNSOUND_PROTOCOL} are not sound: they break off, and may damage memory, under traffic both ways \
                     (eclipse-zenoh/zenoh#2557); quic/ takes the same certificates"
                );
            });
        }
        ZenohSession::open_configured(configured).await
    }

    pub(super) async fn open_configured(
        Configured { config, listen, connect }: Configured,
    ) -> Result<ZenohSession, ZenohError> {
        let started = Instant::now();
        // Wrapped on its own thread: whoever stops waiting drops no session.
        let opening = run_on_thread(move || {
            // Its own, so that what the other side has given up is unmapped at this session's end, and not at
            // the process's.
            let shared = Arc::new(ShmClientStorage::builder().with_default_client_set().build());
            let session = zenoh::open(config).with_shm_clients(shared).wait()?;
            zenoh::Result::Ok(ZenohSession { owned: Arc::new(OwnedSession(Some(session))) })
        })?;
        let source: Cause = match timeout(OPEN_TIMEOUT, opening).await {
            Ok(Ok(Ok(network))) => return Ok(network),
            Ok(Ok(Err(error))) => cause(&error),
            Ok(Err(_)) => "its thread ended".into(),
            Err(_) => format!("no handshake within {} s", OPEN_TIMEOUT.as_secs()).into(),
        };
        let locators = [&listen[..], &connect[..]].concat();
        // Zenoh tells nobody's absence from his refusal by nothing but the time that it takes, and not even
        // by that from a closed port.
        let failed_early = started.elapsed() < Duration::from_millis(OPEN_TIMEOUT_MS.into());
        if failed_early
            && listen.is_empty()
            && run_on_thread(move || connect.iter().any(|locator| is_listening(locator)))?.await == Ok(true)
        {
            return Err(ZenohError::HandshakeFailed { locators });
        }
        Err(ZenohError::Open { locators, source })
    }

    /// The robots that are alive on this network, each with its server, `<Zenoh id>@<host>`; in order of
    /// their names.
    ///
    /// # Errors
    /// [`ZenohError::LivelinessTimeout`] if not all was said within a second, [`ZenohError::Failed`].
    pub async fn robots(&self) -> Result<Vec<(String, String)>, ZenohError> {
        self.alive(&keys::alive("*", "*")).await
    }

    /// The same, of the robots whose tokens match.
    pub(super) async fn alive(&self, tokens: &str) -> Result<Vec<(String, String)>, ZenohError> {
        let replies = self.session().liveliness().get(tokens).timeout(QUERY_TIMEOUT).await.map_err(failed)?;
        let mut robots = Vec::new();
        while let Ok(reply) = replies.recv_async().await {
            // A time-out's: who was heard so far may not be all.
            let sample =
                reply.result().map_err(|_| ZenohError::LivelinessTimeout { waited: QUERY_TIMEOUT })?;
            let found = keys::robot_and_server(sample.key_expr().as_str());
            robots.extend(found.map(|(robot, server)| (robot.to_owned(), server.to_owned())));
        }
        robots.sort();
        robots.dedup();
        Ok(robots)
    }

    /// Leaves the network, for all clones; returns when that is done, or after a second.
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

/// Whether somebody listens there; false where that cannot be told.
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
