//! Zenoh addresses, and which robot of a network to connect to. Sessions, discovery and transports are
//! `chiral_transport::zenoh`.

use std::{
    error::Error as StdError,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use chiral_proto::{Codec, error::chain, keys, lock};
use chiral_transport::IdleTimeout;
use chiral_transport::zenoh::{
    LaneKind, Neighbour, NeighbourKind, Scout, ZenohError, ZenohOptions, ZenohSession, ZenohSessionOptions,
    ZenohTransport,
};

use crate::{
    connect::options::{ConnectError, ConnectOptions, LinkOptions},
    connection::Lane,
    error::Error,
};

/// The pause between two attempts: joining a network costs more than a connection that is refused.
pub(crate) const RETRY_PERIOD: Duration = Duration::from_millis(500);
/// For the replies to a search for robots.
const SCOUT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a robot may take to appear on a network before legacy servers are probed.
const ROBOT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a session is kept on which no robot was found. The next one may be on another network.
const SESSION_TIMEOUT: Duration = Duration::from_secs(5);
/// How an address begins that names a robot in place of a locator.
const NAME_PREFIX: &str = "zenoh:";

/// Where a robot is on a Zenoh network. A clone is the same endpoint.
#[derive(Clone)]
pub(crate) struct Endpoint {
    uri: String,
    /// The name of the robot to connect to; without one, the network's only robot.
    robot: Option<String>,
    /// Without a locator of ours, the network is the configuration file's, or else the one that a search
    /// finds.
    options: ZenohSessionOptions,
    codec: Option<Codec>,
    /// Of both lanes, which share the session's link.
    idle_timeout: IdleTimeout,
    /// The session and the robot's name once it was found; for its second connection.
    found: Arc<Mutex<Option<(ZenohSession, String)>>>,
    /// Whether the last attempt was refused by a peer.
    was_refused: Arc<AtomicBool>,
    /// The session on which no robot was found yet.
    joined: Arc<Mutex<Option<Joined>>>,
}

/// A session on which no robot was found so far.
#[derive(Clone)]
pub(crate) struct Joined {
    pub(crate) session: ZenohSession,
    pub(crate) since: Instant,
    /// Whether robots had time to appear, and none was named.
    had_time: bool,
}

impl Endpoint {
    /// Whether this is a Zenoh address that this client supports.
    pub(crate) fn accepts(uri: &str) -> bool {
        ["tcp/", "tls/", "quic/", "unixsock-stream/", NAME_PREFIX]
            .iter()
            .any(|prefix| uri.starts_with(prefix))
    }

    pub(crate) fn parse(options: &ConnectOptions) -> Result<Endpoint, Error> {
        let uri = options.uri.as_str();
        let refuse = |reason: String| Error::Address { uri: uri.to_owned(), reason };
        let (locator, named) = match uri.strip_prefix(NAME_PREFIX) {
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
        if let (Some(named), Some(robot)) = (named, options.robot.as_deref())
            && named != robot
        {
            return Err(refuse(format!("the builder names another robot, {robot:?}")));
        }
        let robot = named.or(options.robot.as_deref());
        if let Some(robot) = robot {
            keys::check_robot(robot).map_err(|error| refuse(error.to_string()))?;
        }
        if options.codec == Some(Codec::Msgpack)
            && (robot.is_some() || (locator.is_none() && options.zenoh_config.is_none()))
        {
            return Err(refuse(
                "legacy servers (msgpack) have no names, only addresses such as tcp/localhost:7447"
                    .to_owned(),
            ));
        }
        Ok(Endpoint {
            uri: uri.to_owned(),
            robot: robot.map(str::to_owned),
            options: ZenohSessionOptions {
                connect: locator.iter().cloned().collect(),
                config: options.zenoh_config.clone(),
                shared_memory: options.shared_memory,
                legacy: options.codec == Some(Codec::Msgpack),
                ..ZenohSessionOptions::default()
            },
            codec: options.codec,
            idle_timeout: IdleTimeout::new(options.idle_timeout),
            found: Arc::default(),
            was_refused: Arc::default(),
            joined: Arc::default(),
        })
    }

    /// One attempt to connect: on the session on which the robot was found before, or on a new one.
    pub(crate) async fn connect(&self, options: LinkOptions) -> Result<ZenohTransport, ConnectError> {
        let kind = match options.lane {
            Lane::Observations => LaneKind::Observations,
            Lane::Control | Lane::Both => LaneKind::Control,
        };
        let found = lock(&self.found).clone();
        let (session, robot) = match found {
            Some(found) => found,
            None => self.find().await?,
        };
        let options = ZenohOptions {
            max_frame: options.max_frame,
            pool: options.shared.pool,
            codec: Codec::Protobuf,
            shared_memory: None,
            idle_timeout: self.idle_timeout.clone(),
        };
        let connected = session.connect(&robot, kind, options).await.map_err(|error| self.judge(error))?;
        *lock(&self.found) = Some((session, robot));
        Ok(connected)
    }

    /// The session on which the last attempt found no robot, if a legacy server may be meant and robots had
    /// time to appear.
    pub(crate) fn joined_without_robot(&self) -> Option<Joined> {
        lock(&self.joined).clone().filter(|joined| joined.had_time)
    }

    /// A session for the legacy wire, where `session` has found no robot.
    pub(crate) async fn legacy_session(&self, session: ZenohSession) -> Result<ZenohSession, ConnectError> {
        if self.options.legacy {
            return Ok(session);
        }
        let options = ZenohSessionOptions { legacy: true, ..self.options.clone() };
        ZenohSession::open(&options).await.map_err(|error| self.judge(error))
    }

    /// The robot to connect to, and a session on which it is alive.
    async fn find(&self) -> Result<(ZenohSession, String), ConnectError> {
        let joined = lock(&self.joined).take().filter(|joined| joined.since.elapsed() < SESSION_TIMEOUT);
        let (session, since) = match joined {
            Some(Joined { session, since, .. }) => (session, since),
            None => match ZenohSession::open(&self.options).await {
                Err(ZenohError::NoLocator) => {
                    let (locator, robot) = self.scout().await?;
                    let options = ZenohSessionOptions { connect: vec![locator], ..self.options.clone() };
                    let session = ZenohSession::open(&options).await.map_err(|error| self.judge(error))?;
                    return Ok((session, robot));
                }
                opened => (opened.map_err(|error| self.judge(error))?, Instant::now()),
            },
        };
        self.was_refused.store(false, Ordering::Relaxed);
        let keep = |had_time| {
            *lock(&self.joined) = Some(Joined { session: session.clone(), since, had_time });
        };
        if self.codec == Some(Codec::Msgpack) {
            keep(true);
            return Err(ConnectError::Unavailable("no legacy server replies".to_owned()));
        }
        // Measured before the query for robots, which may itself take that long.
        let had_time = since.elapsed() >= ROBOT_TIMEOUT;
        let robots = session.robots().await.map_err(|error| self.judge(error))?;
        // Who is named is meant, wherever it is.
        let robots = match self.robot {
            Some(_) => robots,
            None => {
                let neighbours = session.neighbours().await.map_err(|error| self.judge(error))?;
                led_to(robots, &neighbours)
            }
        };
        let mut names: Vec<String> = robots.into_iter().map(|(robot, _)| robot).collect();
        names.dedup();
        match choose(names, self.robot.as_deref(), &self.uri) {
            Ok(robot) => Ok((session, robot)),
            Err(error) => {
                // A named robot is waited for; without a name, a legacy server may be meant.
                if matches!(error, ConnectError::Unavailable(_))
                    && self.robot.is_none()
                    && self.codec.is_none()
                {
                    keep(had_time);
                }
                Err(error)
            }
        }
    }

    /// Searches for the robot by multicast. Returns a locator by which it is reached, and its name.
    async fn scout(&self) -> Result<(String, String), ConnectError> {
        let mut scout =
            Scout::start(&self.options, SCOUT_TIMEOUT).await.map_err(|error| self.judge(error))?;
        let mut scouted = Vec::new();
        while let Some(robot) = scout.next().await {
            let is_wanted = self.robot.as_ref() == Some(&robot.robot);
            scouted.push(robot);
            if is_wanted {
                break;
            }
        }
        let mut names: Vec<String> = scouted.iter().map(|robot| robot.robot.clone()).collect();
        names.sort();
        names.dedup();
        if names.is_empty() {
            return Err(ConnectError::Unavailable("no robot replied to a search by multicast".to_owned()));
        }
        let name = choose(names, self.robot.as_deref(), &self.uri)?;
        // Prefer its own server to a router.
        scouted.sort_by_key(|robot| !robot.is_direct);
        let robot = scouted.into_iter().find(|robot| robot.robot == name);
        let robot = robot.expect("the names are those of the robots");
        Ok((robot.locator, name))
    }

    /// Whether another attempt may succeed.
    fn judge(&self, error: ZenohError) -> ConnectError {
        match error {
            // A server that is just stopping or starting looks like one that refuses. Two refusals in a row
            // count.
            ZenohError::HandshakeFailed { .. } if !self.was_refused.swap(true, Ordering::Relaxed) => {
                ConnectError::Unavailable(error.to_string())
            }
            ZenohError::Locator { .. } | ZenohError::NoLocator => {
                ConnectError::Failed(Error::Address { uri: self.uri.clone(), reason: chain(&error) })
            }
            ZenohError::Open { ref source, .. } => {
                self.was_refused.store(false, Ordering::Relaxed);
                ConnectError::Unavailable(source.to_string())
            }
            ZenohError::LivelinessTimeout { .. } | ZenohError::NoAnswer { .. } => {
                ConnectError::Unavailable(error.to_string())
            }
            error => ConnectError::Failed(failed(error)),
        }
    }
}

/// A failure that another attempt would not cure.
pub(crate) fn failed(error: ZenohError) -> Error {
    match error {
        ZenohError::Config { file, problem } => Error::ZenohConfig { file, problem },
        ZenohError::Thread(error) => Error::Thread(Arc::new(error)),
        error => Error::Zenoh(Arc::from(Box::<dyn StdError + Send + Sync>::from(chain(&error)))),
    }
}

/// Returns the robots to which the address leads: it must be a router's or a robot's. Any other process there,
/// such as a legacy server, may have found robots by itself, and they are not meant. Robots are given with
/// their servers, `<Zenoh id>@<host>`.
fn led_to(robots: Vec<(String, String)>, neighbours: &[Neighbour]) -> Vec<(String, String)> {
    let is_robot =
        |id: &str| robots.iter().any(|(_, server)| server.split('@').next().is_some_and(|of| of == id));
    let leads = |neighbour: &Neighbour| neighbour.kind == NeighbourKind::Router || is_robot(&neighbour.id);
    if neighbours.iter().any(leads) { robots } else { Vec::new() }
}

/// Chooses among the robots that are alive.
fn choose(mut alive: Vec<String>, wanted: Option<&str>, uri: &str) -> Result<String, ConnectError> {
    match wanted {
        Some(wanted) if alive.iter().any(|name| name == wanted) => Ok(wanted.to_owned()),
        Some(wanted) if alive.is_empty() => Err(ConnectError::Unavailable(format!(
            "no robot is alive there, or access is denied; expected {wanted:?}"
        ))),
        Some(wanted) => Err(ConnectError::Unavailable(format!(
            "no robot named {wanted:?} is alive there, or access to it is denied; alive are: {}",
            alive.join(", ")
        ))),
        None if alive.len() > 1 => {
            Err(ConnectError::Failed(Error::SeveralRobots { uri: uri.to_owned(), names: alive }))
        }
        None => alive.pop().ok_or_else(|| {
            ConnectError::Unavailable("no robot is alive there, or access is denied".to_owned())
        }),
    }
}

#[cfg(test)]
mod tests {
    use chiral_proto::pool::Pool;

    use super::*;
    use crate::connect::options::Shared;

    #[test]
    fn the_only_robot_is_chosen_and_of_several_the_one_that_was_named() {
        let choose = |alive: &[&str], wanted| match choose(
            alive.iter().map(|name| name.to_string()).collect(),
            wanted,
            "tcp/a:1",
        ) {
            Ok(name) => name,
            Err(ConnectError::Unavailable(reason)) => format!("absent: {reason}"),
            Err(ConnectError::Failed(error)) => format!("failed: {error}"),
        };
        assert_eq!(choose(&["arm"], None), "arm");
        assert_eq!(choose(&["arm", "leg"], Some("leg")), "leg");
        assert_eq!(choose(&[], None), "absent: no robot is alive there, or access is denied");
        assert_eq!(
            choose(&["arm"], Some("leg")),
            "absent: no robot named \"leg\" is alive there, or access to it is denied; alive are: arm"
        );
        assert_eq!(
            choose(&["arm", "leg"], None),
            "failed: expected one robot at tcp/a:1, found several: arm, leg; ask for one by its name"
        );
    }

    #[tokio::test]
    async fn both_lanes_share_one_idle_timeout() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let uri = format!("tcp/{free}");
        let listening =
            ZenohSessionOptions { listen: vec![uri.clone()], shared_memory: false, ..Default::default() };
        let network = ZenohSession::open(&listening).await.unwrap();
        let mut listener = network.announce("arm").await.unwrap();
        let accepting = async {
            let options = ZenohOptions {
                max_frame: 1000,
                pool: Pool::new(0),
                codec: Codec::Protobuf,
                shared_memory: None,
                idle_timeout: IdleTimeout::never(),
            };
            let mut lanes = Vec::new();
            while let Some(lane) = listener.accept(&options, Vec::new).await {
                lanes.push(lane);
            }
        };
        let connecting = async {
            let endpoint = Endpoint::parse(&ConnectOptions::new(&uri)).unwrap();
            let mut lanes = Vec::new();
            for lane in [Lane::Control, Lane::Observations] {
                let options = LinkOptions { lane, max_frame: 1000, shared: Shared::new() };
                lanes.push(endpoint.connect(options).await.ok().expect("a robot is there"));
            }
            lanes[0].idle_timeout().set_limit(Duration::from_secs(1234));
            assert_eq!(lanes[1].idle_timeout().limit(), Duration::from_secs(1234));
        };
        tokio::select! {
            () = accepting => panic!("the network was closed"),
            () = connecting => {}
        }
    }

    #[test]
    fn an_address_leads_to_robots_only_if_a_router_or_a_robot_is_there() {
        let robots =
            vec![("arm".to_owned(), "a1@bench".to_owned()), ("leg".to_owned(), "b2@floor".to_owned())];
        let led_to = |neighbours: &[(&str, NeighbourKind)]| {
            let neighbours: Vec<_> = neighbours.iter().map(|(id, kind)| Neighbour::new(*id, *kind)).collect();
            led_to(robots.clone(), &neighbours).len()
        };
        assert_eq!(led_to(&[("a1", NeighbourKind::Peer)]), 2, "a robot, which leg has joined");
        assert_eq!(led_to(&[("c3", NeighbourKind::Router)]), 2);
        assert_eq!(led_to(&[("a", NeighbourKind::Peer)]), 0, "a legacy server that has found robots");
        assert_eq!(led_to(&[]), 0, "it has left");
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
            Endpoint::parse(&ConnectOptions { robot: robot.map(str::to_owned), ..ConnectOptions::new(uri) })
        };
        for good in good {
            assert!(Endpoint::accepts(good) && parse(good, None).is_ok(), "{good}");
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
            assert_eq!(parse(uri, robot).ok().and_then(|endpoint| endpoint.robot).as_deref(), Some("arm"));
        }
    }
}
