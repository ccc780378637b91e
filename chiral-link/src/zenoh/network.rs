//! A session of a Zenoh network: opened, closed and dropped on plain threads, since Zenoh panics at it in a tokio runtime of one thread.

use std::{error::Error, io, mem::ManuallyDrop, sync::Arc, thread, time::Duration};

use chiral_proto::keys;
use tokio::{sync::oneshot, time::timeout};
use zenoh::{Session, Wait, shm::ShmClientStorage};

use super::{config::config, shared::try_some};

/// For all of opening: names, connection, handshake.
const OPEN_LIMIT: Duration = Duration::from_secs(5);
/// For an orderly end. Zenoh's own may take ten seconds on a link that loses packets.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);
/// For what the network knows of who is alive.
const LOOK_LIMIT: Duration = Duration::from_secs(1);

/// How a network is joined: by Zenoh locators such as `tcp/0.0.0.0:7447`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkOptions {
    /// Where others are let in. Without any this is a client of the network, which passes on nothing for others.
    pub listen: Vec<String>,
    /// Whom to connect to: all of them, or at least one for a client.
    pub connect: Vec<String>,
    /// Whether memory is shared with other processes of this host.
    pub shared_memory: bool,
}

impl Default for NetworkOptions {
    /// Nowhere yet, with shared memory.
    fn default() -> NetworkOptions {
        NetworkOptions { listen: Vec::new(), connect: Vec::new(), shared_memory: true }
    }
}

/// Why nobody can be met on a network.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetworkError {
    /// The locators are none.
    #[error("expected Zenoh locators such as tcp/localhost:7447, found {locators:?}")]
    Locator {
        /// All of them.
        locators: Vec<String>,
        /// What Zenoh says of them.
        #[source]
        source: Cause,
    },
    /// Nobody is there to connect to, or the address to listen on cannot be had.
    #[error("no Zenoh network at {locators:?}")]
    Open {
        /// All of them.
        locators: Vec<String>,
        /// What Zenoh says of it.
        #[source]
        source: Cause,
    },
    /// There is no thread to be had.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// A robot of this name is on the network.
    #[error("a robot named {robot:?} is alive on this network (server {server}): expected a name of its own for every robot")]
    NameTaken {
        /// The name.
        robot: String,
        /// The Zenoh id of its server.
        server: String,
    },
    /// The robot's server did not answer.
    #[error("no answer from robot {robot:?} within {} s", waited.as_secs_f64())]
    NoAnswer {
        /// The robot's name.
        robot: String,
        /// How long was waited.
        waited: Duration,
    },
    /// The robot's server takes no connection.
    #[error("robot {robot:?} takes no connection: {reason}")]
    Refused {
        /// The robot's name.
        robot: String,
        /// What it says.
        reason: String,
    },
    /// Zenoh does not do what it should.
    #[error("the Zenoh session failed")]
    Failed(#[source] Cause),
}

/// Whatever Zenoh says.
type Cause = Box<dyn Error + Send + Sync>;

/// A member of a Zenoh network. A clone is the same member; it leaves when the last one is dropped.
#[derive(Clone, Debug)]
pub struct Network {
    owned: Arc<Owned>,
}

/// A session that is never dropped where it must not be. It is there until this is dropped.
#[derive(Debug)]
struct Owned(Option<Session>);

impl Drop for Owned {
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

impl Network {
    /// Joins a network: one attempt, of at most 5 s.
    ///
    /// # Errors
    /// [`NetworkError::Locator`], [`NetworkError::Open`] if nobody is there, [`NetworkError::Thread`].
    pub async fn open(options: &NetworkOptions) -> Result<Network, NetworkError> {
        let locators = || [&options.listen[..], &options.connect[..]].concat();
        let mut options = options.clone();
        if options.shared_memory
            && let Err(error) = on_thread(try_some)?.await.unwrap_or(Ok(()))
        {
            // A session that is told to use it would not open.
            tracing::info!("no shared memory, so observations travel by the network: {error}");
            options.shared_memory = false;
        }
        let config = config(&options).map_err(|error| NetworkError::Locator { locators: locators(), source: cause(&error) })?;
        // Wrapped on its own thread: whoever stops waiting drops no session.
        let opening = on_thread(move || {
            // Its own, so that what the other side has given up is unmapped at this session's end, and not at the process's.
            let shared = Arc::new(ShmClientStorage::builder().with_default_client_set().build());
            let session = zenoh::open(config).with_shm_clients(shared).wait()?;
            zenoh::Result::Ok(Network { owned: Arc::new(Owned(Some(session))) })
        })?;
        let source: Cause = match timeout(OPEN_LIMIT, opening).await {
            Ok(Ok(Ok(network))) => return Ok(network),
            Ok(Ok(Err(error))) => cause(&error),
            Ok(Err(_)) => "its thread ended".into(),
            Err(_) => format!("no handshake within {} s", OPEN_LIMIT.as_secs()).into(),
        };
        Err(NetworkError::Open { locators: locators(), source })
    }

    /// The robots that are alive on this network, each with the Zenoh id of its server; in order of their names.
    ///
    /// # Errors
    /// [`NetworkError::Failed`].
    pub async fn robots(&self) -> Result<Vec<(String, String)>, NetworkError> {
        self.alive(&keys::alive("*", "*")).await
    }

    /// The same, of the robots whose tokens match.
    pub(super) async fn alive(&self, tokens: &str) -> Result<Vec<(String, String)>, NetworkError> {
        let replies = self.session().liveliness().get(tokens).timeout(LOOK_LIMIT).await.map_err(failed)?;
        let mut robots = Vec::new();
        while let Ok(reply) = replies.recv_async().await {
            let Ok(sample) = reply.result() else { continue };
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
        let closing = on_thread(move || {
            let _ = session.close().wait();
            drop(session);
        });
        if let Ok(closing) = closing {
            let _ = timeout(CLOSE_LIMIT, closing).await;
        }
    }

    pub(super) fn session(&self) -> &Session {
        self.owned.0.as_ref().expect("it is taken only when the last clone is dropped")
    }
}

/// Runs what Zenoh does not do within a runtime.
fn on_thread<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> Result<oneshot::Receiver<T>, NetworkError> {
    let (done, waiting) = oneshot::channel();
    let run = move || drop(done.send(call()));
    thread::Builder::new().name("chiral-zenoh".to_owned()).spawn(run).map_err(NetworkError::Thread)?;
    Ok(waiting)
}

pub(super) fn failed(error: zenoh::Error) -> NetworkError {
    NetworkError::Failed(cause(&error))
}

/// What Zenoh says, without the places in its sources, which are paths of the machine that it was built on.
pub(super) fn cause(error: &zenoh::Error) -> Cause {
    let text = error.to_string();
    let mut parts = text.split(" at ");
    let mut plain = parts.next().unwrap_or_default().trim_end().to_owned();
    for part in parts {
        let (place, rest) = part.split_at(part.find(' ').unwrap_or(part.len()));
        if !place.contains(".rs:") {
            plain.push_str(" at ");
            plain.push_str(place);
        }
        plain.push_str(rest);
    }
    plain.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_in_sources_are_left_out() {
        let cases = [
            ("no link", "no link"),
            ("no link!  at /a/b.rs:44.", "no link!"),
            ("no link: [refused at /a/b.rs:1.] at /c.rs:3. at /d.rs:2.", "no link: [refused"),
            ("looked at length at noon", "looked at length at noon"),
        ];
        for (text, expected) in cases {
            assert_eq!(cause(&text.into()).to_string(), expected);
        }
    }
}
