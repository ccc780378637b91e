//! Zenoh addresses, and which robot of a network is meant. How peers meet, and what carries frames, is `chiral-link`'s.

use std::{
    error::Error as StdError,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use chiral_link::zenoh::{LaneKind, Network, NetworkError, NetworkOptions, Search, ZenohOptions, ZenohTransport};
use chiral_proto::{Codec, error::chain, keys, pool::Pool};

use crate::{
    builder::{Attempt, Means},
    error::Error,
    lane::Carries,
    lock,
};

/// Joining a network costs more than a connection that is refused.
pub(crate) const RETRY_PERIOD: Duration = Duration::from_millis(500);
/// For the answers of a network that is searched for a robot.
const SEARCH_LIMIT: Duration = Duration::from_secs(1);
/// What the address of a robot without an address begins with.
const BY_NAME: &str = "zenoh:";

/// How to reach a robot on a Zenoh network. A clone is the same robot.
#[derive(Clone)]
pub(crate) struct Server {
    uri: String,
    asked: Option<String>,
    /// Without a locator of ours, the network is the configuration file's, or else whatever answers a search.
    options: NetworkOptions,
    /// The network and the robot's name, once it was found; for its second connection.
    found: Arc<Mutex<Option<(Network, String)>>>,
    /// Whether the last attempt found somebody who did not let us in.
    was_refused: Arc<AtomicBool>,
}

impl Server {
    /// Whether Zenoh knows such addresses, and this client as well.
    pub(crate) fn is_meant(uri: &str) -> bool {
        ["tcp/", "tls/", "quic/", "unixsock-stream/", BY_NAME].iter().any(|beginning| uri.starts_with(beginning))
    }

    pub(crate) fn parse(uri: &str, means: &Means) -> Result<Server, Error> {
        let refuse = |reason: String| Error::Address { uri: uri.to_owned(), reason };
        let (locator, named) = match uri.strip_prefix(BY_NAME) {
            Some(name) => (None, Some(name).filter(|name| !name.is_empty())),
            None => (Some(uri.to_owned()), None),
        };
        let (protocol, rest) = locator.as_deref().and_then(|locator| locator.split_once('/')).unwrap_or_default();
        // What comes after it is for Zenoh.
        let address = rest.split(['?', '#']).next().unwrap_or_default();
        let port = address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).and_then(|(_, port)| port.parse::<u16>().ok());
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
        let options = NetworkOptions {
            connect: locator.iter().cloned().collect(),
            config: means.zenoh_config.clone(),
            shared_memory: means.shared_memory,
            ..NetworkOptions::default()
        };
        let asked = asked.map(str::to_owned);
        Ok(Server { uri: uri.to_owned(), asked, options, found: Arc::default(), was_refused: Arc::default() })
    }

    /// One attempt to connect: on the network that is known already, or on a new session of it.
    pub(crate) async fn connect(&self, carries: Carries, max_frame: usize, pool: Pool) -> Result<ZenohTransport, Attempt> {
        let kind = if carries == Carries::Observations { LaneKind::Observations } else { LaneKind::Control };
        let options = ZenohOptions { max_frame, pool, codec: Codec::Protobuf, shared_memory: None };
        let known = lock(&self.found).clone();
        let (network, robot) = match known {
            Some(known) => known,
            None => self.find().await?,
        };
        let connected = network.connect(&robot, kind, options).await.map_err(|error| self.judge(error))?;
        *lock(&self.found) = Some((network, robot));
        Ok(connected)
    }

    async fn find(&self) -> Result<(Network, String), Attempt> {
        let network = match Network::open(&self.options).await {
            Err(NetworkError::NoLocator) => {
                let (locator, robot) = self.search().await?;
                let options = NetworkOptions { connect: vec![locator], ..self.options.clone() };
                return Ok((Network::open(&options).await.map_err(|error| self.judge(error))?, robot));
            }
            opened => opened.map_err(|error| self.judge(error))?,
        };
        self.was_refused.store(false, Ordering::Relaxed);
        let robots = network.robots().await.map_err(|error| self.judge(error))?;
        let mut names: Vec<String> = robots.into_iter().map(|(robot, _)| robot).collect();
        names.dedup();
        Ok((network, choose(names, self.asked.as_deref(), &self.uri)?))
    }

    /// Where the robot was found without an address, and its name.
    async fn search(&self) -> Result<(String, String), Attempt> {
        let mut search = Search::begin(&self.options, SEARCH_LIMIT).await.map_err(|error| self.judge(error))?;
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
            return Err(Attempt::Absent("no robot answers a search by multicast".to_owned()));
        }
        let robot = choose(names, self.asked.as_deref(), &self.uri)?;
        sightings.sort_by_key(|sighting| !sighting.is_own);
        let at = sightings.into_iter().find(|sighting| sighting.robot == robot);
        let at = at.expect("the names are those of the sightings");
        Ok((at.locator, robot))
    }

    /// Whether another attempt may mend it.
    fn judge(&self, error: NetworkError) -> Attempt {
        match error {
            // A server that is just ending or beginning looks like one that refuses: only twice in turn is it believed.
            NetworkError::NotLetIn { .. } if !self.was_refused.swap(true, Ordering::Relaxed) => {
                Attempt::Absent(error.to_string())
            }
            NetworkError::Locator { .. } | NetworkError::NoLocator => {
                Attempt::Failed(Error::Address { uri: self.uri.clone(), reason: chain(&error) })
            }
            NetworkError::Open { ref source, .. } => {
                self.was_refused.store(false, Ordering::Relaxed);
                Attempt::Absent(source.to_string())
            }
            NetworkError::NoAnswer { .. } => Attempt::Absent(error.to_string()),
            error => Attempt::Failed(failed(error)),
        }
    }
}

/// What waiting does not mend.
pub(crate) fn failed(error: NetworkError) -> Error {
    match error {
        NetworkError::Config { file, problem } => Error::ZenohConfig { file, problem },
        NetworkError::Thread(error) => Error::Thread(Arc::new(error)),
        error => Error::Zenoh(Arc::from(Box::<dyn StdError + Send + Sync>::from(chain(&error)))),
    }
}

/// The robot that is meant, of those that are alive.
fn choose(mut alive: Vec<String>, asked: Option<&str>, uri: &str) -> Result<String, Attempt> {
    match asked {
        Some(asked) if alive.iter().any(|name| name == asked) => Ok(asked.to_owned()),
        Some(asked) if alive.is_empty() => {
            Err(Attempt::Absent(format!("no robot is alive there, or none that we may reach, nor is {asked:?}")))
        }
        Some(asked) => Err(Attempt::Absent(format!(
            "no robot named {asked:?} is alive there, or we may not reach it; there are: {}",
            alive.join(", ")
        ))),
        None if alive.len() > 1 => Err(Attempt::Failed(Error::SeveralRobots { uri: uri.to_owned(), names: alive })),
        None => alive.pop().ok_or_else(|| Attempt::Absent("no robot is alive there, or none that we may reach".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_robot_is_taken_and_of_several_the_one_asked_for() {
        let choose = |alive: &[&str], asked| match choose(alive.iter().map(|name| name.to_string()).collect(), asked, "tcp/a:1") {
            Ok(name) => name,
            Err(Attempt::Absent(reason)) => format!("absent: {reason}"),
            Err(Attempt::Failed(error)) => format!("failed: {error}"),
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
        let parse =
            |uri: &str, robot: Option<&str>| Server::parse(uri, &Means { robot: robot.map(str::to_owned), ..Means::default() });
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
