//! Zenoh addresses, and which robot of a network is meant. How peers meet, and what carries frames, is `chiral-link`'s.

use std::{
    error::Error as StdError,
    sync::{Arc, Mutex},
    time::Duration,
};

use chiral_link::zenoh::{LaneKind, Network, NetworkError, NetworkOptions, ZenohOptions, ZenohTransport};
use chiral_proto::{Codec, error::chain, keys, pool::Pool};

use crate::{builder::Attempt, error::Error, lane::Carries, lock};

/// Joining a network costs more than a connection that is refused.
pub(crate) const RETRY_PERIOD: Duration = Duration::from_millis(500);

/// How to reach a robot on the Zenoh network that lets others in at an address. A clone is the same robot.
#[derive(Clone)]
pub(crate) struct Server {
    locator: String,
    asked: Option<String>,
    shared_memory: bool,
    /// The network and the robot's name, once it was found; for its second connection.
    found: Arc<Mutex<Option<(Network, String)>>>,
}

impl Server {
    pub(crate) fn parse(locator: &str, robot: Option<&str>, shared_memory: bool) -> Result<Server, Error> {
        let refuse = |reason: String| Error::Address { uri: locator.to_owned(), reason };
        // What comes after it is for Zenoh.
        let address = locator.strip_prefix("tcp/").and_then(|rest| rest.split(['?', '#']).next()).unwrap_or_default();
        let port = address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).and_then(|(_, port)| port.parse::<u16>().ok());
        if port.is_none() {
            return Err(refuse("it names no host and port, such as tcp/localhost:7447".to_owned()));
        }
        if let Some(robot) = robot {
            keys::check_robot(robot).map_err(|error| refuse(error.to_string()))?;
        }
        Ok(Server { locator: locator.to_owned(), asked: robot.map(str::to_owned), shared_memory, found: Arc::default() })
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
        let options = NetworkOptions {
            connect: vec![self.locator.clone()],
            shared_memory: self.shared_memory,
            ..NetworkOptions::default()
        };
        let network = Network::open(&options).await.map_err(|error| self.judge(error))?;
        let robots = network.robots().await.map_err(|error| self.judge(error))?;
        let mut names: Vec<String> = robots.into_iter().map(|(robot, _)| robot).collect();
        names.dedup();
        Ok((network, choose(names, self.asked.as_deref(), &self.locator)?))
    }

    /// Whether another attempt may mend it.
    fn judge(&self, error: NetworkError) -> Attempt {
        match error {
            NetworkError::Locator { .. } => Attempt::Failed(Error::Address { uri: self.locator.clone(), reason: chain(&error) }),
            NetworkError::Open { ref source, .. } => Attempt::Absent(source.to_string()),
            NetworkError::NoAnswer { .. } => Attempt::Absent(error.to_string()),
            NetworkError::Thread(error) => Attempt::Failed(Error::Thread(Arc::new(error))),
            error => Attempt::Failed(Error::Zenoh(Arc::from(Box::<dyn StdError + Send + Sync>::from(chain(&error))))),
        }
    }
}

/// The robot that is meant, of those that are alive.
fn choose(mut alive: Vec<String>, asked: Option<&str>, locator: &str) -> Result<String, Attempt> {
    match asked {
        Some(asked) if alive.iter().any(|name| name == asked) => Ok(asked.to_owned()),
        Some(asked) if alive.is_empty() => Err(Attempt::Absent(format!("no robot is alive there, nor is {asked:?}"))),
        Some(asked) => Err(Attempt::Absent(format!("no robot named {asked:?} is alive there; there are: {}", alive.join(", ")))),
        None if alive.len() > 1 => Err(Attempt::Failed(Error::SeveralRobots { uri: locator.to_owned(), names: alive })),
        None => alive.pop().ok_or_else(|| Attempt::Absent("no robot is alive there".to_owned())),
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
        assert_eq!(choose(&[], None), "absent: no robot is alive there");
        assert_eq!(choose(&["arm"], Some("leg")), "absent: no robot named \"leg\" is alive there; there are: arm");
        assert_eq!(
            choose(&["arm", "leg"], None),
            "failed: expected one robot at tcp/a:1, found several: arm, leg; ask for one by its name"
        );
    }

    #[test]
    fn an_address_has_a_host_and_a_port() {
        for good in ["tcp/localhost:7447", "tcp/[::1]:7447", "tcp/10.0.0.1:1#so_sndbuf=65536"] {
            assert!(Server::parse(good, None, true).is_ok(), "{good}");
        }
        for bad in ["tcp/", "tcp/localhost", "tcp/:7447", "tcp/localhost:port", "tcp/localhost:70000"] {
            assert!(matches!(Server::parse(bad, None, true), Err(Error::Address { .. })), "{bad}");
        }
        assert!(matches!(Server::parse("tcp/localhost:1", Some("a/b"), true), Err(Error::Address { .. })));
    }
}
