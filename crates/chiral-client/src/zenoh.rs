//! Zenoh addresses, and which robot of a network is meant. How peers meet, and what carries frames, is
//! `chiral-transport`'s.

use std::{
    error::Error as StdError,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use chiral_proto::{
    Codec, Message, Reply, Request, Transport, codec::msgpack, error::chain, keys, pool::Pool,
};
use chiral_transport::zenoh::{
    LaneKind, LegacyTransport, Scout, ZenohError, ZenohOptions, ZenohSession, ZenohSessionOptions,
};
use tokio::time::timeout;

use crate::{
    builder::{ConnectError, ConnectOptions},
    connection::Carries,
    endpoint::Connection,
    error::Error,
    lock,
};

/// Joining a network costs more than a connection that is refused.
pub(crate) const RETRY_PERIOD: Duration = Duration::from_millis(500);
/// For the answers of a network that is searched for a robot.
const SEARCH_LIMIT: Duration = Duration::from_secs(1);
/// So long a robot of ours may take to show on a network before legacy servers are asked whether they are
/// there.
const ALIVE_LIMIT: Duration = Duration::from_secs(1);
/// For a legacy server's answer to that, before it is asked again.
const PROBE_LIMIT: Duration = Duration::from_millis(500);
/// After so long without anybody the network is joined anew, in case that it is another by now.
const LOOK_LIMIT: Duration = Duration::from_secs(5);
/// What the address of a robot without an address begins with.
const BY_NAME: &str = "zenoh:";

/// How to reach a robot on a Zenoh network. A clone is the same robot.
#[derive(Clone)]
pub(crate) struct Server {
    uri: String,
    asked: Option<String>,
    /// Without a locator of ours, the network is the configuration file's, or else whatever answers a search.
    options: ZenohSessionOptions,
    /// The network and the robot's name, once it was found; for its second connection.
    found: Arc<Mutex<Option<(ZenohSession, String)>>>,
    /// Whether the last attempt found somebody who did not let us in.
    was_refused: Arc<AtomicBool>,
    /// The wire that is asked for; without, ours, or else that of the peers before us.
    codec: Option<Codec>,
    /// Where nobody was found yet.
    looking: Arc<Mutex<Option<Looking>>>,
    idle_timeout: Duration,
    /// How often legacy servers were asked, on whatever session: they share their keys.
    probes: Arc<AtomicU64>,
}

/// A network without a robot of ours, so far.
struct Looking {
    network: ZenohSession,
    since: Instant,
    /// Where legacy servers answer, once they were asked: an answer may come after the attempt that asked.
    legacy: Option<LegacyTransport>,
}

impl Server {
    /// Whether Zenoh knows such addresses, and this client as well.
    pub(crate) fn is_meant(uri: &str) -> bool {
        ["tcp/", "tls/", "quic/", "unixsock-stream/", BY_NAME]
            .iter()
            .any(|beginning| uri.starts_with(beginning))
    }

    pub(crate) fn parse(uri: &str, means: &ConnectOptions) -> Result<Server, Error> {
        let refuse = |reason: String| Error::Address { uri: uri.to_owned(), reason };
        let (locator, named) = match uri.strip_prefix(BY_NAME) {
            Some(name) => (None, Some(name).filter(|name| !name.is_empty())),
            None => (Some(uri.to_owned()), None),
        };
        let (protocol, rest) =
            locator.as_deref().and_then(|locator| locator.split_once('/')).unwrap_or_default();
        // What comes after it is for Zenoh.
        let address = rest.split(['?', '#']).next().unwrap_or_default();
        let port = address
            .rsplit_once(':')
            .filter(|(host, _)| !host.is_empty())
            .and_then(|(_, port)| port.parse::<u16>().ok());
        match protocol {
            "unixsock-stream" if address.is_empty() => {
                return Err(refuse("it names no socket, such as unixsock-stream//run/robot.sock".to_owned()));
            }
            "tcp" | "tls" | "quic" if port.is_none() => {
                return Err(refuse(format!("it names no host and port, such as {protocol}/localhost:7447")));
            }
            _ => {}
        }
        let robot = means.robot.as_deref();
        if let (Some(named), Some(robot)) = (named, robot)
            && named != robot
        {
            return Err(refuse(format!("another robot, {robot:?}, is asked for")));
        }
        let asked = named.or(robot);
        if let Some(robot) = asked {
            keys::check_robot(robot).map_err(|error| refuse(error.to_string()))?;
        }
        if means.codec == Some(Codec::Msgpack)
            && (asked.is_some() || (locator.is_none() && means.zenoh_config.is_none()))
        {
            return Err(refuse(
                "legacy servers, of msgpack, have no name, only an address such as tcp/localhost:7447"
                    .to_owned(),
            ));
        }
        let options = ZenohSessionOptions {
            connect: locator.iter().cloned().collect(),
            config: means.zenoh_config.clone(),
            shared_memory: means.shared_memory,
            ..ZenohSessionOptions::default()
        };
        let asked = asked.map(str::to_owned);
        Ok(Server {
            uri: uri.to_owned(),
            asked,
            options,
            found: Arc::default(),
            was_refused: Arc::default(),
            codec: means.codec,
            idle_timeout: means.idle_timeout,
            looking: Arc::default(),
            probes: Arc::default(),
        })
    }

    /// One attempt to connect: on the network that is known already, or on a new session of it.
    pub(crate) async fn connect(
        &self,
        carries: Carries,
        max_frame: usize,
        pool: Pool,
    ) -> Result<Connection, ConnectError> {
        let kind = if carries == Carries::Observations { LaneKind::Observations } else { LaneKind::Control };
        let known = lock(&self.found).clone();
        let (network, robot) = match known {
            Some(known) => known,
            None => match self.find(max_frame, &pool).await? {
                (network, Meant::Robot(robot)) => (network, robot),
                (_, Meant::Legacy(legacy)) => {
                    let probes = self.probes.load(Ordering::Relaxed);
                    return Ok(Connection::Legacy(Box::new(legacy), probes));
                }
            },
        };
        let options = ZenohOptions {
            max_frame,
            pool,
            codec: Codec::Protobuf,
            shared_memory: None,
            idle_timeout: self.idle_timeout,
        };
        let connected = network.connect(&robot, kind, options).await.map_err(|error| self.judge(error))?;
        *lock(&self.found) = Some((network, robot));
        Ok(Connection::Zenoh(Box::new(connected)))
    }

    async fn find(&self, max_frame: usize, pool: &Pool) -> Result<(ZenohSession, Meant), ConnectError> {
        let looking = lock(&self.looking).take().filter(|looking| looking.since.elapsed() < LOOK_LIMIT);
        let mut looking = match looking {
            Some(looking) => looking,
            None => match ZenohSession::open(&self.options).await {
                Err(ZenohError::NoLocator) => {
                    let (locator, robot) = self.search().await?;
                    let options = ZenohSessionOptions { connect: vec![locator], ..self.options.clone() };
                    let network = ZenohSession::open(&options).await.map_err(|error| self.judge(error))?;
                    return Ok((network, Meant::Robot(robot)));
                }
                opened => {
                    let network = opened.map_err(|error| self.judge(error))?;
                    Looking { network, since: Instant::now(), legacy: None }
                }
            },
        };
        self.was_refused.store(false, Ordering::Relaxed);
        // Before this look, which may itself have taken so long.
        let is_patience_over = self.codec == Some(Codec::Msgpack) || looking.since.elapsed() >= ALIVE_LIMIT;
        let absent = if self.codec == Some(Codec::Msgpack) {
            "no legacy server answers".to_owned()
        } else {
            let robots = looking.network.robots().await.map_err(|error| self.judge(error))?;
            let mut names: Vec<String> = robots.into_iter().map(|(robot, _)| robot).collect();
            names.dedup();
            match choose(names, self.asked.as_deref(), &self.uri) {
                Ok(robot) => return Ok((looking.network, Meant::Robot(robot))),
                // Legacy servers have no name to be asked for.
                Err(ConnectError::Absent(reason)) if self.asked.is_none() && self.codec.is_none() => reason,
                Err(attempt) => return Err(attempt),
            }
        };
        if is_patience_over {
            let legacy = match looking.legacy.take() {
                Some(legacy) => legacy,
                None => {
                    let declared = looking.network.legacy(keys::End::Client, max_frame, pool.clone()).await;
                    declared.map_err(|error| self.judge(error))?
                }
            };
            if self.probe(&legacy).await? {
                return Ok((looking.network, Meant::Legacy(legacy)));
            }
            looking.legacy = Some(legacy);
        }
        *lock(&self.looking) = Some(looking);
        Err(ConnectError::Absent(absent))
    }

    /// Asks whether a legacy server is there, as legacy clients do.
    async fn probe(&self, legacy: &LegacyTransport) -> Result<bool, ConnectError> {
        let question = Message::Request { id: msgpack::ID, request: Request::GetMetadata };
        let question =
            Codec::Msgpack.encode(&question).map_err(|error| ConnectError::Failed(error.into()))?;
        self.probes.fetch_add(1, Ordering::Relaxed);
        let asking = async {
            legacy.send(question).await?;
            loop {
                // Anything else is another client's.
                if let Some(frame) = legacy.recv().await?
                    && let Ok(Message::Reply { reply: Reply::Metadata(_), .. }) = Codec::Msgpack.decode(frame)
                {
                    return Ok(());
                }
            }
        };
        match timeout(PROBE_LIMIT, asking).await {
            Ok(Ok(())) => Ok(true),
            Ok(Err(error)) => {
                let error: chiral_proto::TransportError = error;
                Err(ConnectError::Absent(chain(&error)))
            }
            Err(_) => Ok(false),
        }
    }

    /// Where the robot was found without an address, and its name.
    async fn search(&self) -> Result<(String, String), ConnectError> {
        let mut search =
            Scout::begin(&self.options, SEARCH_LIMIT).await.map_err(|error| self.judge(error))?;
        let mut sightings = Vec::new();
        while let Some(sighting) = search.next().await {
            let is_asked = self.asked.as_ref() == Some(&sighting.robot);
            sightings.push(sighting);
            if is_asked {
                break;
            }
        }
        let mut names: Vec<String> = sightings.iter().map(|sighting| sighting.robot.clone()).collect();
        names.sort();
        names.dedup();
        if names.is_empty() {
            return Err(ConnectError::Absent("no robot answers a search by multicast".to_owned()));
        }
        let robot = choose(names, self.asked.as_deref(), &self.uri)?;
        sightings.sort_by_key(|sighting| !sighting.is_own);
        let at = sightings.into_iter().find(|sighting| sighting.robot == robot);
        let at = at.expect("the names are those of the sightings");
        Ok((at.locator, robot))
    }

    /// Whether another attempt may mend it.
    fn judge(&self, error: ZenohError) -> ConnectError {
        match error {
            // A server that is just ending or beginning looks like one that refuses: only twice in turn is it
            // believed.
            ZenohError::NotLetIn { .. } if !self.was_refused.swap(true, Ordering::Relaxed) => {
                ConnectError::Absent(error.to_string())
            }
            ZenohError::Locator { .. } | ZenohError::NoLocator => {
                ConnectError::Failed(Error::Address { uri: self.uri.clone(), reason: chain(&error) })
            }
            ZenohError::Open { ref source, .. } => {
                self.was_refused.store(false, Ordering::Relaxed);
                ConnectError::Absent(source.to_string())
            }
            ZenohError::NoWord | ZenohError::NoAnswer { .. } => ConnectError::Absent(error.to_string()),
            error => ConnectError::Failed(failed(error)),
        }
    }
}

/// Who is to be connected to.
enum Meant {
    /// One of ours, by its name.
    Robot(String),
    /// A server that was there before us, which has answered.
    Legacy(LegacyTransport),
}

/// What waiting does not mend.
pub(crate) fn failed(error: ZenohError) -> Error {
    match error {
        ZenohError::Config { file, problem } => Error::ZenohConfig { file, problem },
        ZenohError::Thread(error) => Error::Thread(Arc::new(error)),
        error => Error::Zenoh(Arc::from(Box::<dyn StdError + Send + Sync>::from(chain(&error)))),
    }
}

/// The robot that is meant, of those that are alive.
fn choose(mut alive: Vec<String>, asked: Option<&str>, uri: &str) -> Result<String, ConnectError> {
    match asked {
        Some(asked) if alive.iter().any(|name| name == asked) => Ok(asked.to_owned()),
        Some(asked) if alive.is_empty() => Err(ConnectError::Absent(format!(
            "no robot is alive there, or none that we may reach, nor is {asked:?}"
        ))),
        Some(asked) => Err(ConnectError::Absent(format!(
            "no robot named {asked:?} is alive there, or we may not reach it; there are: {}",
            alive.join(", ")
        ))),
        None if alive.len() > 1 => {
            Err(ConnectError::Failed(Error::SeveralRobots { uri: uri.to_owned(), names: alive }))
        }
        None => alive.pop().ok_or_else(|| {
            ConnectError::Absent("no robot is alive there, or none that we may reach".to_owned())
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_robot_is_taken_and_of_several_the_one_asked_for() {
        let choose = |alive: &[&str], asked| match choose(
            alive.iter().map(|name| name.to_string()).collect(),
            asked,
            "tcp/a:1",
        ) {
            Ok(name) => name,
            Err(ConnectError::Absent(reason)) => format!("absent: {reason}"),
            Err(ConnectError::Failed(error)) => format!("failed: {error}"),
        };
        assert_eq!(choose(&["arm"], None), "arm");
        assert_eq!(choose(&["arm", "leg"], Some("leg")), "leg");
        assert_eq!(choose(&[], None), "absent: no robot is alive there, or none that we may reach");
        assert_eq!(
            choose(&["arm"], Some("leg")),
            "absent: no robot named \"leg\" is alive there, or we may not reach it; there are: arm"
        );
        assert_eq!(
            choose(&["arm", "leg"], None),
            "failed: expected one robot at tcp/a:1, found several: arm, leg; ask for one by its name"
        );
    }

    #[test]
    fn an_address_has_what_its_protocol_needs() {
        let good = [
            "tcp/localhost:7447",
            "tcp/[::1]:7447",
            "tcp/10.0.0.1:1#so_sndbuf=65536",
            "tls/robot.lab:7447",
            "quic/robot.lab:7447",
            "unixsock-stream//run/robot.sock",
            "zenoh:panda",
            "zenoh:",
        ];
        let parse = |uri: &str, robot: Option<&str>| {
            Server::parse(
                uri,
                &ConnectOptions { robot: robot.map(str::to_owned), ..ConnectOptions::default() },
            )
        };
        for good in good {
            assert!(Server::is_meant(good) && parse(good, None).is_ok(), "{good}");
        }
        let bad = [
            "tcp/",
            "tcp/localhost",
            "tcp/:7447",
            "tcp/localhost:port",
            "tcp/localhost:70000",
            "tls/localhost",
            "quic/:1",
            "unixsock-stream/",
            "zenoh:a/b",
        ];
        for bad in bad {
            assert!(matches!(parse(bad, None), Err(Error::Address { .. })), "{bad}");
        }
        for (uri, robot) in [("tcp/localhost:1", "a/b"), ("zenoh:arm", "leg")] {
            assert!(matches!(parse(uri, Some(robot)), Err(Error::Address { .. })), "{uri} {robot}");
        }
        for (uri, robot) in [("zenoh:arm", None), ("zenoh:", Some("arm")), ("zenoh:arm", Some("arm"))] {
            assert_eq!(parse(uri, robot).ok().and_then(|server| server.asked).as_deref(), Some("arm"));
        }
    }
}
